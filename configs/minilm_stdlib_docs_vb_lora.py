"""VB-LoRA on MiniLM: which area of the standard library does a docstring document?

Command: python train.py --config=configs/minilm_stdlib_docs_vb_lora.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_vb_lora", mode)
    config.method = ConfigDict(
        {
            "method": "vb_lora",
            "rank": 4,
            "vectors": 90,
            "length": 128,
            "top": 2,
            "targets": "all-linear",
        }
    )
    config.optimizer.learning_rate = 1e-2  # of the logits; the bank's is a fifth of it
    config.optimizer.factors = ConfigDict({"/bank$": 0.2})
    config.optimizer.weight_decay = 0.0
    return config
