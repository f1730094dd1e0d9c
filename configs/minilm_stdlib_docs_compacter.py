"""Compacter on MiniLM: which area of the standard library does a docstring document?

Bottlenecks of 24 behind attention and mlp, of Kronecker products whose rules they all share:
fifteen times fewer parameters than the same adapters with dense matrices.

Command: python train.py --config=configs/minilm_stdlib_docs_compacter.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_compacter", mode)
    config.method = ConfigDict({"method": "compacter", "width": 24, "placement": "houlsby"})
    config.optimizer.learning_rate = 3e-3
    return config
