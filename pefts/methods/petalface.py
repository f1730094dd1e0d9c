"""PETALface: two LoRAs beside a kernel, blended by the quality of each example.

    y = x W + drop(s ((1 - a) x A1) B1) + drop(s (a x A2) B2)       A (d_in, r), B (r, d_out)
    a = clip(0.5 + q - tau, 0, 1)

q in [0, 1] is an example's quality (of an image, in the paper), 1 the best: the first LoRA serves
the bad examples and the second the good ones. The A start normal with standard deviation 1 / r and
the B at zero, so the model is unchanged at step 0. Trainable: 2 r (d_in + d_out) per kernel. With
one quality for all inputs it is a LoRA of rank 2 r, and can be merged.

NOTE(paper): its code redraws every factor, B too, when the backbone is built, and does not clip a.
"""

import math
from collections.abc import Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from pefts.bound import Call, Rule, State, matmul
from pefts.core import CONTEXT, Declaration, Traits, factory
from pefts.methods.lora import check_dropout, check_rank, drop, factors
from pefts.targets import Select, Site, selection

QUALITY = "quality"
ONE_KERNEL_EACH = "examples of different quality have different kernels: fix one by quality"


@factory
def petalface(
    rank: int = 8,
    *,
    scale: float = 1.0,
    threshold: float = 0.5,
    higher_is_better: bool = True,
    quality: float | None = None,
    windows: bool = False,
    dropout: float = 0.1,
    **select: Unpack[Select],
) -> Declaration:
    """Quality-blended LoRAs: y = x W + drop(s ((1-a) x A1) B1) + drop(s (a x A2) B2).

    A1, A2 (d_in, r), B1, B2 (r, d_out), a = clip(0.5 + q - tau, 0, 1). Without `quality` those of a
    batch are given to `bind(params, state, quality=...)`, one float in [0, 1] for each entry of the
    first axis of every adapted module's input. States do not depend on `quality`: train with those
    of batches, then merge with a method that fixes it. Scores on another scale, such as BRISQUE's,
    have to be brought to [0, 1] first.

    Args:
      rank: r of each LoRA (paper: 8).
      scale: s (paper: 1); alpha_pattern gives single kernels another one.
      threshold: tau in [0, 1], the quality at which both weigh a half (paper: 0.5).
      higher_is_better: False for scores where 0 is the best, such as BRISQUE's; q is then 1 minus
        the score.
      quality: one score for all inputs; the method can then be merged, and pefts.to_lora converts
        it.
      windows: inputs may hold each example's windows one after another, as windowed attention has
        them: a first axis of n times the batch has n of them, and each gets its example's quality.
      dropout: probability of dropping an output of a LoRA (paper: 0.1); active in calls that are
        given a "dropout" random stream.
      **select: targets (paper: attention's joint query, key and value), exclude, rank_pattern,
        alpha_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging, W + s ((1 - a) A1 B1 + a A2 B2), is exact where one quality holds, and
      refused for a batch of several.

    Raises:
      ValueError: rank out of range, scale zero or not finite, threshold or quality outside [0, 1],
        dropout outside [0, 1), or no kernel matches; at the call: quality missing, not floats
        (batch,), of another length than the batch or, where values are known, outside [0, 1]
        (inside jit they are clipped).

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> pefts.count(pefts.petalface(rank=2).init(jax.random.key(0), params).trainable)
      40

    Source: PETALface: Parameter Efficient Transfer Learning for Low-resolution Face Recognition,
      arXiv 2412.07771.
    """
    check_rank(rank)
    check_dropout(dropout)
    _check(scale, threshold, quality)
    is_blended = quality is None

    def blend_of(p: State, call: Call) -> jax.Array:
        q = _scores(call.context) if quality is None else jnp.asarray([quality])
        return blend(q.astype(p["scale"].dtype), threshold, higher_is_better)

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del W, stats
        pairs = [factors(k, site, "gaussian") for k in jax.random.split(key)]
        leaves = {f"{name}{n + 1}": pair[name] for n, pair in enumerate(pairs) for name in "AB"}
        return leaves, {"scale": jnp.float32(site.alpha)}

    def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
        keys = (None, None) if call.key is None else jax.random.split(call.key)
        a, y = blend_of(p, call), call.dot(x, W)
        for n, weight in enumerate((1 - a, a)):
            h = call.dot(x, p[f"A{n + 1}"])
            weight = weight if quality is not None else _rows(weight, len(h), windows)
            by_row = weight.reshape(-1, *(1,) * (h.ndim - 1)).astype(h.dtype)
            h = h * (by_row * p["scale"].astype(h.dtype))
            y = y + drop(matmul(h, p[f"B{n + 1}"]), dropout, keys[n])
        return y

    def both(p: State, call: Call) -> tuple[jax.Array, jax.Array]:
        a = blend_of(p, call)[0].astype(p["B1"].dtype)
        B = jnp.concatenate([(1 - a) * p["B1"], a * p["B2"]], axis=-2)
        A = jnp.concatenate([p["A1"], p["A2"]], axis=-1)
        return A, B * p["scale"].astype(B.dtype)

    def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
        A, B = (factor.astype(W.dtype) for factor in both(p, call))
        return W + A @ B

    return Declaration(
        rule=Rule(
            start,
            _no_dense_kernel if is_blended else effective,
            linear,
            factors=None if is_blended else both,
            through_dot=True,
            uses_key=dropout > 0,
        ),
        selection=selection(**select),
        traits=Traits(
            mergeable=not is_blended,
            stochastic=dropout > 0,
            needs=(CONTEXT,) if is_blended else (),
        ),
        rank=rank,
        alpha=scale,
        unmergeable=ONE_KERNEL_EACH,
    )


