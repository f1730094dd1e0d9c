"""A vision transformer with random weights, as a Hugging Face folder.

    python -m models.create_vit mnist_vit --image_size=28 --patch_size=4 --num_channels=1

train.py pretrains the model from there. Whatever can be read of a checkpoint folder can be read of
this one.
"""

import argparse
import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import jax

from models import hf, vit, vit_names
from models.vit_config import VisionConfig

SIZES = {
    "image_size": 32,
    "patch_size": 4,
    "num_channels": 3,
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_layers": 6,
    "num_heads": 3,
}


def create(folder: str | Path, config: VisionConfig, seed: int = 0) -> Path:
    """Writes config.json and model.safetensors.

    Args:
      folder: created if absent.
      config: any.
      seed: of the weights.

    Raises:
      ValueError: see `hf.save_params`.
    """
    model = vit.VisionTransformer(config)
    size = config.image_size
    image = jax.numpy.zeros((1, size, size, config.num_channels))
    params = jax.jit(lambda: model.init(jax.random.key(seed), image)["params"])()
    names = vit_names.NAMES[config.model_type]
    names = replace(names, layers=config.num_layers, scanned=config.scan_layers)
    hf.save_params(folder, params, names, config.to_hf())
    return Path(folder)


@functools.cache
def tiny_vit() -> Path:
    """A folder with a vision transformer of 80 thousand random weights, for grey 8 x 8 images.

    It is the same for everyone, and gone when the process ends.
    """
    place = tempfile.TemporaryDirectory(prefix="tiny_vit_")
    _KEPT.append(place)
    config = VisionConfig(
        hidden_size=48,
        num_layers=4,
        num_heads=4,
        intermediate_size=96,
        image_size=8,
        patch_size=2,
        num_channels=1,
        initializer_range=0.1,  # about 1 / sqrt(hidden_size): 0.02 is for widths of hundreds
    )
    return create(place.name, config)


_KEPT: list[tempfile.TemporaryDirectory] = []  # a folder lives as long as its object


def main(arguments: list[str] | None = None) -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = vars(parser.parse_args(arguments))
    try:
        config = VisionConfig(**{name: given[name] for name in SIZES})
        create(given["folder"], config, given["seed"])
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"wrote {given['folder']}")


if __name__ == "__main__":
    main()
