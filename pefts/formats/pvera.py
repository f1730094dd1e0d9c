"""PVeRA as Hugging Face PEFT stores it (peft_type PVERA).

    pvera_lambda_b (out,)    pvera_lambda_d (2 r,)     per module
    pvera_A (2 r, max in)    pvera_B (max out, r)      once, beside the modules

The shared pair comes from torch's generator there and from JAX's here, so it always travels along.
"""

from collections.abc import Sequence

import numpy as np

from pefts.formats.contract import Files, Format, Imported, Native, Slot, Weight, expect

NAMES = ("pvera_A", "pvera_B")


def to_hf(native: Native) -> Files:
    """Every slice, and the pair of all of them."""
    for slot in native.slices:
        if slot.is_embedding or slot.window:
            raise ValueError(
                f"peft's PVeRA adapts linear modules alone, and {slot.path!r} is none: exclude it."
            )
    fields = {
        "r": int(native.config["rank"]),
        "d_initial": float(native.config["d_initial"]),
        "fan_in_fan_out": any(not slot.transposed for slot in native.slices),
        "generator_seed": None,
        "init_weights": True,
        "projection_prng_key": int(native.config["seed"]),
        "pvera_dropout": float(native.config["dropout"]),
        "sample_at_inference": False,
        "save_projection": True,
    }
    modules = {
        slot.module: {"pvera_lambda_b": p["lambda_b"], "pvera_lambda_d": p["lambda_d"]}
        for slot, p in native.slices.items()
    }
    return Files(fields, modules, {name: native.shared[name[-1]].T for name in NAMES})


def from_hf(files: Files, slots: Sequence[Slot], weight: Weight) -> Imported:
    """`pvera` with the file's pair; a slice without tensors has lambda_b at zero."""
    del weight
    fields, rank = files.fields, int(files.fields["r"])
    d_in, d_out = max(slot.d_in for slot in slots), max(slot.d_out for slot in slots)
    expect("base_model", files.shared, {"pvera_A": (2 * rank, d_in), "pvera_B": (d_out, rank)})
    trainable = {}
    for slot in slots:
        tensors = files.modules.get(slot.module)
        if tensors is None:
            start = np.full((2 * rank,), fields["d_initial"], np.float32)
            trainable[slot] = {"lambda_b": np.zeros(slot.d_out, np.float32), "lambda_d": start}
            continue
        expect(
            slot.module, tensors, {"pvera_lambda_b": (slot.d_out,), "pvera_lambda_d": (2 * rank,)}
        )
        trainable[slot] = {name.removeprefix("pvera_"): value for name, value in tensors.items()}
    config = {
        "method": "pvera",
        "rank": rank,
        "d_initial": float(fields["d_initial"]),
        "dropout": float(fields["pvera_dropout"]),
        "seed": int(fields["projection_prng_key"]),
    }
    pair = {name[-1]: files.shared[name].T for name in NAMES}
    return Imported(config, trainable, shared_frozen=pair)


FORMAT = Format(
    peft_type="PVERA",
    suffixes=("pvera_lambda_b", "pvera_lambda_d"),
    to_hf=to_hf,
    from_hf=from_hf,
    fields={"r": 256, "d_initial": 0.1, "projection_prng_key": 0, "pvera_dropout": 0.0},
    accepted={"save_projection": (True,), "sample_at_inference": (False,)},
    ignored=("init_weights", "generator_seed"),
    reasons={
        "save_projection": (
            "the frozen pair is drawn by torch's generator and has to be in the file: save it "
            "again with save_projection=True."
        ),
        "sample_at_inference": (
            "here a call samples where it is given a random stream; set it to false, and give "
            'pefts.apply rngs={"dropout": key} where samples are wanted.'
        ),
    },
    shared=NAMES,
    biases=("none", "all"),  # peft's third choice has a name of its own for each type
)
