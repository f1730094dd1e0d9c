"""A run as what it takes to make it again: a key and a few numbers for every update.

    theta_T = replay(tx, theta_0, log)

Kilobytes stand for a checkpoint. On one backend, sharding and program the parameters are the same
bit for bit; on another mesh up to rounding.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from pefts import io
from pefts.zeroth_order import directions, engine
from pefts.zeroth_order.engine import Record, ZerothOrder

VERSION = 1


class SeedLog(NamedTuple):
    """What a run did.

    Attributes:
      paths: the sorted paths of the leaves that were moved: their places are part of the noise.
      shapes: theirs, "2x3" and so on, in that order.
      key: of the run, uint32 (2,).
      coefficients: (T, Q), of every update.
      decays: (T,), the share of decaying leaves that was taken away.
      values: (T,), near theta.
      slopes: (T,), see pefts.zeroth_order.engine.Record.
    """

    paths: tuple[str, ...]
    shapes: tuple[str, ...]
    key: np.ndarray
    coefficients: np.ndarray
    decays: np.ndarray
    values: np.ndarray
    slopes: np.ndarray


def empty(theta: Any, state: Any) -> SeedLog:
    """The log of a run that has not begun.

    Args:
      theta: what it trains.
      state: of its `ZerothOrder`, from init(theta).
    """
    own = engine.state_of(state)
    paths, shapes = _description(theta)
    queries, dtype = own.last.coefficients.shape[0], own.last.coefficients.dtype
    none = np.zeros((0,), dtype)
    rows = np.zeros((0, queries), dtype)
    return SeedLog(paths, shapes, np.asarray(own.key), rows, none, none, none)


def extended(log: SeedLog, records: list[Record]) -> SeedLog:
    """The log with more updates at its end."""
    if not records:
        return log
    rows = jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *records)
    return log._replace(
        coefficients=np.concatenate([log.coefficients, rows.coefficients]),
        decays=np.concatenate([log.decays, rows.decay]),
        values=np.concatenate([log.values, rows.value]),
        slopes=np.concatenate([log.slopes, rows.slope]),
    )


def replay(tx: ZerothOrder, theta: Any, log: SeedLog, steps: int | None = None) -> Any:
    """theta after the log's updates, or the first `steps` of them.

    Args:
      tx: the transformation that made the run, with the same options.
      theta: the parameters that it began with; they are not changed.
      log: of the run.
      steps: how many updates; None: all.

    Raises:
      ValueError: theta has other leaves than the log, a rule whose updates are more than a few
        numbers, or more steps than there are.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from pefts.zeroth_order import engine, mezo, seed_log
      >>> tx, start = mezo(0.1), {"w": jnp.ones(3)}
      >>> theta, state = start, tx.init(start)
      >>> log = seed_log.empty(theta, state)
      >>> step = jax.jit(lambda *run: tx.step(*run, lambda tree: jnp.sum(tree["w"] ** 2)))
      >>> for _ in range(4):
      ...     theta, state = step(theta, state)
      ...     log = seed_log.extended(log, [engine.state_of(state).last])
      >>> bool(jnp.all(seed_log.replay(tx, start, log)["w"] == theta["w"]))
      True
    """
    if tx.replay is None:
        raise ValueError(
            "updates of this rule are more than their scalars (it keeps moments): save checkpoints."
        )
    check(log, theta)
    done = len(log.decays) if steps is None else steps
    if not 0 <= done <= len(log.decays):
        raise ValueError(f"steps={steps}: the log has {len(log.decays)} updates.")
    state = engine.state_of(tx.init(theta))
    if not np.array_equal(state.key, log.key):
        raise ValueError("the log was made with another seed than this transformation has.")
    update = jax.jit(tx.replay, donate_argnums=0)
    theta = jax.tree.map(jnp.copy, theta)
    for step in range(done):
        record = Record(*(jnp.asarray(x[step]) for x in log[3:]))
        theta = update(theta, jnp.int32(step), state.key, record, state.about)
    return theta


def check(log: SeedLog, theta: Any) -> None:
    """Raise ValueError unless theta has the leaves that the log speaks of."""
    paths, shapes = _description(theta)
    if paths != log.paths:
        extra = sorted(set(paths) ^ set(log.paths))
        raise ValueError(
            f"the log moved {len(log.paths)} leaves, and these parameters have {len(paths)}; "
            f"{extra[0]!r} is in one of them alone: replay it on the parameters it began with."
        )
    for path, ours, theirs in zip(paths, shapes, log.shapes, strict=True):
        if ours != theirs:
            raise ValueError(f"{path!r} has shape {ours} here and {theirs} in the log.")


def write(path: Path, log: SeedLog) -> None:
    """Write a safetensors file, whole or not at all."""
    metadata = {
        "version": str(VERSION),
        "paths": json.dumps(log.paths),
        "shapes": json.dumps(log.shapes),
        "noise": directions.IMPL,
        "partitionable": _partitionable(),
    }
    tensors = {name: np.ascontiguousarray(getattr(log, name)) for name in SeedLog._fields[2:]}
    io.write(path, lambda file: save_file(tensors, file, metadata))


def read(path: Path) -> SeedLog:
    """Read what `write` wrote.

    Raises:
      ValueError: no such log, a damaged one, or one whose noise this JAX would draw differently.
    """
    metadata, arrays = io.open_tensors(path)
    try:
        paths, shapes = (tuple(json.loads(metadata[name])) for name in ("paths", "shapes"))
        version, noise = metadata["version"], metadata["noise"]
        partitionable = metadata["partitionable"]
        tensors = [arrays[name] for name in SeedLog._fields[2:]]
    except (KeyError, json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} is no log of a zeroth-order run: {error!r}.") from error
    if version != str(VERSION) or noise != directions.IMPL:
        raise ValueError(f"{path} has version {version} and noise {noise!r}, unknown here.")
    if partitionable != _partitionable():
        raise ValueError(
            f"{path} was made with jax_threefry_partitionable={partitionable}, which draws other "
            "numbers: set it likewise."
        )
    return SeedLog(paths, shapes, *tensors)


def _partitionable() -> str:
    return str(jax.config.values["jax_threefry_partitionable"])


def _description(theta: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    leaves = zip(directions.leaves_of(theta), jax.tree.leaves(theta), strict=True)
    moved = sorted(
        (leaf.path, "x".join(map(str, value.shape))) for leaf, value in leaves if leaf.index >= 0
    )
    return tuple(path for path, _ in moved), tuple(shape for _, shape in moved)
