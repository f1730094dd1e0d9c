"""RandLoRA on MiniLM: which area of the standard library does a docstring document?

Updates of full rank, of which 12 bases of rank 32 are fixed and shared by all kernels.

Command: python train.py --config=configs/minilm_stdlib_docs_randlora.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_randlora", mode)
    config.method = ConfigDict(
        {"method": "randlora", "rank": 32, "scaling": "official", "targets": "all-linear"}
    )
    # No more: gamma starts at 1 / 384, and Adam moves it by as much as this in a step.
    config.optimizer.learning_rate = 1e-3
    return config
