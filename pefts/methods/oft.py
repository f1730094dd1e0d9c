"""OFT: the input of a frozen kernel is rotated, block by block.

    y = (x R) W + b                  R = diag(R_1, ..., R_n), each b x b, n = d_in / b
    R_i = (I - Q_i)(I + Q_i)^-1      Q_i skew-symmetric: Cayley's form of a rotation

Q (n, b (b - 1) / 2) holds the strict upper triangles row by row and starts at zero, so the model is
unchanged at step 0. A rotation keeps all lengths and angles between the kernel's columns. With
`terms` the inverse is a series, I - 2 Q + 2 Q^2 - ... +- Q^(terms - 1): no solve, but R is then
orthogonal only to the order of ||Q||^(terms - 1). x is rotated, R W is never built in training.
Trainable: n b (b - 1) / 2 per kernel, b (b - 1) / 2 with shared blocks.

NOTE(paper): Hugging Face PEFT's series has the opposite sign of its exact form, so the same numbers
  rotate the other way there. Here both have the exact form's; pefts.formats.oft changes the sign.
"""

import functools
import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts import linalg
from pefts.bound import Call, Rule, State
from pefts.core import Declaration, PeftState, Traits, factory
from pefts.methods.lora import check_dropout
from pefts.targets import Select, Site, selection

DEFAULT_SIZE = 32


