"""FRUGAL: Adam where there is room for its state, the sign of the gradient everywhere else.

    R = down(G),  N = inner(R)                                 the part with a state
    E = G - up(R)                                              the rest, without one
    update = -eta s_p (up(N) + s_i sign(E))

for a kernel's gradient G (d_in, d_out). Every T steps another part is chosen, and `inner` begins
anew. Which parts there are: pefts.optimizers.frugal_spaces. State with Adam, of a share rho of the
kernels: 2 rho d_in d_out numbers, and what says which part it is: rho d_in indices ("columns"),
rho d_out ("rows"), rho d_in d_out ("randk"), rho small ("randperm"), rho small^2 ("random", "svd"),
or one for each kernel in a pool ("blocks_*").

An entry without a state moves by eta s_p s_i whatever the size of its gradient: clipping does not
change that, a learning rate found for GaLore is too high, and noise near zero turns signs.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pefts import views
from pefts.optimizers import frugal_spaces
from pefts.optimizers import projection as subspaces
from pefts.targets import ALL_LINEAR, Targets

STATE_FREE = ("sign", "sgd", "none")


class FrugalState(NamedTuple):
    """How many updates are complete, the parts that have a state, and the states."""

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]  optax's name for it
    seed: Any  # uint32: what random parts are drawn from
    spaces: Any  # a tree like the parameters'; at a pool's first leaf, its kernels in each slot
    inner_state: Any  # of the targeted leaves, or pools
    rest_state: Any  # of the other leaves, which never begin anew


def frugal(
    learning_rate: Any,
    *,
    density: float = 0.25,
    projection: str = "columns",
    update_interval: int | None = 200,
    state_free: str = "sign",
    scales: Any = (1.0, 1.0),
    reset: bool = True,
    seed: int = 0,
    inner: optax.GradientTransformation | None = None,
    weight_decay: Any = 0.0,
    targets: Targets = ALL_LINEAR,
    axes: Mapping[str, str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """FRUGAL with decay and a learning rate: W <- W - eta (s_p (up(N) + s_i f(E)) + lambda W).

    W (1 - eta lambda) first and then the step, as in the released code, is the same.

    Args:
      learning_rate: eta, a number or an optax schedule (paper: 1e-3 for pre-training; 5e-4 for
        CoLA, with s_i 0.1, rho 8 / 768, T 500 and lambda 0.1).
      weight_decay: lambda, of every leaf (paper: 0 for pre-training).
      density, projection, update_interval, state_free, scales, reset, seed, inner, targets, axes:
        as in `scale_by_frugal`.

    Returns:
      A transformation; its update needs params if there is decay. optax.inject_hyperparams takes
      it with static_args=("density", "update_interval", "seed").

    Raises:
      ValueError: as `scale_by_frugal`.

    Example:
      >>> import jax.numpy as jnp
      >>> from pefts.optimizers.frugal import frugal
      >>> params = {"dense": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
      >>> tx = frugal(1e-3, density=0.5, scales=(1.0, 0.1))
      >>> updates, state = tx.update(params, tx.init(params), params)

    Source: FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training,
      arXiv 2411.07837.
    """
    return subspaces.with_rate(
        scale_by_frugal(
            density=density,
            projection=projection,
            update_interval=update_interval,
            state_free=state_free,
            scales=scales,
            reset=reset,
            seed=seed,
            inner=inner,
            targets=targets,
            axes=axes,
        ),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
    )


def scale_by_frugal(
    *,
    density: float = 0.25,
    projection: str = "columns",
    update_interval: int | None = 200,
    state_free: str = "sign",
    scales: Any = (1.0, 1.0),
    reset: bool = True,
    seed: int = 0,
    inner: optax.GradientTransformation | None = None,
    targets: Targets = ALL_LINEAR,
    axes: Mapping[str, str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """FRUGAL's direction s_p (up(N) + s_i f(G - up(R))).

    Leaves that are not targeted (biases, norms, embeddings, the head) go through an `inner` of
    their own as they are. A gradient that is not finite passes through, into the state too: guard
    against it by optax.apply_if_finite.

    NOTE(paper): "svd" finds its vectors by a few subspace iterations, as GaLore does here; where
      the smaller side is no larger than r + 16 they are exact.

    Args:
      density: rho, the share with a state (paper: 0.25; 0 is signSGD, 1 is Adam that begins anew).
      projection: what the parts are, one of pefts.optimizers.frugal_spaces.PROJECTIONS: "columns"
        (paper: for fine-tuning), rows of a Flax kernel; "rows", its columns; "randk"; "svd";
        "random"; "randperm"; "blocks_descending" (paper: for pre-training), "blocks_ascending",
        "blocks_mirror" or "blocks_random", whole kernels in that order.
      update_interval: T, steps between two choices, the first at step 0 (paper: 200); None keeps
        the `spaces` of the state, in which others may be put.
      state_free: f of the rest, "sign" (paper), "sgd" for itself or "none" for zero.
      scales: s_p of both parts, and s_i of the rest on top of it (paper: 1 and 1 for pre-training,
        1 and 0.1 for fine-tuning).
      reset: whether `inner` begins anew with each choice, also the count of a schedule in it
        (paper: True). Blocks always do.
      seed: what random choices are drawn from, by threefry, from 0 to 2^32 - 1.
      inner: a transformation that needs no parameters (None: optax.scale_by_adam()).
      targets: which kernels are split, as in pefts.targets (paper: all of attention and MLP;
        default: all but embeddings and the head).
      axes: {regular expression: letters of pefts.views}, as in `scale_by_galore`.

    Returns:
      A transformation; its `FrugalState` is in float32 or better, updates in the gradients' dtype.

    Raises:
      ValueError: an argument is out of range or unknown; at init: a pattern that matches no kernel,
        axes that are ambiguous, a density above 0 that gives a kernel no state, an odd number of
        kernels for "blocks_mirror".

    Example:
      >>> import jax.numpy as jnp, optax, pefts
      >>> from pefts.optimizers.frugal import scale_by_frugal
      >>> state = scale_by_frugal(inner=optax.trace(0.9)).init({"kernel": jnp.ones((8, 5))})
      >>> pefts.count((state.spaces, state.inner_state))
      12

    Source: FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training,
      arXiv 2411.07837.
    """
    _check(projection, state_free, scales, reset, seed)
    subspaces.check_interval(update_interval)
    options = frugal_spaces.options(density, projection, targets, axes)
    inside = subspaces.inner_or_adam(inner)

    def init(params: Any) -> FrugalState:
        plan, leaves = frugal_spaces.plan(options, params), jax.tree.leaves(params)
        shapes = [
            jax.eval_shape(lambda leaf, site=site: frugal_spaces.matrix(leaf, site), leaf)
            for leaf, site in zip(leaves, plan.sites, strict=True)
        ]
        spaces = frugal_spaces.choose(plan, seed, 0, shapes)
        return FrugalState(
            jnp.zeros((), jnp.int32),
            jnp.asarray(seed, jnp.uint32),
            plan.treedef.unflatten(spaces),
            inside.init(_zeros(plan, spaces, shapes)),
            inside.init(jax.tree.map(jnp.zeros_like, _others(plan, shapes))),
        )

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, FrugalState]:
        del params  # they have other shapes than what `inner` sees
        plan, leaves = frugal_spaces.plan(options, updates), jax.tree.leaves(updates)
        matrices = list(map(frugal_spaces.matrix, leaves, plan.sites))
        spaces, inner_state = plan.treedef.flatten_up_to(state.spaces), state.inner_state
        if update_interval is not None:
            renew = functools.partial(_renew, plan, state, matrices, update_interval)
            due = state.count % update_interval == 0
            begin = inside.init if reset else None
            spaces, inner_state = jax.lax.cond(
                due, lambda: renew(begin), lambda: (spaces, state.inner_state)
            )
        low = frugal_spaces.down(plan, spaces, matrices)
        N, inner_state = inside.update(plan.treedef.unflatten(low), inner_state, None, **extra)
        rest, rest_state = inside.update(_others(plan, matrices), state.rest_state, None, **extra)
        full = frugal_spaces.up(
            plan, spaces, low, plan.treedef.flatten_up_to(N), matrices, _free(state_free, scales)
        )
        done = _finish(plan, full, plan.treedef.flatten_up_to(rest), leaves, scales)
        spaces = plan.treedef.unflatten(spaces)
        count = optax.safe_increment(state.count)
        return done, FrugalState(count, state.seed, spaces, inner_state, rest_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _renew(
    plan: frugal_spaces.Plan,
    state: FrugalState,
    matrices: list[Any],
    update_interval: int,
    begin: Callable[[Any], Any] | None,
) -> tuple[frugal_spaces.Spaces, Any]:
    """The spaces of the window that starts, and the state inside, fresh if there is a `begin`."""
    old = plan.treedef.flatten_up_to(state.spaces)
    spaces = frugal_spaces.choose(plan, state.seed, state.count // update_interval, matrices, old)
    return spaces, begin(_zeros(plan, spaces, matrices)) if begin else state.inner_state


def _zeros(plan: frugal_spaces.Plan, spaces: frugal_spaces.Spaces, matrices: list[Any]) -> Any:
    """A tree like that of the R's, whatever the matrices are."""
    low = jax.eval_shape(functools.partial(frugal_spaces.down, plan), spaces, matrices)
    return plan.treedef.unflatten(
        [jax.tree.map(lambda R: jnp.zeros(R.shape, R.dtype), R) for R in low]
    )


def _others(plan: frugal_spaces.Plan, leaves: list[Any]) -> Any:
    """The tree of the leaves that are not targeted."""
    return plan.treedef.unflatten(
        [
            leaf if site is None else optax.MaskedNode()
            for leaf, site in zip(leaves, plan.sites, strict=True)
        ]
    )


def _finish(
    plan: frugal_spaces.Plan, full: list[Any], rest: list[Any], leaves: list[Any], scales: Any
) -> Any:
    """The tree of updates like the leaves, from s_p times what is targeted, and the rest."""
    done = []
    for n, (site, leaf) in enumerate(zip(plan.sites, leaves, strict=True)):
        update = rest[n]
        if site is not None:
            scaled = full[n] * jnp.asarray(scales[0], full[n].dtype)
            update = views.from_matrix(scaled, site.axes, site.shape)
        done.append(update.astype(leaf.dtype))
    return plan.treedef.unflatten(done)


def _free(state_free: str, scales: Any) -> Callable[[jax.Array], jax.Array]:
    """s_i f."""
    f = {"sign": jnp.sign, "sgd": jnp.asarray, "none": jnp.zeros_like}[state_free]
    return lambda E: f(E) * jnp.asarray(scales[1], E.dtype)


def _check(projection: str, state_free: str, scales: Any, reset: bool, seed: Any) -> None:
    if state_free not in STATE_FREE:
        raise ValueError(f"state_free={state_free!r} is unknown; choose one of {STATE_FREE}.")
    if isinstance(scales, int | float) or len(scales) != 2:
        raise ValueError(f"scales={scales!r}: give two numbers, s_p and s_i.")
    for scale in scales:
        if isinstance(scale, int | float) and not 0 <= scale < float("inf"):
            raise ValueError(f"scales={scales!r}: give s_p and s_i of at least 0.")
    if projection in frugal_spaces.BLOCKS and not reset:
        raise ValueError(
            f"reset={reset!r} does not go with projection={projection!r}: the moments of one "
            "kernel say nothing of the next in their place."
        )
    subspaces.check_seed(seed)
