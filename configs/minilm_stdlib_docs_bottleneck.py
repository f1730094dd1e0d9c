"""Houlsby adapters on MiniLM: which area of the standard library does a docstring document?

Command: python train.py --config=configs/minilm_stdlib_docs_bottleneck.py
Time: 0.83 times LoRA's per step on 2 CPU cores; see minilm_stdlib_docs_lora.
Result: on SST-2, 0.848 test accuracy after 216 steps with seed 0
    (python -m benchmarks.methods --methods bottleneck).
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_bottleneck", mode)
    config.method = ConfigDict({"method": "bottleneck", "width": 32, "placement": "houlsby"})
    return config
