"""Poly and multi-head routing as Hugging Face PEFT stores them (peft_type POLY).

    poly_lora_A (h, K, in / h, r)       poly_lora_B (h, K, r, out / h)
    poly_router.module_logits (T, h K)

Its scale is always 1 / r, so ours goes into B. It adapts linear modules alone. Its config has no
`bias`: no bias is trained beside it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pefts.formats.contract import Arrays, Files, Format, Imported, Native, Slot, Weight, expect

A, B, Z = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"


def to_hf(native: Native) -> Files:
    """Every slice; T, h, K and r are one for all."""
    tasks, task = int(native.config["tasks"]), native.config["task"]
    if task is not None and tasks > 1:
        raise ValueError(
            f"task={task!r}: peft's Poly is told the task at every call, so a file would lose it. "
            "Export the state with a method of task=None, or as a LoRA "
            "(pefts.methods.poly.lora_of)."
        )
    ranks = {slot.path: p["A"].shape[-1] for slot, p in native.slices.items()}
    if len(set(ranks.values())) > 1:
        raise ValueError(
            f"peft's Poly has one rank for all modules, and these have several: {ranks}. Give all "
            "kernels one rank, or export each task as a LoRA (pefts.methods.poly.lora_of)."
        )
    for slot in native.slices:
        if slot.is_embedding or slot.window or not slot.transposed:
            raise ValueError(
                f"peft's Poly adapts torch.nn.Linear alone, and {slot.path!r} is none: exclude it."
            )
    rank = min(ranks.values())
    fields = {
        "r": rank,
        "init_weights": True,
        "n_skills": int(native.config["skills"]),
        "n_splits": int(native.config["splits"]),
        "n_tasks": tasks,
        "poly_type": "poly",
    }
    return Files(fields, {slot.module: _tensors(p) for slot, p in native.slices.items()})


def from_hf(files: Files, slots: Sequence[Slot], weight: Weight) -> Imported:
    """`poly` with alpha 1; a slice without tensors has B at zero."""
    del weight
    fields = files.fields
    r, T, h, K = (int(fields[name]) for name in ("r", "n_tasks", "n_splits", "n_skills"))
    trainable: dict[Slot, Any] = {}
    for slot in slots:
        i, o = slot.d_in // h, slot.d_out // h
        shapes = {A: (h, K, i, r), B: (h, K, r, o), Z: (T, h * K)}
        tensors = files.modules.get(slot.module)
        if tensors is None:
            tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        expect(slot.module, tensors, shapes)
        trainable[slot] = {"A": tensors[A], "B": tensors[B], "Z": tensors[Z].reshape(T, h, K)}
    scale = np.asarray(1 / r, np.float32)
    config = {"method": "poly", "rank": r, "skills": K, "splits": h, "tasks": T, "alpha": 1.0}
    return Imported(config, trainable, {slot: {"scale": scale} for slot in slots})


def _tensors(p: Arrays) -> dict[str, np.ndarray]:
    rank = p["A"].shape[-1]
    alpha = np.float32(p["scale"] * np.float32(rank))
    return {A: p["A"], B: p["B"] * alpha, Z: p["Z"].reshape(len(p["Z"]), -1)}


FORMAT = Format(
    peft_type="POLY",
    suffixes=(A, B, Z),
    to_hf=to_hf,
    from_hf=from_hf,
    fields={"r": 8, "n_tasks": 1, "n_skills": 4, "n_splits": 1},
    accepted={"poly_type": ("poly",)},
    ignored=("init_weights",),
    biases=(),
)
