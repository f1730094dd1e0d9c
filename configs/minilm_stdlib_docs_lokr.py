"""LoKr on MiniLM: which area of the standard library does a docstring document?

Command: python train.py --config=configs/minilm_stdlib_docs_lokr.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_lokr", mode)
    config.method = ConfigDict(
        {
            "method": "lokr",
            "rank": 8,
            "alpha": 16.0,
            "decompose_factor": 8,
            "decompose_both": False,
            "targets": "all-linear",
        }
    )
    config.optimizer.learning_rate = 2e-3
    return config
