"""AdaLoRA on MiniLM: which area of the standard library does a docstring document?

Command: python train.py --config=configs/minilm_stdlib_docs_adalora.py
Time: 1.06 times LoRA's per step on 2 CPU cores; see minilm_stdlib_docs_lora.
Result: on SST-2, 0.848 test accuracy after 216 steps with seed 0
    (python -m benchmarks.methods --methods adalora).
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_adalora", mode)
    tiny = mode == "tiny"
    config.train.steps = 2 if tiny else 326  # AdaLoRA's schedule must know the end
    config.optimizer.learning_rate = 0.003
    config.method = ConfigDict(
        {
            "method": "adalora",
            "init_rank": 12,
            "target_rank": 8,
            "alpha": 16.0,
            "total_steps": config.train.get_oneway_ref("steps"),
            "warmup": (0, 0) if tiny else (40, 120),
            "interval": 1 if tiny else 10,
            "gamma": 0.1,
        }
    )
    return config
