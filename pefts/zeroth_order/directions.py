"""Random directions of a parameter tree that are never stored: a key is all that is kept of one.

    z(leaf) = draw(fold_in(key, index of the leaf), shape)                    of one array
    z(leaf)[l] = draw(fold_in(fold_in(key, index), l), shape[1:])             of stacked layers

in float32, whatever the leaf's dtype, where the index is the leaf's place among the sorted paths of
the floating leaves. Perturbed leaves of stacked layers are `Deferred`: their noise is drawn inside
the layer scan, one layer at a time. theta itself is never walked back and forth.

The numbers are threefry's and need jax_threefry_partitionable (JAX's default): with it they do not
depend on how a leaf is sharded.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pefts import deferred, linalg
from pefts.optimizers.decay import leaf_paths
from pefts.optimizers.projection import STACKED

IMPL = "threefry2x32"
Draw = Callable[[jax.Array, tuple[int, ...], str], jax.Array]  # (key, shape, path) -> z, float32
Mask = Callable[[jax.Array, Any], jax.Array]  # (one layer's theta, its `about`) -> True: is moved


def normal(key: jax.Array, shape: tuple[int, ...], path: str) -> jax.Array:
    """z ~ N(0, I)."""
    del path
    return jax.random.normal(key, shape, jnp.float32)


def rademacher(key: jax.Array, shape: tuple[int, ...], path: str) -> jax.Array:
    """Independent signs."""
    del path
    return jax.random.rademacher(key, shape, jnp.float32)


DRAWS: dict[str, Draw] = {"normal": normal, "rademacher": rademacher}


class Direction(NamedTuple):
    """What a key means.

    Attributes:
      draw: the distribution; its path argument is the leaf's, and changes nothing in those here.
      mask: which entries take part, from the parameters before they are perturbed; None: all.
      about: what the mask reads: a tree like theta of arrays with the layers' leading axis.
    """

    draw: Draw = normal
    mask: Mask | None = None
    about: Any = None


class Leaf(NamedTuple):
    """One leaf of theta, and where its noise comes from."""

    path: str
    index: int  # among the floating leaves, by path; -1: not one of them
    stacked: bool  # its first axis is that of scanned layers


def run_key(seed: int) -> jax.Array:
    """The key data of a run, uint32 (2,)."""
    return jax.random.key_data(jax.random.key(seed, impl=IMPL))


def fold_in(key: jax.Array, number: Any) -> jax.Array:
    """The key data of a part of what `key` stands for: a step, a query."""
    return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key, impl=IMPL), number))


def leaves_of(theta: Any) -> list[Leaf]:
    """The leaves in the tree's order; their numbers are those of the sorted paths."""
    names, arrays = jax.tree.leaves(leaf_paths(theta)), jax.tree.leaves(theta)
    floating = sorted(
        name
        for name, leaf in zip(names, arrays, strict=True)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    )
    index = {name: number for number, name in enumerate(floating)}
    return [
        Leaf(name, index.get(name, -1), bool(re.search(STACKED, name)) and jnp.ndim(leaf) > 0)
        for name, leaf in zip(names, arrays, strict=True)
    ]


def perturb(theta: Any, key: jax.Array, scale: Any, direction: Direction = Direction()) -> Any:
    """theta + scale z(key), float32 inside, in theta's dtypes.

    Args:
      theta: a tree; leaves that are not floating stay as they are.
      key: uint32 (2,), from `run_key` and `fold_in`.
      scale: a number, or traced.
      direction: what the key means.

    Returns:
      The tree, with a `Deferred` in the place of every leaf of stacked layers.

    Example:
      >>> import jax.numpy as jnp
      >>> from pefts.zeroth_order import directions
      >>> moved = directions.perturb({"w": jnp.zeros(3)}, directions.run_key(0), 0.5)
      >>> moved["w"].shape
      (3,)
    """

    size = jnp.asarray(scale, jnp.result_type(float))

    def one(leaf: Leaf, value: Any, about: Any) -> Any:
        if leaf.index < 0:
            return value
        own = fold_in(key, leaf.index)
        fn = _Moved(direction._replace(about=None), leaf.path)
        if not leaf.stacked:
            return fn(value, own, size, about)
        layers = value.shape[0]
        keys = jax.vmap(fold_in, (None, 0))(own, jnp.arange(layers))
        sizes = jnp.broadcast_to(size, (layers,))
        return deferred.Deferred(value, (keys, sizes, about), fn, value.ndim - 1)

    return _map(one, theta, direction)


