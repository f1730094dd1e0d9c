"""LoRA: a low-rank update beside a frozen kernel.

    y = x W + s (drop(x) A) B        A (d_in, r), B (r, d_out)

s = alpha / r, or alpha / sqrt(r) with rsLoRA. A convolution's A has the kernel's window, its B is
1x1; an embedding looks A up. A starts uniform on +-1/sqrt(d_in) and B at zero (embeddings: A zero
and B normal), so the model is unchanged at step 0. Trainable: r (d_in + d_out) per kernel.
"""

import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts.bound import Call, Rule, State, matmul
from pefts.core import Declaration, Traits, factory
from pefts.targets import Select, Site, selection

INITS = ("kaiming", "gaussian")


@factory
def lora(
    rank: int = 8,
    alpha: float = 8.0,
    *,
    rslora: bool = False,
    dropout: float = 0.0,
    init: str = "kaiming",
    **select: Unpack[Select],
) -> Declaration:
    """Low-rank adaptation: y = x W + s (drop(x) A) B, with A (d_in, r) and B (r, d_out).

    Args:
      rank: r, from 1 to the kernel's smaller side (Hugging Face PEFT: 8).
      alpha: s = alpha / r (Hugging Face PEFT: 8).
      rslora: s = alpha / sqrt(r) instead (rank-stabilised LoRA).
      dropout: probability of dropping an input of the adapter; active in calls that are given a
        "dropout" random stream.
      init: of A, "kaiming" (uniform on +-1/sqrt(d_in)) or "gaussian" (standard deviation 1/r).
      **select: targets, exclude, rank_pattern, alpha_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W + s A B.

    Raises:
      ValueError: rank out of range, dropout outside [0, 1), unknown init, or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> pefts.count(pefts.lora(rank=2).init(jax.random.key(0), params).trainable)
      20

    Source: LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685; A Rank
      Stabilization Scaling Factor for Fine-Tuning with LoRA, arXiv 2312.03732.
    """
    check_rank(rank)
    check_dropout(dropout)
    if init not in INITS:
        raise ValueError(f"init={init!r} is unknown; choose one of {INITS}.")

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del W, stats
        return factors(key, site, init), {"scale": jnp.float32(scaling(site, rslora))}

    def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
        return call.dot(x, W) + low_rank(drop(x, dropout, call.key), p, call)

    return Declaration(
        rule=Rule(start, effective, linear, through_dot=True, uses_key=dropout > 0),
        selection=selection(**select),
        traits=Traits(stochastic=dropout > 0),
        rank=rank,
        alpha=alpha,
    )


def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
    """W + s A B."""
    del call
    return W + delta(p, W.dtype)


def delta(p: State, dtype: Any) -> jax.Array:
    """s A B (d_in, d_out)."""
    A, B, scale = (p[name].astype(dtype) for name in ("A", "B", "scale"))
    return scale * (A @ B)


def low_rank(x: Any, p: State, call: Call) -> jax.Array:
    """s (x A) B in the product's dtype."""
    h = call.dot(x, p["A"])
    return matmul(h * p["scale"].astype(h.dtype), p["B"])


def factors(key: jax.Array, site: Site, init: str = "kaiming") -> dict[str, jax.Array]:
    """A and B whose product is zero."""
    A, B = (site.d_in, site.rank), (site.rank, site.d_out)
    if site.is_embedding:
        return {"A": jnp.zeros(A, jnp.float32), "B": jax.random.normal(key, B, jnp.float32)}
    if init == "gaussian":
        start = jax.random.normal(key, A, jnp.float32) / site.rank
    else:
        bound = 1 / math.sqrt(site.d_in)
        start = jax.random.uniform(key, A, jnp.float32, -bound, bound)
    return {"A": start, "B": jnp.zeros(B, jnp.float32)}


def scaling(site: Site, rslora: bool = False) -> float:
    """alpha / r, or alpha / sqrt(r)."""
    return site.alpha / (math.sqrt(site.rank) if rslora else site.rank)


def drop(x: Any, rate: float, key: jax.Array | None) -> Any:
    """Inverted dropout; identity without a key, and for ids."""
    if rate == 0 or key is None or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def check_rank(rank: int) -> None:
    """Raise ValueError for a rank that no kernel can have."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank={rank!r}: give a positive integer, such as 8.")


def check_dropout(dropout: float) -> None:
    """Raise ValueError unless dropout is a probability below 1."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r}: give a probability in [0, 1).")
