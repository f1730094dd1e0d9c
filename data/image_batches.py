"""From a task's images to batches of one static shape: normalised, in training also augmented.

Every training batch is a pure function of (images, batch size, seed, step), as those of texts are
(see data/pipeline.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import numpy as np
from numpy.typing import NDArray

from data.images import Images, resize
from data.pipeline import Batch, Batches, class_weights, process_part


class Augmentation(NamedTuple):
    """How a training image is changed, anew at every step.

    Attributes:
        shift: it moves by up to so many pixels each way, black coming in at the edge.
        flip: left and right change places in half of the images.
    """

    shift: int = 0
    flip: bool = False


class ImageRows(NamedTuple):
    """The images of one split, as a model reads them.

    Attributes:
        pixels: uint8 (rows, height, width, channels), as stored.
        labels: class indices, int32 (rows,).
        classes: number of classes of the task.
        size: height and width that batches have.
        tokens: how many tokens the model makes of an image.
        mean, std: a batch holds (pixel / 255 - mean) / std, by channel (channels,).
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int32]
    classes: int
    size: int
    tokens: int
    mean: NDArray[np.float32]
    std: NDArray[np.float32]


def prepare(
    images: Images,
    *,
    classes: int,
    size: int,
    tokens: int,
    channels: int,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
) -> ImageRows:
    """Images with what a model wants of them.

    Args:
        images: a split.
        classes: number of classes of the task.
        size: height and width that the model reads; images of another size are resized.
        tokens: how many tokens it makes of one.
        channels: that it reads.
        mean, std: of its pretraining's normalisation, one number or one for each channel (0.5 of a
            ViT).

    Raises:
        ValueError: images of another number of channels, a mean or std for another number, a std
            that is not positive.
    """
    held = images.pixels.shape[-1]
    if held != channels:
        raise ValueError(
            f"the images have {held} channels, the model reads {channels}: choose a model with "
            f"num_channels={held}, or another task"
        )
    vectors = []
    for name, value in (("mean", mean), ("std", std)):
        vector = np.asarray(value, np.float32).reshape(-1)
        if len(vector) not in (1, channels):
            raise ValueError(f"{name}={value!r}: give one number, or one for each of {channels}")
        vectors.append(np.broadcast_to(vector, (channels,)))
    if not np.all(vectors[1] > 0):
        raise ValueError(f"std={std!r} must be positive")
    return ImageRows(images.pixels, images.labels, classes, size, tokens, *vectors)


