"""Riemannian preconditioning of LoRA's factors, in front of any optimizer.

    g_A <- g_A (B B^T + reg I)^-1         A (d_in, r), B (r, d_out)
    g_B <- (A^T A + reg I)^-1 g_B

with both factors as they are before the step, so that a step of A B hardly depends on how the
product is divided between its factors. It has no state.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pefts import linalg
from pefts.optimizers import projection as subspaces
from pefts.optimizers.decay import leaf_paths

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class Pair(NamedTuple):
    """The two factors of one adapted kernel, as positions among a tree's leaves."""

    path: str  # of the node that holds both, "query/kernel"
    A: int
    B: int


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
        return inside.init(precise(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        check_params("riemannian", params)
        full, (G, treedef) = precise(params), jax.tree.flatten(precise(updates))
        factors = jax.tree.leaves(full)
        for pair in factor_pairs(updates):
            A, B = factors[pair.A], factors[pair.B]
            right = damped_inverse(_einsum("...ro,...so->...rs", B, B), reg)
            left = damped_inverse(_einsum("...ir,...is->...rs", A, A), reg)
            G[pair.A] = _einsum("...ir,...rs->...is", G[pair.A], right)
            G[pair.B] = _einsum("...rs,...so->...ro", left, G[pair.B])
        stepped, state = inside.update(treedef.unflatten(G), state, full, **extra)
        return like(stepped, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def factor_pairs(tree: Any) -> list[Pair]:
    """The pairs of factors in a trainable tree, in the order of its leaves.

    Raises:
      ValueError: there is none (in a tree that has leaves), or factors do not multiply.
    """
    paths, leaves = jax.tree.leaves(leaf_paths(tree)), jax.tree.leaves(tree)
    at = {path: n for n, path in enumerate(paths)}
    pairs = []
    for path, n in at.items():
        node, _, name = path.rpartition("/")
        other = at.get(f"{node}/B" if node else "B")
        if name != "A" or other is None or min(leaves[n].ndim, leaves[other].ndim) < 2:
            continue
        A, B = leaves[n].shape, leaves[other].shape
        if A[-1] != B[-2] or A[:-2] != B[:-2]:
            raise ValueError(
                f"A {A} and B {B} of {node!r} are no factors (..., d_in, r) and (..., r, d_out) of "
                "a product: give such leaves another optimizer by optax.partition."
            )
        pairs.append(Pair(node, n, other))
    if leaves and not pairs:
        raise ValueError(
            f"no node of the tree has matrices A and B; there are {paths[:5]}. This optimizer is "
            "for the trainable tree of LoRA and its kin."
        )
    return pairs


def damped_inverse(gram: jax.Array, damping: Any) -> jax.Array:
    """(gram + damping I)^+ of symmetric (..., r, r), none of whose eigenvalues is below zero."""
    one = functools.partial(_inverse, damping=jnp.asarray(damping, gram.dtype))
    # One layer after the other: LAPACK calls on a batch can wait for each other's threads.
    for _ in range(gram.ndim - 2):
        one = functools.partial(jax.lax.map, one)
    return one(gram)


def _inverse(gram: jax.Array, damping: jax.Array) -> jax.Array:
    values, V = jnp.linalg.eigh(gram)
    values = jnp.maximum(values, 0) + damping
    # The relative cut of a pseudo-inverse: what lies below it is rounding.
    kept = values > len(gram) * jnp.finfo(gram.dtype).eps * values[-1]
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    return _einsum("ir,r,jr->ij", V, inverse, V)


def check_damping(name: str, value: Any) -> None:
    """Raise ValueError if it is a number, not something traced, and none from 0."""
    if isinstance(value, int | float) and not 0 <= value < float("inf"):
        raise ValueError(f"{name}={value!r}: give what is added to the diagonal, from 0.")


def check_params(name: str, params: Any) -> None:
    """Raise ValueError if an update that reads the factors was given none."""
    if params is None:
        raise ValueError(f"{name} reads the factors: call update(grads, state, params).")


def precise(tree: Any) -> Any:
    """The tree with floating leaves in float32 or better."""
    return jax.tree.map(
        lambda leaf: linalg.precise(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
        tree,
    )


def like(tree: Any, original: Any) -> Any:
    """The tree with each leaf in the dtype of the original's."""
    return jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), tree, original)
