"""Sparse-MeZO: zeroth-order steps of the small weights alone.

    m = [|theta_t| <= h_l],  h_l = the (1 - s) quantile of |theta_0| in each kernel
    g = (L(theta + eps m z) - L(theta - eps m z)) / (2 eps),  theta <- theta - eta g m z

The mask is made of theta where it is used, in the layer body, and never stored. Only entries with
m = 1 move, and one that grows above h_l stops.
"""

from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts import linalg
from pefts.zeroth_order import directions, engine, estimator
from pefts.zeroth_order.engine import Rule, ZerothOrder
from pefts.zeroth_order.estimator import Sampling
from pefts.zeroth_order.mezo import NO_DECAY, decay_of


def sparse_mezo(
    learning_rate: Any,
    *,
    sparsity: float = 0.8,
    weight_decay: float = 0.0,
    no_decay: str = NO_DECAY,
    **sampling: Unpack[Sampling],
) -> ZerothOrder:
    """MeZO on the share 1 - s of each kernel that is smallest at the start.

    NOTE(paper): the algorithm box compares theta itself with h; the text, and this, its magnitude.
    The official code could not be read: this follows the paper's text.

    Args:
      learning_rate: eta, a number or an optax schedule (larger than MeZO's; unchecked).
      sparsity: s, the share that stays as it is, from 0 to below 1 (paper: 0.8).
      weight_decay, no_decay, **sampling: as in `mezo`; decay acts on all entries.

    Returns:
      A `ZerothOrder`; its state holds one threshold for each kernel (a leaf, or a layer of it).

    Raises:
      ValueError: sparsity outside [0, 1), and what `mezo` refuses.

    Example:
      >>> import jax.numpy as jnp
      >>> from pefts.zeroth_order import sparse_mezo
      >>> tx, theta = sparse_mezo(0.01, sparsity=0.5), jnp.arange(4.0)
      >>> moved, _ = tx.step(theta, tx.init(theta), lambda theta: jnp.sum(theta**2))
      >>> (moved != theta).tolist()
      [True, True, False, False]

    Source: Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning,
      arXiv 2402.15751.
    """
    how = estimator.options(sampling)
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity!r}: give the share that stays, from 0 to below 1.")

    def prepare(theta: Any) -> Any:
        return thresholds(theta, 1 - sparsity)

    return engine.build(
        learning_rate,
        how,
        Rule(prepare=prepare, mask=is_small) if sparsity else Rule(),
        decay_of(weight_decay, no_decay),
    )


def thresholds(theta: Any, share: float) -> Any:
    """The quantile of |theta| in each leaf, or in each layer of a stacked one: (L,) or ()."""

    def one(leaf: directions.Leaf, value: jax.Array) -> jax.Array:
        size = jnp.abs(linalg.precise(value))
        rows = size.reshape(value.shape[0], -1) if leaf.stacked else size.reshape(1, -1)
        found = jnp.stack([_quantile(row, share) for row in rows])
        return found if leaf.stacked else found[0]

    values, treedef = jax.tree.flatten(theta)
    return treedef.unflatten(
        [one(*pair) for pair in zip(directions.leaves_of(theta), values, strict=True)]
    )


def is_small(value: jax.Array, threshold: jax.Array) -> jax.Array:
    """m, of one layer."""
    return jnp.abs(value) <= threshold.astype(value.dtype)


def _quantile(sizes: jax.Array, share: float) -> jax.Array:
    """The size at or below which lies the given share of all, rounded to whole entries."""
    count = max(1, round(share * sizes.size))
    return jnp.sort(sizes)[count - 1]
