"""LoRA-SB on MiniLM: which area of the standard library does a docstring document?

Command: python train.py --config=configs/minilm_stdlib_docs_lora_sb.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification
from pefts.methods.lora_sb import first_step_size


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_lora_sb", mode)
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.0
    warmup_steps = 20  # of the 326 steps of the whole run
    config.method = ConfigDict(
        {
            "method": "lora_sb",
            "rank": 32,
            "eta0": first_step_size(config.optimizer.learning_rate, warmup_steps),
        }
    )
    return config
