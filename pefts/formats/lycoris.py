"""LoHa and LoKr as Hugging Face PEFT stores them (peft_type LOHA and LOKR), after LyCORIS.

    hada_w1_a (out, r)   hada_w1_b (r, in)     B1, A1, and the same of B2, A2 under w2
    lokr_w1 (l, m)       or lokr_w1_a (l, r), lokr_w1_b (r, m)        K1, or K1_b, K1_a
    lokr_w2 (k, n, ...)  or lokr_w2_a (k, r), lokr_w2_b (r, n ...)    K2, or K2_b, K2_a

All are transposed here. `...` is a convolution's window, behind the channels there and before them
here. The scale is alpha / r; layers of one stacked kernel have one rank. Dropout of whole modules
or ranks has no counterpart, and neither have the cores of use_effective_conv2d.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from pefts import targets
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
    most_common,
    torch_in,
)
from pefts.formats.lora import alpha_of
from pefts.formats.selection import by_pattern
from pefts.methods.lokr import shapes
from pefts.targets import exactly

Tensors = dict[str, np.ndarray]
LOHA = {"A1": "hada_w1_b", "B1": "hada_w1_a", "A2": "hada_w2_b", "B2": "hada_w2_a"}
LOKR = {
    "K1": "lokr_w1",
    "K1_a": "lokr_w1_b",
    "K1_b": "lokr_w1_a",
    "K2": "lokr_w2",
    "K2_a": "lokr_w2_b",
    "K2_b": "lokr_w2_a",
}


def to_hf(
    native: Native, kind: str, written: Callable[[Slot, Arrays], Tensors], extra: Sequence[str]
) -> Files:
    """Every slice at its leaf's rank; patterns hold what differs from the commonest."""
    kept = {slot: p for slot, p in native.slices.items() if _is_live(p)}
    _check_modules(kept, kind)
    own = (native.config.get("rank_pattern") or {}).items()
    ranks = {
        slot.module: int(targets.first(own, slot.path, native.config["rank"])) for slot in kept
    }
    alphas = {
        slot.module: alpha_of(float(p["scale"]), ranks[slot.module], False)
        for slot, p in kept.items()
    }
    rank, alpha = most_common([*ranks.values()]), most_common([*alphas.values()])
    fields = {
        "r": rank,
        "alpha": alpha,
        "rank_pattern": {f"^{name}": r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{name}": a for name, a in alphas.items() if a != alpha},
        "init_weights": True,
        "use_effective_conv2d": False,
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        **{name: native.config[name] for name in extra},
    }
    if "decompose_factor" in extra and fields["decompose_factor"] is None:
        fields["decompose_factor"] = -1
    return Files(fields, {slot.module: written(slot, p) for slot, p in kept.items()})


def from_hf(
    files: Files,
    slots: Sequence[Slot],
    weight: Weight,
    method: str,
    read: Callable[[Mapping[str, Any], Slot, int, Arrays | None], Tensors],
    extra: Sequence[str],
) -> Imported:
    """The method, every leaf with the rank of its layers; a slice without tensors adds nothing."""
    del weight
    fields = files.fields
    ranks = _ranks(fields, [slot for slot in slots if slot.module in files.modules])
    trainable, frozen, alphas = {}, {}, {}
    for slot in slots:
        rank, alpha = ranks[slot.path], _resolved(fields, "alpha_pattern", "alpha", slot)
        trainable[slot] = read(fields, slot, rank, files.modules.get(slot.module))
        frozen[slot] = {"scale": np.float32(alpha / rank)}
        if slot.module in files.modules:
            alphas.setdefault(slot.path, float(alpha))
    config = {
        "method": method,
        "rank": int(fields["r"]),
        "alpha": float(fields["alpha"]),
        "rank_pattern": {exactly(p): r for p, r in ranks.items() if r != fields["r"]},
        "alpha_pattern": {exactly(p): a for p, a in alphas.items() if a != fields["alpha"]},
        **{name: fields[name] for name in extra},
    }
    if config.get("decompose_factor") == -1:
        config["decompose_factor"] = None
    return Imported({k: v for k, v in config.items() if v != {}}, trainable, frozen)


def _loha_to_hf(slot: Slot, p: Arrays) -> Tensors:
    """PEFT sees a convolution's channels and window as one axis, in torch's order."""
    return {
        name: (torch_in(slot, p[own]).reshape(-1, slot.d_in) if own[0] == "A" else p[own].T)
        for own, name in LOHA.items()
    }


def _loha_from_hf(
    fields: Mapping[str, Any], slot: Slot, rank: int, tensors: Arrays | None
) -> Tensors:
    del fields
    sides = {"A": (slot.d_in, rank), "B": (rank, slot.d_out)}
    if tensors is None:
        return {own: np.zeros(sides[own[0]], np.float32) for own in LOHA}
    expect(slot.module, tensors, {name: sides[own[0]][::-1] for own, name in LOHA.items()})
    theirs = {own: tensors[name] for own, name in LOHA.items()}
    return {own: _inputs(slot, f) if own[0] == "A" else f.T for own, f in theirs.items()}


def _inputs(slot: Slot, tensor: np.ndarray) -> np.ndarray:
    """(r, in) of torch, in its order of a window, as (d_in, r)."""
    if not slot.window:
        return tensor.T
    return from_torch_in(slot, tensor.reshape(len(tensor), -1, *slot.window))


def _lokr_to_hf(slot: Slot, p: Arrays) -> Tensors:
    _check_conv1d(slot, p)
    return {LOKR[own]: _turned(slot, own, p[own]) for own in LOKR if own in p}


def _turned(slot: Slot, own: str, leaf: np.ndarray) -> np.ndarray:
    """A leaf of LoKr in torch's layout."""
    if leaf.ndim == 2:
        return leaf.T
    w, n, k = leaf.shape
    turned = np.transpose(leaf, (2, 1, 0))
    return turned.reshape(k, n * w) if own == "K2_a" else turned.reshape(k, n, *slot.window)


def _lokr_from_hf(
    fields: Mapping[str, Any], slot: Slot, rank: int, tensors: Arrays | None
) -> Tensors:
    window = math.prod(slot.window) if slot.window else None
    factor = int(fields["decompose_factor"])
    own_shapes = shapes(
        (slot.d_in // (window or 1), slot.d_out),
        window,
        rank,
        None if factor == -1 else factor,
        bool(fields["decompose_both"]),
    )
    empty = {own: np.zeros(shape, np.float32) for own, shape in own_shapes.items()}
    if tensors is None:
        return empty
    _check_conv1d(slot, own_shapes)
    theirs = {LOKR[own]: _turned(slot, own, leaf).shape for own, leaf in empty.items()}
    expect(slot.module, tensors, theirs)
    return {own: _returned(tensors[LOKR[own]], shape) for own, shape in own_shapes.items()}


def _returned(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `_turned`."""
    if len(shape) == 2:
        return tensor.T
    w, n, k = shape
    return np.transpose(tensor.reshape(k, n, w), (2, 1, 0))


def _check_conv1d(slot: Slot, leaves: Collection[str]) -> None:
    if len(slot.window) == 1 and "K2" in leaves:
        raise ValueError(
            f"peft's Kronecker product of the Conv1d {slot.module!r} pairs the axes of a whole "
            "lokr_w2 otherwise than that of a Linear or Conv2d, and pefts does not: give the "
            "kernel a rank below half of the larger side of K2, or exclude it."
        )


def _ranks(fields: Mapping[str, Any], adapted: Sequence[Slot]) -> dict[str, int]:
    ranks: dict[str, set[int]] = {}
    for slot in adapted:
        rank = int(_resolved(fields, "rank_pattern", "r", slot))
        ranks.setdefault(slot.path, set()).add(rank)
    for path, found in ranks.items():
        if len(found) > 1:
            raise ValueError(
                f"rank_pattern gives the layers of {path!r}, which are stacked in one leaf, the "
                f"ranks {sorted(found)}: load the model with unstacked layers (scan_layers=False)."
            )
    return {path: found.pop() for path, found in ranks.items()}


def _resolved(fields: Mapping[str, Any], pattern: str, default: str, slot: Slot) -> Any:
    return by_pattern(fields[pattern] or {}, slot.module, fields[default])


def _is_live(p: Arrays) -> bool:
    """Whether a slice has an adapter at all: one that an import found none for is all zeros."""
    return any(leaf.any() for name, leaf in p.items() if name != "scale")


def _check_modules(slots: Mapping[Slot, Any], kind: str) -> None:
    if not slots:
        raise ValueError(
            "every factor of this state is zero: there is nothing to export. Train it first."
        )
    for slot in slots:
        conv1d = not slot.transposed and not slot.window
        if slot.is_embedding or conv1d or len(slot.window) > 2:
            raise ValueError(
                f"peft's {kind} adapts torch's Linear, Conv1d and Conv2d alone, and {slot.path!r} "
                "is none of them: exclude it."
            )


_DROPOUT = (
    "pefts has no dropout of whole modules or ranks. It acts in training alone: set it to 0.0 in "
    "adapter_config.json to import the adapter without it."
)


def _format(
    kind: str,
    method: str,
    suffixes: Sequence[str],
    written: Callable[..., Tensors],
    read: Callable[..., Tensors],
    extra: Mapping[str, Any],
) -> Format:
    return Format(
        peft_type=kind,
        suffixes=tuple(suffixes),
        to_hf=functools.partial(to_hf, kind=kind, written=written, extra=tuple(extra)),
        from_hf=functools.partial(from_hf, method=method, read=read, extra=tuple(extra)),
        fields={"r": 8, "alpha": 8, "rank_pattern": {}, "alpha_pattern": {}, **extra},
        accepted={
            "module_dropout": (0.0, 0),
            "rank_dropout": (0.0, 0),
            "use_effective_conv2d": (False,),
        },
        ignored=("init_weights", "rank_dropout_scale"),
        reasons={"module_dropout": _DROPOUT, "rank_dropout": _DROPOUT},
        biases=(),
    )


LOHA_FORMAT = _format("LOHA", "loha", [*LOHA.values()], _loha_to_hf, _loha_from_hf, {})
LOKR_FORMAT = _format(
    "LOKR",
    "lokr",
    [*LOKR.values()],
    _lokr_to_hf,
    _lokr_from_hf,
    {"decompose_both": False, "decompose_factor": -1},
)
