"""GaLore: full-parameter training whose optimizer state lives in a low-rank subspace.

    P = the r leading left singular vectors of G, every T steps        (small, r)
    R = P^T G,  N = inner(R),  update = -eta alpha P N                 (r, large), (d_in, d_out)

for a kernel's gradient G (d_in, d_out) whose smaller side is d_in; with Q of the right singular
vectors and R = G Q where it is d_out. The moments of `inner` stay as they are when P changes.
State: small r + 2 large r numbers per kernel with Adam, instead of 2 small large. Clip gradients
before it; with accumulation put it inside optax.MultiSteps, so that P comes from the mean gradient.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pefts.optimizers import projection as subspaces
from pefts.targets import ALL_LINEAR, Targets


class GaloreState(NamedTuple):
    """How many updates are complete, what was skipped, the projectors, and the state inside."""

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]  optax's name for it
    skipped: Any  # kernels, times refreshes, whose gradient was not finite
    projectors: Any  # a tree like the parameters', of Projector or optax.MaskedNode
    inner_state: Any


def galore(
    learning_rate: Any,
    *,
    rank: int,
    update_interval: int | None = 200,
    scale: Any = 0.25,
    projection: str = "std",
    inner: optax.GradientTransformation | None = None,
    decomposition: str = "subspace",
    weight_decay: Any = 0.0,
    targets: Targets = ALL_LINEAR,
    axes: Mapping[str, str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GaLore with weight decay and a learning rate: W <- W - eta (alpha P N + lambda W).

    NOTE(paper): the released code decays the weights after the step, W (1 - eta lambda); the
      difference is of order eta^2.

    Args:
      learning_rate: eta, a number or an optax schedule (paper: 0.01 for pre-training).
      weight_decay: lambda, of every leaf (paper: 0). To spare some, chain `scale_by_galore` with
        optax.add_decayed_weights(lambda, pefts.optimizers.decay_mask(...)).
      rank, update_interval, scale, projection, inner, decomposition, targets, axes: as in
        `scale_by_galore`.

    Returns:
      A transformation; its update needs params if there is decay. optax.inject_hyperparams takes
      it with static_args=("rank", "update_interval").

    Raises:
      ValueError: as `scale_by_galore`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from pefts.optimizers.galore import galore
      >>> params = {"dense": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), galore(0.01, rank=2))
      >>> updates, state = tx.update(params, tx.init(params), params)

    Source: GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, arXiv 2403.03507.
    """
    return subspaces.with_rate(
        scale_by_galore(
            rank=rank,
            update_interval=update_interval,
            scale=scale,
            projection=projection,
            inner=inner,
            decomposition=decomposition,
            targets=targets,
            axes=axes,
        ),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
    )


