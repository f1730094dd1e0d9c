"""The blockwise codec in numpy, and what tests of 8-bit state share."""

from typing import Any

import jax
import numpy as np

from pefts.optimizers.blockwise import Quantized, codebook

Array = np.ndarray


def normal(*shape: int, seed: int = 0) -> Array:
    """Float32 numbers of many sizes."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * 10.0 ** rng.uniform(-4, 1, size=shape)).astype(np.float32)


def in_numpy(x: Array, signed: bool, block_size: int) -> tuple[Array, Array, Array]:
    """Codes, scales and numbers of one layer: all distances, block by block, in float64."""
    flat = x.astype(np.float32).ravel()
    codes, scales, table = [], [], codebook(signed).astype(np.float64)
    for start in range(0, len(flat), block_size):
        block = flat[start : start + block_size]
        scales.append(np.abs(block).max())
        scaled = (block / (scales[-1] or np.float32(1))).astype(np.float64)
        codes.append(np.abs(scaled[:, None] - table).argmin(axis=1))
    numbers = [table[code] * scale for code, scale in zip(codes, scales, strict=True)]
    return *(np.concatenate(part).reshape(x.shape) for part in (codes, numbers)), np.array(scales)


def almost_the_codes(actual: Any, expected: Array) -> None:
    """One in a thousand may be a neighbour's, where float32 rounds to a midpoint."""
    difference = np.abs(np.asarray(actual, int) - expected)
    assert difference.max() <= 1 and difference.sum() <= max(1, difference.size / 1000)


def coded(node: Any) -> bool:
    return isinstance(node, Quantized)


def nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
