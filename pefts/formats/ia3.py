"""(IA)3 as Hugging Face PEFT stores it (peft_type IA3).

    ia3_l (out, 1)    scales the output and the bias; (1, out, 1, ...) for a convolution
    ia3_l (1, in)     scales the input, of the modules that feedforward_modules names by the end of
                      their name or by a regular expression; (1, channels, 1, ...) there

IA3's config has no `bias`: no bias is trained beside it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pefts.formats.contract import Files, Format, Imported, Native, Slot, Weight, expect
from pefts.methods.ia3 import IN, OUT
from pefts.targets import exactly

NAME = "ia3_l"


def to_hf(native: Native) -> Files:
    """Every slice, and the list of those whose input is scaled."""
    for slot in native.slices:
        if slot.is_embedding:
            raise ValueError(
                f"peft's IA3 adapts no embeddings, and {slot.path!r} is one: exclude it."
            )
    scaled = [slot.module for slot, p in native.slices.items() if IN in p]
    fields = {
        "fan_in_fan_out": any(not slot.transposed and not slot.window for slot in native.slices),
        "feedforward_modules": _named(scaled, [slot.module for slot in native.slices]),
        "init_ia3_weights": True,
    }
    modules = {
        slot.module: {NAME: vector.reshape(_shape(slot, name))}
        for slot, p in native.slices.items()
        for name, vector in p.items()
    }
    return Files(fields, modules)


def from_hf(files: Files, slots: Sequence[Slot], weight: Weight) -> Imported:
    """`ia3`; a slice without tensors is scaled by ones."""
    del weight
    kinds = _kinds(files, slots)
    trainable = {}
    for slot in slots:
        name = kinds[slot.path]
        tensors = files.modules.get(slot.module)
        if tensors is None:
            vector = np.ones(math.prod(_shape(slot, name)), np.float32)
        else:
            expect(slot.module, tensors, {NAME: _shape(slot, name)})
            vector = tensors[NAME].reshape(-1)
        trainable[slot] = {name: vector}
    scaled = sorted(path for path, name in kinds.items() if name == IN)
    feedforward = "|".join(exactly(path) for path in scaled) if scaled else []
    return Imported({"method": "ia3", "feedforward": feedforward}, trainable)


def _shape(slot: Slot, name: str) -> tuple[int, ...]:
    ones = (1,) * len(slot.window)
    if name == IN:
        return (1, slot.d_in // math.prod(slot.window), *ones)
    return (1, slot.d_out, *ones) if ones else (slot.d_out, 1)


def _named(scaled: Sequence[str], adapted: Sequence[str]) -> list[str] | str:
    """feedforward_modules that names exactly `scaled` among the adapted modules."""
    if {name for name in adapted if _is_scaled(scaled, name)} == set(scaled):
        return sorted(scaled)
    return "^(" + "|".join(re.escape(name) for name in sorted(scaled)) + ")$"


def _is_scaled(named: Sequence[str] | str, module: str) -> bool:
    if isinstance(named, str):
        return re.fullmatch(named, module) is not None
    return any(module.endswith(name) for name in named)


def _kinds(files: Files, slots: Sequence[Slot]) -> dict[str, str]:
    """Which vector each leaf has; the layers that it stacks have the same."""
    named = files.fields["feedforward_modules"]
    if named is None:
        raise ValueError(
            "feedforward_modules is null, which stands for peft's own table of model types: write "
            "the names into adapter_config.json, [] for none."
        )
    kinds: dict[str, set[str]] = {}
    for slot in slots:
        if slot.module in files.modules:
            name = IN if _is_scaled(named, slot.module) else OUT
            kinds.setdefault(slot.path, set()).add(name)
    _check_alike(kinds)
    return {path: found.pop() for path, found in kinds.items()}


def _check_alike(kinds: Mapping[str, set[Any]]) -> None:
    for path, found in kinds.items():
        if len(found) > 1:
            raise ValueError(
                f"the layers of {path!r} are stacked in one leaf, and feedforward_modules names "
                "some of them: load the model with unstacked layers (scan_layers=False)."
            )


FORMAT = Format(
    peft_type="IA3",
    suffixes=(NAME,),
    to_hf=to_hf,
    from_hf=from_hf,
    fields={"feedforward_modules": None},
    ignored=("init_ia3_weights",),
    biases=(),
)
