"""DoRA: a low-rank update of a kernel's direction, and a trained magnitude per output unit.

    V = W + s A B                    A (d_in, r), B (r, d_out), s = alpha / r
    y = (m / c) * (x V)              c_j = ||V[:, j]||, m (d_out,)

c is a constant for the gradient (paper, section 4.3). A and B start as LoRA's and m as W's column
norms, so the model is unchanged at step 0 up to rounding. The norms come from
    c_j^2 = ||W_j||^2 + 2 s (W^T A)_j . B_j + s^2 B_j . (A^T A) B_j
without a product of the kernel's size. A column of zeros has m = 0 and stays zero.
Trainable: r (d_in + d_out) + d_out per kernel.
"""

from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts.bound import Call, Rule, State
from pefts.core import Declaration, Traits, factory
from pefts.methods.lora import check_dropout, check_rank, delta, drop, factors, low_rank, scaling
from pefts.targets import Select, Site, selection


@factory
def dora(
    rank: int = 8,
    alpha: float = 8.0,
    *,
    rslora: bool = False,
    dropout: float = 0.0,
    **select: Unpack[Select],
) -> Declaration:
    """Weight-decomposed low-rank adaptation: y = (m / c) * (x W + s (x A) B).

    A (d_in, r), B (r, d_out), m (d_out,); c (d_out,) holds the column norms of W + s A B, through
    which no gradient flows. The module's bias is not scaled.

    Args:
      rank: r, from 1 to the kernel's smaller side (Hugging Face PEFT: 8; the paper: 16 and 32).
      alpha: s = alpha / r (Hugging Face PEFT: 8; the paper: 2 r).
      rslora: s = alpha / sqrt(r) instead.
      dropout: probability of dropping an input of the adapter, that is, of everything that the
        adapted product adds to x W; active in calls that are given a "dropout" random stream.
      **select: targets, exclude, rank_pattern, alpha_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, (m / c) * (W + s A B) column by column.

    Raises:
      ValueError: rank out of range, dropout outside [0, 1), or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> pefts.count(pefts.dora(rank=2).init(jax.random.key(0), params).trainable)
      24

    Source: DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353.
    """
    check_rank(rank)
    check_dropout(dropout)

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del stats
        m = jnp.linalg.norm(W.astype(jnp.float32), axis=0)
        return {**factors(key, site), "m": m}, {"scale": jnp.float32(scaling(site, rslora))}

    def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
        c = norms(call.dense(W), p)
        gain = p["m"].astype(c.dtype) / c
        dropped = drop(x, dropout, call.key)
        y = _times(call.dot(dropped, W) + low_rank(dropped, p, call), gain)
        # The base product keeps every input; what dropout takes away is the adapter's change alone.
        return y if dropped is x else y + call.dot(x - dropped, W)

    return Declaration(
        rule=Rule(start, effective, linear, through_dot=True, uses_key=dropout > 0),
        selection=selection(**select),
        traits=Traits(stochastic=dropout > 0),
        rank=rank,
        alpha=alpha,
    )


def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
    """(m / c) * V, V = W + s A B."""
    del call
    V = W + delta(p, W.dtype)
    c = jnp.linalg.norm(jax.lax.stop_gradient(V), axis=0)
    floor = jnp.finfo(V.dtype).tiny
    return V * (p["m"].astype(V.dtype) / jnp.maximum(c, floor))[None]


def norms(W: jax.Array, p: State) -> jax.Array:
    """c (d_out,): the column norms of W + s A B in float32 or better, a constant for the gradient.

    The norms of W are taken anew at each call: that is one more reading of W, and a stored copy
    would be wrong where the base is cast, quantised, trained or adapted by a method before this.
    """
    W = jax.lax.stop_gradient(W.astype(_float32_or_better(W.dtype)))
    A, B, s = (jax.lax.stop_gradient(p[name]).astype(W.dtype) for name in ("A", "B", "scale"))
    exact = jax.lax.Precision.HIGHEST
    own = jnp.sum(W * W, axis=0)
    cross = jnp.sum(jnp.matmul(A.T, W, precision=exact) * B, axis=0)
    gram = jnp.matmul(A.T, A, precision=exact)
    update = jnp.sum(jnp.matmul(gram, B, precision=exact) * B, axis=0)
    squared = own + 2 * s * cross + s * s * update
    # Below eps ||W_j||^2 the sum is nothing but its own rounding.
    info = jnp.finfo(W.dtype)
    return jnp.sqrt(jnp.maximum(jnp.maximum(squared, info.eps * own), info.tiny))


def _times(y: jax.Array, gain: jax.Array) -> jax.Array:
    """y * gain, unrounded: in bfloat16 a gain's rounding is an error that all tokens share."""
    dtype = _float32_or_better(y.dtype)
    gain = gain.astype(dtype).reshape((1,) * (y.ndim - 1) + gain.shape)
    return (y.astype(dtype) * gain).astype(y.dtype)


def _float32_or_better(dtype: Any) -> Any:
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32
