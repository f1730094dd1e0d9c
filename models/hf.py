"""Hugging Face checkpoints <-> Flax parameter trees, by a name map that is data.

A model family writes one table of (flax path, checkpoint key template, op); everything here is
generic over that table. `{l}` in a template is the layer number: a scanned model keeps those
tensors stacked on a leading axis at `.../layers/...`, an unrolled one at `.../layers_{l}/...`.
The op is "T" (torch Linear weights are (out, in), Flax kernels (in, out)), "" (as stored), or
another of OPS.

Loading is strict: missing, unexpected and mis-shaped tensors are all listed, then refused. It reads
safetensors only, one tensor at a time; pickled checkpoints are never opened.
"""

import contextlib
import difflib
import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"F64", "F32", "F16", "BF16"}

# What each kind of module holds: (flax leaf, torch leaf, op).
LEAVES = {
    "dense": (("kernel", "weight", "T"), ("bias", "bias", "")),
    "conv": (("kernel", "weight", "conv"), ("bias", "bias", "")),
    "conv1d": (("kernel", "weight", ""), ("bias", "bias", "")),  # GPT-2's: (in, out) as ours
    "embedding": (("embedding", "weight", ""),),
    "norm": (("scale", "weight", ""), ("bias", "bias", "")),
}


class Op(NamedTuple):
    """How a checkpoint's tensor becomes our leaf.

    Attributes:
      order: the tensor's axes as they follow each other in the leaf; empty: as they are.
      ones: how many axes of size 1 the tensor has in front, and the leaf has not.
    """

    order: tuple[int, ...] = ()
    ones: int = 0


OPS = {
    "": Op(),
    "1": Op(ones=1),
    "11": Op(ones=2),
    "T": Op((1, 0)),
    "conv": Op((2, 3, 1, 0)),  # (out, in, height, width) -> (height, width, in, out)
}


class Entry(NamedTuple):
    """One parameter: its Flax path, its key in the checkpoint, and the op between them."""

    path: str
    key: str
    op: str = ""


def entries(table: Iterable[tuple[str, str, str]]) -> tuple[Entry, ...]:
    """Expands (flax module, torch module, kind) rows to one Entry per parameter.

    >>> entries([("pooler/dense", "pooler.dense", "dense")])[0]
    Entry(path='pooler/dense/kernel', key='pooler.dense.weight', op='T')
    """
    return tuple(
        Entry(f"{path}/{leaf}", f"{key}.{torch_leaf}", op)
        for path, key, kind in table
        for leaf, torch_leaf, op in LEAVES[kind]
    )


@dataclass(frozen=True)
class NameMap:
    """A model family's parameter names, in both directions.

    Args:
      entries: the table.
      prefixes: what checkpoints saved with a head put before every key of the base ("bert.").
      outside: path roots whose keys stand outside that prefix ("classifier").
      optional: (path root, key pattern): tensors passed over when the model lacks that root.
      fresh: path roots a checkpoint may lack; the model's own initial values stay.
      renewed: path roots whose initial values stay also where the checkpoint has others.
      ignored: key patterns that are never parameters of the model (position ids, LM heads).
      renamed: (old, new) endings of keys in checkpoints of earlier library versions.
      layers: number of layers of this model; `models.load` sets it with the next two.
      scanned: whether layers are stacked on a leading axis.
      prefix: the prefix that `keys` and `modules` write.
    """

    entries: tuple[Entry, ...]
    prefixes: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    optional: tuple[tuple[str, str], ...] = ()
    fresh: tuple[str, ...] = ()
    renewed: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    layers: int = 0
    scanned: bool = True
    prefix: str = ""

    @functools.cached_property
    def _by_path(self) -> dict[str, tuple[tuple[str, ...], str]]:
        """path -> (keys in layer order, op), for this number of layers."""
        found = {}
        for path, key, op in self.entries:
            keys = [key]
            if "{l}" in key:
                keys = [key.replace("{l}", str(i)) for i in range(self.layers)]
            if path.split("/")[0] not in self.outside:
                keys = [self.prefix + key for key in keys]
            if "{l}" not in key or self.scanned:
                found[path] = (tuple(keys), op)
                continue
            for i, name in enumerate(keys):
                found[_at_layer(path, i)] = ((name,), op)
        return found

    @functools.cached_property
    def _by_key(self) -> dict[str, tuple[str, int | None, str]]:
        found = {}
        for path, (keys, op) in self._by_path.items():
            stacked = _is_stacked(path)
            found |= {key: (path, i if stacked else None, op) for i, key in enumerate(keys)}
        return found

    def keys(self, path: str) -> list[str]:
        """Checkpoint keys of a parameter, in layer order (one unless it is stacked).

        Raises:
          ValueError: the path is not in the table.
        """
        return list(_look_up(self._by_path, path, "path")[0])

    def op(self, path: str) -> str:
        """A key of OPS: "T" where the checkpoint holds the transpose of the parameter.

        Raises:
          ValueError: the path is not in the table.
        """
        return _look_up(self._by_path, path, "path")[1]

    def path(self, key: str) -> tuple[str, int | None, str]:
        """(path, index on the stacked axis or None, op) of a checkpoint key.

        Raises:
          ValueError: the key is not in the table.
        """
        return _look_up(self._by_key, key, "key")

    def modules(self, path: str) -> list[str]:
        """Torch module names of a parameter, in layer order: its keys without the last part."""
        return [key.rpartition(".")[0] for key in self.keys(path)]


