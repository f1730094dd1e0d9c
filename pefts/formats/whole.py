"""Leaves that are trained outright, beside an adapter: peft's modules_to_save and bias.

modules_to_save stores a module whole, under its plain key; a bias of an adapted module is stored as
`<module>.base_layer.bias` and named by bias="lora_only", or by bias="all" together with all others.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

# peft adds these to modules_to_save by itself, and does not open a folder that lacks them.
HEADS = {
    "QUESTION_ANS": ("qa_outputs",),
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
}
METHODS = ("bitfit", "full", "head_only")
INNER = "base_layer."
COPY, ORIGINAL = ".modules_to_save.", ".original_module."


class Place(NamedTuple):
    """Where a torch tensor of the base lies in the parameter tree."""

    key: str
    path: str
    layer: int | None
    op: str

    @property
    def module(self) -> str:
        return self.key.rpartition(".")[0]

    @property
    def is_bias(self) -> bool:
        return self.key.endswith(".bias")

    def read(self, leaf: Any) -> np.ndarray:
        """The tensor, in torch's layout, from a leaf of the tree."""
        return to_torch(self, np.asarray(leaf if self.layer is None else leaf[self.layer]))


def to_torch(place: Place, array: np.ndarray) -> np.ndarray:
    """A slice of a leaf in torch's layout."""
    if place.op not in ("", "T"):
        raise ValueError(
            f"{place.path!r} is stored by op {place.op!r}, which cannot be written for Hugging "
            "Face PEFT; leave this leaf untrained, or merge and save the model."
        )
    return array.T if place.op == "T" else array


def export(
    trained: Mapping[str, Any],
    flat: Mapping[str, Any],
    places: Mapping[str, Place],
    adapted: Collection[str],
    task_type: str | None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors by key without the prefix, config fields) for leaves trained to new values.

    Args:
      trained: path -> the leaf's value.
      flat: path -> the base's leaf, for what a stored module holds besides.
      places: every torch tensor of the model, by key.
      adapted: modules that carry an adapter.
      task_type: peft's name of the task; some make it want the head.
    """
    unnamed = sorted(set(trained) - {place.path for place in places.values()})
    if unnamed:
        raise ValueError(
            f"{unnamed[0]!r} is trained outright and has no name in names: torch's model lacks it. "
            "Leave it out of the method that is exported."
        )
    adapted, heads = set(adapted), HEADS.get(task_type or "", ())
    values = {**flat, **trained}
    new = [place for place in places.values() if place.path in trained]
    for place in new:
        if place.module in adapted and not place.is_bias:
            raise ValueError(
                f"{place.path!r} is trained outright and adapted too; peft keeps one base under "
                "all adapters. Merge the trained leaf into the base, or give the methods other "
                "targets."
            )
    biases = [place for place in places.values() if place.is_bias]
    every = bool(biases) and all(place.path in trained for place in biases)
    mode = "none"
    if every or any(place.module in adapted for place in new):
        mode = "all" if every else "lora_only"
    tensors = {
        _bias_key(place, adapted): place.read(values[place.path])
        for place in biases
        if mode == "all" or (mode == "lora_only" and place.module in adapted)
    }
    done = {place.key for place in biases} if mode == "all" else set()
    modules = {place.module for place in new if place.key not in done} - adapted
    modules |= {p.module for p in places.values() if any(_ends(p.module, h) for h in heads)}
    for place in places.values():
        if place.module in modules:
            tensors[place.key] = place.read(values[place.path])
    _check_apart(modules, adapted)
    return tensors, {"bias": mode, "modules_to_save": sorted(modules) or None}


def _bias_key(place: Place, adapted: Collection[str]) -> str:
    return f"{place.module}.{INNER}bias" if place.module in adapted else place.key


def _check_apart(modules: Collection[str], adapted: Collection[str]) -> None:
    for name in modules:
        clash = [other for other in adapted if other.endswith(name) or other.startswith(f"{name}.")]
        if clash:
            raise ValueError(
                f"peft selects modules_to_save by the end of their name: {name!r} would take "
                f"{clash[0]!r} too, which is adapted. Train one of the two only."
            )


def plain_name(name: str) -> str | None:
    """A key without the marks that bias="all" leaves on stored modules; None for unused copies."""
    # peft then saves the bias of a stored module three times: as trained, so again, and the base's.
    return None if ORIGINAL in name else name.replace(COPY, ".")


def read(
    plain: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    flat: Mapping[str, Any],
    places: Mapping[str, Place],
    adapted: Collection[str],
) -> dict[str, np.ndarray]:
    """path -> float32 value of each leaf that the folder trains outright.

    Raises:
      ValueError: a tensor of no known module, one that is missing, of another shape, or one that
        changes the base without adapter_config.json saying so.
    """
    saved = tuple(config.get("modules_to_save") or ())
    wanted = {place.key for place in places.values() if _is_trained(place, config, saved, adapted)}
    tensors = {key.replace(f".{INNER}", "."): value for key, value in plain.items()}
    missing = sorted(wanted - set(tensors))
    if missing:
        raise ValueError(
            f"the adapter lacks {missing[:5]} ({len(missing)} in all), which its modules_to_save="
            f"{list(saved)} and bias={config['bias']!r} call for: the file is incomplete."
        )
    found: dict[str, np.ndarray] = {}
    for key, tensor in tensors.items():
        place = places[key]
        base = place.read(flat[place.path])
        if tensor.shape != base.shape:
            raise ValueError(
                f"{key!r} has shape {tensor.shape} in the adapter and {base.shape} in the model: a "
                "head with another number of labels, or a resized vocabulary."
            )
        if key in wanted:
            _put(found, place, tensor, flat[place.path])
        elif not _same(tensor, base):
            raise ValueError(
                f"the adapter holds a changed {key!r} of the base, which neither modules_to_save "
                "nor bias names (a resized or trained embedding?). Put these values into params "
                "first."
            )
    return found


def _is_trained(
    place: Place, config: Mapping[str, Any], saved: tuple[str, ...], adapted: Collection[str]
) -> bool:
    if place.module not in adapted and any(_ends(place.module, name) for name in saved):
        return True
    own = place.module in adapted or config["bias"] == "all"
    return place.is_bias and config["bias"] != "none" and own


def _ends(module: str, name: str) -> bool:
    """peft's test, for the module itself and for what lies inside it."""
    parts = module.split(".")
    return any(".".join(parts[:n]).endswith(name) for n in range(1, len(parts) + 1))


def _put(found: dict[str, np.ndarray], place: Place, tensor: np.ndarray, leaf: Any) -> None:
    if place.path not in found:
        found[place.path] = np.array(leaf, np.float32)
    value = to_torch(place, tensor)  # a transpose is its own inverse
    if place.layer is None:
        found[place.path] = np.array(value, np.float32)
    else:
        found[place.path][place.layer] = value


def _same(left: np.ndarray, right: np.ndarray) -> bool:
    """Equal up to bfloat16's rounding: a copy of the base in another dtype."""
    return np.allclose(left.astype(np.float32), right.astype(np.float32), rtol=2**-7, atol=0)
