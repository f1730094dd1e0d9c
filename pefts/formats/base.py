"""The base of an adapter, seen by torch's names."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from pefts import paths, targets, views
from pefts.core import Params
from pefts.formats.contract import Format, Slot
from pefts.formats.whole import Place

Letters = Callable[[str, tuple[int, ...], bool], str]  # (path, shape, is stacked) -> axes


class NameMap(Protocol):
    """A model's parameter paths and its torch names; models.load returns one."""

    def keys(self, path: str) -> list[str]:
        """The torch keys of a leaf, one for each layer that it stacks."""
        ...

    def modules(self, path: str) -> list[str]:
        """The same without the last part."""
        ...

    def path(self, key: str) -> tuple[str, int | None, str]:
        """(leaf's path, index on its stacked axis, "T" where torch keeps the transpose)."""
        ...


class Base(NamedTuple):
    """The base, seen by torch's names."""

    flat: Mapping[str, Any]
    places: Mapping[str, Place]  # by key
    names: NameMap

    @classmethod
    def of(cls, params: Params, names: NameMap) -> "Base":
        flat = paths.flatten(params)
        keys = [key for path in flat for key in _known_keys(names, path)]
        return cls(flat, {key: Place(key, *names.path(key)) for key in keys}, names)

    @property
    def adaptable(self) -> dict[str, Place]:
        """The kernels and tables by torch module."""
        leaves = ("kernel", "embedding")
        return {p.module: p for p in self.places.values() if p.path.endswith(leaves)}

    def places_for(self, format: Format) -> dict[str, list[Place]]:
        """The leaves that a format adapts, by the torch module that its keys name."""
        found: dict[str, list[Place]] = {}
        for place in self.places.values():
            if re.search(format.leaves, place.path):
                found.setdefault(format.module_of(place.module), []).append(place)
        return found

    def slots(self, path: str, axes: Letters) -> list[Slot]:
        """The slices of a leaf in the order of its stacked axis."""
        if path not in self.flat:
            raise ValueError(f"the state adapts {path!r}, which params do not have.")
        keys, shape = self.names.keys(path), tuple(self.flat[path].shape)
        letters = axes(path, shape, self.places[keys[0]].layer is not None)
        stack = views.stacked(letters)
        if stack > 1 or len(keys) != (shape[0] if stack else 1):
            raise ValueError(
                f"{path!r} of shape {shape} and axes {letters!r} stacks other slices than its "
                f"{len(keys)} torch modules, for instance {keys[0]!r}; peft adapts one module at a "
                "time."
            )
        return [
            Slot(
                self.places[key].module,
                path,
                self.places[key].layer if stack else None,
                letters[stack:],
                shape[stack:],
                self.places[key].op == "T",
            )
            for key in keys
        ]

    def weight(self, slot: Slot) -> np.ndarray:
        """The slot's kernel as a float32 matrix (d_in, d_out)."""
        leaf = self.flat[slot.path]
        matrix = views.to_matrix(leaf if slot.layer is None else leaf[slot.layer], slot.axes)
        return np.asarray(matrix, np.float32)


def _known_keys(names: NameMap, path: str) -> list[str]:
    try:
        return names.keys(path)
    except ValueError:
        return []  # a leaf that torch's model lacks; an error only if it is adapted


def letters(table: Mapping[str, str] | None) -> Letters:
    """(path, shape, is stacked) -> letters: from the table, else a plain kernel, stacked or not."""
    chosen = targets.selection(axes=table)

    def of(path: str, shape: tuple[int, ...], stacked: bool) -> str:
        inner = len(shape) - stacked
        if targets.first(chosen.axes, path, None) is not None or inner not in (2, 4):
            return chosen.axes_of(path, shape)
        return "l" * stacked + "k" * (inner - 2) + "io"

    return of
