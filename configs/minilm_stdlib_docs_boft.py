"""BOFT on MiniLM: which area of the standard library does a docstring document?

Two butterfly factors with blocks of 8 rotate the inputs of every kernel of the encoder.

Command: python train.py --config=configs/minilm_stdlib_docs_boft.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_boft", mode)
    config.method = ConfigDict(
        {"method": "boft", "block_size": 8, "factors": 2, "targets": "all-linear"}
    )
    config.optimizer.weight_decay = 0.0  # would pull the scales of the outputs to zero
    config.optimizer.learning_rate = 1e-3
    return config
