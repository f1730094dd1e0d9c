"""RandLoRA as Hugging Face PEFT stores it (peft_type RANDLORA).

    randlora_lambda (r, n)    randlora_gamma (n, min)          per module
    randlora_A (r, 1, m)      randlora_B (M, n max, r)         once, beside the modules

peft multiplies flattened bases: column k n + i of the scaled A by column k n + i of B, which is how
our B_i are defined. Some versions of peft add a copy of the pair to each module; such copies are
read and never written. The pair comes from torch's generator there, so it always travels along.
peft has one scale alpha / r for all modules: what else is in ours moves into lambda.
"""

from collections.abc import Sequence

import numpy as np

from pefts.formats.contract import Arrays, Files, Format, Imported, Native, Slot, Weight, expect
from pefts.methods.randlora import ALPHA_PER_RANK, bases_of, scale_of

NAMES: tuple[str, ...] = ("randlora_A", "randlora_B")
TRAINED: tuple[str, ...] = ("randlora_gamma", "randlora_lambda")


def to_hf(native: Native) -> Files:
    """Every slice, and the pair of all of them."""
    config = native.config
    for slot in native.slices:
        if slot.is_embedding or slot.window:
            raise ValueError(
                f"peft's RandLoRA adapts linear modules alone, and {slot.path!r} is none: exclude "
                "it."
            )
    if config.get("rank_pattern"):
        raise ValueError(
            f"rank_pattern={dict(config['rank_pattern'])!r}: peft's RandLoRA has one rank for all "
            "modules, so this adapter cannot be exported; merge it instead."
        )
    rank, scaling = int(config["rank"]), config["scaling"]
    alpha = ALPHA_PER_RANK[scaling] * rank if config["alpha"] is None else config["alpha"]
    fields = {
        "r": rank,
        "randlora_alpha": int(alpha) if alpha == int(alpha) else float(alpha),
        "fan_in_fan_out": any(not slot.transposed for slot in native.slices),
        "init_weights": True,
        "projection_prng_key": int(config["seed"]),
        "randlora_dropout": float(config["dropout"]),
        "save_projection": True,
        "sparse": config["bases"] == "sparse",
        "very_sparse": config["bases"] == "very_sparse",
    }
    modules = {}
    for slot, p in native.slices.items():
        n = p["lambda"].shape[1]
        share = np.float32(scale_of(rank, n, alpha, scaling) / scale_of(rank, n, alpha, "hf"))
        modules[slot.module] = {
            "randlora_gamma": p["gamma"],
            "randlora_lambda": p["lambda"] * share,
        }
    A, B = native.shared["A"], native.shared["B"]
    return Files(fields, modules, {NAMES[0]: A[:, None], NAMES[1]: B.reshape(len(B), -1, rank)})


def from_hf(files: Files, slots: Sequence[Slot], weight: Weight) -> Imported:
    """`randlora` with the file's pair and scale; a slice without tensors has lambda at zero."""
    del weight
    fields, rank = files.fields, int(files.fields["r"])
    sides = max(slot.d_in for slot in slots), max(slot.d_out for slot in slots)
    shared = _pair(files)
    bases = bases_of(min(sides), rank)
    shapes = dict(zip(NAMES, ((rank, 1, min(sides)), (max(sides), bases, rank)), strict=True))
    expect("base_model", shared, shapes)
    trainable = {}
    for slot in slots:
        m = min(slot.d_in, slot.d_out)
        n = bases_of(m, rank)
        held = files.modules.get(slot.module)
        if held is None:
            gamma = np.full((n, m), 1 / max(n, m), np.float32)
            trainable[slot] = {"gamma": gamma, "lambda": np.zeros((rank, n), np.float32)}
            continue
        tensors = {name: value for name, value in held.items() if name not in NAMES}
        expect(slot.module, tensors, dict(zip(TRAINED, ((n, m), (rank, n)), strict=True)))
        trainable[slot] = {name.removeprefix("randlora_"): v for name, v in tensors.items()}
    sparse, very_sparse = bool(fields["sparse"]), bool(fields["very_sparse"])
    config = {
        "method": "randlora",
        "rank": rank,
        "alpha": float(fields["randlora_alpha"]),
        "scaling": "hf",
        # peft looks at very_sparse first.
        "bases": "very_sparse" if very_sparse else "sparse" if sparse else "uniform",
        "dropout": float(fields["randlora_dropout"]),
        "seed": int(fields["projection_prng_key"]),
    }
    A, B = (shared[name] for name in NAMES)
    pair = {"A": A.reshape(rank, -1), "B": B.reshape(len(B), -1)}
    return Imported(config, trainable, shared_frozen=pair)


def _pair(files: Files) -> Arrays:
    """The pair of the whole file, or the modules' copies of it; refused where they differ."""
    found = dict(files.shared)
    for module, held in files.modules.items():
        for name in NAMES:
            copy = held.get(name, found.get(name))
            if copy is not None and not np.array_equal(found.setdefault(name, copy), copy):
                raise ValueError(
                    f"{module}.{name} differs from the {name} of the other modules: pefts has one "
                    "pair for all of them. Save the adapter again with a current peft."
                )
    return found


FORMAT = Format(
    peft_type="RANDLORA",
    suffixes=(*TRAINED, *NAMES),
    to_hf=to_hf,
    from_hf=from_hf,
    fields={
        "r": 32,
        "randlora_alpha": 640,
        "projection_prng_key": 0,
        "randlora_dropout": 0.0,
        "sparse": False,
        "very_sparse": False,
    },
    accepted={"save_projection": (True,)},
    ignored=("init_weights",),
    reasons={
        "save_projection": (
            "the frozen pair is drawn by torch's generator and has to be in the file: save it "
            "again with save_projection=True."
        )
    },
    shared=NAMES,
    biases=("none", "all"),  # peft's third choice has a name of its own for each type
)
