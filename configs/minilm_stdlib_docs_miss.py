"""MiSS on MiniLM: which area of the standard library does a docstring document?

Command: python train.py --config=configs/minilm_stdlib_docs_miss.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_miss", mode)
    config.method = ConfigDict(
        {"method": "miss", "rank": 32, "form": "miss", "targets": "all-linear", "dropout": 0.0}
    )
    config.optimizer.learning_rate = 3e-4  # a row of D meets a dozen inputs
    return config
