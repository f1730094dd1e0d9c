"""LLaMA-Adapter on MiniLM: which area of the standard library does a docstring document?

Command: python train.py --config=configs/minilm_stdlib_docs_llama_adapter.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_llama_adapter", mode)
    config.optimizer.learning_rate = 0.01
    config.method = ConfigDict({"method": "llama_adapter", "length": 10})
    return config
