"""WeLore on MiniLM: which area of the standard library does a docstring document?

The kernels that compress well become factors, which alone are trained.

Command: python train.py --config=configs/minilm_stdlib_docs_welore.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_welore", mode)
    config.optimizer.weight_decay = 0.0  # the factors are the kernels
    config.optimizer.learning_rate = 1e-4
    config.method = ConfigDict({"method": "welore", "reduction": 0.5})
    return config
