"""Riemannian preconditioning of LoRA's factors, in front of any optimizer.

    g_A <- g_A (B B^T + reg I)^-1         A (d_in, r), B (r, d_out)
    g_B <- (A^T A + reg I)^-1 g_B

with both factors as they are before the step, so that a step of A B hardly depends on how the
product is divided between its factors. It has no state.
"""

from typing import Any

import jax
import optax

from pefts import linalg
from pefts.optimizers import projection as subspaces
from pefts.optimizers.factors import (
    check_damping,
    check_params,
    damped_inverse,
    einsum,
    factor_pairs,
    like,
)


def riemannian(
    learning_rate: Any,
    *,
    reg: Any = 1e-2,
    inner: optax.GradientTransformation | None = None,
    weight_decay: Any = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer behind the preconditioner, weight decay and a learning rate.

    Args:
      learning_rate: eta, a number or an optax schedule.
      reg, inner: as in `scale_by_riemannian`.
      weight_decay: of every leaf, decoupled.

    Returns:
      A transformation of the trainable tree; its update needs params.

    Raises:
      ValueError: as `scale_by_riemannian`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from pefts.optimizers.riemannian import riemannian
      >>> params = {"query/kernel": {"A": jnp.ones((6, 2)), "B": jnp.ones((2, 4))}}
      >>> tx = riemannian(1e-3, weight_decay=0.01)
      >>> updates, state = tx.update(params, tx.init(params), params)

    Source: Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, arXiv 2402.02347.
    """
    return subspaces.with_rate(
        scale_by_riemannian(reg=reg, inner=inner),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
    )


def scale_by_riemannian(
    *, reg: Any = 1e-2, inner: optax.GradientTransformation | None = None
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` on g_A (B B^T + reg I)^-1 and (A^T A + reg I)^-1 g_B.

    Every node with an A (..., d_in, r) and a B (..., r, d_out) is a pair, layer by layer where they
    are stacked; other leaves reach `inner` as they are. Directions in which a factor is zero to
    rounding, and reg too, get no update: the inverse is a pseudo-inverse.

    NOTE(paper): Hugging Face PEFT leaves the factors of embeddings as they are; here they are a
      pair like any other. To spare them use optax.partition.

    Args:
      reg: added to the diagonal, from 0 (Hugging Face PEFT: 0.01).
      inner: a transformation (None: optax.scale_by_adam()).

    Returns:
      A transformation; its state is that of `inner`, in float32 or better, its updates in the
      gradients' dtype.

    Raises:
      ValueError: reg is negative, or `inner` is no transformation; at init: the tree has no pair,
        or factors that do not multiply; at update: no params.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from pefts.optimizers.riemannian import scale_by_riemannian
      >>> params = {"A": jnp.ones((1, 1)), "B": 2 * jnp.ones((1, 1))}
      >>> tx = scale_by_riemannian(reg=0.0, inner=optax.identity())
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> updates["A"].item(), updates["B"].item()
      (0.25, 2.0)

    Source: Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, arXiv 2402.02347.
    """
    check_damping("reg", reg)
    inside = subspaces.inner_or_adam(inner)

    def init(params: Any) -> Any:
        factor_pairs(params)
        return inside.init(linalg.precise_floats(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        check_params("riemannian", params)
        full, (G, treedef) = (
            linalg.precise_floats(params),
            jax.tree.flatten(linalg.precise_floats(updates)),
        )
        factors = jax.tree.leaves(full)
        for pair in factor_pairs(updates):
            A, B = factors[pair.A], factors[pair.B]
            right = damped_inverse(einsum("...ro,...so->...rs", B, B), reg)
            left = damped_inverse(einsum("...ir,...is->...rs", A, A), reg)
            G[pair.A] = einsum("...ir,...rs->...is", G[pair.A], right)
            G[pair.B] = einsum("...rs,...so->...ro", left, G[pair.B])
        stepped, state = inside.update(treedef.unflatten(G), state, full, **extra)
        return like(stepped, updates), state

    return optax.GradientTransformationExtraArgs(init, update)
