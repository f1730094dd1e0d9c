"""AdaLoRA as Hugging Face PEFT stores it (peft_type ADALORA).

    lora_A (r, in)   lora_E (r, 1)   lora_B (out, r)     y += s (x (A * E)^T) B^T

s = alpha / (init_r + 1e-5), whatever rank is left. A file with a rank_pattern holds the kept
triplets alone; they come back at their own places, between zeros. A state exports all its triplets,
of which one that is cut has E = 0; a pruned one exports those it has kept, and a rank_pattern that
calls them the first of init_r (their places are gone, and change no product).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pefts.formats import lora
from pefts.formats.contract import Arrays, Files, Format, Imported, Native, Slot, Weight, expect

FACTORS = ("A", "B", "e")
# adapter_config.json's field -> our argument.
ARGUMENTS = {
    "total_step": "total_steps",
    "init_r": "init_rank",
    "target_r": "target_rank",
    "lora_alpha": "alpha",
    "deltaT": "interval",
    "orth_reg_weight": "gamma",
    "lora_dropout": "dropout",
}
# Our argument -> the two fields that hold it.
PAIRS = {"warmup": ("tinit", "tfinal"), "betas": ("beta1", "beta2")}


def to_hf(native: Native) -> Files:
    """Every slice with all its triplets; a slice of zeros is not adapted."""
    fields = {field: native.config[argument] for field, argument in ARGUMENTS.items()}
    for argument, pair in PAIRS.items():
        fields |= zip(pair, native.config[argument], strict=True)
    rank, scale = fields["init_r"], _scale(fields["lora_alpha"], fields["init_r"])
    modules, pattern = {}, {}
    for slot, p in native.slices.items():
        if slot.is_embedding or slot.window:
            raise ValueError(
                f"peft's AdaLoRA has no form for {slot.path!r}, which is no linear kernel: exclude "
                "it."
            )
        if p["e"].shape[-1] > rank or p["scale"] != scale:
            raise ValueError(
                f"peft's AdaLoRA starts every module with init_r={rank} triplets and one alpha, "
                f"and {slot.path!r} has {p['e'].shape[-1]} of them, scaled by {p['scale']}: it "
                "cannot hold rank_pattern or alpha_pattern."
            )
        is_pruned = p["e"].shape[-1] < rank
        kept = p["e"] != 0 if is_pruned else np.ones(rank, bool)
        A, B, e = p["A"][:, kept], p["B"][kept], p["e"][kept]
        if not any(leaf.any() for leaf in (A, B, e)):
            continue
        modules[slot.module] = {"lora_A": A.T, "lora_B": B.T, "lora_E": e[:, None]}
        pattern[f"{slot.module}.lora_E"] = [n < len(e) for n in range(rank)]
    is_whole = all(all(kept) for kept in pattern.values())
    fan_in_fan_out = any(not slot.transposed for slot in native.slices)
    constant = {
        "init_lora_weights": True,
        "rank_pattern": None if is_whole else pattern,
        "fan_in_fan_out": fan_in_fan_out,
    }
    return Files({**fields, **constant}, modules)


def from_hf(files: Files, slots: Sequence[Slot], weight: Weight) -> Imported:
    """`adalora` at init_r triplets, its averages at zero: training starts to score anew."""
    del weight
    fields, rank = files.fields, int(files.fields["init_r"])
    masks = _masks(fields["rank_pattern"] or {}, files.modules, rank)
    scale = _scale(fields["lora_alpha"], rank)
    trainable = {
        slot: _triplets(slot, files.modules.get(slot.module), masks.get(slot.module), rank)
        for slot in slots
    }
    averages = {
        slot: {
            f"{kind}_{name}": np.zeros_like(arrays[name])
            for kind in ("sensitivity", "uncertainty")
            for name in FACTORS
        }
        for slot, arrays in trainable.items()
    }
    frozen = {slot: {"scale": scale, **arrays} for slot, arrays in averages.items()}
    config = {argument: fields[field] for field, argument in ARGUMENTS.items()}
    config |= {argument: [fields[field] for field in pair] for argument, pair in PAIRS.items()}
    return Imported({"method": "adalora", **config}, trainable, frozen)


def _scale(alpha: float, rank: int) -> np.float32:
    return np.float32(alpha / (rank + 1e-5))


def _masks(
    pattern: Mapping[str, Any], modules: Mapping[str, Any], rank: int
) -> dict[str, np.ndarray]:
    """module -> which triplets its tensors hold."""
    masks = {}
    for key, kept in pattern.items():
        module = key.partition(".lora_E")[0].removeprefix("base_model.model.")
        if module not in modules or len(kept) != rank:
            raise ValueError(
                f"rank_pattern names {key!r} with {len(kept)} entries: it has to name a module of "
                f"the file, with init_r={rank} entries."
            )
        masks[module] = np.asarray(kept, bool)
    return masks


def _triplets(
    slot: Slot, tensors: Arrays | None, kept: np.ndarray | None, rank: int
) -> dict[str, np.ndarray]:
    kept = np.ones(rank, bool) if kept is None else kept
    A, B = np.zeros((slot.d_in, rank), np.float32), np.zeros((rank, slot.d_out), np.float32)
    e = np.zeros(rank, np.float32)
    if tensors is not None:
        left = int(kept.sum())
        shapes = {"lora_A": (left, slot.d_in), "lora_B": (slot.d_out, left), "lora_E": (left, 1)}
        expect(slot.module, tensors, shapes)
        A[:, kept], B[kept] = tensors["lora_A"].T, tensors["lora_B"].T
        e[kept] = tensors["lora_E"][:, 0]
    return {"A": A, "B": B, "e": e}


FORMAT = Format(
    peft_type="ADALORA",
    suffixes=("lora_A", "lora_B", "lora_E"),
    to_hf=to_hf,
    from_hf=from_hf,
    fields={
        "total_step": None,
        "init_r": 12,
        "target_r": 8,
        "lora_alpha": 8,
        "tinit": 0,
        "tfinal": 0,
        "deltaT": 1,
        "beta1": 0.85,
        "beta2": 0.85,
        "orth_reg_weight": 0.5,
        "lora_dropout": 0.0,
        "rank_pattern": None,
    },
    accepted={
        **lora.FEATURES,
        "alpha_pattern": ({}, None),
        "use_dora": (False, None),
        "use_rslora": (False, None),
    },
    ignored=(*lora.FORMAT.ignored, "r"),
    reasons=lora.FORMAT.reasons,
)
