"""Classification of images: the record that image sources return, and how it is divided."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Images(NamedTuple):
    """The images of one split.

    Attributes:
        pixels: uint8 (images, height, width, channels), 0 black, 255 white or full colour.
        labels: class indices, int32 (images,).
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int32]


class ImageTask(NamedTuple):
    """A task of classifying images; build it with `make_image_task`, which checks it.

    Attributes:
        name: what reports call the task.
        labels: label names; the class index is the position in this tuple.
        splits: split name -> its images, all of one height, width and number of channels.
    """

    name: str
    labels: tuple[str, ...]
    splits: dict[str, Images]


def make_image_task(
    name: str, labels: Iterable[str], splits: Mapping[str, tuple[NDArray, NDArray]]
) -> ImageTask:
    """Return a checked `ImageTask`.

    Args:
        name: what reports call the task.
        labels: distinct label names, at least two.
        splits: split name -> (pixels, labels), see `Images`; at least one image in each.

    Raises:
        ValueError: fewer than two labels, a repeated label, no split, an empty split, pixels that
            are not uint8 (images, height, width, channels), splits whose images differ in shape, or
            labels of another number or outside the classes.

    Example:
        >>> pixels = np.zeros((3, 8, 8, 1), np.uint8)
        >>> task = make_image_task("toy", ("no", "yes"), {"train": (pixels, np.array([0, 1, 1]))})
        >>> task.splits["train"].labels.tolist()
        [0, 1, 1]
    """
    labels = tuple(labels)
    if len(set(labels)) != len(labels) or len(labels) <= 1:
        raise ValueError(f"labels={labels!r} of task {name!r}: expected at least two, all distinct")
    if not splits:
        raise ValueError(f"splits of task {name!r} is empty; give at least a 'train' split")
    checked = {
        split: _check(f"split {split!r} of task {name!r}", len(labels), *pair)
        for split, pair in splits.items()
    }
    shapes = {split: images.pixels.shape[1:] for split, images in checked.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"splits of task {name!r} have images of different shapes: {shapes}")
    return ImageTask(name, labels, checked)


def first(task: ImageTask, count: int) -> ImageTask:
    """Keep at most `count` images of each split, labels in turn, the same ones every time.

    Raises:
        ValueError: `count` is smaller than the number of labels.
    """
    if count < len(task.labels):
        raise ValueError(
            f"limit={count} is smaller than the {len(task.labels)} labels of task {task.name!r}: "
            "some class would be lost; raise it"
        )
    splits = {}
    for split, images in task.splits.items():
        kept = _in_turn(images, count)
        splits[split] = Images(images.pixels[kept], images.labels[kept])
    return task._replace(splits=splits)


def divide(images: Images, shares: Mapping[str, float]) -> dict[str, Images]:
    """Divide images by the hash of their pixels.

    Equal images stay together, and where an image goes depends on neither the others nor their
    order: a part of the classes is divided as the whole is. Shares are met on average alone.

    Args:
        images: to divide.
        shares: new split -> the fraction of all possible hashes that go there; the rest is "train".

    Returns:
        "train", then the new splits, each in the order of `images`.

    Raises:
        ValueError: shares that are not positive or leave nothing for train, or an empty split.
    """
    if not all(share > 0 for share in shares.values()) or sum(shares.values()) >= 1:
        raise ValueError(f"shares={dict(shares)}: give positive fractions of a sum below 1")
    place = np.asarray([fraction(row) for row in images.pixels])
    edges = np.cumsum(list(shares.values()))
    part = np.searchsorted(edges, place, side="right")  # len(edges): train
    found = {"train": part == len(edges)}
    found |= {split: part == index for index, split in enumerate(shares)}
    empty = [split for split, rows in found.items() if not rows.any()]
    if empty:
        raise ValueError(f"shares={dict(shares)} of {len(part)} images leave {empty} empty")
    return {
        split: Images(images.pixels[rows], images.labels[rows]) for split, rows in found.items()
    }


def fraction(pixels: NDArray[np.uint8]) -> float:
    """A number in [0, 1) by the pixels alone, equal in every process."""
    digest = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def resize(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Images (N, height, width, C) as (N, size, size, C).

    Linear between pixels where it enlarges, the mean over the pixels covered (by a triangle) where
    it shrinks.
    """
    if pixels.shape[1:3] == (size, size):
        return pixels
    rows, columns = (_weights(old, size) for old in pixels.shape[1:3])
    x = np.einsum("th,nhwc->ntwc", rows, pixels.astype(np.float32))
    x = np.einsum("sw,ntwc->ntsc", columns, x)
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


def _weights(old: int, new: int) -> NDArray[np.float32]:
    """(new, old): what each old pixel counts in a new one."""
    scale = old / new
    centres = (np.arange(new) + 0.5) * scale
    distance = np.abs(np.arange(old)[None, :] + 0.5 - centres[:, None])
    weights = np.maximum(0.0, 1.0 - distance / max(scale, 1.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _check(where: str, classes: int, pixels: NDArray, labels: NDArray) -> Images:
    pixels, labels = np.asarray(pixels), np.asarray(labels)
    if pixels.dtype != np.uint8 or pixels.ndim != 4:
        raise ValueError(
            f"{where}: pixels are {pixels.dtype} of shape {pixels.shape}; give uint8 (images, "
            "height, width, channels)"
        )
    if not len(pixels) or labels.shape != (len(pixels),):
        raise ValueError(
            f"{where}: {len(pixels)} images and labels of shape {labels.shape}; give at least one "
            "image, and one label for each"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"{where}: labels reach from {labels.min()} to {labels.max()}, outside 0..{classes - 1}"
        )
    return Images(pixels, labels.astype(np.int32))


def _in_turn(images: Images, count: int) -> NDArray[np.int64]:
    """Indices of the images that stay: of every label those of the smallest hash, in turn."""
    ordered = np.argsort([fraction(row) for row in images.pixels], kind="stable")
    turn = np.zeros(len(ordered), np.int64)
    for label in np.unique(images.labels):
        members = ordered[images.labels[ordered] == label]
        turn[members] = np.arange(len(members))
    rank = np.empty(len(ordered), np.int64)
    rank[ordered] = np.arange(len(ordered))
    return np.lexsort((rank, images.labels, turn))[:count]
