"""One adapter, one file: the state as safetensors, the method and its base in the header.

The header holds, as JSON under the key "pefts": the format's version, the library's, `peft.config`,
the fingerprint of the base (pefts.fingerprint) and the list of leaves. A leaf is named by its way
through the state, "trainable:layers/query/kernel:A". Loading runs no code from the file.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils

from pefts import fingerprint
from pefts.core import CONTEXT, Params, Peft, PeftState
from pefts.registry import from_config

FORMAT_VERSION = 1
HEADER = "pefts"
FIELDS = ("base", "config", "empty", "leaves", "library")
# What safetensors stores as it is; one-byte types besides these go in as bytes.
NATIVE = "bfloat16 bool float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64"


def save(path: str | os.PathLike, peft: Peft, state: PeftState, params: Params) -> None:
    """Write an adapter to one safetensors file, complete or not at all.

    Args:
      path: the file; folders on the way are made. An existing file is replaced.
      peft: the method. It must be one that its config rebuilds.
      state: its state; sharded arrays are gathered, and the first process writes.
      params: the base that the state adapts, neither bound nor merged: its fingerprint is stored,
        and `load` refuses another base.

    Raises:
      ValueError: the state is not one of this method on these params, holds NaN or Inf, or the
        method cannot be rebuilt (a partition labelled by a function).
      OSError: the file cannot be written; what was there before is left as it was.

    Example:
      >>> import jax, pathlib, pefts, tempfile
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> peft = pefts.lora(rank=2)
      >>> file = pathlib.Path(tempfile.mkdtemp(), "adapter.safetensors")
      >>> pefts.save(file, peft, peft.init(jax.random.key(0), params), params)
      >>> pefts.load(file, params)[0].config["rank"]
      2
    """
    config = _plain_config(peft)
    leaves, empty = _flatten({"trainable": state.trainable, "frozen": state.frozen})
    check_structure(from_config(config), params, leaves, "state")
    bases = fingerprint.targeted(params, state.trainable, state.frozen)
    arrays = {name: gather(name, leaf) for name, leaf in leaves.items()}
    check_finite(arrays, "state")
    header = {
        "format_version": FORMAT_VERSION,
        "library": _library(),
        "config": config,
        "base": fingerprint.take(params, bases),
        "leaves": {name: _described(array) for name, array in arrays.items()},
        "empty": empty,
    }
    stored = {name: _storable(array) for name, array in arrays.items()}
    metadata = {HEADER: json.dumps(header, sort_keys=True)}
    write(path, lambda file: safetensors.numpy.save_file(stored, file, metadata))


def load(
    path: str | os.PathLike, params: Params, *, check_base: str = "values"
) -> tuple[Peft, PeftState]:
    """Read an adapter that `save` wrote, on the base that it was trained on.

    Args:
      path: the file.
      params: the base. Its adapted leaves must have the values they had at `save`, up to rounding
        to bfloat16, so a float32 and a bfloat16 copy of one checkpoint are the same base. Leaves
        that the adapter replaces entirely (pefts.full) are compared in shape alone.
      check_base: "values", or "shapes" for a copy in another format, such as a quantised one.

    Returns:
      (peft, state), the state's arrays bit for bit as they were saved.

    Raises:
      ValueError: no such file, a truncated or foreign one, another format version, an unknown
        method, another base, leaves that are missing, extra or of another shape, NaN or Inf.
    """
    if check_base not in fingerprint.CHECKS:
        raise ValueError(f"check_base={check_base!r}: choose one of {fingerprint.CHECKS}.")
    file = Path(path)
    header, arrays = _read(file)
    peft = _rebuild(header, file)
    fingerprint.check(header["base"], params, check_base, str(file))
    _check_listed(header["leaves"], arrays, file)
    restored = {name: _restored(name, arrays[name], header["leaves"][name]) for name in arrays}
    check_finite(restored, str(file))
    check_structure(peft, params, restored, str(file))
    device = {name: _to_device(name, array) for name, array in restored.items()}
    tree = _unflatten(device, header["empty"])
    return peft, PeftState(tree.get("trainable", {}), tree.get("frozen", {}))


def write(path: str | os.PathLike, writer: Callable[[str], object]) -> None:
    """Let `writer` fill a temporary file beside `path`, then move it into place.

    Of several processes only the first writes.

    Raises:
      OSError: with the path and what to do; no partial file is left.
    """
    if jax.process_index() != 0:
        return
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        writer(str(temporary))
        os.replace(temporary, target)
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(
            f"{target} could not be written ({error}); nothing was changed there. Give a path in a "
            "folder that can be written, with enough space."
        ) from error
    finally:
        if temporary.exists():
            temporary.unlink()


def open_tensors(file: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """(metadata, tensors) of a safetensors file.

    Raises:
      ValueError: no such file, or not a complete safetensors file.
    """
    if not file.is_file():
        raise ValueError(f"{file} does not exist, or is no file.")
    try:
        with safetensors.safe_open(file, "np") as handle:
            names = handle.keys()
            return handle.metadata() or {}, {name: handle.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, OSError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{file} is not a complete safetensors file ({error}): it is truncated or of another "
            "format. Copy it again; pickled files (.bin, .pt) are never read."
        ) from error


def _library() -> str:
    from pefts import __version__  # the package imports this module first

    return f"pefts {__version__}"


def _plain_config(peft: Peft) -> dict[str, Any]:
    try:
        config = json.loads(json.dumps(peft.config, allow_nan=False))
        from_config(config)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{peft.config.get('method')} cannot be stored: its config does not rebuild it "
            f"({error})."
        ) from error
    return config


def _rebuild(header: Mapping[str, Any], file: Path) -> Peft:
    try:
        return from_config(header["config"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} was written by {header['library']}, and its method cannot be rebuilt here: "
            f"{error} This is {_library()}."
        ) from error


def _read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    metadata, arrays = open_tensors(file)
    if HEADER not in metadata:
        raise ValueError(
            f"{file} was not written by pefts.save: its header has no {HEADER!r} entry. A Hugging "
            "Face PEFT adapter is read by pefts.import_hf(folder, params, names)."
        )
    try:
        header = json.loads(metadata[HEADER])
        version = header["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the header of {file} is damaged ({error}): copy it again.") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version={version!r}; {_library()} reads {FORMAT_VERSION}. It was "
            f"written by {header.get('library')}: use that version, or a later one."
        )
    absent = [field for field in FIELDS if field not in header]
    if absent:
        raise ValueError(f"the header of {file} is damaged: it lacks {absent}. Copy it again.")
    return header, arrays


def _flatten(tree: Any, parts: tuple[str, ...] = ()) -> tuple[dict[str, Any], list[str]]:
    """({name: leaf}, [names of empty groups])."""
    name = ":".join(quote(part, safe="/") for part in parts)
    if not isinstance(tree, Mapping):
        return {name: tree}, []
    if not tree:
        return {}, [name]
    leaves, empty = {}, []
    for key in sorted(tree):
        inner, hollow = _flatten(tree[key], (*parts, key))
        leaves.update(inner)
        empty.extend(hollow)
    return leaves, empty


def _unflatten(leaves: Mapping[str, Any], empty: list[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in [*leaves.items(), *((name, {}) for name in empty)]:
        *parents, last = (unquote(part) for part in name.split(":"))
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def gather(name: str, leaf: Any) -> np.ndarray:
    """A leaf on the host, whole, however it is sharded."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ValueError(f"{name!r} holds random keys: keep jax.random.key_data(key) in a state.")
    whole = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
    if whole or leaf.is_fully_replicated:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def _described(array: np.ndarray) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": array.dtype.name}