def _is_stacked(path: str) -> bool:
    return "layers" in path.split("/")


def _at_layer(path: str, layer: int) -> str:
    return "/".join(f"layers_{layer}" if part == "layers" else part for part in path.split("/"))


def _look_up(table: Mapping[str, Any], name: str, what: str) -> Any:
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=3, cutoff=0.3)
    raise ValueError(
        f"{what}={name!r} is not in the name map; nearest: {', '.join(near) or 'none'}"
    )


class _Tensor(NamedTuple):
    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


def load_params(folder: str | Path, names: NameMap, abstract_params: Any, dtype: Any = None) -> Any:
    """Reads a safetensors checkpoint into the structure of `abstract_params`.

    Args:
      folder: holds model.safetensors, or its shards and model.safetensors.index.json.
      names: the family's name map with `layers` and `scanned` set.
      abstract_params: arrays or ShapeDtypeStructs. A leaf that carries a sharding is placed by it;
        leaves under `names.fresh` that the file lacks, and all under `names.renewed`, are returned
        as they came.
      dtype: of the result; None keeps each leaf's dtype in `abstract_params`.

    Returns:
      The parameter tree, jax arrays.

    Raises:
      ValueError: no safetensors file, an unreadable or pickled one, or tensors missing, unexpected,
        mis-shaped or not floating point (all are listed).
    """
    folder = Path(folder)
    flat = traverse_util.flatten_dict(abstract_params, sep="/")
    tensors = _headers(folder)
    names = with_prefix(names, tensors)
    tensors = _rename(names, tensors)
    wanted = _plan(folder, names, flat, tensors)
    with contextlib.ExitStack() as stack:
        files = {
            file: stack.enter_context(safetensors.safe_open(file, "np"))
            for file in {tensors[key].file for keys in wanted.values() for key in keys}
        }

        def read(path: str, leaf: Any) -> jax.Array:
            found = [tensors[key] for key in wanted[path]]
            views = [files[tensor.file].get_slice(tensor.key) for tensor in found]
            return _assemble(views, leaf, names.op(path), dtype, _is_stacked(path))

        loaded = {path: read(path, leaf) if path in wanted else leaf for path, leaf in flat.items()}
    return traverse_util.unflatten_dict(loaded, sep="/")


