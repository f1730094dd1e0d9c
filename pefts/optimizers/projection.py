"""Gradients in low-rank subspaces: which leaves, which side, how the subspace is found.

A leaf is a stack of kernels G (d_in, d_out). With r orthonormal columns P (d_in, r), Q (d_out, r)

    projection      is compressed                           R                 back
    std             the smaller side, d_in of a square      P^T G  or  G Q    P N  or  N Q^T
    reverse_std     the larger side, d_out of a square      P^T G  or  G Q    P N  or  N Q^T
    right           d_in                                    P^T G  (r, d_out) P N
    left            d_out                                   G Q    (d_in, r)  N Q^T
    full            both                                    P^T G Q  (r, r)   P N Q^T

where P and Q hold the leading left and right singular vectors of a gradient, in the order of their
singular values. "left" and "right" are the papers' names, which speak of the transposed kernel.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pefts import linalg, views
from pefts.optimizers.decay import leaf_paths
from pefts.targets import ALL_LINEAR, Selection, Site, Targets, exactly, first, selection, site_key

PROJECTIONS = ("std", "reverse_std", "left", "right", "full")
DECOMPOSITIONS = ("subspace", "svd")
# Leaves with layers on their first axis, unless `axes` says otherwise: below "layers", but not
# below a number there, which would mean one subtree for each layer.
STACKED = r"(^|/)layers/(?!\d+(/|$))"

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class Projector(NamedTuple):
    """Orthonormal columns for the sides that are compressed, None for the other."""

    P: Any  # (*stack, d_in, r)
    Q: Any  # (*stack, d_out, r)


@dataclasses.dataclass(frozen=True)
class Options:
    """Checked settings; `options` makes them."""

    rank: int
    projection: str
    decomposition: str
    selection: Selection


class Descent(NamedTuple):
    """One gradient tree in its subspaces: a list entry for each leaf, None where not projected."""

    leaves: list[Any]
    treedef: Any
    sites: list[Site | None]
    matrices: list[Any]  # G (*stack, d_in, d_out), in the dtype of the projector
    projectors: list[Any]  # optax.MaskedNode where not projected
    usable: list[Any]  # bool (*stack): whether the kernel takes part in this step
    reduced: Any  # a tree like the gradients': R, or the leaf itself in float32 or better


def options(
    rank: int,
    projection: str = "std",
    decomposition: str = "subspace",
    targets: Targets = ALL_LINEAR,
    axes: Mapping[str, str] | None = None,
) -> Options:
    """The settings, checked as far as they can be without a tree.

    Raises:
      ValueError: rank is no integer from 1, or a name is unknown.
    """
    if type(rank) is not int or rank < 1:
        raise ValueError(
            f"rank={rank!r}: give an integer of at least 1 (and name it in the static_args of "
            "optax.inject_hyperparams)."
        )
    for name, value, known in (
        ("projection", projection, PROJECTIONS),
        ("decomposition", decomposition, DECOMPOSITIONS),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {known}.")
    return Options(rank, projection, decomposition, selection(targets=targets, axes=axes))


def check_interval(update_interval: int | None) -> None:
    """Raise ValueError unless T is None or an integer from 1."""
    if update_interval is not None and (type(update_interval) is not int or update_interval < 1):
        raise ValueError(
            f"update_interval={update_interval!r}: give the number of steps, from 1, between two "
            "refreshes of the projectors, or None to refresh them yourself."
        )


def check_scale(scale: Any) -> None:
    """Raise ValueError if alpha is a number, not something traced, that is not above zero."""
    if isinstance(scale, int | float) and not 0 < scale < float("inf"):
        raise ValueError(f"scale={scale!r}: give a number above 0.")


def check_seed(seed: Any) -> None:
    """Raise ValueError unless it is an integer that fits a key."""
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ValueError(
            f"seed={seed!r}: give an integer from 0 to 2^32 - 1 (and name it in the static_args of "
            "optax.inject_hyperparams)."
        )


def with_rate(
    *parts: optax.GradientTransformation, learning_rate: Any, weight_decay: Any
) -> optax.GradientTransformationExtraArgs:
    """The parts, decay of every leaf if there is any, and the learning rate."""
    if not isinstance(weight_decay, int | float) or weight_decay != 0:
        parts = (*parts, optax.add_decayed_weights(weight_decay))
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))


def inner_or_adam(
    inner: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation inside, optax.scale_by_adam() if there is none.

    Raises:
      ValueError: it is no transformation.
    """
    if inner is None:
        return optax.with_extra_args_support(optax.scale_by_adam())
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise ValueError(
            f"inner={inner!r} is no gradient transformation: call it, as in optax.scale_by_adam()."
        )
    return optax.with_extra_args_support(inner)


