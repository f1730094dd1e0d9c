"""DiffoRA-style selection on MiniLM: which area of the standard library does a docstring document?

Gates choose three of the six kernels of each layer in the first half of the training.

Command: python train.py --config=configs/minilm_stdlib_docs_diffora.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_diffora", mode)
    config.method = ConfigDict(
        {
            "method": "diffora",
            "rank": 8,
            "alpha": 16.0,
            "keep": 3,
            "schedule": (2, 1, 2) if mode == "tiny" else (30, 120, 3),
            "gate_rate": 0.05,
        }
    )
    config.optimizer.learning_rate = 0.003
    return config
