"""The part of each gradient that an optimizer keeps a state for: rows, entries, subspaces, kernels.

A leaf is a stack of kernels G (d_in, d_out), with rho the density and small the smaller side:

    projection  state for                                     R           how many
    columns     rows of a Flax kernel: features coming in     (m, d_out)  floor(rho d_in)
    rows        columns of a Flax kernel: features going out  (d_in, m)   floor(rho d_out)
    randk       single entries                                (k,)        floor(rho d_in d_out)
    randperm    those of the two which are fewer              (m, large)  round(rho small)
    random      a random subspace of the smaller side         (r, large)  round(rho small)
    svd         that of G's leading singular vectors          (r, large)  round(rho small)
    blocks_*    whole kernels, every layer of a stack one     (n, *G)     round(rho kernels)

"columns" and "rows" are the paper's names, which speak of torch's (d_out, d_in). Kernels of one
shape share a pool of R's and of their moments. In the order blocks_ascending (descending, ...) they
are counted layer by layer and, within one, by path.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pefts import linalg, views
from pefts.optimizers import projection as subspaces
from pefts.targets import Site, Targets, site_key

INDEXED = ("columns", "rows", "randk", "randperm")
BASES = ("random", "svd")
BLOCKS = ("blocks_random", "blocks_ascending", "blocks_descending", "blocks_mirror")
PROJECTIONS = INDEXED + BASES + BLOCKS

Spaces = list[Any]  # for each leaf: indices, a Projector, a pool's slots, or optax.MaskedNode


@dataclasses.dataclass(frozen=True)
class Options:
    """Checked settings; `options` makes them."""

    density: float
    projection: str
    selection: subspaces.Options


class Pool(NamedTuple):
    """Kernels of one shape, which take turns in as many slots."""

    leaves: list[tuple[int, int]]  # which leaf, and the first of its kernels in this pool
    numbers: np.ndarray  # of the kernels, among all there are
    capacity: int


class Plan(NamedTuple):
    """What a tree's shapes decide."""

    projection: str
    treedef: Any
    sites: list[Site | None]
    sizes: list[int]  # indices or basis vectors of a kernel; 0 where there are none
    pools: dict[int, Pool]  # by the leaf in whose place its state is
    active: int  # kernels with a state at a time


def options(
    density: float, projection: str, targets: Targets, axes: Mapping[str, str] | None
) -> Options:
    """The settings, checked as far as they can be without a tree.

    Raises:
      ValueError: density is no number from 0 to 1, or the projection is unknown.
    """
    if not isinstance(density, int | float) or not 0 <= density <= 1:
        raise ValueError(
            f"density={density!r}: give rho, the share with a state, from 0 to 1 (and name it in "
            "the static_args of optax.inject_hyperparams)."
        )
    if projection not in PROJECTIONS:
        raise ValueError(f"projection={projection!r} is unknown; choose one of {PROJECTIONS}.")
    # Nothing has a state at density 0, however it is chosen: no index is the simplest nothing.
    kind = projection if density else "columns"
    return Options(density, kind, subspaces.options(1, "std", "svd", targets, axes))


def plan(options: Options, tree: Any) -> Plan:
    """What of this tree has a state.

    Raises:
      ValueError: as pefts.optimizers.projection.sites; a density above 0 that leaves nothing; an
        odd number of blocks in the order of "blocks_mirror".
    """
    treedef, sites = jax.tree.structure(tree), subspaces.sites(options.selection, tree)
    kind = options.projection
    if kind not in BLOCKS:
        sizes = [0 if site is None else _size(options, site) for site in sites]
        return Plan(kind, treedef, sites, sizes, {}, 0)
    order = _in_order(sites)
    active = round(len(order) * options.density)
    if order:
        _check_blocks(options, len(order), active)
    dtypes = [
        str(jax.eval_shape(linalg.precise_floats, leaf).dtype) for leaf in jax.tree.leaves(tree)
    ]
    pools = _pools(options, sites, dtypes, order, active)
    return Plan(kind, treedef, sites, [0] * len(sites), pools, active)


