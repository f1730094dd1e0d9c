"""NOLA on MiniLM: which area of the standard library does a docstring document?

256 coefficients for each kernel; the matrices that they combine are drawn anew in every step.

Command: python train.py --config=configs/minilm_stdlib_docs_nola.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_nola", mode)
    config.method = ConfigDict(
        {"method": "nola", "rank": 4, "alpha": 4.0, "bases": 128, "targets": "all-linear"}
    )
    config.optimizer.learning_rate = 1e-2
    config.optimizer.weight_decay = 0.0
    return config