def blend(quality: jax.Array, threshold: float, higher_is_better: bool = True) -> jax.Array:
    """a = clip(0.5 + q - tau, 0, 1), q the quality, or 1 minus a score whose best is 0."""
    q = quality if higher_is_better else 1 - quality
    return jnp.clip(0.5 + (jnp.clip(q, 0, 1) - threshold), 0, 1)


def _no_dense_kernel(W: jax.Array, p: State, call: Call) -> jax.Array:
    del W, p, call
    raise ValueError(
        f"petalface has no dense kernel for a module that pefts does not know; {ONE_KERNEL_EACH}, "
        "or exclude this one."
    )


def _scores(context: Mapping[str, Any]) -> jax.Array:
    if QUALITY not in context:
        raise ValueError(
            "petalface blends by the quality of examples and was not told the batch's: call "
            f"peft.bind(params, state, {QUALITY}=...), or fix one by {QUALITY}."
        )
    scores = jnp.asarray(context[QUALITY])
    if scores.ndim != 1 or not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(
            f"{QUALITY} of shape {scores.shape} and dtype {scores.dtype}: give floats (batch,)."
        )
    try:
        known = np.asarray(scores)
    except jax.errors.TracerArrayConversionError:
        return scores
    outside = known[~((known >= 0) & (known <= 1))]
    if outside.size:
        raise ValueError(
            f"{QUALITY} holds {outside[0]}: bring the scores to [0, 1], as (score - least) / "
            "(most - least)."
        )
    return scores


def _rows(weight: jax.Array, rows: int, windows: bool) -> jax.Array:
    """The weights (batch,) of an input's first axis."""
    examples = len(weight)
    if rows == examples:
        return weight
    if not windows or rows % examples:
        raise ValueError(
            f"{QUALITY} has {examples} entries, and a kernel is applied to inputs whose first axis "
            f"has {rows}: it must be the batch's{' or a multiple' if windows else ''}. Where it "
            "holds the windows of every example one after another, set windows=True; exclude "
            "kernels that see no examples."
        )
    return jnp.repeat(weight, rows // examples)


def _check(scale: float, threshold: float, quality: float | None) -> None:
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"scale={scale!r}: give a finite number other than 0, such as 1.0.")
    for name, value in (("threshold", threshold), ("quality", quality)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name}={value!r}: give a number in [0, 1].")