def _assemble(views: list[Any], leaf: Any, op: str, dtype: Any, stacked: bool) -> jax.Array:
    """One leaf from its layers' tensors; of a sharded one only the shards of this process."""
    target = jnp.dtype(dtype or leaf.dtype)

    def shard(index: Any) -> np.ndarray:
        spans = [range(*part.indices(size)) for part, size in zip(index, leaf.shape, strict=True)]
        inner = tuple(slice(span.start, span.stop) for span in spans[stacked:])
        inner = _as_stored(inner, op, slice(None))
        part = np.empty([len(span) for span in spans], target)
        rows = [views[i] for i in spans[0]] if stacked else views
        for row, view in zip(part if stacked else part[None], rows, strict=True):
            row[...] = _from_stored(view[inner], op).astype(target)
        return part

    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return jax.device_put(shard((slice(None),) * len(leaf.shape)))
    return jax.make_array_from_callback(leaf.shape, sharding, shard)


def _as_stored(of_axes: tuple[Any, ...], op: str, of_ones: Any) -> tuple[Any, ...]:
    """One thing for each axis of a leaf, for the axes of the checkpoint's tensor."""
    order, ones = OPS[op]
    moved = tuple(of_axes[order.index(axis)] for axis in range(len(order))) if order else of_axes
    return (of_ones,) * ones + moved


def _from_stored(tensor: np.ndarray, op: str) -> np.ndarray:
    order, ones = OPS[op]
    tensor = tensor.reshape(tensor.shape[ones:])
    return tensor.transpose(order) if order else tensor


def _to_stored(leaf: np.ndarray, op: str) -> np.ndarray:
    order, ones = OPS[op]
    tensor = leaf.transpose(np.argsort(order)) if order else leaf
    return np.ascontiguousarray(tensor.reshape((1,) * ones + tensor.shape))


def _headers(folder: Path) -> dict[str, _Tensor]:
    """Key -> where it lies and what its shape is, over all shards, without reading the data."""
    found = {}
    for file in _files(folder):
        try:
            found |= _header(file)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} is not a readable safetensors file ({error}); it is truncated or"
                " of another format: fetch it again"
            ) from error
    return found


def _header(file: Path) -> dict[str, _Tensor]:
    with safetensors.safe_open(file, "np") as shard:
        views = {key: shard.get_slice(key) for key in shard.keys()}  # noqa: SIM118 (no mapping)
        return {
            key: _Tensor(file, key, tuple(view.get_shape()), view.get_dtype())
            for key, view in views.items()
        }


def _files(folder: Path) -> list[Path]:
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return [single]
    if index.is_file():
        return _shards(index)
    held = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else "no such folder"
    advice = ""
    if any(folder.glob("pytorch_model*.bin")):
        advice = (
            " pytorch_model.bin is a pickle, which can run code and is not read: convert it to"
            " safetensors first (save_pretrained of a current transformers does)."
        )
    raise ValueError(f"folder={folder} has neither {SINGLE} nor {INDEX}; it holds {held}.{advice}")


def _shards(index: Path) -> list[Path]:
    try:
        listed = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index: no weight_map of file names") from error
    files = [index.parent / name for name in listed]
    absent = [file.name for file in files if file.parent != index.parent or not file.is_file()]
    if absent:
        raise ValueError(f"{index} lists shards that are not beside it: {', '.join(absent)}")
    return files


def with_prefix(names: NameMap, keys: Iterable[str]) -> NameMap:
    """The same map, with the prefix that these checkpoint keys use."""
    used = [prefix for prefix in names.prefixes if any(key.startswith(prefix) for key in keys)]
    return replace(names, prefix=used[0] if used else "")


def checkpoint_keys(folder: str | Path) -> list[str]:
    """Tensor names of a checkpoint, over all shards.

    Raises:
      ValueError: the folder has no readable safetensors checkpoint.
    """
    return list(_headers(Path(folder)))


def _rename(names: NameMap, tensors: dict[str, _Tensor]) -> dict[str, _Tensor]:
    def current(key: str) -> str:
        for old, new in names.renamed:
            if key.endswith(old):
                return key.removesuffix(old) + new
        return key

    return {current(key): tensor for key, tensor in tensors.items()}


