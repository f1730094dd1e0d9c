"""P-tuning on MiniLM: which area of the standard library does a docstring document?

Command: python train.py --config=configs/minilm_stdlib_docs_p_tuning.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_p_tuning", mode)
    config.optimizer.learning_rate = 1e-3  # the MLP's; a table alone takes ten times as much
    config.method = ConfigDict({"method": "p_tuning", "length": 16})
    return config
