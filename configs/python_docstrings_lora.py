"""LoRA on the project's own small decoder: writing the docstring of a Python function.

Command: python train.py --config=configs/python_docstrings_lora.py
The base: python eval.py --run=runs/python_decoder_pretrain --merge=python_base
Time: 4 minutes on 2 CPU cores, compilation and evaluation included.
Result: perplexity of test docstrings 106.4 (the base's: 217.7).
"""

from ml_collections import ConfigDict

from configs.base import Config, decoder_language


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = decoder_language("python_docstrings_lora", mode)
    config.model.source = "tiny-llama" if mode == "tiny" else "python_base"
    config.task.name, config.task.code = "docstrings", 200 if mode == "tiny" else 350
    config.data.max_length = 256 if mode == "tiny" else 384  # a prompt has fewer bytes
    if mode != "tiny":
        config.data.batch_size, config.data.eval_batch_size = 16, 16
        config.train.steps, config.train.eval_every, config.train.save_every = 150, 75, 75
    config.method = ConfigDict(
        {
            "method": "lora",
            "rank": 4 if mode == "tiny" else 16,
            "alpha": 32.0,
            "targets": "all-linear",
        }
    )
    config.optimizer.learning_rate = 3e-3
    return config
