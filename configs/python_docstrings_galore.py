"""GaLore on the project's own small decoder: writing the docstring of a Python function.

Command: python train.py --config=configs/python_docstrings_galore.py
All parameters are trained; the optimizer's state of a kernel lives in a subspace of rank 48.
Time: 6 minutes on 2 CPU cores with other work beside it.
Result: perplexity of test docstrings 97.5 (the base's: 217.7).
"""

from ml_collections import ConfigDict

from configs.base import Config
from configs.python_docstrings_lora import get_config as lora


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = lora(mode)
    config.name = config.name.replace("lora", "galore")
    config.method = ConfigDict({"method": "full", "targets": r".*"})
    config.optimizer.name, config.optimizer.learning_rate = "galore", 2e-3
    rank = 4 if mode == "tiny" else 48
    config.optimizer.options = ConfigDict({"rank": rank, "update_interval": 50, "scale": 1.0})
    return config
