"""Fira: GaLore, and the part of the gradient that its projection leaves out.

    R = P^T G,  N = M / (sqrt(V) + eps)                               Adam's, before bias correction
    phi_j = ||N_:j|| / (||R_:j|| + 1e-8)                              (d_out,), over the rank axis
    S = (G - P R) * phi,  limited to ||S_t|| <= gamma ||S_t-1||       (d_in, d_out)
    update = -eta k_t (alpha P N + S),  k_t = sqrt(1 - b2^t) / (1 - b1^t)

for a kernel whose d_in is compressed; with Q, G - R Q^T and phi (d_in,) where it is d_out. State:
that of GaLore and one norm per kernel.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pefts.optimizers import limiter
from pefts.optimizers import projection as subspaces
from pefts.optimizers.raw_adam import correct_bias, raw_adam
from pefts.targets import ALL_LINEAR, Targets

RESIDUALS = ("paper", "code")


class FiraState(NamedTuple):
    """That of GaLore, and the norms that limit the next ones."""

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]  optax's name for it
    skipped: Any  # kernels, times refreshes, whose gradient was not finite
    projectors: Any  # a tree like the parameters', of Projector or optax.MaskedNode
    norms: Any  # a tree like it: ||S|| (*stack) of the last step, 0 before it
    inner_state: Any


def fira(
    learning_rate: Any,
    *,
    rank: int,
    update_interval: int | None = 200,
    scale: Any = 0.25,
    projection: str = "std",
    growth: float = 1.01,
    residual: str = "paper",
    decomposition: str = "subspace",
    weight_decay: Any = 0.0,
    targets: Targets = ALL_LINEAR,
    axes: Mapping[str, str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Fira with Adam, decay and a learning rate: W <- W - eta (k (alpha P N + S) + lambda W).

    NOTE(paper): as in the released code eps stands before the correction of the bias; that code
      decays the weights after the step, here it is the weights before it, as in optax.

    Args:
      learning_rate: eta, a number or an optax schedule (paper: 0.01 for pre-training, 1e-4 for
        fine-tuning).
      weight_decay: lambda, of every leaf (paper: 0).
      rank, update_interval, scale, projection, growth, residual, decomposition, targets, axes: as
        in `scale_by_fira`.

    Returns:
      A transformation; its update needs params if there is decay.

    Raises:
      ValueError: as `scale_by_fira`.

    Example:
      >>> import jax.numpy as jnp
      >>> from pefts.optimizers.fira import fira
      >>> params = {"dense": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
      >>> tx = fira(0.01, rank=2)
      >>> updates, state = tx.update(params, tx.init(params), params)

    Source: Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?,
      arXiv 2410.01623.
    """
    return subspaces.with_rate(
        scale_by_fira(
            rank=rank,
            update_interval=update_interval,
            scale=scale,
            projection=projection,
            growth=growth,
            residual=residual,
            decomposition=decomposition,
            targets=targets,
            axes=axes,
        ),
        correct_bias(),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
    )


def scale_by_fira(
    *,
    rank: int,
    update_interval: int | None = 200,
    scale: Any = 0.25,
    projection: str = "std",
    growth: float = 1.01,
    residual: str = "paper",
    inner: optax.GradientTransformation | None = None,
    decomposition: str = "subspace",
    targets: Targets = ALL_LINEAR,
    axes: Mapping[str, str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Fira's direction alpha P N + S, before the correction of Adam's bias by `correct_bias`.

    Leaves that are not targeted go through `inner` as they are. Gradients that are not finite at a
    refresh are treated, and counted, as in `scale_by_galore`.

    Args:
      rank, update_interval, projection, decomposition, targets, axes: as in `scale_by_galore`; a
        projection of "full" has no columns to scale.
      scale: alpha, of the part in the subspace (paper: 0.25 for pre-training).
      growth: gamma, the largest ratio of the residual's norm to that of the step before (paper:
        1.01). After a step without residual, as a factor of LoRA has at first, nothing is limited.
      residual: "paper", S from G - P R, orthogonal to P; or "code", from G - alpha P R, with which
        the published numbers were made.
      inner: a transformation that gives N from R, without correction of the bias (None:
        raw_adam()).

    Returns:
      A transformation; its `FiraState` is in float32 or better, updates in the gradients' dtype.
      `pefts.optimizers.galore.refresh` takes its state too.

    Raises:
      ValueError: an argument is out of range or unknown; at init, as `scale_by_galore`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from pefts.optimizers.fira import scale_by_fira
      >>> from pefts.optimizers.raw_adam import correct_bias, raw_adam
      >>> tx = optax.chain(scale_by_fira(rank=2, inner=raw_adam(eps=1e-6)), correct_bias())
      >>> updates, _ = tx.update(jnp.eye(4), tx.init(jnp.eye(4)))

    Source: Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?,
      arXiv 2410.01623.
    """
    _check(projection, growth, residual)
    subspaces.check_interval(update_interval)
    subspaces.check_scale(scale)
    options = subspaces.options(rank, projection, decomposition, targets, axes)
    inside = subspaces.inner_or_adam(raw_adam() if inner is None else inner)

    def init(params: Any) -> FiraState:
        projectors, reduced = subspaces.start(options, params)
        norms = [
            optax.MaskedNode() if site is None else jnp.zeros(site.stack, low.dtype)
            for site, low in zip(
                subspaces.sites(options, params), jax.tree.leaves(reduced), strict=True
            )
        ]
        zero = jnp.zeros((), jnp.int32)
        tree = jax.tree.structure(params).unflatten(norms)
        return FiraState(zero, jnp.zeros_like(zero), projectors, tree, inside.init(reduced))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, FiraState]:
        del params  # they have other shapes than what `inner` sees
        due = None if update_interval is None else state.count % update_interval == 0
        low = subspaces.descend(options, updates, state.projectors, due)
        stepped, inner_state = inside.update(low.reduced, state.inner_state, None, **extra)
        full, norms = [], []
        for site, G, projector, ok, R, N, norm in zip(
            low.sites,
            low.matrices,
            low.projectors,
            low.usable,
            low.treedef.flatten_up_to(low.reduced),
            low.treedef.flatten_up_to(stepped),
            low.treedef.flatten_up_to(state.norms),
            strict=True,
        ):
            if site is not None:
                alpha = jnp.asarray(scale, N.dtype)
                outside = G - subspaces.restore(projector, R * alpha if residual == "code" else R)
                S, new = limiter.limit(outside * _ratio(projector, N, R), norm, growth)
                N, norm = alpha * subspaces.restore(projector, N) + S, jnp.where(ok, new, norm)
            full.append(N)
            norms.append(norm)
        return subspaces.ascend(low, full), FiraState(
            optax.safe_increment(state.count),
            state.skipped + subspaces.unusable(low),
            low.treedef.unflatten(low.projectors),
            low.treedef.unflatten(norms),
            inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _ratio(projector: subspaces.Projector, N: jax.Array, R: jax.Array) -> jax.Array:
    """phi, one number for every index of the side that is not compressed."""
    return limiter.ratio(N, R, axis=-2 if projector.Q is None else -1)


def _check(projection: str, growth: float, residual: str) -> None:
    if projection == "full":
        raise ValueError(
            "projection='full' leaves no side uncompressed whose entries Fira could scale: choose "
            f"one of {[name for name in subspaces.PROJECTIONS if name != 'full']}."
        )
    if residual not in RESIDUALS:
        raise ValueError(f"residual={residual!r} is unknown; choose one of {RESIDUALS}.")
    limiter.check_growth(growth)
