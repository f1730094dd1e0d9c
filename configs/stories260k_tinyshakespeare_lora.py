"""LoRA on stories260K: from children's stories to Shakespeare.

Command: python train.py --config=configs/stories260k_tinyshakespeare_lora.py
The base: python -m models.llama2c stories260K.bin tok512.bin stories260K
Time: 2 minutes on 2 CPU cores, compilation and evaluation included.
Result: perplexity on test 16.5 (the base's: 145.2).
"""

from ml_collections import ConfigDict

from configs.base import Config, decoder_language


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = decoder_language("stories260k_tinyshakespeare_lora", mode)
    config.model.source = "stories260K"
    config.task.name, config.task.root = "tinyshakespeare", "../shared/data"
    config.data.max_length = 256
    config.method = ConfigDict(
        {"method": "lora", "rank": 8, "alpha": 16.0, "targets": "all-linear"}
    )
    config.optimizer.learning_rate = 3e-3
    return config
