"""LaMDA on MiniLM: which area of the standard library does a docstring document?

Command: python train.py --config=configs/minilm_stdlib_docs_lamda.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_lamda", mode)
    config.train.steps = 2 if mode == "tiny" else 326  # LaMDA's schedule must know the end
    config.optimizer.weight_decay = 0.0  # Sg and B carry a part of the pretrained kernels
    config.optimizer.learning_rate = 5e-4
    config.method = ConfigDict(
        {
            "method": "lamda",
            "rank": 32,
            "alpha": 16.0,
            "freezing": 0.3,
            "total_steps": config.train.get_oneway_ref("steps"),
        }
    )
    return config
