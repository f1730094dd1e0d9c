"""What a format file works with: slices of leaves as torch modules, and both sides of an adapter.

A format converts between `Native` (our state, one entry per slice) and `Files` (what the folder
holds, keyed by torch module). Names, stacking, files and the leaves trained outright are not its
business.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

Arrays = Mapping[str, np.ndarray]
Named = TypeVar("Named", "str", "Slot")
BIASES = ("none", "all", "lora_only")


class Slot(NamedTuple):
    """One torch module: a slice of a leaf of the parameter tree."""

    module: str  # the torch module's dotted path
    path: str  # the leaf's path
    layer: int | None  # its index on the leaf's stacked axis
    axes: str  # letters (pefts.views) of the slice's axes
    shape: tuple[int, ...]  # of the slice
    transposed: bool = True  # torch keeps this kernel as (out, in)

    def _size(self, letters: str) -> int:
        return math.prod(
            n for n, axis in zip(self.shape, self.axes, strict=True) if axis in letters
        )

    @property
    def d_in(self) -> int:
        return self._size("ik")

    @property
    def d_out(self) -> int:
        return self._size("o")

    @property
    def window(self) -> tuple[int, ...]:
        """Of a convolution; () for any other kernel."""
        return tuple(n for n, axis in zip(self.shape, self.axes, strict=True) if axis == "k")

    @property
    def is_embedding(self) -> bool:
        return self.path.endswith("embedding")


Weight = Callable[[Slot], np.ndarray]  # the base kernel of a slot as a float32 matrix (d_in, d_out)


class Native(NamedTuple):
    """Our side of an adapter that is exported."""

    config: Mapping[str, Any]  # the method's hyperparameters, as in Peft.config
    slices: Mapping[Slot, Arrays]  # trainable and frozen arrays together
    shared: Arrays
    weight: Weight


class Files(NamedTuple):
    """Their side: adapter_config.json's fields, and tensors by torch module."""

    fields: Mapping[str, Any]
    modules: Mapping[str, Arrays]  # module -> {the key's rest: tensor}
    shared: Arrays = {}  # tensors that belong to no module


class Imported(NamedTuple):
    """What a format makes of `Files`: a method, and the arrays of every slot it was given."""

    config: Mapping[str, Any]  # {"method": name, **hyperparameters}, without targets and axes
    trainable: Mapping[Slot, Arrays]
    frozen: Mapping[Slot, Arrays] = {}
    shared_trainable: Arrays = {}
    shared_frozen: Arrays = {}


class Format(NamedTuple):
    """One peft_type.

    `from_hf` gets every slot of every leaf of which some slice is adapted: slices that the folder
    says nothing of must come back as the identity.
    """

    peft_type: str
    suffixes: tuple[str, ...]  # the rests of keys after a module's path
    to_hf: Callable[[Native], Files]
    from_hf: Callable[[Files, Sequence[Slot], Weight], Imported]
    fields: Mapping[str, Any]  # field -> default, of all that from_hf reads
    accepted: Mapping[str, tuple[Any, ...]] = {}  # field -> the only values that can be represented
    ignored: tuple[str, ...] = ()  # fields that do not change what the adapter computes
    reasons: Mapping[str, str] = {}  # field -> what to do about a value that is not accepted
    shared: tuple[str, ...] = ()  # names of shared tensors
    biases: tuple[str, ...] = (
        BIASES  # what peft's field `bias` may be; (): the type has no such field
    )
    saves_modules: bool = True  # the type has the field modules_to_save
    stores_tables: bool = True  # peft stores the base's table of an adapted embedding
    tied: tuple[str, ...] = ()  # last names of modules that share a table, whose tensors are copies
    leaves: str = r"(kernel|embedding)$"  # the leaves that its adapters stand at, in our paths
    module_of: Callable[[str], str] = str  # such a leaf's torch module -> the one that keys name
    # Prompt learning: keys are the bare names of `shared` tensors, which belong to all `leaves`.
    keyless: bool = False
    # (config, torch modules) -> those that have tensors; None: by target_modules as peft's layers
    selects: Callable[[Mapping[str, Any], Iterable[str]], set[str]] | None = None


def torch_in(slot: Slot, factor: np.ndarray) -> np.ndarray:
    """(d_in, n) -> (n, d_in), or (n, d_in / window, *window) for a convolution."""
    if not slot.window:
        return factor.T
    kernel = factor.reshape(*slot.window, -1, factor.shape[-1])
    return np.moveaxis(kernel, (-1, -2), (0, 1))


def from_torch_in(slot: Slot, tensor: np.ndarray) -> np.ndarray:
    """The inverse of `torch_in`."""
    if not slot.window:
        return tensor.T
    return np.moveaxis(tensor, (0, 1), (-1, -2)).reshape(slot.d_in, tensor.shape[0])


def torch_out(slot: Slot, factor: np.ndarray) -> np.ndarray:
    """(n, d_out) -> (d_out, n), or (d_out, n, 1, ...) for a convolution."""
    return factor.T.reshape(slot.d_out, factor.shape[0], *(1 for _ in slot.window))


def from_torch_out(slot: Slot, tensor: np.ndarray) -> np.ndarray:
    """The inverse of `torch_out`."""
    return tensor.reshape(slot.d_out, -1).T


def expect(module: str, tensors: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless a module holds exactly these tensors in these shapes."""
    missing, extra = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    if missing or extra:
        raise ValueError(
            f"the adapter's tensors for {module!r} do not fit its adapter_config.json: missing "
            f"{missing}, unexpected {extra}. Save it again with a current peft."
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != tuple(shape):
            raise ValueError(
                f"{module}.{name} has shape {tuple(tensors[name].shape)} in the file; this model "
                f"and adapter_config.json make it {tuple(shape)}. The adapter is for another model."
            )


def in_order(named: Iterable[Named]) -> list[Named]:
    """Torch modules, or slots of them, by the numbers in their names: layer 10 behind layer 9."""

    def key(item: Named) -> tuple[list[int], str]:
        name = item if isinstance(item, str) else item.module
        return [int(number) for number in re.findall(r"\d+", name)], name

    return sorted(named, key=key)


def most_common(values: Sequence[Any]) -> Any:
    """The value that occurs most often, the smallest of several."""
    return min(set(values), key=lambda value: (-values.count(value), value))
