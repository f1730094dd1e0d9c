"""LN tuning on MiniLM: which area of the standard library does a docstring document?

Command: python train.py --config=configs/minilm_stdlib_docs_ln_tuning.py
Time: 0.80 times LoRA's per step on 2 CPU cores; see minilm_stdlib_docs_lora.
Result: on SST-2, 0.852 test accuracy after 216 steps with seed 0
    (python -m benchmarks.methods --methods ln_tuning).
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_ln_tuning", mode)
    config.optimizer.learning_rate = 0.003
    config.method = ConfigDict({"method": "ln_tuning"})
    return config
