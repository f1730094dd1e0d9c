"""BitFit on MiniLM: which area of the standard library does a docstring document?

Command: python train.py --config=configs/minilm_stdlib_docs_bitfit.py
Time: 0.85 times LoRA's per step on 2 CPU cores; see minilm_stdlib_docs_lora.
Result: on SST-2, 0.853 test accuracy after 216 steps with seed 0
    (python -m benchmarks.methods --methods bitfit).
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_bitfit", mode)
    config.optimizer.learning_rate = 0.003
    config.method = ConfigDict({"method": "bitfit", "exclude": "classifier"})
    return config
