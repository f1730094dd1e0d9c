"""LoRA and DoRA as Hugging Face PEFT stores them (peft_type LORA).

    lora_A.weight (r, in)         lora_B.weight (out, r)        y += s (x A^T) B^T
    lora_embedding_A (r, vocab)   lora_embedding_B (dim, r)     s = alpha / r or alpha / sqrt(r)
    lora_magnitude_vector (out,)  DoRA's m

Layers of one stacked kernel may differ in rank: the smaller ones are padded with zeros, which
changes no product, and the padding is taken off again on export. A layer without an adapter is all
zeros.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

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
from pefts.formats.selection import by_pattern
from pefts.targets import exactly

LINEAR = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"


def to_hf(native: Native) -> Files:
    """Every slice at its own rank; patterns hold what differs from the common rank and alpha."""
    dora, rslora = native.config["method"] == "dora", bool(native.config["rslora"])
    kept = {slot: (p, _rank(p, keep_one=dora)) for slot, p in native.slices.items()}
    kept = {slot: pair for slot, pair in kept.items() if pair[1]}
    if not kept:
        raise ValueError(
            "every A and B of this state is zero: there is nothing to export. Train it first."
        )
    ranks = {slot.module: rank for slot, (_, rank) in kept.items()}
    alphas = {
        slot.module: alpha_of(float(p["scale"]), rank, rslora) for slot, (p, rank) in kept.items()
    }
    rank, alpha = most_common([*ranks.values()]), most_common([*alphas.values()])
    fields = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{name}": r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{name}": a for name, a in alphas.items() if a != alpha},
        "lora_dropout": float(native.config["dropout"]),
        "fan_in_fan_out": _conv1d(kept),
        "init_lora_weights": True,
        "use_dora": dora,
        "use_rslora": rslora,
    }
    return Files(fields, {slot.module: _tensors(slot, p, r) for slot, (p, r) in kept.items()})


def from_hf(files: Files, slots: Sequence[Slot], weight: Weight) -> Imported:
    """`lora`, or `dora` for use_dora, with every leaf at the largest rank among its layers."""
    fields = files.fields
    dora, rslora = bool(fields["use_dora"]), bool(fields["use_rslora"])
    adapted = [slot for slot in slots if slot.module in files.modules]
    ranks = {slot: int(_resolved(fields, "rank_pattern", "r", slot)) for slot in adapted}
    alphas = {
        slot: float(_resolved(fields, "alpha_pattern", "lora_alpha", slot)) for slot in adapted
    }
    widths = {path: max(r for s, r in ranks.items() if s.path == path) for path in _paths(adapted)}
    trainable, frozen = {}, {}
    for slot in slots:
        tensors = files.modules.get(slot.module)
        rank = ranks.get(slot, int(fields["r"]))
        alpha = alphas.get(slot, float(fields["lora_alpha"]))
        scale = alpha / (math.sqrt(rank) if rslora else rank)
        frozen[slot] = {"scale": np.float32(scale)}
        trainable[slot] = _factors(slot, tensors, rank, widths[slot.path], dora)
        if dora:
            trainable[slot]["m"] = (
                np.linalg.norm(weight(slot), axis=0)
                if tensors is None
                else tensors[MAGNITUDE].reshape(slot.d_out)
            )
    config = {
        "method": "dora" if dora else "lora",
        "rank": int(fields["r"]),
        "alpha": float(fields["lora_alpha"]),
        "rslora": rslora,
        "dropout": float(fields["lora_dropout"]),
        "rank_pattern": {exactly(p): r for p, r in widths.items() if r != fields["r"]},
        "alpha_pattern": {
            exactly(slot.path): alpha
            for slot, alpha in reversed(alphas.items())
            if alpha != fields["lora_alpha"]
        },
    }
    return Imported({k: v for k, v in config.items() if v != {}}, trainable, frozen)


def alpha_of(scale: float, rank: int, rslora: bool) -> float | int:
    """The shortest alpha whose scale rounds to this float32."""
    divisor = math.sqrt(rank) if rslora else rank
    for digits in range(10):
        alpha = round(scale * divisor, digits)
        if np.float32(alpha / divisor) == np.float32(scale):
            return int(alpha) if alpha == int(alpha) else alpha
    return scale * divisor


def _rank(p: Arrays, keep_one: bool) -> int:
    """The rank without trailing zeros; 0 for a slice that is not adapted."""
    live = np.flatnonzero((p["A"] != 0).any(0) | (p["B"] != 0).any(1))
    return int(live[-1]) + 1 if live.size else int(keep_one)


def _tensors(slot: Slot, p: Arrays, rank: int) -> dict[str, np.ndarray]:
    name_A, name_B = EMBEDDING if slot.is_embedding else LINEAR
    A, B = p["A"][:, :rank], p["B"][:rank]
    tensors = {name_A: torch_in(slot, A), name_B: torch_out(slot, B)}
    if "m" in p:
        ones = (1,) * len(slot.window)
        tensors[MAGNITUDE] = p["m"].reshape((1, slot.d_out, *ones) if ones else (slot.d_out,))
    return tensors


def _factors(
    slot: Slot, tensors: Arrays | None, rank: int, width: int, dora: bool
) -> dict[str, np.ndarray]:
    A, B = np.zeros((slot.d_in, width), np.float32), np.zeros((width, slot.d_out), np.float32)
    if tensors is None:
        return {"A": A, "B": B}
    name_A, name_B = EMBEDDING if slot.is_embedding else LINEAR
    ones = (1,) * len(slot.window)
    channels = slot.d_in // math.prod(slot.window)
    shapes = {name_A: (rank, channels, *slot.window), name_B: (slot.d_out, rank, *ones)}
    if dora:
        shapes[MAGNITUDE] = (1, slot.d_out, *ones) if ones else (slot.d_out,)
    expect(slot.module, tensors, shapes)
    A[:, :rank] = from_torch_in(slot, tensors[name_A])
    B[:rank] = from_torch_out(slot, tensors[name_B])
    return {"A": A, "B": B}


def _resolved(fields: Mapping[str, Any], pattern: str, default: str, slot: Slot) -> Any:
    return by_pattern(fields[pattern] or {}, slot.module, fields[default])


def _paths(slots: Sequence[Slot]) -> list[str]:
    return list(dict.fromkeys(slot.path for slot in slots))


def _conv1d(slots: Mapping[Slot, Any]) -> bool:
    """Whether torch keeps these kernels as (in, out), as GPT-2's Conv1D does."""
    linear = [slot for slot in slots if not slot.is_embedding and not slot.window]
    return any(not slot.transposed for slot in linear)


_REPLACED = (
    "it changes the base's weights when the adapter is loaded, so A and B alone do not say what "
    "the model computes: save it as a plain LoRA with peft's save_pretrained(..., "
    "path_initial_model_for_weight_conversion=...) and import that."
)
FEATURES: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "corda_config": (None,),
    "ensure_weight_tying": (False, None),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "loftq_config": ({}, None),
    "lora_bias": (False, None),
    "lora_ga_config": (None,),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False, None),
    "velora_config": (None,),
}
FORMAT = Format(
    peft_type="LORA",
    suffixes=(*LINEAR, *EMBEDDING, MAGNITUDE, "lora_B.bias"),
    to_hf=to_hf,
    from_hf=from_hf,
    fields={
        "r": 8,
        "lora_alpha": 8,
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "use_dora": False,
        "use_rslora": False,
    },
    accepted=FEATURES,
    ignored=("eva_config", "megatron_core", "qalora_group_size"),
    reasons={"init_lora_weights": _REPLACED, "loftq_config": _REPLACED},
)
