"""Tensor-train adapters on MiniLM: which area of the standard library does a docstring document?

Command: python train.py --config=configs/minilm_stdlib_docs_tensor_train.py
Time: TIMEX times LoRA's per step on 2 CPU cores; see minilm_stdlib_docs_lora.
Result: on SST-2, RESULTX test accuracy after 216 steps with seed 0
    (python -m benchmarks.methods --methods tensor_train).
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_tensor_train", mode)
    config.method = ConfigDict({"method": "tensor_train", "bottleneck": 64, "rank": 5})
    return config
