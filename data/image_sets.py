"""Image sets: scikit-learn's digits, which come with the package, and published files below a root.

Splits are made by the hash of an image's pixels (see `data.images.divide`), the same for everyone:

    digits    scikit-learn's 1,797: 20 % test, 10 % dev, the rest train
    mnist     the 10,000 test images alone: 20 % test, 10 % dev, the rest train; where the 60,000
              training images lie beside them: those are train, less 10 % for dev
    cifar10   a zip of train/CLASS/*.jpg and test/CLASS/*.jpg: train is less 10 % for dev
"""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.images import Images, ImageTask, divide, make_image_task

_DEV_AND_TEST = {"test": 0.2, "dev": 0.1}
_DEV = {"dev": 0.1}
MNIST = "mnist_t10k"
CIFAR10 = "cifar10_jpeg"
_TEN = tuple(str(digit) for digit in range(10))


def load_digits(*, classes: Sequence[str] | None = None) -> ImageTask:
    """Return scikit-learn's hand-written digits, 8 x 8 and grey.

    Args:
        classes: digits to keep, such as ("5", "7"), in class order; None: all ten. What is test
            among all ten is test here too.

    Raises:
        ValueError: unknown, repeated, or fewer than two classes.

    Example:
        >>> task = load_digits(classes=("3", "8"))
        >>> task.splits["train"].pixels.shape[1:], task.labels
        ((8, 8, 1), ('3', '8'))
    """
    from sklearn import datasets

    found: Any = datasets.load_digits()
    # They are written in 17 steps from 0 to 16.
    pixels = np.rint(found["images"] * (255 / 16)).astype(np.uint8)[..., None]
    whole = Images(pixels, found["target"].astype(np.int32))
    return _task("digits", _TEN, divide(whole, _DEV_AND_TEST), classes)


def load_mnist(*, root: str | Path, classes: Sequence[str] | None = None) -> ImageTask:
    """Return MNIST's hand-written digits, 28 x 28 and grey.

    Args:
        root: folder that holds `mnist_t10k`, with t10k-images-idx3-ubyte.gz and its labels; the
            train-... files are read where they are there too.
        classes: as of `load_digits`.

    Raises:
        ValueError: a file is absent, or no IDX file; or as `load_digits`.
    """
    folder = Path(root) / MNIST
    test = _idx_pair(folder, "t10k", str(root))
    if not (folder / "train-images-idx3-ubyte.gz").is_file():
        return _task("mnist", _TEN, divide(test, _DEV_AND_TEST), classes)
    train = divide(_idx_pair(folder, "train", str(root)), _DEV)
    return _task("mnist", _TEN, {**train, "test": test}, classes)


def load_cifar10(*, root: str | Path, classes: Sequence[str] | None = None) -> ImageTask:
    """Return CIFAR-10, 32 x 32 in three colours, from a zip of JPEG files.

    Args:
        root: folder that holds `cifar10_jpeg`, with one zip of train/CLASS/*.jpg and
            test/CLASS/*.jpg.
        classes: class names to keep, in class order; None: all, by the alphabet.

    Raises:
        ImportError: pillow, which reads the files, is not installed.
        ValueError: no zip or several, a split without images, an unreadable image; or as
            `load_digits`.
    """
    folder = Path(root) / CIFAR10
    found = sorted(folder.glob("*.zip"))
    if len(found) != 1:
        raise ValueError(
            f"root={str(root)!r}: expected one zip in {str(folder)!r}, there are {len(found)}; "
            "pass the folder that contains cifar10_jpeg as root="
        )
    with zipfile.ZipFile(found[0]) as archive:
        members = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        names = tuple(sorted({name.split("/")[-2] for name in members}))
        train, test = (
            _decode(archive, names, [name for name in members if name.startswith(f"{split}/")])
            for split in ("train", "test")
        )
    return _task("cifar10", names, {**divide(train, _DEV), "test": test}, classes)


def _task(
    name: str,
    labels: tuple[str, ...],
    splits: dict[str, Images],
    classes: Sequence[str] | None,
) -> ImageTask:
    """The task, of these classes alone."""
    chosen = labels if classes is None else tuple(classes)
    unknown = [label for label in chosen if label not in labels]
    if unknown or len(set(chosen)) != len(chosen):
        raise ValueError(f"classes={chosen!r}: give distinct ones of {labels}")
    number = np.full(len(labels), -1)
    number[[labels.index(label) for label in chosen]] = np.arange(len(chosen))
    kept = {}
    for split in ("train", "dev", "test"):
        pixels, old = splits[split]
        rows = number[old] >= 0
        kept[split] = (pixels[rows], number[old][rows])
    return make_image_task(name, chosen, kept)


def _idx_pair(folder: Path, stem: str, root: str) -> Images:
    files = [folder / f"{stem}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    for file in files:
        if not file.is_file():
            raise ValueError(
                f"root={root!r}: expected {str(file)!r}; pass the folder that contains {MNIST} as "
                "root="
            )
    pixels, labels = (read_idx(file) for file in files)
    if pixels.ndim != 3 or labels.shape != pixels.shape[:1]:
        raise ValueError(
            f"{files[0]} holds an array of shape {pixels.shape} and {files[1].name} one of "
            f"{labels.shape}: they do not belong together"
        )
    return Images(pixels[..., None], labels.astype(np.int32))


def read_idx(file: Path) -> NDArray[np.uint8]:
    """Return the array of bytes of a gzip-compressed IDX file.

    Raises:
        ValueError: it is no gzip file, or of another type or length than its header says.
    """
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(f"{file} is no complete gzip file ({error}); fetch it again") from error
    # Two zero bytes, the type (8: unsigned bytes), the number of axes, then their sizes.
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{file} is no IDX file of bytes: it begins with {content[:4].hex()!r}")
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, 4).astype(np.int64)
    values = np.frombuffer(content, np.uint8, -1, 4 + 4 * axes)
    if len(values) != shape.prod():
        raise ValueError(f"{file} holds {len(values)} bytes, its header says {tuple(shape)}")
    return values.reshape(tuple(shape))


def _decode(archive: zipfile.ZipFile, names: tuple[str, ...], members: list[str]) -> Images:
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise ImportError("cifar10 is read with pillow: pip install pillow") from error
    if not members:
        raise ValueError(f"{archive.filename} holds no train/CLASS/*.jpg or no test/CLASS/*.jpg")

    def read(name: str) -> NDArray[np.uint8]:
        try:
            with Image.open(io.BytesIO(archive.read(name))) as image:
                return np.asarray(image.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{archive.filename}: {name} is no readable image") from error

    labels = [names.index(name.split("/")[-2]) for name in members]
    return Images(np.stack([read(name) for name in members]), np.asarray(labels, np.int32))
