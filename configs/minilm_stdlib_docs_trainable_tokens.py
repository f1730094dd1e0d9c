"""Trainable tokens on MiniLM: which area of the standard library does a docstring document?

The rows of a few marks alone: [CLS], [SEP], the point, the comma and the parentheses.

Command: python train.py --config=configs/minilm_stdlib_docs_trainable_tokens.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_trainable_tokens", mode)
    config.optimizer.learning_rate = 0.01
    tokens = (2, 3, 4, 5) if mode == "tiny" else (101, 102, 1006, 1007, 1010, 1012)
    config.method = ConfigDict({"method": "trainable_tokens", "tokens": tokens})
    return config
