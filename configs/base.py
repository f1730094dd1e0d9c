"""What experiments have in common, on encoders and on decoders; a config says what differs."""

from typing import Any

from ml_collections import ConfigDict

Config = Any  # a ConfigDict; its fields are known when it is built, not to the type checker
MODES = ("", "tiny")


def encoder_classification(name: str, mode: str = "") -> Config:
    """Text classification of the standard library's docstrings with a pretrained MiniLM."""
    config = _named(name, mode)
    config.model = ConfigDict(
        {
            "source": "minilm",  # also a folder, or a Hugging Face hub id
            "pooling": "mean",  # or "cls", "pooler"
            "dtype": "float32",  # of the computation
            "param_dtype": "float32",  # of the frozen base
            "scan_layers": True,
            "remat": "none",  # or "full", "dots"
        }
    )
    config.task = ConfigDict({"name": "stdlib_docs"}, type_safe=False)
    config.data = ConfigDict(
        {
            "max_length": 64,  # tokens; longer texts are cut
            "buckets": (16, 32, 64),  # padded lengths: one compilation each
            "batch_size": 32,
            "eval_batch_size": 64,
            "token_dropout": 0.3,  # share of hidden tokens in training batches
            "balance": "sqrt",  # class weights: "none", "sqrt" or "uniform"
        }
    )
    config.head = True  # train the classification head beside the method
    _shared(config, epochs=2.0, no_decay=("bias",))
    if mode == "tiny":
        config.data.buckets = (16,)
        _shrink(config)
    return config


def image_classification(name: str, mode: str = "") -> Config:
    """Classification of images with a vision transformer; the config names it and the task."""
    config = _named(name, mode)
    config.model = ConfigDict(
        {
            "source": "",  # a folder, or a Hugging Face hub id
            "pooling": "cls",  # or "mean", a ViT's "pooler", CLIP's "projection"
            "fresh_head": False,  # a new classification head in the place of the checkpoint's
            "dtype": "float32",  # of the computation
            "param_dtype": "float32",  # of the frozen base
            "scan_layers": True,
            "remat": "none",  # or "full", "dots"
        }
    )
    config.task = ConfigDict({"name": "digits"}, type_safe=False)
    config.data = ConfigDict(
        {
            "batch_size": 32,
            "eval_batch_size": 256,
            "mean": 0.5,  # of the base's normalisation; or a tuple, one number for each channel
            "std": 0.5,
            "shift": 0,  # training images move by up to so many pixels
            "flip": False,  # left and right, in half of the training images
            "balance": "none",  # class weights: "none", "sqrt" or "uniform"
        },
        type_safe=False,
    )
    config.head = True  # train the classification head beside the method
    _shared(config, epochs=2.0, no_decay=("bias",))
    if mode == "tiny":
        _shrink(config)
    return config


def decoder_language(name: str, mode: str = "") -> Config:
    """Learning to write running text with a pretrained decoder; the config names both."""
    config = _named(name, mode)
    config.model = ConfigDict(
        {
            "source": "",  # a folder, or a Hugging Face hub id
            "dtype": "float32",  # of the computation
            "param_dtype": "float32",  # of the frozen base
            "scan_layers": True,
            "remat": "none",  # or "full", "dots"
        }
    )
    config.task = ConfigDict({"name": "text"}, type_safe=False)
    config.data = ConfigDict(
        {
            "max_length": 512,  # tokens of a packed row, and of the longest text in it
            "batch_size": 8,
            "eval_batch_size": 8,
        }
    )
    config.head = False
    _shared(config, epochs=1.0, no_decay=())
    if mode == "tiny":
        _shrink(config)
    return config


def _named(name: str, mode: str) -> Config:
    if mode not in MODES:
        raise ValueError(f"config mode {mode!r} is none of {MODES}; use for instance NAME.py:tiny")
    config: Config = ConfigDict()
    config.name = name + (f"_{mode}" if mode else "")
    config.seed = 0
    return config


def _shared(config: Config, epochs: float, no_decay: tuple[str, ...]) -> None:
    """The sections that are the same for every kind of task."""
    config.method = ConfigDict()
    # Training batches that methods which start from data (CorDA, EVA, ...) look at first.
    config.calibrate = ConfigDict({"batches": 8})
    # Weights of what is added to the loss: mean squared distances from the unadapted base in
    # evaluation mode, of every layer's output, and of the logits (for a base with a trained head).
    config.distill = ConfigDict({"features": 0.0, "logits": 0.0})
    config.optimizer = ConfigDict(
        {
            "name": "adamw",  # or one of pefts.OPTIMIZERS, with its options
            "learning_rate": 1e-3,  # peak
            "schedule": "cosine",  # behind the warm-up; or "constant", without one
            "warmup": 0.06,  # share of all steps
            "weight_decay": 0.01,
            "clip_norm": 1.0,
            "no_decay": no_decay,  # patterns of trainable leaves
            "factors": ConfigDict(),  # pattern -> learning-rate factor; {"/B$": 16.0} is LoRA+
            "options": ConfigDict(),  # for optimizers other than adamw
        }
    )
    # Fields -> values: every combination is trained, all in one step (training/sweep.py).
    config.sweep = ConfigDict()
    config.train = ConfigDict(
        {
            "epochs": epochs,
            "steps": 0,  # if not 0, instead of epochs
            "value": "loss",  # what is lowered; without gradients also a score, "error_rate"
            "accumulate": 1,  # parts of a batch, computed one after the other to save memory
            "eval_every": 80,
            "save_every": 50,
            "base_dropout": False,  # the pretrained model's own dropout
        }
    )


def _shrink(config: Config) -> None:
    """Two steps on a few short texts, or a few images."""
    config.task.examples = 40
    if "max_length" in config.data:
        config.data.max_length = 16
    config.data.batch_size, config.data.eval_batch_size = 8, 8
    config.train.steps, config.train.eval_every, config.train.save_every = 2, 1, 1
    config.calibrate.batches = 2


def plain(section: Any) -> Any:
    """A config section as the dicts and lists that JSON would give back."""
    if isinstance(section, ConfigDict | dict):
        return {name: plain(value) for name, value in section.items()}
    if isinstance(section, tuple | list):
        return [plain(value) for value in section]
    return section
