"""The log of a run that trains by values alone: seeds.safetensors, kilobytes for a checkpoint.

It is written when checkpoints are, and cut back to the step that a run resumes at.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from pefts.zeroth_order import ZerothOrder, engine, seed_log

FILE = "seeds.safetensors"


class Recorder:
    """Collects what each update was; does nothing for optimizers that a log cannot replay."""

    def __init__(self, folder: Path, tx: Any, trainable: Any, opt_state: Any, step: int) -> None:
        self.file, self.records = folder / FILE, []
        self.log = None
        if isinstance(tx, ZerothOrder) and tx.replay is not None:
            self.log = _resumed(self.file, seed_log.empty(trainable, opt_state), step)

    def add(self, opt_state: Any) -> None:
        """Note the update that led to this state."""
        if self.log is not None:
            # On the host: the next step takes the state's arrays for its own.
            self.records.append(jax.tree.map(np.asarray, engine.state_of(opt_state).last))

    def write(self) -> None:
        """Write all updates so far."""
        if self.log is None:
            return
        self.log = seed_log.extended(self.log, self.records)
        self.records = []
        seed_log.write(self.file, self.log)


def files(folder: Path) -> dict[str, Path]:
    """A run's log by what it is, if there is one."""
    return {"seeds": folder / FILE} if (folder / FILE).exists() else {}


def _resumed(file: Path, new: seed_log.SeedLog, step: int) -> seed_log.SeedLog:
    if step == 0:
        return new
    log = seed_log.read(file)
    if len(log.decays) < step or not np.array_equal(log.key, new.key):
        raise ValueError(
            f"{file} does not lead to step {step}, at which this run resumes: it is another run's, "
            "or was replaced. Start anew in another --workdir."
        )
    return log._replace(
        **{name: getattr(log, name)[:step] for name in seed_log.SeedLog._fields[3:]}
    )