def sites(options: Options, tree: Any) -> list[Site | None]:
    """What is projected, in the order of the tree's leaves; None for the others.

    Paths are those of the tree, without the "/value" by which `pefts.full` names its leaves.

    Raises:
      ValueError: a pattern matches no kernel, a rank is out of range, or axes are ambiguous.
    """
    names = [path.removesuffix("/value") for path in jax.tree.leaves(leaf_paths(tree))]
    leaves = dict(zip(names, jax.tree.leaves(tree), strict=True))
    if not leaves:  # what optax asks for to learn where a state holds trees like the parameters'
        return []
    table = options.selection.axes
    stacked = {
        path for path in leaves if re.search(STACKED, path) and first(table, path, None) is None
    }
    kernels = sorted(path for path in stacked if leaves[path].ndim == 3)
    vectors = {path for path in stacked if leaves[path].ndim < 3}
    chosen = dataclasses.replace(
        options.selection, axes=table + tuple((exactly(path), "lio") for path in kernels)
    ).resolve({path: leaves[path] for path in names if path not in vectors}, rank=options.rank)
    by_path = {site.path: site for site in chosen}
    return [by_path.get(path) for path in names]


def start(options: Options, tree: Any) -> tuple[Any, Any]:
    """Projectors before the first refresh, and zeros like `Descent.reduced`: two trees.

    The projectors are random orthonormal columns, which a gradient is never orthogonal to; each
    leaf's depend on its path alone.
    """
    leaves, treedef = jax.tree.flatten(tree)
    projectors, reduced = [], []
    for leaf, site in zip(leaves, sites(options, tree), strict=True):
        if site is None:
            projectors.append(optax.MaskedNode())
            reduced.append(jnp.zeros_like(linalg.precise_floats(leaf)))
            continue
        dtype = jax.eval_shape(linalg.precise, leaf).dtype
        projectors.append(_random(site, options.projection, dtype))
        shape = jax.eval_shape(
            project,
            projectors[-1],
            jax.ShapeDtypeStruct((*site.stack, site.d_in, site.d_out), dtype),
        ).shape
        reduced.append(jnp.zeros(shape, dtype))
    return treedef.unflatten(projectors), treedef.unflatten(reduced)


def descend(options: Options, gradients: Any, projectors: Any, due: Any) -> Descent:
    """Refresh the projectors where `due`, a scalar, says so, then project the gradients.

    A kernel whose gradient is not finite at a refresh keeps its projector, is given a zero gradient
    and is not `usable`. One whose gradient is zero keeps its projector.
    """
    leaves, treedef = jax.tree.flatten(gradients)
    chosen = sites(options, gradients)
    old = treedef.flatten_up_to(projectors)
    matrices = [
        site and views.to_matrix(leaf, site.axes).astype(_dtype(projector))
        for leaf, site, projector in zip(leaves, chosen, old, strict=True)
    ]
    new, usable = _refresh_if(due, options, chosen, matrices, old)
    reduced = [
        linalg.precise_floats(leaf) if site is None else _where(ok, project(projector, G))
        for leaf, site, projector, G, ok in zip(leaves, chosen, new, matrices, usable, strict=True)
    ]
    return Descent(leaves, treedef, chosen, matrices, new, usable, treedef.unflatten(reduced))


def ascend(descent: Descent, updates: Sequence[Any]) -> Any:
    """The tree of updates, from (*stack, d_in, d_out) if projected; zero where not usable."""
    done = []
    for leaf, site, ok, update in zip(
        descent.leaves, descent.sites, descent.usable, updates, strict=True
    ):
        if site is not None:
            update = views.from_matrix(_where(ok, update), site.axes, site.shape)
        done.append(update.astype(leaf.dtype))
    return descent.treedef.unflatten(done)


def unusable(descent: Descent) -> jax.Array:
    """How many kernels, layers counted one by one, do not take part in this step."""
    flags = [jnp.sum(~ok, dtype=jnp.int32) for ok in descent.usable if ok is not None]
    return sum(flags, start=jnp.zeros((), jnp.int32))


