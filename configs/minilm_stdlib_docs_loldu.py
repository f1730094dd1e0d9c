"""LoLDU on MiniLM: which area of the standard library does a docstring document?

Command: python train.py --config=configs/minilm_stdlib_docs_loldu.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_loldu", mode)
    config.optimizer.learning_rate = 3e-4
    config.optimizer.weight_decay = 0.0  # would shrink the pivots themselves
    # s = 1: with the released code's alpha = 1 a step of z would reach W divided by 384.
    config.method = ConfigDict({"method": "loldu", "rank": 384, "alpha": 384.0})
    return config
