"""PiSSA on MiniLM: which area of the standard library does a docstring document?

Command: python train.py --config=configs/minilm_stdlib_docs_pissa.py
Time: see the README's table; minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_pissa", mode)
    config.method = ConfigDict(
        {"method": "pissa", "rank": 8, "alpha": 8.0, "targets": "all-linear"}
    )
    config.optimizer.weight_decay = 0.0  # would shrink the part of the base that A B took over
    config.optimizer.learning_rate = 3e-4
    return config