def project(projector: Projector, G: Any) -> jax.Array:
    """R = P^T G Q, of (..., d_in, d_out), with the identity for the P or Q that is None."""
    R = G if projector.P is None else _einsum("...ir,...io->...ro", projector.P, G)
    return R if projector.Q is None else _einsum("...io,...oq->...iq", R, projector.Q)


def restore(projector: Projector, N: jax.Array) -> jax.Array:
    """P N Q^T (..., d_in, d_out), the way back from `project`."""
    U = N if projector.P is None else _einsum("...ir,...ro->...io", projector.P, N)
    return U if projector.Q is None else _einsum("...iq,...oq->...io", U, projector.Q)


def _sides(projection: str, site: Site) -> tuple[bool, bool]:
    """Whether d_in and whether d_out are compressed."""
    smaller_in = site.d_in <= site.d_out
    return {
        "std": (smaller_in, not smaller_in),
        "reverse_std": (not smaller_in, smaller_in),
        "left": (False, True),
        "right": (True, False),
        "full": (True, True),
    }[projection]


def _random(site: Site, projection: str, dtype: Any) -> Projector:
    # Named, so that jax_default_prng_impl cannot change an initialisation.
    key = site_key(jax.random.key(0, impl="threefry2x32"), site.path)
    left, right = _sides(projection, site)
    return Projector(
        _columns(jax.random.fold_in(key, 0), site, site.d_in, dtype) if left else None,
        _columns(jax.random.fold_in(key, 1), site, site.d_out, dtype) if right else None,
    )


def _columns(key: jax.Array, site: Site, side: int, dtype: Any) -> jax.Array:
    return _orthonormal(
        jax.random.split(key, site.stack), len(site.stack), (side, site.rank), dtype
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _orthonormal(keys: jax.Array, depth: int, shape: tuple[int, int], dtype: Any) -> jax.Array:
    return _over_stack(lambda key: linalg.orthonormal(key, shape, dtype), depth)(keys)


def _refresh_if(
    due: Any, options: Options, chosen: list[Site | None], matrices: list[Any], old: list[Any]
) -> tuple[list[Any], list[Any]]:
    """Projectors and whether each kernel is usable, by one branch on a scalar for all leaves."""
    stays = [site and jnp.ones(site.stack, bool) for site in chosen]
    if due is None or not any(chosen):
        return old, stays

    def refresh() -> tuple[list[Any], list[Any]]:
        pairs = [
            (projector, None)
            if site is None
            else _over_stack(functools.partial(_refresh, options), len(site.stack))((G, projector))
            for site, G, projector in zip(chosen, matrices, old, strict=True)
        ]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    return jax.lax.cond(due, refresh, lambda: (old, stays))


def _refresh(options: Options, args: tuple[jax.Array, Projector]) -> tuple[Projector, jax.Array]:
    """One kernel's projector from its gradient, and whether the gradient can be used."""
    G, old = args
    finite = jnp.all(jnp.isfinite(G))
    new = _leading(options.decomposition, jnp.where(finite, G, jnp.zeros_like(G)), old)
    found = [jnp.all(jnp.isfinite(columns)) for columns in jax.tree.leaves(new)]
    usable = functools.reduce(jnp.logical_and, found, finite)
    # NOTE(paper): a zero gradient (a factor of LoRA while the other is zero) has no leading
    # directions; the released code takes whichever ones the SVD returns for it.
    take = usable & jnp.any(G != 0)
    return jax.tree.map(lambda new, old: jnp.where(take, new, old), new, old), usable


def _leading(decomposition: str, G: jax.Array, old: Projector) -> Projector:
    rank = jax.tree.leaves(old)[0].shape[-1]
    if decomposition == "svd":
        U, _, V = linalg.svd(G, rank)
    elif old.P is not None:
        U, _, V = linalg.svd_near(G, old.P)
    else:
        V, _, U = linalg.svd_near(G.T, old.Q)
    return Projector(None if old.P is None else U, None if old.Q is None else V)


def _over_stack(one: Callable[[Any], Any], depth: int) -> Callable[[Any], Any]:
    """The function over `depth` leading axes."""
    # One layer after the other: a decomposition's workspace is that of a single kernel, and LAPACK
    # calls on a batch can wait for each other's threads without end.
    for _ in range(depth):
        one = functools.partial(jax.lax.map, one)
    return one


def _where(ok: Any, matrix: jax.Array) -> jax.Array:
    return jnp.where(ok[..., None, None], matrix, jnp.zeros_like(matrix))


def _dtype(projector: Any) -> Any:
    return jax.tree.leaves(projector)[0].dtype