def matrix(leaf: Any, site: Site | None) -> jax.Array:
    """The leaf in float32 or better, (*stack, d_in, d_out) where there is a site."""
    return linalg.precise_floats(leaf if site is None else views.to_matrix(leaf, site.axes))


def choose(
    plan: Plan, seed: Any, window: Any, matrices: list[Any], old: Spaces | None = None
) -> Spaces:
    """The spaces of a window: drawn, taken in turn or, for "svd", found in the gradients.

    Without old spaces, before there are gradients, those of "svd" are random. A kernel whose
    gradient is zero or not finite keeps its old one.
    """
    # Named, so that jax_default_prng_impl cannot change a choice.
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), window)
    if plan.projection in BLOCKS:
        return _choose_blocks(plan, key, window)
    spaces = []
    for n, site in enumerate(plan.sites):
        if site is None:
            space = optax.MaskedNode()
        elif plan.projection in INDEXED:
            space = _indices(plan.projection, site_key(key, site.path), site, plan.sizes[n])
        elif plan.projection == "svd" and old is not None:
            space = _found(matrices[n], old[n])
        else:
            space = _random(site_key(key, site.path), site, plan.sizes[n], matrices[n].dtype)
        spaces.append(space)
    return spaces


def down(plan: Plan, spaces: Spaces, matrices: list[Any]) -> list[Any]:
    """R of each leaf or pool, optax.MaskedNode elsewhere."""
    low: list[Any] = [optax.MaskedNode()] * len(plan.sites)
    for first, pool in plan.pools.items():
        low[first] = _gather(plan, pool, spaces[first], matrices)
    for n, site in enumerate(plan.sites):
        if site is not None and plan.projection in BASES:
            low[n] = subspaces.project(spaces[n], matrices[n])
        elif site is not None and plan.projection in INDEXED:
            low[n] = _vmap(_take(plan.projection, site), len(site.stack))(matrices[n], spaces[n])
    return low


def up(
    plan: Plan,
    spaces: Spaces,
    low: list[Any],
    stepped: list[Any],
    matrices: list[Any],
    free: Callable[[jax.Array], jax.Array],
) -> list[Any]:
    """up(N) + free(G - up(R)) of each leaf with a site, from R and what became of it, N.

    `free` takes zero to zero.
    """
    full = list(matrices)
    for n, site in enumerate(plan.sites):
        if site is None or plan.projection in BLOCKS:
            continue
        if plan.projection in BASES:
            outside = matrices[n] - subspaces.restore(spaces[n], low[n])
            full[n] = subspaces.restore(spaces[n], stepped[n]) + free(outside)
        else:
            put = _vmap(_put(plan.projection, site), len(site.stack))
            full[n] = put(free(matrices[n]), spaces[n], stepped[n])
    for first, pool in plan.pools.items():
        for n, offset in pool.leaves:
            full[n] = _scatter(free(matrices[n]), spaces[first] - offset, stepped[first])
    return full


def _size(options: Options, site: Site) -> int:
    kind, small = options.projection, min(site.d_in, site.d_out)
    sides = {"columns": site.d_in, "rows": site.d_out, "randk": site.d_in * site.d_out}
    exact = sides.get(kind, small) * options.density
    # The density of one of 49 is 0.9999999999999999 of them.
    size = int(exact + 1e-9) if kind in sides else round(exact)
    if options.density and not size:
        raise ValueError(
            f"density={options.density!r} gives projection={kind!r} nothing of {site.path!r}, a "
            f"{site.d_in} x {site.d_out} kernel: choose at least {1 / sides.get(kind, small):.2g}, "
            "or 0 for no state at all."
        )
    return size


def _axis(projection: str, site: Site) -> int | None:
    """The axis of (d_in, d_out) that indices are of, None if of both."""
    smaller = -2 if site.d_in <= site.d_out else -1
    return {"columns": -2, "rows": -1, "randk": None, "randperm": smaller}[projection]


