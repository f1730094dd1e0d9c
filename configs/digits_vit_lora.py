"""LoRA on the project's own small vision transformer, which knows 0 to 4: the digits 5 to 9.

Command: python train.py --config=configs/digits_vit_lora.py
The base: python eval.py --run=runs/digits_vit_pretrain --merge=digits_vit_base
Time: half a minute on 2 CPU cores (400 batches of 32 images).
Result: 0.940 of the test images of 5 to 9 right; a linear probe on the frozen base: 0.758.
"""

from ml_collections import ConfigDict

from configs.base import Config, image_classification


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = image_classification("digits_vit_lora", mode)
    config.model.source = "tiny-vit" if mode == "tiny" else "digits_vit_base"
    config.model.fresh_head = True  # the base's is one of other digits
    config.task.name, config.task.classes = "digits", ("5", "6", "7", "8", "9")
    config.data.shift = 1
    config.method = ConfigDict(
        {"method": "lora", "rank": 4, "alpha": 8.0, "targets": r"encoder/.*/kernel"}
    )
    config.optimizer.learning_rate = 5e-3
    if mode != "tiny":
        config.train.steps, config.train.eval_every, config.train.save_every = 400, 100, 200
    return config
