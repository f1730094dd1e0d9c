"""PVeRA: VeRA whose hidden vector is drawn from a normal distribution that it learns.

    mu = lambda_mu * (drop(x) A_mu)      sigma = exp(lambda_var * (drop(x) A_var) / 2)
    y = x W + lambda_b * ((mu + sigma * noise) B)

A = [A_mu, A_var] (d_in, 2 r) and B (r, d_out) are frozen slices of one pair for all kernels, as in
VeRA; lambda_d = [lambda_mu, lambda_var] (2 r,) starts at 0.1 and lambda_b (d_out,) at zero, so the
model is unchanged at step 0. The noise is standard normal in calls that are given a "dropout"
random stream, and zero in others, where the layer is a VeRA of its mean. Trainable: 2 r + d_out per
kernel.
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
def pvera(
    rank: int = 256,
    *,
    d_initial: float = 0.1,
    dropout: float = 0.0,
    seed: int = 0,
    **select: Unpack[Select],
) -> Declaration:
    """Probabilistic VeRA: y = x W + lambda_b * ((mu + exp(v / 2) * noise) B), [mu, v] = l * (x A).

    A (d_in, 2 r) and B (r, d_out) are frozen and shared; l = lambda_d (2 r,) and lambda_b (d_out,)
    train, l's second half only in calls with noise.

    Args:
      rank: r, any positive integer, one for all kernels; it may exceed a kernel's sides (Hugging
        Face PEFT: 256).
      d_initial: start value of lambda_d (Hugging Face PEFT: 0.1).
      dropout: probability of dropping an input of the adapter; like the noise, active in calls that
        are given a "dropout" random stream.
      seed: of the frozen A and B; the same seed and the same largest kernels give the same pair.
      **select: targets, exclude, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging takes the mean, W + A_mu diag(lambda_mu) B diag(lambda_b).

    Raises:
      ValueError: rank not positive, d_initial zero or not finite, dropout outside [0, 1), a
        negative seed, a rank_pattern or alpha_pattern, or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> pefts.count(pefts.pvera(rank=16).init(jax.random.key(0), params).trainable)
      36

    Source: PVeRA: Probabilistic Vector-Based Random Matrix Adaptation, arXiv 2512.07703 (unchecked:
      as Hugging Face PEFT has it, without a divergence in the loss).
    """
    check_rank(rank)
    check_dropout(dropout)
    _check(d_initial, seed)

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del key, W, stats
        lambda_d = jnp.full((2 * rank,), d_initial, jnp.float32)
        return {"lambda_b": jnp.zeros((site.d_out,), jnp.float32), "lambda_d": lambda_d}, {}

    def share(key: jax.Array, sites: tuple[Site, ...]) -> tuple[dict, dict]:
        del key
        d_in, d_out = max(site.d_in for site in sites), max(site.d_out for site in sites)
        # The generator is named so that another default cannot change the pair.
        key_A, key_B = jax.random.split(jax.random.key(seed, impl="threefry2x32"))
        return {}, {"A": _uniform(key_A, d_in, 2 * rank), "B": _uniform(key_B, rank, d_out)}

    def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
        A = call.shared["A"][: jax.eval_shape(call.dense, W).shape[-2]]
        update = matmul(_hidden(x, A, p["lambda_d"], call, dropout), _right(p, call))
        return call.dot(x, W) + update * _row(p["lambda_b"], update)

    return Declaration(
        rule=Rule(start, effective, linear, through_dot=True, uses_key=True),
        selection=selection(**select),
        traits=Traits(stochastic=True),
        init_shared=share,
    )


def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
    """W + A_mu diag(lambda_mu) B diag(lambda_b)."""
    B, lambda_b, lambda_d = (
        m.astype(W.dtype) for m in (_right(p, call), p["lambda_b"], p["lambda_d"])
    )
    A_mu = call.shared["A"][: W.shape[-2], : len(B)].astype(W.dtype)
    return W + ((A_mu * lambda_d[None, : len(B)]) @ B) * lambda_b[None]


def _hidden(x: Any, A: jax.Array, lambda_d: jax.Array, call: Call, dropout: float) -> jax.Array:
    """mu + sigma * noise, or mu without a random stream."""
    rank = len(lambda_d) // 2
    if call.key is None:
        mu = call.dot(x, A[:, :rank])
        return mu * _row(lambda_d[:rank], mu)
    key_drop, key_noise = jax.random.split(call.key)
    both = call.dot(drop(x, dropout, key_drop), A)
    mu, log_variance = jnp.split(both * _row(lambda_d, both), 2, axis=-1)
    return mu + jnp.exp(log_variance / 2) * jax.random.normal(key_noise, mu.shape, mu.dtype)


def _right(p: State, call: Call) -> jax.Array:
    """The kernel's own B (r, d_out)."""
    return call.shared["B"][:, : p["lambda_b"].shape[-1]]


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
