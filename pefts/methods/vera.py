"""VeRA: one frozen random pair for all kernels, and two trained vectors for each.

    y = x W + lambda_b * ((lambda_d * (drop(x) A)) B)      A (d_in, r), B (r, d_out)

A and B are slices from the origin of one A (max d_in, r), uniform on +-sqrt(6 / max d_in), and one
B (r, max d_out), uniform on +-sqrt(6 / r). They come from `seed`, not from the key given to init,
and lie once in the state, under "shared". lambda_d (r,) starts at 0.1 and lambda_b (d_out,) at
zero, so the model is unchanged at step 0. Trainable: r + d_out per kernel; it wants a learning rate
some ten times LoRA's.
"""

import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts.bound import Call, Rule, State, matmul
from pefts.core import Declaration, Traits, factory
from pefts.methods.lora import check_dropout, check_rank, drop
from pefts.targets import Select, Site, selection


@factory
def vera(
    rank: int = 256,
    *,
    d_initial: float = 0.1,
    dropout: float = 0.0,
    seed: int = 0,
    **select: Unpack[Select],
) -> Declaration:
    """Vector-based random matrix adaptation: y = x W + lambda_b * ((lambda_d * (x A)) B).

    A (d_in, r) and B (r, d_out) are frozen and shared; lambda_d (r,) and lambda_b (d_out,) train.

    Args:
      rank: r, any positive integer, one for all kernels; it may exceed a kernel's sides (the paper:
        256 and 1024).
      d_initial: start value of lambda_d (the paper: 0.1).
      dropout: probability of dropping an input of the adapter; active in calls that are given a
        "dropout" random stream.
      seed: of the frozen A and B; the same seed and the same largest kernels give the same pair.
      **select: targets, exclude, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W + A diag(lambda_d) B diag(lambda_b).

    Raises:
      ValueError: rank not positive, d_initial zero or not finite, dropout outside [0, 1), a
        negative seed, a rank_pattern or alpha_pattern, or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> pefts.count(pefts.vera(rank=16).init(jax.random.key(0), params).trainable)
      20

    Source: VeRA: Vector-based Random Matrix Adaptation, arXiv 2310.11454.
    """
    check_rank(rank)
    check_dropout(dropout)
    _check(d_initial, seed)

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del key, W, stats
        lambda_d = jnp.full((rank,), d_initial, jnp.float32)
        return {"lambda_b": jnp.zeros((site.d_out,), jnp.float32), "lambda_d": lambda_d}, {}

    def share(key: jax.Array, sites: tuple[Site, ...]) -> tuple[dict, dict]:
        del key
        d_in, d_out = max(site.d_in for site in sites), max(site.d_out for site in sites)
        # The generator is named so that another default cannot change the pair.
        key_A, key_B = jax.random.split(jax.random.key(seed, impl="threefry2x32"))
        return {}, {"A": _uniform(key_A, d_in, rank), "B": _uniform(key_B, rank, d_out)}

    def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
        d_in = jax.eval_shape(call.dense, W).shape[-2]
        A, B = pair(call, d_in, p)
        h = call.dot(drop(x, dropout, call.key), A)
        h = h * _row(p["lambda_d"], h)
        update = matmul(h, B)
        return call.dot(x, W) + update * _row(p["lambda_b"], update)

    return Declaration(
        rule=Rule(start, effective, linear, through_dot=True, uses_key=dropout > 0),
        selection=selection(**select),
        traits=Traits(stochastic=dropout > 0),
        init_shared=share,
    )


def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
    """W + A diag(lambda_d) B diag(lambda_b)."""
    A, B = (factor.astype(W.dtype) for factor in pair(call, W.shape[-2], p))
    lambda_b, lambda_d = (p[name].astype(W.dtype) for name in ("lambda_b", "lambda_d"))
    return W + ((A * lambda_d[None]) @ B) * lambda_b[None]


def pair(call: Call, d_in: int, p: State) -> tuple[jax.Array, jax.Array]:
    """The kernel's own A (d_in, r) and B (r, d_out)."""
    return call.shared["A"][:d_in], call.shared["B"][:, : p["lambda_b"].shape[-1]]


def _uniform(key: jax.Array, fan_in: int, fan_out: int) -> jax.Array:
    """(fan_in, fan_out), uniform on +-sqrt(6 / fan_in)."""
    bound = math.sqrt(6 / fan_in)
    return jax.random.uniform(key, (fan_in, fan_out), jnp.float32, -bound, bound)


def _row(vector: jax.Array, like: jax.Array) -> jax.Array:
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + vector.shape)


def _check(d_initial: float, seed: int) -> None:
    if not math.isfinite(d_initial) or d_initial == 0:
        raise ValueError(
            f"d_initial={d_initial!r}: lambda_b starts at zero, so lambda_d must not; give a "
            "finite number other than zero, such as 0.1."
        )
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed={seed!r}: give a non-negative integer, such as 0.")
