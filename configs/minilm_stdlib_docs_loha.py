"""LoHa on MiniLM: which area of the standard library does a docstring document?

Command: python train.py --config=configs/minilm_stdlib_docs_loha.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_loha", mode)
    config.method = ConfigDict(
        {"method": "loha", "rank": 8, "alpha": 32.0, "targets": "all-linear"}
    )
    config.optimizer.learning_rate = 4e-3  # the product of four small factors
    return config
