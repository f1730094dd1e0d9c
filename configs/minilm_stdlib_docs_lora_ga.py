"""LoRA-GA on MiniLM: which area of the standard library does a docstring document?

Command: python train.py --config=configs/minilm_stdlib_docs_lora_ga.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_lora_ga", mode)
    config.optimizer.weight_decay = 0.0  # it would take the start of A and B out of the kernels
    config.method = ConfigDict({"method": "lora_ga", "rank": 8, "alpha": 16.0})
    return config
