"""Resumable state on disk: Orbax checkpoints, and the config that a run folder belongs to."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from configs.base import Config, plain

CONFIG = "config.json"


def manager(folder: Path, keep: int = 2) -> ocp.CheckpointManager:
    """Asynchronous and atomic: a step's folder gets its name when everything in it is on disk."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    return ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)


def save(checkpoints: ocp.CheckpointManager, step: int, state: Any, position: Any) -> None:
    """Save the training state and the data position under `step`."""
    checkpoints.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(position)
        ),
    )


def restore_latest(checkpoints: ocp.CheckpointManager, like: Any) -> tuple[Any, Any] | None:
    """(state, data position) of the newest checkpoint, placed like `like`, or None."""
    step = checkpoints.latest_step()
    if step is None:
        return None
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    restored: Any = checkpoints.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
        ),
    )
    return restored.state, restored.data


def claim(folder: Path, config: Config) -> None:
    """Write the config into a new run folder, or check that the folder belongs to this config.

    Raises:
      ValueError: the folder holds a run with another config; the differing fields are listed.
    """
    file, mine = folder / CONFIG, plain(config)
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(mine, indent=2, sort_keys=True) + "\n")
        return
    theirs = json.loads(file.read_text(encoding="utf-8"))
    different = sorted(_differences(theirs, json.loads(json.dumps(mine))))
    if different:
        raise ValueError(
            f"{folder} holds a run with another config: "
            + "; ".join(different)
            + ". Give another --workdir, or remove that folder to start afresh."
        )


def read_config(folder: Path) -> Config:
    """The config of a run folder.

    Raises:
      ValueError: the folder holds no run.
    """
    file = folder / CONFIG
    if not file.exists():
        raise ValueError(f"{folder} holds no run ({CONFIG} is missing); give train.py's --workdir.")
    return ConfigDict(json.loads(file.read_text(encoding="utf-8")))


def write_atomically(file: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new content, never half of it."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def _differences(theirs: Any, mine: Any, prefix: str = "") -> list[str]:
    if not (isinstance(theirs, dict) and isinstance(mine, dict)):
        return [] if theirs == mine else [f"{prefix}: {theirs!r} there, {mine!r} here"]
    names = sorted(set(theirs) | set(mine))
    return [
        line
        for name in names
        for line in _differences(theirs.get(name), mine.get(name), f"{prefix}.{name}".lstrip("."))
    ]
