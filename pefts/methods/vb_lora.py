"""VB-LoRA: LoRA factors put together from one bank of vectors that all kernels share.

    v = sum_{j in top} w_j bank_j      w = softmax of the k largest logits, top their places
    y = x W + (drop(x) A) B            A (d_in, r), B (r, d_out)

Every piece v of b neighbouring entries, of a row of A^T or of B, has h logits of its own, one for
each vector of the bank (h, b). The bank starts uniform on +-0.02 and the logits normal with
standard deviation 0.1, so the update is small but not zero at step 0. There is no scale. Trainable:
h r (d_in + d_out) / b per kernel, and the bank, h b, once.
"""

import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts.bound import Call, State, matmul
from pefts.core import Declaration, Traits, factory
from pefts.low_rank import additive
from pefts.methods.lora import check_dropout, check_rank, drop
from pefts.targets import Select, Site, selection


@factory
def vb_lora(
    rank: int = 4,
    *,
    vectors: int = 256,
    length: int = 256,
    top: int = 2,
    dropout: float = 0.0,
    bank_bound: float = 0.02,
    logits_std: float = 0.1,
    **select: Unpack[Select],
) -> Declaration:
    """Vector-bank LoRA: y = x W + (x A) B, each piece of A and B a mixture of k shared vectors.

    bank (h, b); logits_A (r, d_in / b, h) and logits_B (r, d_out / b, h).

    Args:
      rank: r, from 1 to the kernel's smaller side (Hugging Face PEFT: 4).
      vectors: h, of the bank (Hugging Face PEFT: 256).
      length: b, a divisor of both sides of every kernel (Hugging Face PEFT: 256).
      top: k, how many vectors make up a piece, from 1 to h (Hugging Face PEFT: 2); with 1 the
        logits have no gradient.
      dropout: probability of dropping an input of the adapter; active in calls that are given a
        "dropout" random stream.
      bank_bound: the bank starts uniform on +- this (Hugging Face PEFT: 0.02).
      logits_std: standard deviation of the logits' start (Hugging Face PEFT: 0.1).
      **select: targets, exclude, rank_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W + A B.

    Raises:
      ValueError: a number out of range, a length that does not divide a side, dropout outside
        [0, 1), or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> peft = pefts.vb_lora(rank=2, vectors=5, length=2)
      >>> pefts.count(peft.init(jax.random.key(0), params).trainable)
      60

    Source: VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks, arXiv 2405.15179
      (unchecked: as Hugging Face PEFT has it).
    """
    check_rank(rank)
    check_dropout(dropout)
    _check(vectors, length, top)
    for name, value in (("bank_bound", bank_bound), ("logits_std", logits_std)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value!r}: give a positive number, such as 0.1.")

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del W, stats
        _check_fit(length, site)
        logits = {}
        sides = (("logits_A", site.d_in), ("logits_B", site.d_out))
        for part, (name, side) in zip(jax.random.split(key), sides, strict=True):
            shape = (site.rank, side // length, vectors)
            logits[name] = logits_std * jax.random.normal(part, shape, jnp.float32)
        return logits, {}

    def share(key: jax.Array, sites: tuple[Site, ...]) -> tuple[dict, dict]:
        del sites
        shape = (vectors, length)
        bank = jax.random.uniform(key, shape, jnp.float32, -bank_bound, bank_bound)
        return {"bank": bank}, {}

    def factors(p: State, call: Call) -> tuple[jax.Array, jax.Array]:
        A, B = (mixtures(p[name], call.shared["bank"], top) for name in ("logits_A", "logits_B"))
        return A.T, B

    def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
        A, B = factors(p, call)
        return call.dot(x, W) + matmul(call.dot(drop(x, dropout, call.key), A), B)

    # Without `factors` in the rule: exported, it has a format of its own and becomes no LoRA.
    rule = additive(start, factors)._replace(linear=linear, factors=None)
    return Declaration(
        rule=rule._replace(uses_key=dropout > 0),
        selection=selection(**select),
        traits=Traits(identity_at_init=False, stochastic=dropout > 0),
        rank=rank,
        init_shared=share,
    )


def mixtures(logits: jax.Array, bank: jax.Array, top: int) -> jax.Array:
    """(r, d): of logits (r, d / b, h), each piece the mean of `top` vectors of the bank (h, b)."""
    largest, places = jax.lax.top_k(logits, top)
    weights = jax.nn.softmax(largest, axis=-1).astype(bank.dtype)
    pieces = jnp.einsum("rdk,rdkb->rdb", weights, bank[places])
    return pieces.reshape(len(logits), -1)


def _check(vectors: int, length: int, top: int) -> None:
    for name, value in (("vectors", vectors), ("length", length), ("top", top)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: give a positive integer.")
    if top > vectors:
        raise ValueError(f"top={top}: the bank has vectors={vectors}; choose 1 to {vectors}.")


def _check_fit(length: int, site: Site) -> None:
    if site.d_in % length or site.d_out % length:
        raise ValueError(
            f"length={length} does not divide both sides of {site.path!r}, a {site.d_in} x "
            f"{site.d_out} kernel: choose a divisor of {math.gcd(site.d_in, site.d_out)}, or "
            "exclude it."
        )