class _Moved(NamedTuple):
    """value + scale z; equal for equal directions, as it is part of a tree's structure."""

    direction: Direction
    path: str

    def __call__(self, value: Any, key: Any, scale: Any, about: Any) -> jax.Array:
        z = _noise(self.direction, self.path, value, key, about)
        wide = linalg.precise(value)
        return (wide + scale.astype(wide.dtype) * z.astype(wide.dtype)).astype(value.dtype)


def _noise(direction: Direction, path: str, value: Any, key: Any, about: Any) -> jax.Array:
    z = direction.draw(jax.random.wrap_key_data(key, impl=IMPL), value.shape, path)
    if direction.mask is None:
        return z
    return jnp.where(direction.mask(value, about), z, jnp.zeros_like(z))


def total(
    theta: Any, keys: jax.Array, coefficients: jax.Array, direction: Direction = Direction()
) -> Any:
    """sum_n c_n z(key_n), a dense tree like theta in float32 or better; zero where not floating.

    Args:
      theta: a tree.
      keys: uint32 (N, 2).
      coefficients: (N,).
      direction: what the keys mean.
    """

    def one(leaf: Leaf, value: Any, about: Any) -> Any:
        if leaf.index < 0:
            return jnp.zeros_like(value)
        return _over_layers(
            leaf, value, about, functools.partial(_sum, direction, leaf, keys, coefficients)
        )

    return _map(one, theta, direction)


def move(
    theta: Any,
    keys: jax.Array,
    coefficients: jax.Array,
    direction: Direction = Direction(),
    decay: Any = None,
) -> Any:
    """theta (1 - decay) + sum_n c_n z(key_n), one layer after the other.

    With theta donated to the jitted step that ends in it, this works in place, and the noise that
    exists at any time is that of one layer.

    Args:
      theta: a tree.
      keys: uint32 (N, 2).
      coefficients: (N,); each is multiplied and added in float32, in the order of n.
      direction: what the keys mean; a mask reads theta as it was before the call.
      decay: a tree like theta of scalars; None: no decay.
    """
    decays = jax.tree.map(lambda _: None, theta) if decay is None else decay

    def one(leaf: Leaf, value: Any, about: Any, lost: Any) -> Any:
        if leaf.index < 0:
            return value

        def moved(part: Any, own: Any, part_about: Any) -> jax.Array:
            step = _sum(direction, leaf, keys, coefficients, part, own, part_about)
            kept = part.astype(step.dtype)
            kept = kept if lost is None else kept - jnp.asarray(lost, step.dtype) * kept
            return (kept + step).astype(part.dtype)

        return _over_layers(leaf, value, about, moved)

    return _map(one, theta, direction, decays)


def _over_layers(
    leaf: Leaf, value: Any, about: Any, fn: Callable[[Any, Any, Any], jax.Array]
) -> jax.Array:
    """fn(part, layer or None, about), of the layers one after the other, in place if it can be."""
    if not leaf.stacked:
        return fn(value, None, about)
    slices = jax.tree.map(lambda x: x[0], (value, about))
    out = jax.eval_shape(lambda part, rest: fn(part, jnp.int32(0), rest), *slices)

    def body(layer: Any, whole: Any) -> Any:
        part = jax.lax.dynamic_index_in_dim(whole, layer, keepdims=False)
        rest = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), about)
        return jax.lax.dynamic_update_index_in_dim(whole, fn(part, layer, rest), layer, 0)

    start = value if out.dtype == value.dtype else value.astype(out.dtype)
    return jax.lax.fori_loop(0, value.shape[0], body, start)


def _sum(
    direction: Direction,
    leaf: Leaf,
    keys: jax.Array,
    coefficients: jax.Array,
    part: Any,
    layer: Any,
    about: Any,
) -> jax.Array:
    """sum_n c_n z(key_n) of one layer."""
    zero = jnp.zeros_like(linalg.precise(part))

    def term(n: Any) -> jax.Array:
        own = fold_in(keys[n], leaf.index)
        own = own if layer is None else fold_in(own, layer)
        z = _noise(direction, leaf.path, part, own, about).astype(zero.dtype)
        return coefficients[n].astype(zero.dtype) * z

    if keys.shape[0] == 1:
        return term(0)
    return jax.lax.fori_loop(0, keys.shape[0], lambda n, sum: sum + term(n), zero)


def _map(fn: Callable[..., Any], theta: Any, direction: Direction, *trees: Any) -> Any:
    """fn(leaf, value, about, ...) over the tree."""
    values, treedef = jax.tree.flatten(theta)
    abouts = (
        [None] * len(values) if direction.about is None else treedef.flatten_up_to(direction.about)
    )
    others = [treedef.flatten_up_to(tree) for tree in trees]
    return treedef.unflatten(
        [fn(*parts) for parts in zip(leaves_of(theta), values, abouts, *others, strict=True)]
    )
