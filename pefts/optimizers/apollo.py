"""APOLLO: the gradient itself, scaled by what Adam does to a random projection of it.

    R = P^T G,  N = M / (sqrt(V) + eps)                          (r, large), Adam's, uncorrected
    phi_j = ||N_:j|| / (||R_:j|| + 1e-8)                         (large,), "channel"
    phi = ||N|| / (||R|| + 1e-8)                                 a number, "tensor"
    S = G * phi,  limited to ||S_t|| <= gamma ||S_t-1||          (d_in, d_out)
    update = -eta k_t alpha S,  k_t = sqrt(1 - b2^t) / (1 - b1^t)

for a kernel whose smaller side (d_in of a square) is compressed by P (small, r) of independent
normal entries with variance 1/r. P is never stored: every step draws it again, the same one for T
steps, from a seed, the number of T steps that have passed and the kernel's path. State: 2 large r
numbers and a norm per kernel; with r = 1, APOLLO-Mini, about as much as SGD.

Read in the released code: the variance, the compressed side, both kinds of phi, what is limited and
before which factors, the correction of the bias, and the default settings. The papers' results were
not reproduced here.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pefts import linalg, views
from pefts.optimizers import limiter
from pefts.optimizers import projection as subspaces
from pefts.optimizers.raw_adam import correct_bias, raw_adam
from pefts.targets import ALL_LINEAR, Site, Targets, site_key

SCALE_TYPES = ("channel", "tensor")


class ApolloState(NamedTuple):
    """What P is drawn from, the norms that limit the next ones, and the state inside."""

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]  optax's name for it
    seed: Any  # uint32: the same for all kernels, whose paths tell them apart
    norms: Any  # a tree like the parameters': ||S|| (*stack) of the last step, 0 before it
    inner_state: Any


def apollo(
    learning_rate: Any,
    *,
    rank: int,
    update_interval: int | None = 200,
    scale: Any = None,
    scale_type: str = "channel",
    growth: Any = 1.01,
    seed: int = 0,
    weight_decay: Any = 0.0,
    targets: Targets = ALL_LINEAR,
    axes: Mapping[str, str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO with Adam, decay and a learning rate: W <- W - eta (k alpha S + lambda W).

    NOTE(paper): as in the released code eps stands before the correction of the bias; that code
      decays the weights after the step, here it is the weights before it, as in optax.

    Args:
      learning_rate: eta, a number or an optax schedule (paper: 0.01 for pre-training; 1e-5 in its
        example of fine-tuning).
      weight_decay: lambda, of every leaf (paper: 0).
      rank, update_interval, scale, scale_type, growth, seed, targets, axes: as in
        `scale_by_apollo`.

    Returns:
      A transformation; its update needs params if there is decay. optax.inject_hyperparams takes
      it with static_args=("rank", "update_interval", "seed").

    Raises:
      ValueError: as `scale_by_apollo`.

    Example:
      >>> import jax.numpy as jnp
      >>> from pefts.optimizers.apollo import apollo
      >>> params = {"dense": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
      >>> mini = apollo(0.01, rank=1, scale_type="tensor")
      >>> updates, state = mini.update(params, mini.init(params), params)

    Source: APOLLO: SGD-like Memory, AdamW-level Performance, arXiv 2412.05270.
    """
    return subspaces.with_rate(
        scale_by_apollo(
            rank=rank,
            update_interval=update_interval,
            scale=scale,
            scale_type=scale_type,
            growth=growth,
            seed=seed,
            targets=targets,
            axes=axes,
        ),
        correct_bias(),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
    )


