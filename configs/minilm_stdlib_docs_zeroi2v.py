"""ZeroI2V's adapters on MiniLM: which area of the standard library does a docstring document?

Four maps near the identity in each layer, which fold into the kernels beside them.

Command: python train.py --config=configs/minilm_stdlib_docs_zeroi2v.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_zeroi2v", mode)
    config.method = ConfigDict({"method": "zeroi2v", "width": 96, "scale": 0.5})
    config.optimizer.learning_rate = 5e-4
    return config
