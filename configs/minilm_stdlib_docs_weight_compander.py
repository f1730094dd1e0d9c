"""Weight Compander on MiniLM: which area of the standard library does a docstring document?

Two numbers for each kernel; the classification head learns beside them.

Command: python train.py --config=configs/minilm_stdlib_docs_weight_compander.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_weight_compander", mode)
    config.method = ConfigDict(
        {"method": "weight_compander", "kappa": 1.5, "targets": "all-linear"}
    )
    config.optimizer.learning_rate = 5e-3
    return config
