"""A leaf that is computed where it is read: inside the layer that needs it, and nowhere else.

A state's array may be replaced by a `Deferred`. nn.scan slices it as it slices arrays, and the rule
of a method is given the array itself: what is built of a stack of layers is one layer at a time.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("value", "args"), meta_fields=("fn", "ndim")
)
@dataclasses.dataclass(frozen=True)
class Deferred:
    """fn(value, *args), for each layer of a stack."""

    value: jax.Array  # (*stack, ...)
    args: tuple[Any, ...]  # arrays or trees of them, with the same leading axes
    fn: Callable[..., jax.Array]  # of one layer; its result has the layer's shape and dtype
    ndim: int  # axes of `value` in a layer

    def array(self) -> jax.Array:
        """The array that this stands for."""
        fn = self.fn
        for _ in range(self.value.ndim - self.ndim):
            fn = jax.vmap(fn)
        return fn(self.value, *self.args)


def is_deferred(leaf: Any) -> bool:
    """Whether this node of a tree is a `Deferred`."""
    return isinstance(leaf, Deferred)


def arrays(tree: Any) -> Any:
    """The tree with an array in the place of every `Deferred`."""
    return jax.tree.map(
        lambda leaf: leaf.array() if is_deferred(leaf) else leaf, tree, is_leaf=is_deferred
    )