def _indices(projection: str, key: jax.Array, site: Site, size: int) -> jax.Array:
    """(*stack, size) different indices for each kernel."""
    axis = _axis(projection, site)
    total = site.d_in * site.d_out if axis is None else (site.d_in, site.d_out)[axis]
    keys = jax.random.split(key, math.prod(site.stack))
    return _permuted(keys, total, size).reshape(*site.stack, size)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _permuted(keys: jax.Array, total: int, size: int) -> jax.Array:
    def draw(key: jax.Array) -> jax.Array:
        return jax.random.permutation(key, jnp.arange(total, dtype=jnp.int32))[:size]

    # One kernel after the other: all entries of a single one are sorted at a time.
    return jax.lax.map(draw, keys)


def _random(key: jax.Array, site: Site, rank: int, dtype: Any) -> subspaces.Projector:
    shape = (min(site.d_in, site.d_out), rank)
    columns = _orthonormal(jax.random.split(key, math.prod(site.stack)), shape, dtype)
    columns = columns.reshape(*site.stack, *shape)
    if site.d_in <= site.d_out:
        return subspaces.Projector(columns, None)
    return subspaces.Projector(None, columns)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _orthonormal(keys: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    return jax.lax.map(lambda key: linalg.orthonormal(key, shape, dtype), keys)


def _found(G: jax.Array, old: subspaces.Projector) -> subspaces.Projector:
    """The leading singular vectors of each kernel on its smaller side."""
    # LAPACK calls on a batch can wait for each other's threads without end.
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[-2:]), (G, old))
    return jax.tree.map(lambda new, old: new.reshape(old.shape), jax.lax.map(_leading, flat), old)


def _leading(args: tuple[jax.Array, subspaces.Projector]) -> subspaces.Projector:
    G, (P, Q) = args
    G, before = (G, P) if Q is None else (G.T, Q)
    finite = jnp.where(jnp.all(jnp.isfinite(G)), G, jnp.zeros_like(G))
    columns = linalg.svd_near(finite, before).U
    usable = jnp.any(finite != 0) & jnp.all(jnp.isfinite(columns))
    columns = jnp.where(usable, columns, before)
    return subspaces.Projector(columns, None) if Q is None else subspaces.Projector(None, columns)


def _vmap(one: Callable[..., Any], depth: int) -> Callable[..., Any]:
    for _ in range(depth):
        one = jax.vmap(one)
    return one


def _place(projection: str, site: Site, indices: jax.Array) -> Any:
    """What a kernel is indexed with."""
    axis = _axis(projection, site)
    if axis is None:
        return indices // site.d_out, indices % site.d_out
    return (indices,) if axis == -2 else (slice(None), indices)


def _take(projection: str, site: Site) -> Callable[..., jax.Array]:
    return lambda G, indices: G[_place(projection, site, indices)]


def _put(projection: str, site: Site) -> Callable[..., jax.Array]:
    return lambda G, indices, N: G.at[_place(projection, site, indices)].set(N)


# --- whole kernels ---


def _in_order(sites: list[Site | None]) -> list[tuple[int, int]]:
    """(leaf, layer) of every kernel: layer after layer, by path within one."""

    def position(path: str, layer: int, *, stacked: bool) -> list[Any]:
        found = re.search(subspaces.STACKED, path)
        if stacked:
            cut = found.end() if found else 0
            path = f"{path[:cut]}{layer}/{path[cut:]}"
        return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", path)]

    kernels = [
        (position(site.path, layer, stacked=bool(site.stack)), n, layer)
        for n, site in enumerate(sites)
        if site is not None
        for layer in range(math.prod(site.stack))
    ]
    return [(n, layer) for _, n, layer in sorted(kernels)]


def _check_blocks(options: Options, kernels: int, active: int) -> None:
    if not active:
        raise ValueError(
            f"density={options.density!r} gives none of {kernels} kernels a state: choose at least "
            f"{1 / kernels:.2g}, or 0 for no state at all."
        )
    if options.projection == "blocks_mirror" and active % 2:
        raise ValueError(
            f"projection='blocks_mirror' takes kernels in pairs, but density={options.density!r} "
            f"of {kernels} kernels are {active}: choose one that gives an even number."
        )


