"""SVFT on MiniLM: which area of the standard library does a docstring document?

Command: python train.py --config=configs/minilm_stdlib_docs_svft.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_svft", mode)
    config.optimizer.learning_rate = 0.005
    config.optimizer.weight_decay = 0.0  # as in the paper's runs
    config.method = ConfigDict({"method": "svft", "pattern": "banded", "off_diagonals": 16})
    return config
