"""Coordinate-wise gradient estimates (CGE): one more value of the loss for every entry in a set S.

    ghat_i = (L(theta + mu e_i) - L(theta)) / mu       for i in S,  0 for the others

S is a tree like the parameters of flat positions (k,) in each leaf, so the cost is 1 + |S| values.
Every perturbed tree is made from theta itself; one leaf of it is a copy. `chunk` values are found
side by side: a leaf is then copied that many times, and what does not depend on it is computed
once. With a `sharding` every device finds its part of S, and only the numbers ghat_i are exchanged.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pefts import linalg
from pefts.optimizers.decay import leaf_paths
from pefts.optimizers.projection import STACKED
from pefts.targets import site_key

Sparsity = float | Mapping[str, float | Sequence[float]]


def value_and_cge(
    value_fn: Callable[[Any], Any],
    params: Any,
    coordinates: Any = None,
    *,
    mu: Any = 5e-3,
    chunk: int = 1,
    sharding: NamedSharding | None = None,
    value: Any = None,
) -> tuple[jax.Array, Any]:
    """L(theta) and the forward differences ghat_i = (L(theta + mu e_i) - L(theta)) / mu.

    NOTE(paper): what is divided by is the difference of the two entries as they are stored, and mu
      grows to the distance of neighbouring numbers where an entry is too large for its dtype to
      tell theta_i + mu from theta_i.

    Args:
      value_fn: params -> L, a floating-point scalar, the same at every call: one batch, no dropout.
      params: theta.
      coordinates: S, a tree like params: integers (k,) that count a leaf's entries in row-major
        order, or None for none of them (None in place of the tree: all floating entries). They may
        be traced; those out of range are then clipped.
      mu: the step (paper: 5e-3).
      chunk: how many values are computed side by side.
      sharding: of S, such as NamedSharding(mesh, PartitionSpec("data")): an axis of the mesh which
        splits neither theta nor the batch.
      value: L(theta), where it is known.

    Returns:
      L(theta) in float32 or better, and the estimate, a tree like params in float32 or better.

    Raises:
      ValueError: mu or chunk is out of range, value_fn gives no scalar, S is empty, does not fit
        params or leaves a leaf's range, the sharding splits no axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from pefts.zeroth_order.coordinates import value_and_cge
      >>> params = {"w": jnp.asarray([1.0, 2.0, 3.0])}
      >>> chosen = {"w": jnp.asarray([0, 2])}
      >>> value, g = value_and_cge(lambda p: 2 * jnp.sum(p["w"]), params, chosen, mu=0.5)
      >>> float(value), g["w"].tolist()
      (12.0, [2.0, 0.0, 2.0])

    Source: DeepZero: Scaling up Zeroth-Order Optimization for Deep Model Training,
      arXiv 2310.02025.
    """
    check_mu(mu)
    check_chunk(chunk)
    check_scalar(value_fn, params)
    sets = index_sets(params, coordinates)
    leaves, treedef = jax.tree.flatten(params)
    base = linalg.precise(jnp.asarray(value_fn(params) if value is None else value))
    devices = 1 if sharding is None else _count(sharding)
    padded = [_padded(S, chunk, devices) for S in sets]

    def quotients(leaves: list[Any], base: Any, mu: Any, padded: list[Any]) -> list[Any]:
        return [
            _quotients(value_fn, treedef, leaves, number, S, base, mu, chunk)
            for number, S in enumerate(padded)
        ]

    if sharding is not None:
        quotients = _split(quotients, sharding)
    found = quotients(leaves, base, jnp.asarray(mu, base.dtype), padded)
    estimate = [
        _scattered(leaf, S, ghat) for leaf, S, ghat in zip(leaves, sets, found, strict=True)
    ]
    return base, treedef.unflatten(estimate)


def all_coordinates(params: Any) -> Any:
    """Every entry of every floating leaf, as `value_and_cge` takes them."""

    def one(leaf: Any) -> Any:
        return jnp.arange(leaf.size) if _floating(leaf) else jnp.arange(0)

    return jax.tree.map(one, params)


def random_coordinates(key: jax.Array, params: Any, sparsity: Sparsity) -> Any:
    """Of every layer of n entries, n - round(s n) at random, as `value_and_cge` takes them.

    What is drawn for a leaf depends on the key and its path alone. How many are drawn is static, so
    that a jitted step can draw others without being compiled again.

    Args:
      key: a random key, or traced.
      params: theta.
      sparsity: s, a number for every leaf with a matrix, or {path: number, or one for each layer},
        as `pefts.zeroth_order.deepzero.layer_sparsity` gives it. Of other leaves all are chosen.

    Raises:
      ValueError: s is outside [0, 1], or names no leaf, or not each of its layers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from pefts.zeroth_order.coordinates import random_coordinates
      >>> params = {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)}
      >>> S = random_coordinates(jax.random.key(0), params, 0.9)
      >>> S["kernel"].shape, S["bias"].tolist()
      ((2,), [0, 1, 2, 3, 4])

    Source: DeepZero: Scaling up Zeroth-Order Optimization for Deep Model Training,
      arXiv 2310.02025.
    """
    leaves, treedef = jax.tree.flatten(params)
    paths = jax.tree.leaves(leaf_paths(params))
    table = _fractions(dict(zip(paths, leaves, strict=True)), sparsity)
    drawn = [
        _drawn(site_key(key, path), leaf, table.get(path))
        for path, leaf in zip(paths, leaves, strict=True)
    ]
    return treedef.unflatten(drawn)


def layers_of(path: str, leaf: Any) -> int:
    """How many layers are stacked on the leaf's first axis: 1 unless it is below "layers/"."""
    return leaf.shape[0] if re.search(STACKED, path) and leaf.ndim else 1


