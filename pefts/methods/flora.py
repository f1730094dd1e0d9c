"""FLoRA: a Tucker update, a small core with one factor for each axis of the kernel.

    dW = s G x_in U_in x_out U_out x_1 U_1 ...      G (r_in, r_out, r_1, ...), U_n (size_n, r_n)

A linear kernel is a matrix: dW = s U_in G U_out^T. A convolution's has its window besides, each
axis of it with a factor of its own. The core goes into the factor of the larger rank,
    dW = A B        A (d_in, m), B (m, d_out), m the smaller of r_in r_1 ... and r_out
so that a convolution becomes one with m channels, of the same window, and a 1x1. G starts at zero
and U_n normal of variance 1 / (2 r_n), so the model is unchanged at step 0. Trainable:
r_in r_out r_1 ... + sum of size_n r_n per kernel.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts.bound import Call, State, matmul
from pefts.core import Declaration, Traits, factory
from pefts.low_rank import additive
from pefts.methods.lokr import window_of
from pefts.methods.lora import check_dropout, drop
from pefts.targets import Select, Site, selection

WINDOW = "U_window_"  # and the number of the axis, from 1


@factory
def flora(
    ranks: Sequence[int] = (16, 16),
    scale: float = 4.0,
    *,
    dropout: float = 0.0,
    **select: Unpack[Select],
) -> Declaration:
    """Low-rank core space: W' = W + s G x_in U_in x_out U_out x_1 U_1 ..., a Tucker update.

    G (r_in, r_out, r_1, ...), U_in (channels in, r_in), U_out (d_out, r_out), U_n (size_n, r_n).

    Head axes count as part of the inputs or outputs. Kernels with and without a window need ranks
    of different length: give them two methods by pefts.partition.

    The convolution with m channels costs as much as a LoRA of rank m. A chain of 1x1, small
    convolution and 1x1 would have fewer multiply-adds, for one more pass over the activations.

    Args:
      ranks: (r_in, r_out) of linear kernels and embeddings, (r_in, r_out, r_1, ...) of convolutions
        with the axes of the window in the kernel's order, each from 1 to its axis' size (the
        official example for 7 x 7 windows: 16, 16, 2, 2).
      scale: s, not divided by a rank (the example: 4).
      dropout: probability of dropping an input of the adapter, in calls that are given a "dropout"
        random stream (the example: 0.01).
      **select: targets, exclude, alpha_pattern (of s), axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact.

    Raises:
      ValueError: ranks not at least two positive integers, of another number than a kernel's axes,
        or larger than an axis; scale zero or not finite, dropout outside [0, 1), a convolution
        whose kernel does not begin with its window, a rank_pattern, or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"conv": {"kernel": jax.numpy.ones((3, 3, 6, 4))}}
      >>> peft = pefts.flora((2, 2, 1, 1), targets="conv", axes={"conv": "kkio"})
      >>> pefts.count(peft.init(jax.random.key(0), params).trainable)
      30

    Source: FLoRA: Low-Rank Core Space for N-dimension, arXiv 2405.14739.
    """
    ranks = _checked(ranks)
    check_dropout(dropout)
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"scale={scale!r}: give a finite number other than zero, such as 4.0.")

    def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
        A, B = factors(p, call)
        return call.dot(x, W) + matmul(call.dot(drop(x, dropout, call.key), A), B)

    rule = additive(functools.partial(_start, ranks=ranks), factors)
    return Declaration(
        rule=rule._replace(linear=linear, uses_key=dropout > 0),
        selection=selection(**select),
        traits=Traits(stochastic=dropout > 0),
        alpha=scale,
    )


def factors(p: State, call: Call) -> tuple[jax.Array, jax.Array]:
    """A (d_in, m), B (m, d_out) with A B = s dW, a window's places outermost among the inputs."""
    del call
    G, U_in, U_out = p["G"], p["U_in"], p["U_out"]
    outputs = p["scale"].astype(U_out.dtype) * U_out.T
    window = [p[f"{WINDOW}{n}"] for n in range(1, G.ndim - 1)]
    if math.prod(G.shape) // G.shape[1] <= G.shape[1]:
        inputs = functools.reduce(jnp.kron, [*window, U_in])
        core = jnp.moveaxis(G, (0, 1), (-2, -1)).reshape(-1, G.shape[1])
        return inputs, core @ outputs
    sizes, ranks = "abc"[: len(window)], "pqr"[: len(window)]
    terms = [
        f"xy{ranks}",
        "ix",
        *(f"{size}{rank}" for size, rank in zip(sizes, ranks, strict=True)),
    ]
    A = jnp.einsum(f"{','.join(terms)}->{sizes}iy", G, U_in, *window)
    return A.reshape(-1, G.shape[1]), outputs


def _start(
    key: jax.Array, W: jax.Array, *, site: Site, stats: Any, ranks: tuple[int, ...]
) -> tuple[dict, dict]:
    del W, stats
    window = window_of(site)
    sizes = (site.d_in // math.prod(window), site.d_out, *window)
    _check_fit(site, sizes, ranks)
    names = ["U_in", "U_out", *(f"{WINDOW}{n + 1}" for n in range(len(window)))]
    trainable = {"G": jnp.zeros(ranks, jnp.float32)}
    for n, (name, size, rank) in enumerate(zip(names, sizes, ranks, strict=True)):
        draw = jax.random.normal(jax.random.fold_in(key, n), (size, rank), jnp.float32)
        trainable[name] = draw * math.sqrt(0.5 / rank)
    return trainable, {"scale": jnp.float32(site.alpha)}


def _check_fit(site: Site, sizes: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    names = ("in", "out", *(f"window {n}" for n in range(1, len(sizes) - 1)))
    described = ", ".join(f"{name} {size}" for name, size in zip(names, sizes, strict=True))
    if len(ranks) != len(sizes):
        raise ValueError(
            f"ranks={ranks} are {len(ranks)}, and {site.path!r} of shape {site.shape} has "
            f"{len(sizes)} axes ({described}): give one rank for each, or exclude it and give it "
            "a method of its own by pefts.partition."
        )
    if any(rank > size for rank, size in zip(ranks, sizes, strict=True)):
        raise ValueError(
            f"ranks={ranks} are out of range for {site.path!r}, whose axes are {described}: choose "
            f"at most {sizes}, or exclude it."
        )


def _checked(ranks: Sequence[int]) -> tuple[int, ...]:
    given = list(ranks) if isinstance(ranks, Sequence) else [ranks]
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in given)
    if not whole or not 2 <= len(given) <= 5:
        raise ValueError(
            f"ranks={ranks!r}: give two to five positive integers, of the inputs, of the outputs "
            "and of each axis of a convolution's window, such as (16, 16) or (16, 16, 2, 2)."
        )
    return tuple(given)