def _storable(array: np.ndarray) -> np.ndarray:
    dense = np.array(array, order="C")
    if dense.dtype.name in NATIVE.split():
        return dense
    if dense.dtype.itemsize != 1:
        raise ValueError(f"a state of dtype {dense.dtype.name} cannot be stored; cast it first.")
    return dense.view(np.uint8)


def _restored(name: str, array: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
    dtype = jnp.dtype(entry["dtype"])
    array = array if array.dtype == dtype else array.view(dtype)
    if list(array.shape) != list(entry["shape"]):
        raise ValueError(
            f"{name!r} has shape {array.shape} and the header says {tuple(entry['shape'])}: the "
            "file is damaged, copy it again."
        )
    return array


def _to_device(name: str, array: np.ndarray) -> jax.Array:
    leaf = jnp.asarray(array)
    if leaf.dtype != array.dtype:
        raise ValueError(
            f"{name!r} is {array.dtype.name}, which this process would round to {leaf.dtype.name}: "
            "set jax.config.update('jax_enable_x64', True) first."
        )
    return leaf


def _check_listed(listed: Mapping[str, Any], arrays: Mapping[str, Any], file: Path) -> None:
    missing, extra = sorted(set(listed) - set(arrays)), sorted(set(arrays) - set(listed))
    if missing or extra:
        raise ValueError(
            f"{file} is damaged: missing leaves {missing}, extra leaves {extra}. Copy or save it "
            "again."
        )


def check_finite(arrays: Mapping[str, np.ndarray], source: str) -> None:
    """Raise ValueError, naming the leaf, if one holds NaN or Inf."""
    for name, array in arrays.items():
        floating = jnp.issubdtype(array.dtype, jnp.floating)
        if floating and not np.isfinite(array.astype(np.float64)).all():
            raise ValueError(
                f"{source} has NaN or Inf in {name!r}: the training that made it diverged. Go back "
                "to an earlier checkpoint."
            )


def check_state(peft: Peft, state: PeftState, params: Params, source: str) -> None:
    """Raise ValueError unless the state is one that `peft.init` could make on these params."""
    leaves, _ = _flatten({"trainable": state.trainable, "frozen": state.frozen})
    check_structure(peft, params, leaves, source)


def check_structure(peft: Peft, params: Params, leaves: Mapping[str, Any], source: str) -> None:
    """Raise ValueError unless the leaves are those that `peft.init` makes on these params."""
    from_data = set(peft.traits.needs) - {CONTEXT}
    if peft.traits.shapes_from_values or from_data:
        # Such an init cannot run abstractly; the list of leaves and the fingerprint have to do.
        return
    abstract = jax.eval_shape(peft.init, jax.random.key(0), params)
    wanted, _ = _flatten({"trainable": abstract.trainable, "frozen": abstract.frozen})
    missing, extra = sorted(set(wanted) - set(leaves)), sorted(set(leaves) - set(wanted))
    if missing or extra:
        raise ValueError(
            f"{source} is no state of {peft.config['method']} on these params: missing leaves "
            f"{missing[:5]}, extra leaves {extra[:5]} ({len(missing)} and {len(extra)} in all). "
            "Use the method and the parameters that it was made with."
        )
    for name, leaf in wanted.items():
        found = leaves[name]
        if tuple(found.shape) != tuple(leaf.shape):
            raise ValueError(
                f"{source}: {name!r} has shape {tuple(found.shape)}, {peft.config['method']} makes "
                f"{tuple(leaf.shape)} on these params. Stacked states are saved one by one."
            )