def _plan(
    folder: Path, names: NameMap, flat: Mapping[str, Any], tensors: Mapping[str, _Tensor]
) -> dict[str, list[str]]:
    """path -> keys to read; refuses the checkpoint with every disagreement listed."""
    wanted, problems, claimed = {}, [], set()
    # A root is fresh as a whole: half a classifier in the file is a damaged one.
    held = {path.split("/")[0] for path in flat if tensors.keys() & set(names.keys(path))}
    fresh = set(names.fresh) - held | set(names.renewed)
    for path, leaf in flat.items():
        keys = names.keys(path)
        claimed.update(keys)
        if path.split("/")[0] in fresh:
            continue
        wanted[path] = keys
        shape = tuple(leaf.shape[1:] if _is_stacked(path) else leaf.shape)
        shape = _as_stored(shape, names.op(path), 1)
        problems += [_problem(key, tensors.get(key), shape, path) for key in keys]
    passed = _passed_over(names, flat)
    problems += [
        f"unexpected: {key} {tensor.shape}"
        for key, tensor in tensors.items()
        if key not in claimed and not passed(key)
    ]
    problems = [problem for problem in problems if problem]
    if problems:
        raise ValueError(
            f"the checkpoint in {folder} does not fit the model, {len(problems)} tensors:\n  "
            + "\n  ".join(problems)
            + "\nCheck that config.json belongs to the file, or extend the name map of the family."
        )
    return wanted


def _problem(key: str, tensor: _Tensor | None, shape: tuple[int, ...], path: str) -> str:
    if tensor is None:
        return f"missing: {key} {shape}, for {path}"
    if tensor.shape != shape:
        return f"shape: {key} is {tensor.shape} in the file, {shape} in the model, for {path}"
    if tensor.dtype not in FLOATS:
        return f"dtype: {key} is {tensor.dtype} in the file, not a float, for {path}"
    return ""


def _passed_over(names: NameMap, flat: Mapping[str, Any]) -> Callable[[str], bool]:
    roots = {path.split("/")[0] for path in flat}
    patterns = [*names.ignored, *(key for root, key in names.optional if root not in roots)]
    compiled = [re.compile(pattern) for pattern in patterns]
    return lambda key: any(p.fullmatch(key.removeprefix(names.prefix)) for p in compiled)


def save_params(
    folder: str | Path, params: Any, names: NameMap, hf_config: Mapping[str, Any]
) -> None:
    """Writes model.safetensors and config.json, which transformers opens.

    Each file is written beside its final name and moved into place when it is complete.

    Args:
      folder: created if absent.
      params: plain (merged) parameters, in the dtype to be stored.
      names: as returned by `models.load`; its `prefix` is written ("bert." with a head).
      hf_config: content of config.json.

    Raises:
      ValueError: a leaf is not a plain array, is not in the name map, or has another number of
        layers; or the folder holds a sharded checkpoint, whose index would shadow the new file.
    """
    folder = Path(folder)
    if (folder / INDEX).exists():
        raise ValueError(f"folder={folder} holds a sharded checkpoint ({INDEX}); choose another")
    tensors = {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise ValueError(
                f"{path} is a {type(leaf).__name__}, not an array; merge the adapter first"
            )
        keys, op = names.keys(path), names.op(path)
        array = np.asarray(leaf)
        rows = array if _is_stacked(path) else array[None]
        if len(rows) != len(keys):
            raise ValueError(f"{path} has {len(rows)} layers, the name map {len(keys)}")
        for key, row in zip(keys, rows, strict=True):
            tensors[key] = _to_stored(row, op)
    folder.mkdir(parents=True, exist_ok=True)
    # transformers refuses a file that does not say which framework wrote it.
    _replace(folder / SINGLE, lambda f: safetensors.numpy.save_file(tensors, f, {"format": "pt"}))
    text = json.dumps(dict(hf_config), indent=2, sort_keys=True) + "\n"
    _replace(folder / "config.json", lambda file: Path(file).write_text(text))


def _replace(target: Path, write: Callable[[str], object]) -> None:
    name = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        write(str(name))
        os.replace(name, target)
    finally:
        name.unlink(missing_ok=True)
