"""Files of trained bottleneck adapters for the tiny models, made without training."""

import atexit
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

# The second feed-forward kernels of tests/tiny.py and of the decoder of test_decoder_adapters.
KERNELS = {"layers/down/kernel": (2, 20, 12), "layers/mlp/down_proj/kernel": (2, 40, 24)}
WIDTHS = (2, 3, 2)


def files() -> list[str]:
    """Three adapters of several widths; the files live as long as the process."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    rng = np.random.default_rng(0)
    written = [folder / f"{n}.safetensors" for n in range(len(WIDTHS))]
    for file, width in zip(written, WIDTHS, strict=True):
        _write(file, width, rng)
    return [str(file) for file in written]


def _write(file: Path, width: int, rng: np.random.Generator) -> None:
    """As pefts.save would, but for the checksums of the base, which are left open."""
    tensors = {}
    for path, (layers, _, d) in KERNELS.items():
        shapes = {"D": (d, width), "b_D": (width,), "U": (width, d), "b_U": (d,)}
        for name, shape in shapes.items():
            leaf = rng.normal(size=(layers, *shape)) / np.sqrt(shape[0])
            tensors[f"trainable:{path}:{name}"] = leaf.astype(np.float32)
        scale = rng.uniform(0.5, 1.5, layers)
        tensors[f"frozen:{path}:scale"] = scale.astype(np.float32)
    base = {path: {"shape": shape, "checksum": None} for path, shape in KERNELS.items()}
    config = {"method": "bottleneck", "width": width, "activation": "swish"}
    header = {"format_version": 1, "library": "a test", "config": config, "base": base}
    save_file(tensors, file, {"pefts": json.dumps(header)})
