"""Adapters as Hugging Face PEFT's folders: `export_hf` and `import_hf`.

A folder holds adapter_model.safetensors, whose keys are `base_model.model.<torch
module>.<tensor>`, and adapter_config.json. What a method's tensors are lies in pefts/formats, one
file per family; this file knows names, stacking, and both files. peft itself passes over keys it
does not find in its model, so nothing here does: an import consumes every tensor, or fails.
"""

import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from pefts import io
from pefts.convert import direction_of, to_lora
from pefts.core import SHARED, Params, Peft, PeftState
from pefts.formats import FORMATS, selection, whole
from pefts.formats.base import Base, NameMap, letters
from pefts.formats.contract import Files, Format, Imported, Native, Slot
from pefts.registry import from_config
from pefts.targets import exactly, only

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX, MODEL = "base_model.", "base_model.model."
# The oldest peft that reads what is written here as it is meant.
PEFT_VERSION = "0.18.0"
# peft stores the whole table of these modules when they are targeted.
STORED_EMBEDDINGS = ("embed_tokens", "lm_head")


def export_hf(
    folder: str | os.PathLike,
    peft: Peft,
    state: PeftState,
    params: Params,
    names: NameMap,
    **info: Any,
) -> None:
    """Write an adapter as a folder that peft.PeftModel.from_pretrained opens.

    Args:
      folder: made if absent; each file is complete or not written.
      peft: a method of pefts.formats.FORMATS or one that `to_lora` converts, which becomes a plain
        LoRA (or DoRA) on the same base; or a chain or partition of one of them and leaves that are
        trained outright (full, head_only, bitfit), which become modules_to_save and bias.
      state: its state.
      params: the base.
      names: the model's name map. Its prefix must be that of the torch model the adapter is for:
        keys of a bare encoder do not fit the same encoder under a classifier.
      **info: base_model_name_or_path, revision, task_type, auto_mapping: fields of
        adapter_config.json that say nothing of the tensors.

    Raises:
      ValueError: peft cannot represent the method or a leaf of it; an unknown info; NaN or Inf.
      OSError: the files cannot be written.

    Example:
      >>> import jax, pefts, tempfile, types
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> names = types.SimpleNamespace(  # models.load returns a real one
      ...     keys=lambda path: ["layer.query.weight"],
      ...     modules=lambda path: ["layer.query"],
      ...     path=lambda key: ("query/kernel", None, "T"),
      ... )
      >>> peft, folder = pefts.lora(rank=2), tempfile.mkdtemp()
      >>> state = peft.init(jax.random.key(0), params)
      >>> pefts.export_hf(folder, peft, state, params, names, task_type="CAUSAL_LM")
      >>> pefts.import_hf(folder, params, names)[0].config["rank"]
      2
    """
    config, adapter, trained = _split(*_exportable(peft, state, params))
    format = FORMATS[config["method"]]
    free = {*selection.ABOUT, *format.ignored}
    if not free.issuperset(info):
        raise ValueError(
            f"info: {sorted(set(info) - free)} cannot be chosen for {format.peft_type}, the method "
            f"and its state decide them; free are {sorted(free)}."
        )
    base = Base.of(params, names)
    axes = letters(config.get("axes"))
    slices, shared = _slices(adapter, base, axes)
    files = format.to_hf(Native(config, slices, shared, base.weight))
    if format.keyless:
        _check_keyless(format, slices, base, info)
    _check_selected(format, files, base)
    plain, fields = whole.export(
        trained, base.flat, base.places, files.modules, info.get("task_type")
    )
    if format.stores_tables:
        plain.update(_tables(files, base))
    model, together = _in_front(format)
    tensors = {f"{model}{m}.{n}": v for m, held in files.modules.items() for n, v in held.items()}
    tensors |= {f"{together}{name}": value for name, value in files.shared.items()}
    tensors |= {f"{model}{key}": value for key, value in plain.items()}
    dense = {key: np.array(value, np.float32, order="C") for key, value in tensors.items()}
    io.check_finite(dense, "the adapter")
    written = {
        "base_model_name_or_path": None,
        "inference_mode": True,
        "peft_version": PEFT_VERSION,
        "revision": None,
        "task_type": None,
        **files.fields,
        **selection.outright(fields, format),
        **info,
        "peft_type": format.peft_type,
    }
    if not format.keyless and "target_modules" not in files.fields:
        chosen = selection.targets_for(files.modules, base.places_for(format))
        written["target_modules"] = chosen
    text = json.dumps(written, indent=2, sort_keys=True) + "\n"
    save = functools.partial(safetensors.numpy.save_file, dense, metadata={"format": "pt"})
    io.write(Path(folder) / WEIGHTS, save)
    io.write(Path(folder) / CONFIG, lambda file: Path(file).write_text(text, encoding="utf-8"))


