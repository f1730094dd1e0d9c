"""PETALface on MiniLM: which area of the standard library does a docstring document?

The texts have no quality, so one holds for all and both LoRAs serve every input, the second three
times as much as the first.

Command: python train.py --config=configs/minilm_stdlib_docs_petalface.py
Time: see the README's table; minilm_stdlib_docs_lora has minutes on 2 CPU cores.
Result: see the README's table.
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_petalface", mode)
    config.method = ConfigDict(
        {
            "method": "petalface",
            "rank": 8,
            "quality": 0.75,
            "dropout": 0.1,
            "targets": "all-linear",
        }
    )
    return config
