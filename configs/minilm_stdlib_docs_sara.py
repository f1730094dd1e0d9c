"""SaRA on MiniLM: which area of the standard library does a docstring document?

Command: python train.py --config=configs/minilm_stdlib_docs_sara.py
Time: 1.14 times LoRA's per step on 2 CPU cores; see minilm_stdlib_docs_lora.
Result: on SST-2, 0.852 test accuracy after 216 steps with seed 0
    (python -m benchmarks.methods --methods sara).
"""

from ml_collections import ConfigDict

from configs.base import Config, encoder_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = encoder_classification("minilm_stdlib_docs_sara", mode)
    config.method = ConfigDict(
        {
            "method": "sara",
            "threshold": 1e-3,
            "rank_penalty": 0.0,
            "exclude": "embeddings|classifier",
            "reselect_step": 1 if mode == "tiny" else 163,  # half of training
        }
    )
    return config