def train_batches(
    rows: ImageRows,
    *,
    batch_size: int,
    seed: int,
    balance: str = "none",
    augmentation: Augmentation = Augmentation(),
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Return endless shuffled batches, reshuffled in every epoch from (seed, epoch).

    What fills no batch is left out, other rows in every epoch.

    Args:
        rows: see `prepare`.
        batch_size: rows in a batch over all processes.
        seed: non-negative; the same seed gives the same batches.
        balance: weights of the classes, see `data.pipeline.class_weights`.
        augmentation: see there.
        process_index: which slice of every global batch to yield.
        process_count: number of slices; divides `batch_size`.

    Returns:
        `Batches` of {"images": float32 (B, size, size, C), "mask": int32 (B, tokens), all 1,
        "label": int32 (B,), "weight": float32 (B,)}.

    Raises:
        ValueError: an argument out of range, or fewer rows than a batch.
    """
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative; NumPy's generators take none")
    if not 1 <= batch_size <= len(rows.labels):
        raise ValueError(
            f"batch_size={batch_size} must be from 1 to the {len(rows.labels)} rows of the split"
        )
    height = min(rows.pixels.shape[1:3])
    if not 0 <= augmentation.shift < height:
        raise ValueError(f"shift={augmentation.shift} must be from 0 to {height - 1} pixels")
    part = _part(batch_size, process_index, process_count)
    weight = class_weights(rows.labels, balance, rows.classes)[rows.labels]
    source = _Source(rows, weight, batch_size, part, seed, augmentation)
    return _batches(source, dropped=len(rows.labels) % batch_size)


def eval_batches(
    rows: ImageRows, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Batches:
    """Return one pass over the rows in their order, with "index" as `data.pipeline` has it.

    Raises:
        ValueError: an argument out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    part = _part(batch_size, process_index, process_count)
    weight = np.ones(len(rows.labels), np.float32)
    return _batches(_Source(rows, weight, batch_size, part, None), dropped=0)


def augment(
    pixels: NDArray[np.uint8], how: Augmentation, draw: np.random.Generator
) -> NDArray[np.uint8]:
    """Images (B, height, width, C), each moved and flipped by its own draw."""
    count, height, width, _ = pixels.shape
    top, left = draw.integers(0, 2 * how.shift + 1, (2, count))
    flipped = draw.random(count) < 0.5
    edge = (how.shift, how.shift)
    padded = np.pad(pixels, ((0, 0), edge, edge, (0, 0)))
    rows = top[:, None] + np.arange(height)[None, :]
    columns = left[:, None] + np.arange(width)[None, :]
    if how.flip:
        columns = np.where(flipped[:, None], columns[:, ::-1], columns)
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


@dataclass
class _Source:
    """Random access to batches by step, as grain reads it. `seed` None means one pass in order."""

    rows: ImageRows
    weight: NDArray[np.float32]
    batch_size: int
    part: slice
    seed: int | None
    augmentation: Augmentation = Augmentation()

    def __len__(self) -> int:
        # Training has no end of its own; 2**40 steps stay within every integer grain uses.
        return self.steps if self.seed is None else 2**40

    @property
    def steps(self) -> int:
        count = len(self.rows.labels)
        return -(-count // self.batch_size) if self.seed is None else count // self.batch_size

    def __getitem__(self, index: int) -> Batch:
        epoch, step = divmod(int(index), self.steps)
        order = np.arange(len(self.rows.labels))
        if self.seed is not None:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        members = order[step * self.batch_size : (step + 1) * self.batch_size]
        missing = self.batch_size - len(members)
        real = np.arange(self.batch_size) < len(members)
        chosen = np.concatenate([members, np.repeat(members[-1:], missing)])
        pixels = self.rows.pixels[chosen]
        if self.seed is not None and self.augmentation != Augmentation():
            # Drawn for the whole batch: the same images on any number of processes.
            draw = np.random.default_rng((self.seed, 1, int(index)))
            pixels = augment(pixels, self.augmentation, draw)
        return self._batch(pixels[self.part], chosen[self.part], real[self.part])

    def _batch(
        self, pixels: NDArray[np.uint8], chosen: NDArray[np.int64], real: NDArray[np.bool_]
    ) -> Batch:
        rows = self.rows
        images = resize(pixels, rows.size).astype(np.float32) / np.float32(255)
        batch: dict[str, NDArray[Any]] = {
            "images": (images - rows.mean) / rows.std,
            "mask": np.ones((len(chosen), rows.tokens), np.int32),
            "label": rows.labels[chosen],
            "weight": np.where(real, self.weight[chosen], np.float32(0)),
        }
        if self.seed is None:
            batch["index"] = np.where(real, chosen, -1).astype(np.int32)
        return batch


def _part(batch_size: int, process_index: int, process_count: int) -> slice:
    if process_count < 1 or not 0 <= process_index < process_count or batch_size % process_count:
        raise ValueError(
            f"process_index={process_index} must be in 0..process_count-1, and process_count="
            f"{process_count} divide batch_size={batch_size}"
        )
    return process_part(batch_size, process_index, process_count)


def _batches(source: _Source, dropped: int) -> Batches:
    rows, local = source.rows, source.part.stop - source.part.start
    shape: Any = (local, rows.size, rows.size, rows.pixels.shape[-1])
    return Batches(grain.MapDataset.source(source), source.steps, (shape,), dropped)
