"""SORSA on MiniLM: which area of the standard library does a docstring document?

Command: python train.py --config=configs/minilm_stdlib_docs_sorsa.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_sorsa", mode)
    config.optimizer.learning_rate = 3e-4
    config.optimizer.weight_decay = 0.0  # would shrink the part of the base that is trained
    config.method = ConfigDict(
        {
            "method": "sorsa",
            "rank": 8,
            "gamma": 4e-4,
            "peak_learning_rate": config.optimizer.get_oneway_ref("learning_rate"),
        }
    )
    return config