def import_hf(
    folder: str | os.PathLike,
    params: Params,
    names: NameMap,
    *,
    axes: Mapping[str, str] | None = None,
) -> tuple[Peft, PeftState]:
    """Read a folder that Hugging Face PEFT, or `export_hf`, wrote.

    Args:
      folder: holds adapter_model.safetensors and adapter_config.json.
      params: the base.
      names: the model's name map.
      axes: as for every method (see pefts.infer_axes), for kernels with head axes.

    Returns:
      (peft, state): the method alone, or pefts.chain(full, method) where the folder holds
      modules_to_save or biases. Layers of a stacked leaf without tensors of their own get the
      identity.

    Raises:
      ValueError: an unsupported peft_type or feature (named), a tensor that is missing, left over,
        of another shape or not finite, a damaged file.
    """
    folder = Path(folder)
    raw = _read_config(folder)
    by_type = {format.peft_type: format for format in FORMATS.values()}
    if raw.get("peft_type") not in by_type:
        raise ValueError(
            f"{folder / CONFIG}: peft_type={raw.get('peft_type')!r} cannot be imported; supported "
            f"are {sorted(by_type)}."
        )
    format = by_type[raw["peft_type"]]
    config = selection.checked(raw, format, str(folder / CONFIG))
    base = Base.of(params, names)
    modules, shared, plain = _sorted_tensors(_read_tensors(folder), format, base)
    if not format.keyless:
        _check_modules(config, modules, format, base)
    trained = whole.read(plain, config, base.flat, base.places, modules)
    slots = _slots_of(modules, format, base, letters(axes))
    imported = format.from_hf(Files(config, modules, shared), slots, base.weight)
    peft, state = _native(imported, slots, axes)
    if trained:
        listed = only(sorted(trained))
        values = {path: {"value": jnp.asarray(value)} for path, value in trained.items()}
        outright = from_config({"method": "full", "targets": listed})
        peft = from_config({"method": "chain", "members": [outright.config, peft.config]})
        state = PeftState(
            {"0": values, "1": state.trainable},
            {"0": {}, "1": state.frozen},
        )
    io.check_state(peft, state, params, str(folder))
    return peft, state


def _members(config: Mapping[str, Any], state: PeftState) -> Iterator[tuple[Any, PeftState]]:
    members = config.get("members")
    if members is None:
        yield config, state
        return
    for label in members if isinstance(members, Mapping) else range(len(members)):
        inner = PeftState(state.trainable[str(label)], state.frozen[str(label)])
        yield from _members(members[label], inner)


def _exportable(peft: Peft, state: PeftState, params: Params) -> tuple[Peft, PeftState]:
    """The same adapter as a plain LoRA, where it has no format of its own but a LoRA can say it."""
    configs = [config for config, _ in _members(peft.config, state)]
    own = {*FORMATS, *whole.METHODS}
    if all(config["method"] in own and not direction_of(config) for config in configs):
        return peft, state
    return to_lora(peft, state, params)


def _split(peft: Peft, state: PeftState) -> tuple[Mapping[str, Any], PeftState, dict[str, Any]]:
    """(config and state of the one adapter, {path: value} of the leaves trained outright)."""
    adapters, trained = [], {}
    for config, part in _members(peft.config, state):
        if config["method"] not in whole.METHODS:
            adapters.append((config, part))
            continue
        for path, group in part.trainable.items():
            trained[path] = io.gather(path, group["value"])
    found = [config["method"] for config, _ in adapters]
    if len(found) != 1:
        raise ValueError(
            f"a folder holds exactly one adapter and this method has {len(found)} ({found}): "
            "export each by itself, or merge."
        )
    return *adapters[0], trained


