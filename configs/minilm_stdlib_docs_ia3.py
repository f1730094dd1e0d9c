"""(IA)3 on MiniLM: which area of the standard library does a docstring document?

Keys, values and the input of the second feed-forward layer are scaled: 13,824 numbers beside the
head's.

Command: python train.py --config=configs/minilm_stdlib_docs_ia3.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_ia3", mode)
    config.method = ConfigDict({"method": "ia3"})
    config.optimizer.weight_decay = 0.0  # it would pull the scales to zero, not to one
    config.optimizer.learning_rate = 1e-2
    return config
