"""SNNK adapters on MiniLM: which area of the standard library does a docstring document?

Layers on 32 random features of the outputs of attention and mlp, each with a gate.

Command: python train.py --config=configs/minilm_stdlib_docs_snnk.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_snnk", mode)
    config.method = ConfigDict({"method": "snnk", "features": 32, "placement": "houlsby"})
    config.optimizer.learning_rate = 5e-3
    return config
