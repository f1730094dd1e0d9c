"""VeRA as Hugging Face PEFT stores it (peft_type VERA).

    vera_lambda_b (out,)   vera_lambda_d (r,)      per module
    vera_A (r, max in)     vera_B (max out, r)     once, beside the modules

The shared pair comes from torch's generator there and from JAX's here, so it always travels along.
"""

from collections.abc import Sequence

import numpy as np

from pefts.formats.contract import Files, Format, Imported, Native, Slot, Weight, expect

NAMES = ("vera_A", "vera_B")


def to_hf(native: Native) -> Files:
    """Every slice, and the pair of all of them."""
    for slot in native.slices:
        if slot.is_embedding or slot.window:
            raise ValueError(
                f"peft's VeRA adapts linear modules alone, and {slot.path!r} is none: exclude it."
            )
    fields = {
        "r": int(native.config["rank"]),
        "d_initial": float(native.config["d_initial"]),
        "fan_in_fan_out": any(not slot.transposed for slot in native.slices),
        "init_weights": True,
        "projection_prng_key": int(native.config["seed"]),
        "save_projection": True,
        "vera_dropout": float(native.config["dropout"]),
    }
    modules = {
        slot.module: {"vera_lambda_b": p["lambda_b"], "vera_lambda_d": p["lambda_d"]}
        for slot, p in native.slices.items()
    }
    shared = {name: native.shared[name[-1]].T for name in NAMES}
    return Files(fields, modules, shared)


def from_hf(files: Files, slots: Sequence[Slot], weight: Weight) -> Imported:
    """`vera` with the file's pair; a slice without tensors has lambda_b at zero."""
    del weight
    fields, rank = files.fields, int(files.fields["r"])
    d_in, d_out = max(slot.d_in for slot in slots), max(slot.d_out for slot in slots)
    expect("base_model", files.shared, {"vera_A": (rank, d_in), "vera_B": (d_out, rank)})
    trainable = {}
    for slot in slots:
        tensors = files.modules.get(slot.module)
        if tensors is None:
            start = np.full((rank,), fields["d_initial"], np.float32)
            trainable[slot] = {"lambda_b": np.zeros(slot.d_out, np.float32), "lambda_d": start}
            continue
        expect(slot.module, tensors, {"vera_lambda_b": (slot.d_out,), "vera_lambda_d": (rank,)})
        trainable[slot] = {name.removeprefix("vera_"): value for name, value in tensors.items()}
    config = {
        "method": "vera",
        "rank": rank,
        "d_initial": float(fields["d_initial"]),
        "dropout": float(fields["vera_dropout"]),
        "seed": int(fields["projection_prng_key"]),
    }
    pair = {name[-1]: files.shared[name].T for name in NAMES}
    return Imported(config, trainable, shared_frozen=pair)


FORMAT = Format(
    peft_type="VERA",
    suffixes=("vera_lambda_b", "vera_lambda_d"),
    to_hf=to_hf,
    from_hf=from_hf,
    fields={"r": 256, "d_initial": 0.1, "projection_prng_key": 0, "vera_dropout": 0.0},
    accepted={"save_projection": (True,)},
    ignored=("init_weights",),
    reasons={
        "save_projection": (
            "the frozen pair is drawn by torch's generator and has to be in the file: save it "
            "again with save_projection=True."
        )
    },
    shared=NAMES,
)
