"""A small vision transformer from random weights, on the written digits 0 to 4.

Command: python train.py --config=configs/digits_vit_pretrain.py
The base it makes: python eval.py --run=runs/digits_vit_pretrain --merge=digits_vit_base
Time: under 1 minute on 2 CPU cores (1,200 batches of 32 images).
Result: 0.975 of the test images of 0 to 4 right (a linear probe on the random weights: 0.946).

A larger one from MNIST's 28 x 28 pixels, on its digits 0 to 4:
python -m models.create_vit mnist_vit --image_size=28 --patch_size=4 --num_channels=1
--hidden_size=96 --intermediate_size=384, and --config.model.source=mnist_vit
--config.task.name=mnist --config.task.root=FOLDER, where FOLDER/mnist_t10k has the files.
"""

from ml_collections import ConfigDict

from configs.base import Config, image_classification

KNOWN = ("0", "1", "2", "3", "4")


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = image_classification("digits_vit_pretrain", mode)
    config.model.source = "tiny-vit"
    config.task.name, config.task.classes = "digits", KNOWN
    config.data.shift = 1
    config.head = False  # it is trained with everything else
    config.method = ConfigDict({"method": "full", "targets": r".*"})
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.no_decay = ("bias", "norm")
    if mode != "tiny":
        config.train.steps, config.train.eval_every, config.train.save_every = 1200, 200, 400
    return config
