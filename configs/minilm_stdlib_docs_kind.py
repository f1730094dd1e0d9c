"""KIND on MiniLM: which area of the standard library does a docstring document?

The components after the eight largest of each kernel are trained, the same for every input; the
rest of the kernel stays.

Command: python train.py --config=configs/minilm_stdlib_docs_kind.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_kind", mode)
    config.method = ConfigDict(
        {"method": "kind", "learngenes": 8, "tailors": 8, "targets": "all-linear"}
    )
    config.optimizer.weight_decay = 0.0  # would shrink the part of the base that they took over
    config.optimizer.learning_rate = 3e-4
    return config
