"""OFT on MiniLM: which area of the standard library does a docstring document?

The inputs of every kernel of the encoder are rotated in blocks of 32, by Cayley's series.

Command: python train.py --config=configs/minilm_stdlib_docs_oft.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_oft", mode)
    config.method = ConfigDict({"method": "oft", "block_size": 32, "targets": "all-linear"})
    config.optimizer.weight_decay = 0.0  # would pull the rotations to the identity
    config.optimizer.learning_rate = 1e-3
    return config