def _slices(
    state: PeftState, base: Base, axes: Any
) -> tuple[dict[Slot, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    groups: dict[str, dict[str, np.ndarray]] = {}
    for tree in (state.frozen, state.trainable):
        for path, group in tree.items():
            arrays = {name: io.gather(f"{path}:{name}", leaf) for name, leaf in group.items()}
            groups.setdefault(path, {}).update(arrays)
    for path, group in groups.items():
        io.check_finite({f"{path}:{name}": a for name, a in group.items()}, "the state")
    shared, slices = groups.pop(SHARED, {}), {}
    for path, group in groups.items():
        for slot in base.slots(path, axes):
            slices[slot] = {n: a if slot.layer is None else a[slot.layer] for n, a in group.items()}
    return slices, shared


def _in_front(format: Format) -> tuple[str, str]:
    """What stands in front of a torch module's path, and of a tensor that belongs to no module."""
    return (PREFIX, "") if format.keyless else (MODEL, PREFIX)


def _tables(files: Files, base: Base) -> dict[str, np.ndarray]:
    """The base's table of adapted input and output embeddings, as peft stores it."""
    chosen = [name for name in files.modules if name.split(".")[-1] in STORED_EMBEDDINGS]
    places = {name: base.adaptable[name] for name in chosen}
    return {f"{n}.{whole.INNER}weight": p.read(base.flat[p.path]) for n, p in places.items()}


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}); give a folder that peft's save_pretrained wrote."
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} is no JSON object.")
    return config


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    file = folder / WEIGHTS
    if not file.is_file() and file.with_suffix(".bin").is_file():
        raise ValueError(
            f"{folder} holds adapter_model.bin, a pickle, which can run code and is not read: load "
            "it with peft and save it again, with safe_serialization=True."
        )
    _, tensors = io.open_tensors(file)
    for key, tensor in tensors.items():
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(f"{file}: {key!r} is {tensor.dtype.name}, and no float.")
    single = {key: tensor.astype(np.float32) for key, tensor in tensors.items()}
    io.check_finite(single, str(file))
    return single