@factory
def oft(
    block_size: int | None = None,
    blocks: int | None = None,
    *,
    terms: int | None = 5,
    block_share: bool = False,
    coft_eps: float | None = None,
    dropout: float = 0.0,
    **select: Unpack[Select],
) -> Declaration:
    """Orthogonal fine-tuning: y = (x R) W + b, R block-diagonal of Cayley rotations (b, b).

    Set weight decay to 0 unless it is meant to pull R to the identity.

    Args:
      block_size: b, a divisor of every kernel's d_in, from 2 (32 where `blocks` is absent too).
      blocks: n = d_in / b instead.
      terms: of Cayley's series, from 2 (Hugging Face PEFT: 5); None: exact, by one solve (the
        paper).
      block_share: one b x b rotation for all blocks of a kernel.
      coft_eps: constrained OFT: Q is kept within a Frobenius norm of coft_eps / sqrt(n) in every
        block, n = 1 for a shared one (Hugging Face PEFT: 6e-5). None: unconstrained.
      dropout: probability of leaving a block of the input unrotated; active in calls that are given
        a "dropout" random stream.
      **select: targets, exclude, axes; see pefts.targets.Select. A convolution's kernel is rotated
        over its window and channels, densely, one layer at a time.

    Returns:
      A Peft; merging is exact, R W.

    Raises:
      ValueError: block_size and blocks both given, out of range or no divisor of a d_in, terms
        below 2, coft_eps not positive, dropout outside [0, 1), a target that is an embedding, a
        rank_pattern or alpha_pattern, or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> pefts.count(pefts.oft(block_size=3).init(jax.random.key(0), params).trainable)
      6

    Source: Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv 2306.07280;
      Orthogonal Finetuning Made Scalable, arXiv 2506.19847 (the series).
    """
    check_sizes(block_size, blocks)
    check_dropout(dropout)
    _check(terms, coft_eps)

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del key, W, stats
        b, n = sizes(site, block_size, blocks, DEFAULT_SIZE)
        return {"Q": jnp.zeros((1 if block_share else n, b * (b - 1) // 2), jnp.float32)}, {}

    rotation = functools.partial(_rotation, terms=terms, eps=coft_eps)

    def linear(x: jax.Array, W: Any, p: State, call: Call) -> jax.Array:
        R = rotation(p["Q"], x.shape[-1])
        return call.dot(linalg.block_diagonal(x, kept(R, dropout, call.key)), W)

    def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
        del call
        R = rotation(p["Q"].astype(W.dtype), len(W))
        return jnp.einsum("nij,njo->nio", R, W.reshape(*R.shape[:2], -1)).reshape(W.shape)

    return Declaration(
        rule=Rule(start, effective, linear, uses_key=dropout > 0),
        selection=selection(**select),
        traits=Traits(stochastic=dropout > 0),
        update=None if coft_eps is None else functools.partial(_held, eps=coft_eps),
    )


def project(Q: jax.Array, eps: float) -> jax.Array:
    """Q (n, b (b - 1) / 2), each block's matrix no longer than eps / sqrt(n) in Frobenius norm.

    NOTE(paper): as in Hugging Face PEFT it is Q that is constrained, and not R - I.
    """
    norm = jnp.sqrt(2 * jnp.sum(Q * Q, axis=-1, keepdims=True))  # both triangles
    radius = eps / Q.shape[-2] ** 0.5
    return jnp.where(norm > radius, Q * (radius / jnp.where(norm > 0, norm, 1)), Q)


def _held(state: PeftState, grads: Any, step: jax.Array, *, eps: float) -> PeftState:
    """The state with every Q where the constraint allows it."""
    del grads, step
    held = {path: {"Q": project(group["Q"], eps)} for path, group in state.trainable.items()}
    return state._replace(trainable=held)


def sizes(site: Site, block_size: int | None, blocks: int | None, default: int) -> tuple[int, int]:
    """(b, n) of this kernel.

    Raises:
      ValueError: the size given does not divide d_in, or the blocks have one entry, or the inputs
        are ids.
    """
    if site.is_embedding:
        raise ValueError(
            f"targets match {site.path!r}, an embedding, whose inputs are ids: there is nothing to "
            "rotate. Exclude it."
        )
    name, value = (
        ("blocks", blocks) if blocks is not None else ("block_size", block_size or default)
    )
    allowed = [n for n in range(1, site.d_in + 1) if site.d_in % n == 0]
    allowed = [n for n in allowed if (site.d_in // n if name == "blocks" else n) > 1]
    if value not in allowed:
        near = [*[n for n in allowed if n < value][-1:], *[n for n in allowed if n > value][:1]]
        raise ValueError(
            f"{name}={value} does not cut the {site.d_in} inputs of {site.path!r} into blocks of "
            f"one size, from 2: near divisors are {near}. Choose one, or give this kernel a method "
            "of its own by pefts.partition."
        )
    return (site.d_in // value, value) if name == "blocks" else (value, site.d_in // value)


def check_sizes(block_size: int | None, blocks: int | None) -> None:
    """Raise ValueError unless at most one is given, as an integer."""
    for name, value, least in (("block_size", block_size, 2), ("blocks", blocks, 1)):
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r}: give an integer of at least {least}, or None.")
    if block_size is not None and blocks is not None:
        raise ValueError(
            f"block_size={block_size} and blocks={blocks}: each decides the other; give one."
        )


def kept(R: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """The rotations R (..., b, b), each replaced by the identity with this probability."""
    if rate == 0 or key is None:
        return R
    left_out = jax.random.bernoulli(key, rate, R.shape[:-2])[..., None, None]
    return jnp.where(left_out, jnp.broadcast_to(jnp.eye(R.shape[-1], dtype=R.dtype), R.shape), R)


def _rotation(Q: jax.Array, d_in: int, terms: int | None, eps: float | None) -> jax.Array:
    """R (n, b, b) of Q (n or 1, b (b - 1) / 2)."""
    b = (1 + math.isqrt(1 + 8 * Q.shape[-1])) // 2
    if eps is not None:
        # The state is projected after every update, so that this is no change; where it is one, the
        # gradient is that of the projected Q.
        Q = Q + jax.lax.stop_gradient(project(Q, eps) - Q)
    skew = linalg.skew(Q, b)
    R = linalg.cayley(skew) if terms is None else linalg.cayley_neumann(skew, terms)
    return jnp.broadcast_to(R, (d_in // b, b, b))


def _check(terms: int | None, eps: float | None) -> None:
    is_whole = isinstance(terms, int) and not isinstance(terms, bool)
    if terms is not None and not (is_whole and terms >= 2):
        raise ValueError(f"terms={terms!r}: give an integer of at least 2, or None for all.")
    if eps is not None and not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"coft_eps={eps!r}: give a positive number, or None for no constraint.")
