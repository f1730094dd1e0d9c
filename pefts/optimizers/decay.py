"""Which leaves weight decay acts on, by path."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from pefts import targets


def decay_mask(without: Sequence[str]) -> Callable[[Any], Any]:
    """A mask for optax (True: decays) that is False where a pattern is found in the leaf's path.

    Paths are those of an adapter's trainable tree: "encoder/layers/mlp/output/kernel/A".

    Args:
      without: regular expressions, searched in the path; leaves they match do not decay.

    Returns:
      A function (tree) -> tree of booleans, such as `mask` of optax.adamw takes.

    Raises:
      ValueError: at the tree: a pattern that is found in no path; near names are listed.

    Example:
      >>> import optax
      >>> from pefts.optimizers import decay_mask
      >>> decay_mask(["/B$"])({"dense/kernel": {"A": 0.0, "B": 0.0}})
      {'dense/kernel': {'A': True, 'B': False}}
      >>> tx = optax.adamw(1e-3, weight_decay=0.1, mask=decay_mask(["/B$"]))
    """
    patterns = tuple([without] if isinstance(without, str) else without)

    def mask(tree: Any) -> Any:
        paths = leaf_paths(tree)
        for pattern in patterns:
            targets.match(pattern, jax.tree.leaves(paths), argument="without")
        return jax.tree.map(lambda path: not found(patterns, path), paths)

    return mask


def leaf_paths(tree: Any) -> Any:
    """The tree with each leaf's path, joined with "/", in its place."""

    def name(path: Any, leaf: Any) -> str:
        del leaf
        return jax.tree_util.keystr(path, simple=True, separator="/")

    return jax.tree_util.tree_map_with_path(name, tree)


def found(patterns: Sequence[str], path: str) -> bool:
    """Whether any of the patterns is found in the path."""
    return any(re.search(pattern, path) for pattern in patterns)
