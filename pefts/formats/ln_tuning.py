"""LN tuning as Hugging Face PEFT stores it (peft_type LN_TUNING).

    ln_tuning_layers.weight (d,)    ln_tuning_layers.bias (d,)    per norm, bias where it has one

peft copies whole modules: where one of the two is trained here, the other is written as it is.
"""

from collections.abc import Sequence

import numpy as np

from pefts.formats.contract import Arrays, Files, Format, Imported, Native, Slot, Weight, expect
from pefts.methods.ln_tuning import NORMS

NAMES = {"scale": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias"}


def to_hf(native: Native) -> Files:
    """Every norm of which something is trained, whole."""
    modules: dict[str, dict[str, np.ndarray]] = {}
    for slot in native.slices:
        norm = slot.path.rpartition("/")[0]
        for leaf, name in NAMES.items():
            value = _value(native, slot._replace(path=f"{norm}/{leaf}"))
            if value is not None:
                modules.setdefault(slot.module, {})[name] = value
    return Files({}, modules)


def _value(native: Native, slot: Slot) -> np.ndarray | None:
    """The leaf as trained, as in the base, or None: an RMSNorm has no bias."""
    p: Arrays = native.slices.get(slot, {})
    if "value" in p:
        return p["value"]
    try:
        return native.weight(slot).reshape(-1)
    except KeyError:
        return None


def from_hf(files: Files, slots: Sequence[Slot], weight: Weight) -> Imported:
    """`ln_tuning`; a norm without tensors keeps its values."""
    named = {slot: NAMES[slot.path.rpartition("/")[2]] for slot in slots}
    for module, tensors in files.modules.items():
        shapes = {name: slot.shape for slot, name in named.items() if slot.module == module}
        expect(module, tensors, shapes)
    trainable = {
        slot: {
            "value": files.modules[slot.module][name]
            if slot.module in files.modules
            else weight(slot).reshape(slot.shape)
        }
        for slot, name in named.items()
    }
    return Imported({"method": "ln_tuning"}, trainable)


FORMAT = Format(
    peft_type="LN_TUNING",
    suffixes=tuple(NAMES.values()),
    to_hf=to_hf,
    from_hf=from_hf,
    fields={},
    biases=(),
    leaves=NORMS,
)
