"""The gradient of a batch from its parts, one after the other: the memory of a part."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def in_parts(
    gradient: Callable[[Tree, jax.Array], Tree], weight: Callable[[Tree], jax.Array], parts: int
) -> Callable[[Tree], Tree]:
    """The mean of `gradient` over the parts of a batch, as it is over the whole.

    Args:
      gradient: (part, its number) -> any tree of means over the part's examples.
      weight: part -> what its means count in those of the batch.
      parts: how many; divides the batch.

    Returns:
      batch -> the tree. Part n holds the rows n, n + parts, ...: a batch that is divided over
      devices stays so in every part.

    Raises:
      ValueError: parts below 1, or (when called) a batch that it does not divide.
    """
    if parts < 1:
        raise ValueError(f"train.accumulate={parts} must be at least 1 part of a batch")

    def run(batch: Tree) -> Tree:
        zero = jnp.zeros((), jnp.int32)
        if parts == 1:
            return gradient(batch, zero)
        divided = jax.tree.map(lambda rows: _divide(rows, parts), batch)

        def add(carry: Tree, part: Tree) -> tuple[Tree, None]:
            number, sums, total = carry
            count = weight(part).astype(jnp.float32)
            found = gradient(part, number)
            sums = jax.tree.map(lambda s, x: s + (count * x).astype(s.dtype), sums, found)
            return (number + 1, sums, total + count), None

        first = jax.tree.map(lambda rows: rows[0], divided)
        shapes = jax.eval_shape(gradient, first, zero)
        empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        start = (zero, empty, jnp.zeros((), jnp.float32))
        (_, sums, total), _ = jax.lax.scan(add, start, divided)
        return jax.tree.map(lambda s: (s / jnp.maximum(total, 1.0)).astype(s.dtype), sums)

    return run


def _divide(rows: jax.Array, parts: int) -> jax.Array:
    if rows.shape[0] % parts:
        raise ValueError(
            f"train.accumulate={parts} must divide the batch of {rows.shape[0]} rows; change it, "
            "or data.batch_size"
        )
    return jnp.swapaxes(rows.reshape(rows.shape[0] // parts, parts, *rows.shape[1:]), 0, 1)
