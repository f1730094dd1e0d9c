"""A small Llama from random weights, on the Python sources of the standard library.

Command: python train.py --config=configs/python_decoder_pretrain.py
Before it: python -m models.create python_decoder --task=python_sources --characters=4000000
Time: 16 minutes on 2 CPU cores (800 batches of 16 x 256 tokens) with other work beside it.
Result: perplexity on test 54.1, on dev 41.7 (random weights: 4,131).

A larger model is made by larger sizes: `--hidden_size=384 --num_layers=10 --num_heads=6
--num_kv_heads=6 --intermediate_size=1024 --vocab_size=16384` has 24 million parameters;
--config.task.packages=True adds all installed packages to the training text.
"""

from ml_collections import ConfigDict

from configs.base import Config, decoder_language


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = decoder_language("python_decoder_pretrain", mode)
    config.model.source = "tiny-llama" if mode == "tiny" else "python_decoder"
    config.task.name, config.task.packages = "python_sources", False
    if mode != "tiny":
        config.data.max_length = 256
        config.data.batch_size, config.data.eval_batch_size = 16, 16
        config.train.steps, config.train.eval_every, config.train.save_every = 800, 200, 200
    config.method = ConfigDict({"method": "full", "targets": r".*"})
    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.1
    config.optimizer.no_decay = (r"norm",)
    return config
