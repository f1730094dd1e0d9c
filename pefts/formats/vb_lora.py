"""VB-LoRA as Hugging Face PEFT stores it (peft_type VBLORA).

    vblora_logits_A (r, in / b, h)     vblora_logits_B (out / b, r, h)     per module
    vblora_vector_bank (h, b)                                              once, beside the modules

Files with the chosen vectors' weights alone (save_only_topk_weights) have lost the other logits and
are refused.
"""

from collections.abc import Sequence

import numpy as np

from pefts.formats.contract import Files, Format, Imported, Native, Slot, Weight, expect

BANK = "vblora_vector_bank"
LOGITS = ("vblora_logits_A", "vblora_logits_B")


def to_hf(native: Native) -> Files:
    """Every slice, and the bank of all of them."""
    config = native.config
    for slot in native.slices:
        if slot.is_embedding or slot.window:
            raise ValueError(
                f"peft's VB-LoRA adapts linear modules alone, and {slot.path!r} is none: exclude "
                "it."
            )
    if config.get("rank_pattern"):
        raise ValueError(
            f"rank_pattern={dict(config['rank_pattern'])!r}: peft's VB-LoRA has one rank for all "
            "modules, so this adapter cannot be exported; merge it instead."
        )
    fields = {
        "r": int(config["rank"]),
        "num_vectors": int(config["vectors"]),
        "vector_length": int(config["length"]),
        "topk": int(config["top"]),
        "vblora_dropout": float(config["dropout"]),
        "init_vector_bank_bound": float(config["bank_bound"]),
        "init_logits_std": float(config["logits_std"]),
        "save_only_topk_weights": False,
        "fan_in_fan_out": any(not slot.transposed for slot in native.slices),
    }
    modules = {
        slot.module: {LOGITS[0]: p["logits_A"], LOGITS[1]: p["logits_B"].swapaxes(0, 1)}
        for slot, p in native.slices.items()
    }
    return Files(fields, modules, {BANK: native.shared["bank"]})


def from_hf(files: Files, slots: Sequence[Slot], weight: Weight) -> Imported:
    """`vb_lora` with the file's bank; every slice of an adapted leaf needs logits."""
    del weight
    fields = files.fields
    rank, h, b = (int(fields[name]) for name in ("r", "num_vectors", "vector_length"))
    expect("base_model", files.shared, {BANK: (h, b)})
    trainable = {}
    for slot in slots:
        tensors = files.modules.get(slot.module)
        if tensors is None:
            raise ValueError(
                f"the adapter leaves {slot.module!r} alone and adapts other layers of "
                f"{slot.path!r}: no logits make its update zero, so layers that are stacked must "
                "be adapted together. Load the model with its layers one by one, or adapt them all."
            )
        shapes = ((rank, slot.d_in // b, h), (slot.d_out // b, rank, h))
        expect(slot.module, tensors, dict(zip(LOGITS, shapes, strict=True)))
        logits_A, logits_B = (tensors[name] for name in LOGITS)
        trainable[slot] = {"logits_A": logits_A, "logits_B": logits_B.swapaxes(0, 1)}
    config = {
        "method": "vb_lora",
        "rank": rank,
        "vectors": h,
        "length": b,
        "top": int(fields["topk"]),
        "dropout": float(fields["vblora_dropout"]),
        "bank_bound": float(fields["init_vector_bank_bound"]),
        "logits_std": float(fields["init_logits_std"]),
    }
    return Imported(config, trainable, shared_trainable={"bank": np.asarray(files.shared[BANK])})


FORMAT = Format(
    peft_type="VBLORA",
    suffixes=LOGITS,
    to_hf=to_hf,
    from_hf=from_hf,
    fields={
        "r": 4,
        "num_vectors": 256,
        "vector_length": 256,
        "topk": 2,
        "vblora_dropout": 0.0,
        "init_vector_bank_bound": 0.02,
        "init_logits_std": 0.1,
    },
    accepted={"save_only_topk_weights": (False,)},
    reasons={
        "save_only_topk_weights": (
            "such a file lacks the logits of the other vectors, and cannot be trained on: save it "
            "again with save_only_topk_weights=False."
        )
    },
    shared=(BANK,),
    biases=("none", "all"),  # peft's third choice has a name of its own for each type
)