def scale_by_apollo(
    *,
    rank: int,
    update_interval: int | None = 200,
    scale: Any = None,
    scale_type: str = "channel",
    growth: Any = 1.01,
    seed: int = 0,
    inner: optax.GradientTransformation | None = None,
    targets: Targets = ALL_LINEAR,
    axes: Mapping[str, str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO's direction alpha S, before the correction of Adam's bias by `correct_bias`.

    Leaves that are not targeted go through `inner` as they are. A gradient that is not finite
    passes through, into the norms too: guard against it by optax.apply_if_finite.

    NOTE(paper): the released code may multiply by alpha before the limit (scale_front); a limit of
      a ratio does not see a constant alpha, so there is no such choice here.

    Args:
      rank: r, from 1 to the smaller side (paper: 256 for 1B and 7B, a quarter of the model's width
        below; 1 for APOLLO-Mini).
      update_interval: T, steps with one P (paper: 200); None keeps the first one.
      scale: alpha (paper: 1 for "channel", sqrt(128) for "tensor", which are the defaults of None).
        The released code takes its square: 32 there, as for fine-tuning, is 32 ** 0.5 here.
      scale_type: "channel", a phi for each index of the larger side, or "tensor", one for a kernel.
      growth: gamma, the largest ratio of the norm of S to that of the step before (paper: 1.01).
        After a step without gradient nothing is limited; 1e9 turns the limit off.
      seed: what P is drawn from, by threefry, from 0 to 2^32 - 1.
      inner: a transformation that gives N from R, without correction of the bias (None:
        raw_adam()).
      targets: which kernels are scaled, as in pefts.targets (paper: all of attention and MLP;
        default: all but embeddings and the head).
      axes: {regular expression: letters of pefts.views}, as in `scale_by_galore`.

    Returns:
      A transformation; its `ApolloState` is in float32 or better, updates in the gradients' dtype.

    Raises:
      ValueError: an argument is out of range or unknown; at init: a pattern that matches no kernel,
        a rank above a kernel's smaller side, axes that are ambiguous.

    Example:
      >>> import jax.numpy as jnp, optax, pefts
      >>> from pefts.optimizers.apollo import scale_by_apollo
      >>> from pefts.optimizers.raw_adam import correct_bias, raw_adam
      >>> tx = optax.chain(scale_by_apollo(rank=1, inner=raw_adam(eps=1e-6)), correct_bias())
      >>> moments = tx.init({"kernel": jnp.ones((64, 32))})[0].inner_state
      >>> pefts.count((moments.mu, moments.nu))
      128

    Source: APOLLO: SGD-like Memory, AdamW-level Performance, arXiv 2412.05270.
    """
    alpha = _checked(scale, scale_type, growth, seed)
    subspaces.check_interval(update_interval)
    options = subspaces.options(rank, "std", "svd", targets, axes)
    inside = subspaces.inner_or_adam(raw_adam() if inner is None else inner)

    def init(params: Any) -> ApolloState:
        sites, treedef = subspaces.sites(options, params), jax.tree.structure(params)
        low = [
            jnp.zeros(*_like(*pair)) for pair in zip(jax.tree.leaves(params), sites, strict=True)
        ]
        norms = [
            optax.MaskedNode() if site is None else jnp.zeros(site.stack, R.dtype)
            for site, R in zip(sites, low, strict=True)
        ]
        zero, state = jnp.zeros((), jnp.int32), inside.init(treedef.unflatten(low))
        return ApolloState(zero, jnp.asarray(seed, jnp.uint32), treedef.unflatten(norms), state)

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, ApolloState]:
        del params  # they have other shapes than what `inner` sees
        leaves, treedef = jax.tree.flatten(updates)
        sites = subspaces.sites(options, updates)
        window = state.count // (update_interval or jnp.iinfo(jnp.int32).max)
        key = jax.random.fold_in(jax.random.key(state.seed, impl="threefry2x32"), window)
        matrices = [_matrix(leaf, site) for leaf, site in zip(leaves, sites, strict=True)]
        low = [
            G if site is None else subspaces.project(_projector(key, site, G.dtype), G)
            for G, site in zip(matrices, sites, strict=True)
        ]
        stepped, inner_state = inside.update(
            treedef.unflatten(low), state.inner_state, None, **extra
        )
        done, norms = treedef.flatten_up_to(stepped), treedef.flatten_up_to(state.norms)
        for n, (site, G) in enumerate(zip(sites, matrices, strict=True)):
            if site is not None:
                whole = (-2, -1) if scale_type == "tensor" else _small(site)
                phi = limiter.ratio(done[n], low[n], whole)
                S, norms[n] = limiter.limit(G * phi, norms[n], growth)
                done[n] = views.from_matrix(S * jnp.asarray(alpha, S.dtype), site.axes, site.shape)
        done = [N.astype(leaf.dtype) for N, leaf in zip(done, leaves, strict=True)]
        return treedef.unflatten(done), ApolloState(
            optax.safe_increment(state.count), state.seed, treedef.unflatten(norms), inner_state
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _small(site: Site) -> int:
    """The axis of (*stack, d_in, d_out) that is compressed."""
    return -2 if site.d_in <= site.d_out else -1


def _like(leaf: Any, site: Site | None) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of R, or of a leaf that is not targeted."""
    dtype = jax.eval_shape(linalg.precise_floats, leaf).dtype
    if site is None:
        return leaf.shape, dtype
    low = (site.rank, site.d_out) if _small(site) == -2 else (site.d_in, site.rank)
    return (*site.stack, *low), dtype


def _projector(key: jax.Array, site: Site, dtype: Any) -> subspaces.Projector:
    """Entries of N(0, 1/r); each leaf's depend on its path alone."""
    shape = (*site.stack, min(site.d_in, site.d_out), site.rank)
    P = jax.random.normal(site_key(key, site.path), shape, dtype) / site.rank**0.5
    return subspaces.Projector(P, None) if _small(site) == -2 else subspaces.Projector(None, P)


def _matrix(leaf: Any, site: Site | None) -> jax.Array:
    return linalg.precise_floats(leaf if site is None else views.to_matrix(leaf, site.axes))


def _checked(scale: Any, scale_type: str, growth: Any, seed: Any) -> Any:
    """alpha, once the arguments are found in range."""
    if scale_type not in SCALE_TYPES:
        raise ValueError(f"scale_type={scale_type!r} is unknown; choose one of {SCALE_TYPES}.")
    subspaces.check_scale(scale)
    limiter.check_growth(growth)
    subspaces.check_seed(seed)
    if scale is None:
        return 1.0 if scale_type == "channel" else 128**0.5
    return scale
