"""LoRA-GA: a LoRA that starts along the gradient, so that its first step is like full training's.

    G (d_in, d_out), the loss's gradient with respect to W, ~ U diag(S) V^T at rank 2r
    A0 = c_A U[:, I_A] (d_in, r)     B0 = c_B V[:, I_B]^T (r, d_out)
    y = x W + s (x A B - x A0 B0)    s = alpha / r, or alpha / sqrt(r) with rsLoRA

I_A and I_B are two halves of the 2r directions (`direction`), c_A and c_B their scales (`scale`).
A and B are trained from A0 and B0, which stay beside W: W itself is left whole, and as one product
of rank 2r the difference is exactly zero at step 0. With orthonormal factors a step of gradient
descent changes W' along A0 A0^T G + G B0^T B0, and with c_A = c_B that is the best approximation of
G at rank 2r. Trainable: r (d_in + d_out) per kernel.
"""

import math
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from pefts import linalg
from pefts.core import Declaration, Traits, factory
from pefts.low_rank import additive
from pefts.methods.lora import check_rank, scaling
from pefts.methods.pissa import check_alpha, factors, taken_over
from pefts.targets import Select, Site, selection

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "unit", "gd_scale", "weight_svd")
VARIANTS = ("peft", "paper")


@factory
def lora_ga(
    rank: int = 8,
    alpha: float = 8.0,
    *,
    rslora: bool = False,
    direction: str = "ArB2r",
    scale: str = "stable",
    stable_gamma: float = 16.0,
    variant: str = "peft",
    svd: str = "exact",
    **select: Unpack[Select],
) -> Declaration:
    """LoRA started from the gradient's singular vectors: y = x W + s (x A B - x A0 B0).

    A (d_in, r) and B (r, d_out) are trained from A0 and B0, which come from the 2r largest singular
    triplets U, S, V of the gradient G (d_in, d_out): pefts.calibrate(..., peft, loss=loss).
    Train without weight decay, which would take s A0 B0 out of W.

    NOTE(paper): the released code has orthonormal factors, both scaled ("paper"); Hugging Face PEFT
      multiplies B by S and, but for "gd_scale", scales B alone ("peft"). B is then as small as the
      gradient, changes with the scale of the loss, and the first step follows G's directions with
      other weights.

    Args:
      rank: r; 2r is at most the kernel's smaller side (Hugging Face PEFT and released code: 8).
      alpha: s = alpha / r (Hugging Face PEFT and released code: 8).
      rslora: s = alpha / sqrt(r) instead.
      direction: which triplets A and B take, counted from the largest: "ArB2r" the first r and the
        next r, "A2rBr" the next r and the first r, "ArBr" the 2nd, 4th, ... and the 1st, 3rd, ...,
        "random" any of the 2r (the same for both with "peft", disjoint with "paper").
      scale: "stable", d_out^(1/4) / sqrt(stable_gamma); "unit", 1; "gd_scale", 1 / s on both
        factors; "weight_svd", for "peft" the largest singular value of W over that of B, for
        "paper" the mean of sqrt(sigma_i(W) / s) over the r largest.
      stable_gamma: gamma, above 0 (released code: 16).
      variant: "peft" or "paper".
      svd: "exact", or "randomized" (as in both programs), which is faster for a small rank of a
        large kernel.
      **select: targets, exclude, rank_pattern, alpha_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W + s (A B - A0 B0).

    Raises:
      ValueError: 2r above a kernel's smaller side, alpha not positive, stable_gamma out of range,
        unknown direction, scale, variant or svd, no gradients in stats, or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> stats = {"query/kernel": {"gradient": jax.numpy.eye(6, 4)}}
      >>> state = pefts.lora_ga(rank=2).init(jax.random.key(0), params, stats)
      >>> pefts.count(state.trainable)
      20

    Source: LoRA-GA: Low-Rank Adaptation with Gradient Approximation, arXiv 2407.05000.
    """
    check_rank(rank)
    check_alpha(alpha, select)
    for argument, value, known in (
        ("direction", direction, DIRECTIONS),
        ("scale", scale, SCALES),
        ("variant", variant, VARIANTS),
        ("svd", svd, linalg.METHODS),
    ):
        if value not in known:
            raise ValueError(f"{argument}={value!r} is unknown; choose one of {known}.")
    if not 0 < stable_gamma < math.inf:
        raise ValueError(f"stable_gamma={stable_gamma!r}: give a positive number, such as 16.")

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        _check_directions(site)
        s = scaling(site, rslora)
        parts = _directions(key, stats["gradient"], site.rank, direction, variant, svd)
        c_A, c_B = _scales(parts, W, site, scale, variant, s, stable_gamma, svd)
        return taken_over(c_A * parts.A, c_B * parts.B, jnp.asarray(s, parts.A.dtype))

    return Declaration(
        rule=additive(start, factors),
        selection=selection(**select),
        traits=Traits(needs=("gradient",)),
        rank=rank,
        alpha=alpha,
    )


class _Parts(NamedTuple):
    """What the gradient gives to A and to B, before they are scaled."""

    A: jax.Array  # (d_in, r), orthonormal columns
    B: jax.Array  # (r, d_out), orthonormal rows; for "peft" times S_B
    S_B: jax.Array  # (r,), the singular values of B's directions


def _directions(
    key: jax.Array, G: jax.Array, r: int, direction: str, variant: str, svd: str
) -> _Parts:
    U, S, V = linalg.svd(G, 2 * r, method=svd)
    first, second = jnp.arange(r), jnp.arange(r, 2 * r)
    if direction == "ArB2r":
        I_A, I_B = first, second
    elif direction == "A2rBr":
        I_A, I_B = second, first
    elif direction == "ArBr":
        I_A, I_B = 2 * first + 1, 2 * first
    else:
        order = jax.random.permutation(key, 2 * r)
        I_A, I_B = order[:r], order[:r] if variant == "peft" else order[r:]
    S_B, B = S[I_B], V[:, I_B].T
    return _Parts(U[:, I_A], S_B[:, None] * B if variant == "peft" else B, S_B)


def _scales(
    parts: _Parts,
    W: jax.Array,
    site: Site,
    scale: str,
    variant: str,
    s: float,
    stable_gamma: float,
    svd: str,
) -> tuple[Any, Any]:
    """c_A and c_B."""
    if scale == "unit":
        return 1.0, 1.0
    if scale == "gd_scale":
        return 1 / s, 1 / s
    if scale == "stable":
        c = site.d_out**0.25 / math.sqrt(stable_gamma)
    else:
        c = _weight_scale(linalg.svd(W, site.rank, method=svd).S, parts.S_B, variant, s)
    return (1.0, c) if variant == "peft" else (c, c)


def _weight_scale(S_W: jax.Array, S_B: jax.Array, variant: str, s: float) -> jax.Array:
    if variant == "paper":
        return jnp.mean(jnp.sqrt(S_W / s))
    nonzero = S_B[0] > 0
    return jnp.where(nonzero, S_W[0] / jnp.where(nonzero, S_B[0], jnp.ones_like(S_B[0])), 1.0)


def _check_directions(site: Site) -> None:
    side = min(site.d_in, site.d_out)
    if 2 * site.rank > side:
        raise ValueError(
            f"rank={site.rank}: lora_ga takes 2 r = {2 * site.rank} singular directions of the "
            f"gradient, and that of {site.path!r}, a {site.d_in} x {site.d_out} kernel, has "
            f"{side}: choose 1 to {side // 2}, or give it one of its own by rank_pattern."
        )
