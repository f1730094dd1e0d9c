"""Parameter trees as flat dictionaries of "/"-joined paths, and back."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

Tree = Any
RESERVED = "pefts"  # the top-level key of a bound tree that carries shared state and context


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> {"a/b/kernel": leaf}; anything that is not a mapping is a leaf."""
    flat: dict[str, Any] = {}
    for name, value in params.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{path}/"))
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b/kernel": leaf} -> nested dict."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def replace(params: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the nested mapping in which the leaves at the given paths are exchanged."""
    return unflatten({**flatten(params), **leaves})


def keep(params: Mapping[str, Any], wanted: Callable[[str], bool]) -> dict[str, Any]:
    """The sub-tree of the leaves whose path is wanted."""
    return unflatten({path: leaf for path, leaf in flatten(params).items() if wanted(path)})


def join(*names: str | Iterable[str]) -> str:
    """Path segments (strings, or tuples of them) joined with "/", empty ones left out."""
    parts: list[str] = []
    for name in names:
        parts.extend([name] if isinstance(name, str) else name)
    return "/".join(part for part in parts if part)
