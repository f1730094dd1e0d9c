"""Pairs of factors A (d_in, r), B (r, d_out) in a trainable tree; inverses of their Grams."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pefts.optimizers.decay import leaf_paths

einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class Pair(NamedTuple):
    """The two factors of one adapted kernel, as positions among a tree's leaves."""

    path: str  # of the node that holds both, "query/kernel"
    A: int
    B: int


def factor_pairs(tree: Any) -> list[Pair]:
    """The pairs of factors in a trainable tree, in the order of its leaves.

    Raises:
      ValueError: there is none (in a tree that has leaves), or factors do not multiply.
    """
    paths, leaves = jax.tree.leaves(leaf_paths(tree)), jax.tree.leaves(tree)
    at = {path: n for n, path in enumerate(paths)}
    pairs = []
    for path, n in at.items():
        node, _, name = path.rpartition("/")
        other = at.get(f"{node}/B" if node else "B")
        if name != "A" or other is None or min(leaves[n].ndim, leaves[other].ndim) < 2:
            continue
        A, B = leaves[n].shape, leaves[other].shape
        if A[-1] != B[-2] or A[:-2] != B[:-2]:
            raise ValueError(
                f"A {A} and B {B} of {node!r} are no factors (..., d_in, r) and (..., r, d_out) of "
                "a product: give such leaves another optimizer by optax.partition."
            )
        pairs.append(Pair(node, n, other))
    if leaves and not pairs:
        raise ValueError(
            f"no node of the tree has matrices A and B; there are {paths[:5]}. This optimizer is "
            "for the trainable tree of LoRA and its kin."
        )
    return pairs


def damped_inverse(gram: jax.Array, damping: Any) -> jax.Array:
    """(gram + damping I)^+ of symmetric (..., r, r), none of whose eigenvalues is below zero."""
    one = functools.partial(_inverse, damping=jnp.asarray(damping, gram.dtype))
    # One layer after the other: LAPACK calls on a batch can wait for each other's threads.
    for _ in range(gram.ndim - 2):
        one = functools.partial(jax.lax.map, one)
    return one(gram)


def _inverse(gram: jax.Array, damping: jax.Array) -> jax.Array:
    values, V = jnp.linalg.eigh(gram)
    values = jnp.maximum(values, 0) + damping
    # The relative cut of a pseudo-inverse: what lies below it is rounding.
    kept = values > len(gram) * jnp.finfo(gram.dtype).eps * values[-1]
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    return einsum("ir,r,jr->ij", V, inverse, V)


def check_damping(name: str, value: Any) -> None:
    """Raise ValueError if it is a number, not something traced, and none from 0."""
    if isinstance(value, int | float) and not 0 <= value < float("inf"):
        raise ValueError(f"{name}={value!r}: give what is added to the diagonal, from 0.")


def check_params(name: str, params: Any) -> None:
    """Raise ValueError if an update that reads the factors was given none."""
    if params is None:
        raise ValueError(f"{name} reads the factors: call update(grads, state, params).")


def like(tree: Any, original: Any) -> Any:
    """The tree with each leaf in the dtype of the original's."""
    return jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), tree, original)
