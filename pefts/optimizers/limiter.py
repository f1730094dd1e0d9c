"""Scaling a gradient by the ratio of norms that an optimizer finds in a smaller space.

phi_j = ||N_:j|| / (||R_:j|| + 1e-8)         how much the optimizer changed R into N
||S_t|| <= gamma ||S_t-1||                   the limit on the growth of what is scaled
"""

from typing import Any

import jax
import jax.numpy as jnp

TINY = 1e-8  # the papers' code adds it to what it divides by


def ratio(N: jax.Array, R: jax.Array, axis: Any) -> jax.Array:
    """phi, with the axes over which the norms are taken kept as ones."""
    ours, theirs = (jnp.linalg.norm(x, axis=axis, keepdims=True) for x in (N, R))
    return ours / (theirs + TINY)


def limit(S: jax.Array, before: jax.Array, growth: Any) -> tuple[jax.Array, jax.Array]:
    """S (..., d_in, d_out), its norm at most `growth` times the one before, and that norm."""
    norm = jnp.linalg.norm(S, axis=(-2, -1))
    growth = jnp.asarray(growth, norm.dtype)
    excess = jnp.maximum(norm / (before + TINY), growth) / growth
    # NOTE(paper): a first gradient of zero would hold what follows near zero for a thousand steps.
    excess = jnp.where(before > TINY, excess, jnp.ones_like(excess))
    return S / excess[..., None, None], norm / excess


def check_growth(growth: Any) -> None:
    """Raise ValueError if gamma is a number, not something traced, below 1 or infinite."""
    if isinstance(growth, int | float) and not 1 <= growth < float("inf"):
        raise ValueError(
            f"growth={growth!r}: give gamma, the largest ratio of norms, from 1; 1e9 for no limit."
        )
