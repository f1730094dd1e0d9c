"""PELA on MiniLM: which area of the standard library does a docstring document?

The kernels become factors of half their size, which learn from the original model as well.

Command: python train.py --config=configs/minilm_stdlib_docs_pela.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_pela", mode)
    config.optimizer.weight_decay = 0.0  # the factors are the kernels
    config.optimizer.learning_rate = 3e-4
    config.distill.features = 1.0
    config.method = ConfigDict({"method": "pela", "compression": 2.0})
    return config
