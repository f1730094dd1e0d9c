"""HiRA as Hugging Face PEFT stores it (peft_type HIRA).

    hira_A (r, in)                hira_B (out, r)              W' = W * (1 + A B), entry by entry
    hira_embedding_A (r, vocab)   hira_embedding_B (dim, r)    there is no scale

peft (0.21.2) gives every module the rank r whatever rank_pattern says, so smaller ranks are written
padded with zeros, which change no product; what is imported is the rank that the tensors have. A
layer without an adapter is all zeros. HiRA's config has no `bias`: no bias is trained beside it.
"""

import math
from collections.abc import Sequence

import numpy as np

from pefts.formats.contract import (
    Arrays,
    Files,
    Format,
    Imported,
    Native,
    Slot,
    Weight,
    expect,
    from_torch_in,
    from_torch_out,
    most_common,
    torch_in,
    torch_out,
)
from pefts.targets import exactly

LINEAR, EMBEDDING = ("hira_A", "hira_B"), ("hira_embedding_A", "hira_embedding_B")


def to_hf(native: Native) -> Files:
    """Every slice, all at the largest rank."""
    ranks = {slot: _rank(p) for slot, p in native.slices.items()}
    rank = max(ranks.values())
    if not rank:
        raise ValueError(
            "every A and B of this state is zero: there is nothing to export. Train it first."
        )
    adapted = {slot: p for slot, p in native.slices.items() if ranks[slot]}
    linear = [slot for slot in adapted if not slot.is_embedding and not slot.window]
    fields = {
        "r": rank,
        "rank_pattern": {},
        "hira_dropout": float(native.config["dropout"]),
        "fan_in_fan_out": any(not slot.transposed for slot in linear),
        "init_weights": True,
    }
    return Files(fields, {slot.module: _tensors(slot, p, rank) for slot, p in adapted.items()})


def from_hf(files: Files, slots: Sequence[Slot], weight: Weight) -> Imported:
    """`hira`, with every leaf at the largest rank among its layers."""
    del weight
    found = {slot: files.modules[slot.module] for slot in slots if slot.module in files.modules}
    ranks = {slot: _stored_rank(slot, tensors) for slot, tensors in found.items()}
    widths = {slot.path: 0 for slot in found}
    for slot, rank in ranks.items():
        widths[slot.path] = max(widths[slot.path], rank)
    trainable = {slot: _factors(slot, found.get(slot), widths[slot.path]) for slot in slots}
    common = most_common([*widths.values()])
    others = {exactly(path): width for path, width in widths.items() if width != common}
    config = {
        "method": "hira",
        "rank": common,
        "dropout": float(files.fields["hira_dropout"]),
        **({"rank_pattern": others} if others else {}),
    }
    return Imported(config, trainable)


def _rank(p: Arrays) -> int:
    """The rank without trailing zeros; 0 for a slice that is not adapted."""
    live = np.flatnonzero((p["A"] != 0).any(0) | (p["B"] != 0).any(1))
    return int(live[-1]) + 1 if live.size else 0


def _names(slot: Slot) -> tuple[str, str]:
    return EMBEDDING if slot.is_embedding else LINEAR


def _tensors(slot: Slot, p: Arrays, rank: int) -> dict[str, np.ndarray]:
    A, B = np.zeros((slot.d_in, rank), np.float32), np.zeros((rank, slot.d_out), np.float32)
    own = min(rank, p["A"].shape[1])
    A[:, :own], B[:own] = p["A"][:, :own], p["B"][:own]
    name_A, name_B = _names(slot)
    return {name_A: torch_in(slot, A), name_B: torch_out(slot, B)}


def _stored_rank(slot: Slot, tensors: Arrays) -> int:
    name_A, name_B = _names(slot)
    rank = len(tensors.get(name_A, ()))
    channels, ones = slot.d_in // math.prod(slot.window), (1,) * len(slot.window)
    shapes = {name_A: (rank, channels, *slot.window), name_B: (slot.d_out, rank, *ones)}
    expect(slot.module, tensors, shapes)
    return rank


def _factors(slot: Slot, tensors: Arrays | None, width: int) -> dict[str, np.ndarray]:
    A, B = np.zeros((slot.d_in, width), np.float32), np.zeros((width, slot.d_out), np.float32)
    if tensors is not None:
        name_A, name_B = _names(slot)
        stored = from_torch_in(slot, tensors[name_A])
        rank = stored.shape[1]
        A[:, :rank], B[:rank] = stored, from_torch_out(slot, tensors[name_B])
    return {"A": A, "B": B}


FORMAT = Format(
    peft_type="HIRA",
    suffixes=(*LINEAR, *EMBEDDING),
    to_hf=to_hf,
    from_hf=from_hf,
    fields={"hira_dropout": 0.0},
    ignored=("init_weights", "r", "rank_pattern"),
    biases=(),
)
