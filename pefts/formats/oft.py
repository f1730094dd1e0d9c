"""OFT as Hugging Face PEFT stores it (peft_type OFT).

    oft_R.weight (n, b (b - 1) / 2), (1, ...) with block_share     y = (x R) W + b

The rows are the strict upper triangles of Q, row by row.

NOTE(paper): peft's exact form is (I - Q)(I + Q)^-1, as here, and its series I + 2 Q + 2 Q^2 + ...
  is that of the inverse rotation. So Q changes its sign on the way where use_cayley_neumann is
  true. Its series of 3 terms is its series of 4; of 2 terms it is I + 2 Q, which has no
  counterpart.

peft takes another block size without a word where oft_block_size does not divide a side; what is
imported is the size that the tensors have.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pefts.formats.contract import Files, Format, Imported, Native, Slot, Weight, expect

NAME = "oft_R.weight"
TERMS, EPS = 5, 6e-5  # peft's defaults


def to_hf(native: Native) -> Files:
    """Every slice."""
    config = native.config
    terms, eps = config["terms"], config["coft_eps"]
    if terms is not None and terms < 4:
        raise ValueError(
            f"terms={terms}: peft's shortest series that has a counterpart is that of 4 terms; "
            "train with terms of at least 4, or None."
        )
    check_linear(native.slices, "OFT")
    size = next(block_size(p["Q"]) for p in native.slices.values())
    blocks = config["blocks"]
    fields = {
        "r": 0 if blocks is None else int(blocks),
        "oft_block_size": size if blocks is None else 0,
        "block_share": bool(config["block_share"]),
        "coft": eps is not None,
        "eps": EPS if eps is None else float(eps),
        "fan_in_fan_out": any(not slot.transposed for slot in native.slices),
        "init_weights": True,
        "module_dropout": float(config["dropout"]),
        "num_cayley_neumann_terms": TERMS if terms is None else int(terms),
        "use_cayley_neumann": terms is not None,
    }
    sign = 1 if terms is None else -1
    return Files(fields, {slot.module: {NAME: sign * p["Q"]} for slot, p in native.slices.items()})


def from_hf(files: Files, slots: Sequence[Slot], weight: Weight) -> Imported:
    """`oft`; a slice without tensors is not rotated."""
    del weight
    fields, share = files.fields, bool(files.fields["block_share"])
    terms = _terms(fields)
    adapted = {slot: files.modules.get(slot.module) for slot in slots}
    found = {}
    for slot, tensors in adapted.items():
        if tensors is not None:
            found[slot.path] = _size(slot, tensors, share)
    chosen = _common(found, {slot.path: slot.d_in for slot in slots})
    sign = 1 if terms is None else -1
    trainable = {}
    for slot, tensors in adapted.items():
        b = found[slot.path]
        shape = (1 if share else slot.d_in // b, b * (b - 1) // 2)
        if tensors is not None:
            expect(slot.module, tensors, {NAME: shape})
        Q = np.zeros(shape, np.float32) if tensors is None else sign * tensors[NAME]
        trainable[slot] = {"Q": Q}
    config = {
        "method": "oft",
        **chosen,
        "terms": terms,
        "block_share": share,
        "coft_eps": float(fields["eps"]) if fields["coft"] else None,
        "dropout": float(fields["module_dropout"]),
    }
    return Imported(config, trainable)


def check_linear(slots: Mapping[Slot, Any], kind: str) -> None:
    """Raise ValueError for a convolution, whose entries peft cuts into blocks in another order."""
    for slot in slots:
        if slot.window:
            raise ValueError(
                f"peft's {kind} cuts the inputs of a convolution into blocks channel by channel, "
                f"and here {slot.path!r} is cut along its window: exclude it, or merge."
            )


def block_size(Q: np.ndarray) -> int:
    """b of Q (n, b (b - 1) / 2)."""
    return (1 + math.isqrt(1 + 8 * Q.shape[-1])) // 2


def _size(slot: Slot, tensors: Mapping[str, np.ndarray], share: bool) -> int:
    if set(tensors) != {NAME}:
        expect(slot.module, tensors, {NAME: ()})
    check_linear({slot: tensors}, "OFT")
    b = block_size(tensors[NAME])
    if slot.d_in % b or b < 2:
        raise ValueError(
            f"{slot.module}.{NAME} has shape {tensors[NAME].shape}, blocks of {b} entries, which "
            f"do not divide this model's {slot.d_in}: the adapter is for another model."
        )
    return b


def _common(sizes: Mapping[str, int], sides: Mapping[str, int]) -> dict[str, int | None]:
    """The one block size of all leaves, or their one number of blocks."""
    counts = {sides[path] // b for path, b in sizes.items()}
    if len(set(sizes.values())) == 1:
        return {"block_size": next(iter(sizes.values())), "blocks": None}
    if len(counts) == 1:
        return {"block_size": None, "blocks": counts.pop()}
    raise ValueError(
        f"the adapter's blocks have neither one size nor one number: {dict(sizes)}. peft changes "
        "an oft_block_size that does not divide a side, which only its warning says: import the "
        "modules of each size by themselves."
    )


def _terms(fields: Mapping[str, Any]) -> int | None:
    if not fields["use_cayley_neumann"]:
        return None
    terms = int(fields["num_cayley_neumann_terms"])
    if terms < 3:
        raise ValueError(
            f"num_cayley_neumann_terms={terms} cannot be imported: peft's R is then "
            f"{'I + 2 Q' if terms == 2 else 'the identity'}, no part of Cayley's series."
        )
    return max(terms, 4)


FORMAT = Format(
    peft_type="OFT",
    suffixes=(NAME,),
    to_hf=to_hf,
    from_hf=from_hf,
    fields={
        "r": 0,
        "oft_block_size": 32,
        "block_share": False,
        "coft": False,
        "eps": EPS,
        "module_dropout": 0.0,
        "num_cayley_neumann_terms": TERMS,
        "use_cayley_neumann": True,
    },
    ignored=("init_weights",),
    biases=("none",),
)
