"""MiSS as Hugging Face PEFT stores it (peft_type MISS), and BONE, an older peft's name for it.

    miss_block (r, out)         D                       init_weights true or false
    miss_block (r, m)           D of the small form     "mini", with mini_r = m
    miss_block (out / r, r, r)  the transposed C_b      "bat"

BONE's files say bone_block; they are read and never written.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pefts.formats.contract import Files, Format, Imported, Native, Slot, Weight, expect

BLOCK, OLD_BLOCK = "miss_block", "bone_block"
FORMS = {"bat": "bat", "mini": "mini"}  # init_weights -> form; whatever else it is: "miss"


def to_hf(native: Native) -> Files:
    """Every slice."""
    for slot in native.slices:
        if slot.is_embedding or slot.window or not slot.transposed:
            raise ValueError(
                f"peft's MiSS adapts torch.nn.Linear alone, and {slot.path!r} is none: exclude it."
            )
    form = native.config["form"]
    fields = {
        "r": int(native.config["rank"]),
        "mini_r": int(native.config["mini_rank"] or 1),
        "miss_dropout": float(native.config["dropout"]),
        "init_weights": True if form == "miss" else form,
    }
    modules = {
        slot.module: {BLOCK: np.swapaxes(p["C"], -1, -2) if form == "bat" else p["D"]}
        for slot, p in native.slices.items()
    }
    return Files(fields, modules)


def from_hf(files: Files, slots: Sequence[Slot], weight: Weight) -> Imported:
    """`miss` in one of its forms; a slice without a tensor gets zeros."""
    del weight
    return _imported(files, slots, BLOCK)


def from_bone(files: Files, slots: Sequence[Slot], weight: Weight) -> Imported:
    """The same from the old names."""
    del weight
    return _imported(files, slots, OLD_BLOCK)


def _imported(files: Files, slots: Sequence[Slot], name: str) -> Imported:
    fields, r = files.fields, int(files.fields["r"])
    form = FORMS.get(str(fields["init_weights"]), "miss")
    mini_rank = int(fields["mini_r"]) if form == "mini" else None
    trainable: dict[Slot, dict[str, Any]] = {}
    for slot in slots:
        shape = (slot.d_out // r, r, r) if form == "bat" else (r, mini_rank or slot.d_out)
        tensors = files.modules.get(slot.module, {name: np.zeros(shape, np.float32)})
        expect(slot.module, tensors, {name: shape})
        block = tensors[name]
        trainable[slot] = {"C": np.swapaxes(block, -1, -2)} if form == "bat" else {"D": block}
    config = {
        "method": "miss",
        "rank": r,
        "form": form,
        "mini_rank": mini_rank,
        "dropout": float(fields["miss_dropout"]),
    }
    return Imported(config, trainable)


def _no_new_file(native: Native) -> Files:
    del native
    raise ValueError("peft no longer reads BONE: export the method miss.")


FORMAT = Format(
    peft_type="MISS",
    suffixes=(BLOCK,),
    to_hf=to_hf,
    from_hf=from_hf,
    fields={"r": 64, "mini_r": 1, "miss_dropout": 0.0, "init_weights": True},
    accepted={"init_weights": (True, False, "bat", "mini")},
    biases=("none",),  # peft trains them, and leaves them out of the file
)
BONE = FORMAT._replace(
    peft_type="BONE",
    suffixes=(OLD_BLOCK,),
    to_hf=_no_new_file,
    from_hf=from_bone,
    accepted={"init_weights": (True, False, "bat")},
)