def scale_by_galore(
    *,
    rank: int,
    update_interval: int | None = 200,
    scale: Any = 0.25,
    projection: str = "std",
    inner: optax.GradientTransformation | None = None,
    decomposition: str = "subspace",
    targets: Targets = ALL_LINEAR,
    axes: Mapping[str, str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` on gradients in their leading subspaces: alpha P inner(P^T G).

    Leaves that are not targeted (biases, norms, embeddings, the head) go through the same `inner`
    as they are. A kernel whose gradient has NaN or infinities at a refresh keeps its projector,
    gets a zero update, and is counted in `skipped`; at other steps they pass through.

    NOTE(paper): the released AdamW adds its eps, 1e-6, before bias correction; give
      inner=optax.scale_by_adam(eps=...) for another eps than 1e-8.

    Args:
      rank: r, from 1 to the smaller side (paper: a quarter to a half of the model's width).
      update_interval: T, steps between two refreshes, the first at step 0 (paper: 200); None leaves
        them to `refresh`.
      scale: alpha (paper: 0.25 for pre-training; 4 with rank 4 for GLUE).
      projection: which side is compressed, "std", "reverse_std", "left", "right" or "full"; see
        pefts.optimizers.projection.
      inner: a transformation that needs no parameters (None: optax.scale_by_adam()).
      decomposition: "subspace", a few subspace iterations from the last projector, or "svd", exact.
      targets: which kernels are projected, as in pefts.targets, of paths such as
        "layers/query/kernel", without the "/value" of `pefts.full` (paper: all of attention and
        MLP; default: all but embeddings and the head).
      axes: {regular expression: letters of pefts.views}, for kernels with heads or windows. Without
        it a kernel has two axes, or three below "layers": each layer is projected by itself.

    Returns:
      A transformation; its `GaloreState` is in float32 or better, updates in the gradients' dtype.

    Raises:
      ValueError: an argument is out of range or unknown; at init: a pattern that matches no kernel,
        a rank above a kernel's smaller side, axes that are ambiguous.

    Example:
      >>> import jax.numpy as jnp, optax, pefts
      >>> from pefts.optimizers.galore import scale_by_galore
      >>> params = {"kernel": jnp.ones((6, 4))}
      >>> state = scale_by_galore(rank=2).init(params)
      >>> pefts.count((state.projectors, state.inner_state.mu, state.inner_state.nu))
      32

    Source: GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, arXiv 2403.03507.
    """
    subspaces.check_interval(update_interval)
    subspaces.check_scale(scale)
    options = subspaces.options(rank, projection, decomposition, targets, axes)
    inside = subspaces.inner_or_adam(inner)

    def init(params: Any) -> GaloreState:
        projectors, reduced = subspaces.start(options, params)
        zero = jnp.zeros((), jnp.int32)
        return GaloreState(zero, jnp.zeros_like(zero), projectors, inside.init(reduced))

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, GaloreState]:
        del params  # they have other shapes than what `inner` sees
        due = None if update_interval is None else state.count % update_interval == 0
        low = subspaces.descend(options, updates, state.projectors, due)
        stepped, inner_state = inside.update(low.reduced, state.inner_state, None, **extra)

        def back(N: jax.Array, site: Any, projector: Any) -> jax.Array:
            if site is None:
                return N
            return jnp.asarray(scale, N.dtype) * subspaces.restore(projector, N)

        full = map(back, low.treedef.flatten_up_to(stepped), low.sites, low.projectors)
        return subspaces.ascend(low, list(full)), GaloreState(
            optax.safe_increment(state.count),
            state.skipped + subspaces.unusable(low),
            low.treedef.unflatten(low.projectors),
            inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def refresh(
    state: Any,
    gradients: Any,
    *,
    rank: int,
    projection: str = "std",
    decomposition: str = "subspace",
    targets: Targets = ALL_LINEAR,
    axes: Mapping[str, str] | None = None,
) -> Any:
    """The state with projectors from these gradients, for a transformation with no interval.

    Called by the host in a jitted function of its own, every T steps before the update with the
    same gradients, it keeps the decompositions out of the step's program and memory.

    Args:
      state: a GaloreState, of `scale_by_galore(update_interval=None, ...)`, or Fira's.
      gradients: what the next update is given, clipped and averaged.
      rank, projection, decomposition, targets, axes: as given there.

    Returns:
      The state; kernels whose gradient is not finite keep their projector and add to `skipped`.
      The next update does not skip them: guard it by optax.apply_if_finite.

    Raises:
      ValueError: as `scale_by_galore`.

    Example:
      >>> import jax.numpy as jnp
      >>> from pefts.optimizers.galore import refresh, scale_by_galore
      >>> gradients = {"kernel": jnp.ones((6, 4))}
      >>> tx = scale_by_galore(rank=1, update_interval=None)
      >>> state = refresh(tx.init(gradients), gradients, rank=1)
      >>> [round(abs(float(q)), 2) for q in state.projectors["kernel"].Q[:, 0]]
      [0.5, 0.5, 0.5, 0.5]
    """
    options = subspaces.options(rank, projection, decomposition, targets, axes)
    low = subspaces.descend(options, gradients, state.projectors, jnp.ones((), bool))
    return state._replace(
        skipped=state.skipped + subspaces.unusable(low),
        projectors=low.treedef.unflatten(low.projectors),
    )
