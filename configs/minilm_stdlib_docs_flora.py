"""FLoRA on MiniLM: which area of the standard library does a docstring document?

Its kernels are matrices, each with a core of 16 by 16 between two factors.

Command: python train.py --config=configs/minilm_stdlib_docs_flora.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_flora", mode)
    config.method = ConfigDict(
        {
            "method": "flora",
            "ranks": (16, 16),
            "scale": 4.0,
            "dropout": 0.01,
            "targets": "all-linear",
        }
    )
    config.optimizer.learning_rate = 2e-4  # a step of the core moves a kernel ten times LoRA's way
    return config