def is_matrix(path: str, leaf: Any) -> bool:
    """Whether a layer of the leaf has two axes or more: kernels, embeddings."""
    return _floating(leaf) and leaf.ndim - (1 if re.search(STACKED, path) else 0) >= 2


def index_sets(params: Any, coordinates: Any = None) -> list[jax.Array]:
    """The checked positions (k,), k >= 0, in the order of the leaves of params.

    Raises:
      ValueError: the trees differ; positions that are no integers (k,), out of range, or of a leaf
        that is not floating; no position at all.
    """
    leaves, treedef = jax.tree.flatten(params)
    paths = jax.tree.leaves(leaf_paths(params))
    try:
        given = treedef.flatten_up_to(
            all_coordinates(params) if coordinates is None else coordinates
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            "coordinates: give a tree like params with integers (k,), or None, in the place of "
            f"every leaf; {error}"
        ) from None
    sets = [_index_set(path, leaf, S) for path, leaf, S in zip(paths, leaves, given, strict=True)]
    if not sum(S.size for S in sets):
        raise ValueError(
            f"coordinates: none of {paths[:5]} has an entry to estimate. Choose at least one."
        )
    return sets


def check_mu(mu: Any) -> None:
    """Raise ValueError if mu is a number, not something traced, that is not above zero."""
    if isinstance(mu, int | float) and not 0 < mu < math.inf:
        raise ValueError(
            f"mu={mu!r}: give the step of the differences, a number above 0 (paper: 5e-3)."
        )


def check_chunk(chunk: int) -> None:
    """Raise ValueError unless chunk is an integer from 1."""
    if type(chunk) is not int or chunk < 1:
        raise ValueError(
            f"chunk={chunk!r}: give how many values are computed side by side, an integer from 1 "
            "(and name it in the static_args of optax.inject_hyperparams)."
        )


def check_queries(queries: int) -> None:
    """Raise ValueError unless q is an integer from 1."""
    if type(queries) is not int or queries < 1:
        raise ValueError(
            f"queries={queries!r}: give q, the number of directions, an integer from 1."
        )


def check_scalar(value_fn: Callable[[Any], Any], params: Any) -> None:
    """Raise ValueError unless value_fn(params) is one floating-point number; none is computed."""
    value = jax.eval_shape(value_fn, params)
    if getattr(value, "shape", None) != () or not _floating(value):
        raise ValueError(
            f"value_fn returns {value}: it must return one floating-point number, the loss of "
            "params (take the mean over the batch, and drop auxiliary outputs)."
        )


def _index_set(path: str, leaf: Any, S: Any) -> jax.Array:
    if S is None:
        return jnp.arange(0)
    if not hasattr(S, "dtype"):
        S = np.asarray(S, np.int32 if np.size(S) == 0 else None)
    if len(S.shape) != 1 or not jnp.issubdtype(S.dtype, jnp.integer):
        raise ValueError(
            f"coordinates of {path!r}: integers of shape (k,) are needed, got {S.dtype} of shape "
            f"{tuple(S.shape)}. Flatten positions with numpy.ravel_multi_index, masks with "
            "numpy.flatnonzero."
        )
    if S.size and not _floating(leaf):
        raise ValueError(
            f"coordinates of {path!r}: its dtype is {leaf.dtype}, and mu is added to "
            "floating-point entries alone. Give None for it."
        )
    try:
        known = np.asarray(S)
    except jax.errors.TracerArrayConversionError:
        return S
    if S.size and not (known.min() >= 0 and known.max() < leaf.size):
        raise ValueError(
            f"coordinates of {path!r}: positions from {known.min()} to {known.max()} are given, "
            f"but its {leaf.size} entries, shape {tuple(leaf.shape)}, have those from 0 to "
            f"{leaf.size - 1}."
        )
    return jnp.asarray(S)


def _fractions(leaves: Mapping[str, Any], sparsity: Any) -> dict[str, np.ndarray]:
    """s (layers,) of the leaves that have one."""
    if not isinstance(sparsity, Mapping):
        sparsity = {path: sparsity for path, leaf in leaves.items() if is_matrix(path, leaf)}
    return {path: _fraction(leaves, path, given) for path, given in sparsity.items()}


