"""Which base an adapter belongs to: the shape and a checksum of every kernel it adapts.

The checksum covers all values, as bfloat16 would round them, so that a float32 and a bfloat16 copy
of one checkpoint agree. With b_i the 16 bits of value i and w_i a fixed odd weight of its position,

    sum_i b_i w_i  mod 2^32          twice, with independent weights

Integer sums have no order: the result is the same on any number of devices and under any sharding,
and nothing but it leaves the devices.
"""

import difflib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pefts import paths

CHECKS = ("values", "shapes")
SEEDS = (0, 0x9E3779B9)


def targeted(params: Mapping[str, Any], *trees: Any) -> dict[str, bool]:
    """{path of each leaf that the state's trees adapt: whether the state replaces it entirely}."""
    flat, found = paths.flatten(params), {}

    def visit(tree: Any) -> None:
        if not isinstance(tree, Mapping):
            return
        for name, group in tree.items():
            if name in flat and isinstance(group, Mapping):
                # A leaf that is trained itself may have started anywhere: a new classifier, say.
                value = group.get("value")
                whole = value is not None and value.size == flat[name].size
                found[name] = found.get(name, False) or whole
            else:
                visit(group)

    for tree in trees:
        visit(tree)
    return found or dict.fromkeys(flat, False)


def take(params: Mapping[str, Any], leaves: Mapping[str, bool]) -> dict[str, dict[str, Any]]:
    """{path: {"shape", "checksum"}}; the checksum is None for leaves that are replaced entirely."""
    flat = paths.flatten(params)
    return {
        path: {
            "shape": list(flat[path].shape),
            "checksum": None if replaced else checksum(flat[path]),
        }
        for path, replaced in sorted(leaves.items())
    }


def check(
    recorded: Mapping[str, Mapping[str, Any]], params: Mapping[str, Any], level: str, source: str
) -> None:
    """Raise ValueError, naming the leaves, unless `params` are the base that was recorded."""
    flat = paths.flatten(params)
    for path, entry in recorded.items():
        shape = tuple(entry["shape"])
        if path not in flat:
            near = difflib.get_close_matches(path, flat, n=3)
            raise ValueError(
                f"{source} is an adapter for another base: it adapts {path!r} {shape}, which "
                f"params do not have{f' (near names: {near})' if near else ''}. Load it on the "
                "model it was made for, built with the same options (scanned layers, head)."
            )
        if tuple(flat[path].shape) != shape:
            raise ValueError(
                f"{source} is an adapter for another base: {path!r} was {shape} there and is "
                f"{tuple(flat[path].shape)} in params. Load it on the model it was made for."
            )
    if level == "shapes":
        return
    changed = [
        path
        for path, entry in recorded.items()
        if entry["checksum"] is not None and checksum(flat[path]) != entry["checksum"]
    ]
    if changed:
        raise ValueError(
            f"{source} is an adapter for another base: {len(changed)} of {len(recorded)} adapted "
            f"leaves hold other values, for instance {changed[0]!r}. Give the parameters it was "
            "trained on, neither merged nor bound; for the same checkpoint in another format "
            "(quantised, float16) pass check_base='shapes'."
        )


def checksum(leaf: Any) -> str:
    """16 hexadecimal digits per array of one leaf (a quantised kernel has several)."""
    arrays = jax.tree.leaves(leaf)
    sums = [np.asarray(_sums(jnp.asarray(array))).tolist() for array in arrays]
    return "-".join("".join(f"{value:08x}" for value in pair) for pair in sums)


@jax.jit
def _sums(x: jax.Array) -> jax.Array:
    bits, index = _bits(x), jnp.zeros(x.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(x.ndim)):
        position = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        index = index + position * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.stack([jnp.sum(bits * _weights(index, s), dtype=jnp.uint32) for s in SEEDS])


def _bits(x: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x.astype(jnp.uint32)
    if x.dtype == jnp.bfloat16:
        return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    # Rounding to nearest even by integers alone: no device can flush a denormal on the way.
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    odd = (bits >> jnp.uint32(16)) & jnp.uint32(1)
    return (bits + jnp.uint32(0x7FFF) + odd) >> jnp.uint32(16)


def _weights(index: jax.Array, seed: int) -> jax.Array:
    """Odd and well mixed, so that one changed value always changes the sum."""
    h = (index ^ jnp.uint32(seed)) * jnp.uint32(2654435761)
    h = (h ^ (h >> jnp.uint32(15))) * jnp.uint32(2246822519)
    return (h ^ (h >> jnp.uint32(13))) | jnp.uint32(1)
