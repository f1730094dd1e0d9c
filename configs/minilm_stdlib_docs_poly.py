"""Poly on MiniLM: which area of the standard library does a docstring document?

With one task the router learns which of its four LoRAs to use in which kernel; their gates are
sampled in training. Batches of several tasks need their task_ids in bind, which train.py has not.

Command: python train.py --config=configs/minilm_stdlib_docs_poly.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_poly", mode)
    config.method = ConfigDict(
        {
            "method": "poly",
            "rank": 8,
            "alpha": 8.0,
            "skills": 4,
            "splits": 4,
            "targets": "all-linear",
        }
    )
    return config
