"""MoS on MiniLM: which area of the standard library does a docstring document?

As many parameters as a LoRA of rank 2, for factors of rank 6.

Command: python train.py --config=configs/minilm_stdlib_docs_mos.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_mos", mode)
    config.method = ConfigDict(
        {
            "method": "mos",
            "rank": 6,
            "alpha": 16.0,
            "budget": 2,
            "private": 1,
            "shards": 4,
            "targets": "all-linear",
        }
    )
    config.optimizer.learning_rate = 2e-3
    return config