def _fraction(leaves: Mapping[str, Any], path: str, given: Any) -> np.ndarray:
    if path not in leaves or not _floating(leaves[path]):
        raise ValueError(
            f"sparsity: {path!r} is no floating leaf of params; for instance these are: "
            f"{[name for name, leaf in leaves.items() if _floating(leaf)][:5]}."
        )
    layers = layers_of(path, leaves[path])
    try:
        fractions = np.asarray(given, np.float64)
    except (TypeError, ValueError, jax.errors.TracerArrayConversionError):
        fractions = np.asarray(np.nan)
    if fractions.ndim == 0:
        fractions = np.repeat(fractions, layers)
    if fractions.shape != (layers,) or not np.all((fractions >= 0) & (fractions <= 1)):
        raise ValueError(
            f"sparsity={given!r} of {path!r}: give the fraction of entries that are left out, a "
            f"number from 0 to 1 (not traced), or {layers} of them, one for each layer."
        )
    return fractions


def _drawn(key: jax.Array, leaf: Any, fractions: np.ndarray | None) -> jax.Array:
    if not _floating(leaf):
        return jnp.arange(0)
    if fractions is None or not leaf.size:
        return jnp.arange(leaf.size)
    n = leaf.size // len(fractions)
    kept = np.asarray([n - round(s * n) for s in fractions.tolist()], np.int32)
    order = jnp.argsort(jax.random.uniform(key, (len(fractions), n)), axis=1)
    rank = jnp.argsort(order, axis=1)
    chosen = rank < jnp.asarray(kept, rank.dtype)[:, None]
    return jnp.flatnonzero(chosen, size=int(kept.sum()))


def _quotients(
    value_fn: Any,
    treedef: Any,
    leaves: list[Any],
    number: int,
    S: Any,
    base: Any,
    mu: Any,
    chunk: int,
) -> jax.Array:
    """ghat (k,) of the positions (k,) in one leaf."""
    leaf = leaves[number]

    def quotient(i: jax.Array) -> jax.Array:
        at = jnp.unravel_index(i, leaf.shape)
        moved = _moved(leaf[at], mu)
        theta = [*leaves[:number], leaf.at[at].set(moved), *leaves[number + 1 :]]
        after = jnp.asarray(value_fn(treedef.unflatten(theta))).astype(base.dtype)
        step = linalg.precise(moved) - linalg.precise(leaf[at])
        return (after - base) / step.astype(base.dtype)

    if not S.size:
        return jnp.zeros((0,), base.dtype)
    width = min(chunk, S.size)
    return jax.lax.map(quotient, S, batch_size=width if width > 1 else None)


def _moved(entry: jax.Array, mu: jax.Array) -> jax.Array:
    """theta_i + mu, or the next number where that is theta_i, in its dtype."""
    kind, wide = jnp.finfo(entry.dtype), linalg.precise(entry)
    step = jnp.maximum(mu.astype(wide.dtype), jnp.abs(wide) * float(kind.eps))
    # A cast alone could be optimised away, and the difference would be that of other numbers.
    return jax.lax.reduce_precision(wide + step, kind.nexp, kind.nmant).astype(entry.dtype)


def _padded(S: jax.Array, chunk: int, devices: int) -> jax.Array:
    """Positions repeated so that devices and chunks divide them: one program, not two."""
    if not S.size:
        return S
    width = min(chunk, -(-S.size // devices))
    extra = -S.size % (width * devices)
    return jnp.concatenate([S, jnp.broadcast_to(S[:1], (extra,))])


def _scattered(leaf: Any, S: jax.Array, ghat: jax.Array) -> jax.Array:
    zero = jnp.zeros_like(linalg.precise(leaf))
    if not S.size:
        return zero
    if not leaf.ndim:
        return ghat[0].astype(zero.dtype)
    return zero.at[jnp.unravel_index(S, leaf.shape)].set(ghat[: S.size].astype(zero.dtype))


def _split(
    quotients: Callable[..., list[Any]], sharding: NamedSharding
) -> Callable[..., list[Any]]:
    """The function with its last argument, the positions, divided among the devices."""
    axes = sharding.spec[0]

    def part(*args: Any) -> list[Any]:
        own = quotients(*args)
        all_of = jax.lax.all_gather(jnp.concatenate(own), axes)  # (devices, numbers of one device)
        ends = np.cumsum([ghat.size for ghat in own])
        return [ghat.reshape(-1) for ghat in jnp.split(all_of, ends[:-1], axis=1)]

    manual = jax.shard_map(
        part,
        mesh=sharding.mesh,
        in_specs=(P(), P(), P(), P(axes)),
        out_specs=P(),
        axis_names={axes} if isinstance(axes, str) else set(axes),
        check_vma=False,
    )
    return jax.jit(manual)  # where some axes of a mesh stay automatic it does not run without


def _count(sharding: NamedSharding) -> int:
    spec = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()
    if len(spec) != 1 or not spec[0]:
        raise ValueError(
            f"sharding={sharding!r}: give a NamedSharding whose spec names the mesh axis that "
            "divides the coordinates, such as PartitionSpec('data')."
        )
    axes = [spec[0]] if isinstance(spec[0], str) else spec[0]
    return math.prod(sharding.mesh.shape[axis] for axis in axes)


def _floating(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
