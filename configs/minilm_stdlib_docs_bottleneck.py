"""Houlsby adapters on MiniLM: which area of the standard library does a docstring document?

Command: python train.py --config=configs/minilm_stdlib_docs_bottleneck.py
Time: about TODO minutes on 2 CPU cores.
Result: accuracy TODO, macro-F1 TODO on the test split (seed 0, Python 3.11).
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_bottleneck", mode)
    config.method = ConfigDict({"method": "bottleneck", "width": 32, "placement": "houlsby"})
    return config
