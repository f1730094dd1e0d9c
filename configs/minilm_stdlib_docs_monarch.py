"""Monarch on MiniLM: which area of the standard library does a docstring document?

Two block-diagonal factors take the place of each kernel: a half of its size in the attention, a
third in the mlp. That loses half of the kernels' norm and more before the first step.

Command: python train.py --config=configs/minilm_stdlib_docs_monarch.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_monarch", mode)
    config.method = ConfigDict(
        {"method": "monarch", "blocks": (4, 4), "rank": 24, "targets": "all-linear"}
    )
    config.optimizer.weight_decay = 0.0  # the factors are the kernels
    config.optimizer.learning_rate = 3e-4
    return config
