"""IncreLoRA on MiniLM: which area of the standard library does a docstring document?

Every kernel starts at rank 1; 16 times four of the 36 grow by four, up to 8 on average.

Command: python train.py --config=configs/minilm_stdlib_docs_increlora.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_increlora", mode)
    config.method = ConfigDict(
        {
            "method": "increlora",
            "target_rank": 8,
            "max_rank": 16,
            "alpha": 16.0,
            "growth": (4, 1 if mode == "tiny" else 4),
            "schedule": (20, 10, 10),
            "gamma": 0.1,
        }
    )
    config.optimizer.learning_rate = 0.003
    return config