def _turn(projection: str, kernels: int, active: int, window: Any) -> Any:
    """Which kernels have a state in this window, where that is no draw."""
    place = np.arange(kernels, dtype=np.int32)
    total, many = max(kernels, 1), active
    if projection == "blocks_descending":
        place = place[::-1]
    elif projection == "blocks_mirror":
        place, total, many = np.minimum(place, place[::-1]), max(kernels // 2, 1), active // 2
    start = window % total * many % total
    # One in the middle of an odd number has no partner, and no turn.
    return ((place - start) % total < many) & (place < total)


def _pools(
    options: Options,
    sites: list[Site | None],
    dtypes: list[str],
    order: list[tuple[int, int]],
    active: int,
) -> dict[int, Pool]:
    """Pools by the first of their leaves, no larger than the order ever needs."""
    number = {kernel: n for n, kernel in enumerate(order)}
    grouped: dict[Any, list[tuple[int, int]]] = {}
    for n, site in enumerate(sites):
        if site is not None:
            layers = [(n, layer) for layer in range(math.prod(site.stack))]
            grouped.setdefault((site.d_in, site.d_out, dtypes[n]), []).extend(layers)
    pools = {}
    for kernels in grouped.values():
        numbers = np.array([number[kernel] for kernel in kernels])
        starts = [(n, at) for at, (n, layer) in enumerate(kernels) if layer == 0]
        if options.projection == "blocks_random":
            # NOTE(paper): its draw may fall on kernels of one shape alone, for which there would
            # have to be room; here none of the shapes gets more than its share, rounded up.
            most = math.ceil(len(kernels) * options.density - 1e-9)
        else:
            turns = (_turn(options.projection, len(order), active, n) for n in range(len(order)))
            most = max(int(turn[numbers].sum()) for turn in turns)
        pools[kernels[0][0]] = Pool(starts, numbers, min(most, active))
    return pools


def _choose_blocks(plan: Plan, key: jax.Array, window: Any) -> Spaces:
    spaces: Spaces = [optax.MaskedNode()] * len(plan.sites)
    kernels = sum(len(pool.numbers) for pool in plan.pools.values())
    if plan.projection == "blocks_random":
        taken = _draw(plan, key)
    else:
        taken = jnp.asarray(_turn(plan.projection, kernels, plan.active, window))
    for first, pool in plan.pools.items():
        spaces[first] = jnp.nonzero(
            taken[pool.numbers], size=pool.capacity, fill_value=len(pool.numbers)
        )[0].astype(jnp.int32)
    return spaces


def _draw(plan: Plan, key: jax.Array) -> jax.Array:
    """Which kernels have a state: the first in a random queue whose pools have room."""
    kernels = sum(len(pool.numbers) for pool in plan.pools.values())
    queue = jax.random.permutation(key, jnp.arange(kernels, dtype=jnp.int32))
    for pool in plan.pools.values():
        late = _rank(queue[pool.numbers]) >= pool.capacity
        queue = queue.at[pool.numbers].add(jnp.where(late, kernels, 0).astype(jnp.int32))
    return _rank(queue) < plan.active


def _rank(values: jax.Array) -> jax.Array:
    return jnp.argsort(jnp.argsort(values))


def _gather(plan: Plan, pool: Pool, slots: jax.Array, matrices: list[Any]) -> jax.Array:
    """The gradients of the kernels in the slots (capacity, d_in, d_out), zero in an empty one."""
    low = jnp.zeros((), matrices[pool.leaves[0][0]].dtype)
    for n, offset in pool.leaves:
        kernels = matrices[n].reshape(-1, *matrices[n].shape[-2:])
        at = slots - offset
        inside = ((at >= 0) & (at < len(kernels)))[:, None, None]
        low = jnp.where(inside, kernels[jnp.clip(at, 0, len(kernels) - 1)], low)
    return low


def _scatter(full: jax.Array, at: jax.Array, stepped: jax.Array) -> jax.Array:
    """The kernels of one leaf with those of the slots put in their places."""
    kernels = full.reshape(-1, *full.shape[-2:])
    at = jnp.where(at < 0, len(kernels), at)  # a negative index would count from the end
    return kernels.at[at].set(stepped, mode="drop").reshape(full.shape)
