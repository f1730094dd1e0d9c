"""The head alone on MiniLM: which area of the standard library does a docstring document?

Command: python train.py --config=configs/minilm_stdlib_docs_head_only.py
Time: 0.30 times LoRA's per step on 2 CPU cores; see minilm_stdlib_docs_lora.
Result: on SST-2, 0.806 test accuracy after 216 steps with seed 0
    (python -m benchmarks.methods --methods head_only).
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_head_only", mode)
    config.head = False  # the method trains it
    config.optimizer.learning_rate = 0.01
    config.method = ConfigDict({"method": "head_only"})
    return config
