"""HiRA on MiniLM: which area of the standard library does a docstring document?

Every kernel of the encoder, multiplied entry by entry with one plus a matrix of rank 16.

Command: python train.py --config=configs/minilm_stdlib_docs_hira.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_hira", mode)
    config.method = ConfigDict({"method": "hira", "rank": 16, "targets": "all-linear"})
    config.optimizer.learning_rate = 4e-3  # the entries of W that it scales are small
    return config