def _sorted_tensors(
    tensors: Mapping[str, np.ndarray], format: Format, base: Base
) -> tuple[dict[str, dict], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """({module: {rest: tensor}}, shared, plain) by the keys' form; no key is passed over."""
    modules: dict[str, dict[str, np.ndarray]] = {}
    shared, plain, adaptable = {}, {}, base.places_for(format)
    model, together = _in_front(format)
    for key, tensor in tensors.items():
        if key.removeprefix(together) in format.shared:
            shared[key.removeprefix(together)] = tensor
            continue
        name = key.removeprefix(model)
        if name == key:
            raise ValueError(
                f"the key {key!r} lacks the prefix {model!r} that peft's adapters have: the file "
                "was written by another tool; rename its keys."
            )
        name = whole.plain_name(name)
        if name is None:
            continue
        rest = next((s for s in format.suffixes if name.endswith(f".{s}")), None)
        module = name.removesuffix(f".{rest}")
        if rest is not None and _is_copy(module, tensor, tensors, format, base):
            continue
        if rest is not None and module in adaptable:
            modules.setdefault(module, {})[rest] = tensor
        elif rest is None and name.replace(f".{whole.INNER}", ".") in base.places:
            plain[name] = tensor
        else:
            raise ValueError(_stray(name if rest is None else module, key, adaptable, base))
    return modules, shared, plain


def _is_copy(
    module: str, tensor: np.ndarray, tensors: Mapping[str, np.ndarray], format: Format, base: Base
) -> bool:
    """Whether a tensor of a tied head, which has no leaf of its own, stands there twice."""
    if module.split(".")[-1] not in format.tied:
        return False
    if any(place.module == module for place in base.places.values()):
        return False
    return sum(np.array_equal(tensor, other) for other in tensors.values()) > 1


def _stray(name: str, key: str, adaptable: Mapping[str, Any], base: Base) -> str:
    shown = sorted(base.places if name not in adaptable else adaptable)[:3]
    return (
        f"the adapter's tensor {key!r} belongs to {name!r}, which is no module or tensor of this "
        f"model (whose names are like {shown}). Is it an adapter for another base, or one whose "
        "torch model has a head where this one has none? dataclasses.replace(names, prefix=...) "
        "renames, models.load(..., num_labels=...) adds a head."
    )


def _check_keyless(
    format: Format, slices: Mapping[Slot, Any], base: Base, info: Mapping[str, Any]
) -> None:
    """Raise ValueError where peft would run something else, or the base alone."""
    if not info.get("task_type"):
        raise ValueError(
            f"peft runs a folder of {format.peft_type} without a task_type as the base alone: give "
            "export_hf(..., task_type='CAUSAL_LM'), or the task that the model is for."
        )
    all_paths = {place.path for places in base.places_for(format).values() for place in places}
    left = sorted(all_paths - {slot.path for slot in slices})
    if left:
        raise ValueError(
            f"peft has no way to leave {left[0]!r} out of {format.peft_type}, which stands at "
            f"{sorted(all_paths)}: adapt them all, with the method's own default targets."
        )


def _check_selected(format: Format, files: Files, base: Base) -> None:
    """Raise ValueError where peft would adapt other modules than those with tensors."""
    if format.selects is None:
        return
    selected = format.selects(files.fields, base.places_for(format))
    if selected != set(files.modules):
        raise ValueError(
            f"peft would put {format.peft_type} into {sorted(selected)}, and adapted are "
            f"{sorted(files.modules)}: these targets cannot be said in adapter_config.json."
        )


def _check_modules(
    config: Mapping[str, Any], modules: Mapping[str, Any], format: Format, base: Base
) -> None:
    if not modules:
        raise ValueError("the folder holds no adapter tensor at all: nothing would be adapted.")
    select = format.selects or selection.selected
    selected = select(config, base.places_for(format))
    if selected is None:
        return
    missing, extra = sorted(selected - set(modules)), sorted(set(modules) - selected)
    if missing or extra:
        raise ValueError(
            f"target_modules={config['target_modules']!r} and the tensors disagree: selected "
            f"without tensors {missing[:5]} ({len(missing)}), tensors without being selected "
            f"{extra[:5]} ({len(extra)}). The file is incomplete, or for another model."
        )


def _slots_of(modules: Mapping[str, Any], format: Format, base: Base, axes: Any) -> list[Slot]:
    adaptable = base.places_for(format)
    if format.keyless and not adaptable:
        raise ValueError(
            f"none of the model's leaves is one that {format.peft_type} stands at, by its path "
            f"({format.leaves!r}); there is no place for the adapter."
        )
    chosen = adaptable if format.keyless else modules
    touched = sorted({place.path for name in chosen for place in adaptable[name]})
    return [slot for path in touched for slot in base.slots(path, axes)]


def _native(
    imported: Imported, slots: list[Slot], axes: Mapping[str, str] | None
) -> tuple[Peft, PeftState]:
    by_path: dict[str, list[Slot]] = {}
    for slot in slots:
        by_path.setdefault(slot.path, []).append(slot)
    listed = only(by_path)
    letters = {
        exactly(path): "l" * (own[0].layer is not None) + own[0].axes
        for path, own in by_path.items()
    }
    config = {**imported.config, "targets": listed, "axes": dict(axes or letters)}

    return from_config(config), PeftState(
        _tree(by_path, imported.trainable, imported.shared_trainable),
        _tree(by_path, imported.frozen, imported.shared_frozen),
    )


def _tree(
    by_path: Mapping[str, list[Slot]], slices: Mapping[Slot, Any], shared: Mapping[str, Any]
) -> dict[str, Any]:
    """{path: {name: array}} with the slices stacked again, and the shared arrays."""
    groups = {}
    for path, own in by_path.items() if slices else ():
        rows = [slices[slot] for slot in own]
        groups[path] = {
            name: jnp.asarray(
                rows[0][name] if own[0].layer is None else np.stack([r[name] for r in rows])
            )
            for name in rows[0]
        }
    groups[SHARED] = {name: jnp.asarray(value) for name, value in shared.items()}
    return {path: group for path, group in groups.items() if group}
