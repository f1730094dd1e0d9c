"""Many runs in one step: adapters of other seeds, learning rates or ranks over one frozen base.

    config.sweep = ConfigDict({"seed": (0, 1), "optimizer": {"learning_rate": (1e-4, 1e-3)}})

Every combination is a member. One program updates all of them, by jax.vmap over stacked states: the
base is read once, and a member becomes what train.py would have made of its config alone. Members
may differ in the seed (initialisation, noise and order of the data), in the numbers of the
optimizer, and in those hyperparameters of the method that live in its state, as ranks and alpha do;
that one program computes all of them is checked before the first step. A member whose loss is not
finite stops where it is, and the others go on.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import pefts
from configs.base import Config, plain
from data import pipeline
from models import sharding
from pefts.zeroth_order import ZerothOrder
from training import checkpoint, evaluate, experiment, plan, report, step
from training.objective import Experiment, Forward

MEMBERS = "members"  # the folder of a sweep's run folder in which each member has its own
SAME = 1e-4  # relative: how close one program has to come to each member's own


class Member(NamedTuple):
    """One of the runs."""

    name: str
    values: Mapping[str, Any]  # "optimizer.learning_rate" -> what this member has there
    config: Config


class State(NamedTuple):
    """All that changes: every leaf of `runs` has a leading axis of members."""

    runs: step.TrainState
    alive: jax.Array  # (K,): whether every update so far was finite


class Sweep(NamedTuple):
    """Runs that are ready to start."""

    members: list[Member]
    runs: list[Experiment]  # each member's own method; all hold the first one's base
    shapes: list[pefts.PeftState]  # of each member's own adapter
    batches: list[pipeline.Batches]  # one if all see the same
    steps: int
    state: State
    place: Callable[[Any], Any]
    update: Callable[[State, Any], tuple[State, step.Metrics]]
    plan: plan.Plan


def train(config: Config, folder: Path, plan_only: bool = False) -> None:
    """Train all members, score them on dev, and finish the best one as train.py does."""
    sweep = prepare(config)
    title = {
        "data": sweep.runs[0].objective.describe(sweep.runs[0]),
        "method": str(config.method.method),
        "members": f"{len(sweep.members)}: {', '.join(sweep.members[0].values)}",
        "run folder": str(folder),
    }
    report.show_plan(title, sweep.plan)
    if plan_only:
        return
    checkpoint.claim(folder, config)
    for member in sweep.members:
        checkpoint.claim(_folder(folder, member), member.config)
    adapted = evaluate.adapted_forward(sweep.runs[0])
    finish(sweep, folder, loop(sweep, folder, adapted), adapted)


def members(config: Config) -> list[Member]:
    """The combinations of `config.sweep`, the last field's values changing fastest.

    Raises:
      ValueError: a field that members cannot differ in, or that the config lacks; no values.
    """
    fields = _flat(plain(config.sweep))
    for field, values in fields.items():
        _check_field(config, field, values)
    combinations = list(itertools.product(*fields.values()))
    digits = len(str(len(combinations) - 1))
    return [
        _member(config, f"{number:0{digits}}", dict(zip(fields, values, strict=True)))
        for number, values in enumerate(combinations)
    ]


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in section.items():
        nested = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def _check_field(config: Config, field: str, values: Any) -> None:
    section, _, name = field.rpartition(".")
    numbers = [f"optimizer.{number}" for number in experiment.NUMBERS]
    if field not in ("seed", *numbers) and section != "method":
        raise ValueError(
            f"sweep: members cannot differ in {field!r} within one step; they can in 'seed', "
            f"{', '.join(map(repr, numbers))}, and the method's own fields ('method.rank')."
        )
    if name not in (config[section] if section else config):
        raise ValueError(f"sweep: the config has no field {field!r} whose value could change.")
    if field == "method.method":
        raise ValueError("sweep: the members of one step have one method; give each its own run.")
    if not isinstance(values, list) or not values:
        raise ValueError(f"sweep: {field}={values!r} has to be a tuple of at least one value.")


def _member(config: Config, name: str, values: dict[str, Any]) -> Member:
    own: Config = ConfigDict(config.to_dict())
    own.sweep, own.name = ConfigDict(), f"{config.name}/{MEMBERS}/{name}"
    for field, value in values.items():
        section, _, last = field.rpartition(".")
        holder: Config = own[section] if section else own
        holder[last] = value
    return Member(name, values, own)


# -------------------------------------------------------------------------------- getting ready


def prepare(config: Config) -> Sweep:
    """Load everything, check that one program serves all members, and compile it.

    Raises:
      ValueError: members that one program cannot compute.
    """
    chosen = members(config)
    mesh = sharding.data_mesh(config.data.batch_size, config.train.accumulate)
    runs, adapters, noises, sources = _started(chosen, mesh)
    first, batches = runs[0], sources[: 1 if _same_data(chosen) else None]
    steps = experiment.total_steps(config, sources[0])
    stacked = pefts.stack(adapters, pad=True)
    full = [jax.tree.map(lambda leaf, k=k: leaf[k], stacked) for k in range(len(chosen))]
    shapes = [jax.eval_shape(lambda a=adapter: a) for adapter in adapters]
    optimizers = [
        step.optimizer(run, padded.trainable, steps, sources[0].steps_per_epoch)
        for run, padded in zip(runs, full, strict=True)
    ]
    _check_one_program(chosen, runs, adapters, optimizers[0], sources[0])
    moments = [tx.init(padded.trainable) for tx, padded in zip(optimizers, full, strict=True)]
    count = len(chosen)
    start = step.TrainState(
        jnp.zeros((count,), jnp.int32),
        stacked,
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *moments),
        jnp.stack(noises),
    )
    state = sharding.replicate(mesh, State(start, jnp.ones((count,), bool)))
    place = _placer(mesh, len(batches) > 1)
    update = _compiled(first, chosen, steps, batches)
    longest = place(gathered([source.longest() for source in batches]))
    memory = plan.plan(first.params, state.runs, update.lower(state, longest).compile(), steps)
    return Sweep(chosen, runs, shapes, batches, steps, state, place, update, memory)


def _same_data(chosen: Sequence[Member]) -> bool:
    return len({member.config.seed for member in chosen}) == 1


def _started(chosen: Sequence[Member], mesh: Any) -> tuple[list, list, list, list]:
    """(experiments, adapters at step 0, key data, batches), the experiments with one base."""
    runs, adapters, noises, sources = [], [], [], []
    for member in chosen:
        run = experiment.build(member.config)
        run = run._replace(params=sharding.replicate(mesh, run.params))
        batches = run.objective.train_batches(run)
        seen = (batches[n] for n in range(member.config.calibrate.batches))
        stats = experiment.statistics(run, (sharding.split_batch(mesh, batch) for batch in seen))
        adapter, noise = step.start(run, stats)
        # A head is drawn by the member's seed and lies in its adapter; the base is the same.
        runs.append(run._replace(params=runs[0].params) if runs else run)
        adapters.append(adapter)
        noises.append(noise)
        sources.append(batches)
    return runs, adapters, noises, sources


def _check_one_program(
    chosen: Sequence[Member],
    runs: Sequence[Experiment],
    adapters: Sequence[pefts.PeftState],
    tx: optax.GradientTransformation,
    batches: pipeline.Batches,
) -> None:
    """Each member's own method and the first one's, on its filled-up state, make one same step."""
    first, batch = runs[0], batches[0]
    shapes = [jax.tree.map(jnp.shape, adapter) for adapter in adapters]
    if any(shape != shapes[0] for shape in shapes) and isinstance(tx, ZerothOrder):
        raise ValueError(
            "sweep: adapters of other ranks draw other random directions when they are filled up, "
            "so an optimizer that works by values would not do what it does alone: keep one rank."
        )
    seen: list[tuple[Any, Any]] = []
    for member, run, adapter, shape in zip(chosen, runs, adapters, shapes, strict=True):
        alike = (shape, plain(member.config.method))
        if alike in seen or isinstance(tx, ZerothOrder):
            continue
        seen.append(alike)
        moved = pefts.randomize(jax.random.key(0), adapter)
        filled = jax.tree.map(lambda leaf: leaf[0], pefts.stack([moved, *adapters], pad=True))
        alone, loss = _one_step(run, moved, batch)
        together, same_loss = _one_step(first, filled, batch)
        cut = pefts.unstack(jax.tree.map(lambda leaf: leaf[None], together), [alone])[0]
        padding = pefts.stack([cut, together], pad=True)
        error = max(
            _distance(loss, same_loss),
            *map(_distance, jax.tree.leaves(alone), jax.tree.leaves(cut)),
            *(_distance(leaf[1], leaf[0]) for leaf in jax.tree.leaves(padding)),
        )
        if not error <= SAME:
            raise ValueError(
                f"sweep: member {member.name} ({_words(member)}) is not what the program of member "
                f"{chosen[0].name} ({_words(chosen[0])}) computes: a step differs by {error:.1e}. "
                "These fields do not live in the method's state; give each value a sweep of its "
                "own."
            )


def _one_step(run: Experiment, adapter: pefts.PeftState, batch: Any) -> tuple[Any, jax.Array]:
    """The adapter after one plain gradient step, and the loss before it."""
    tx = optax.sgd(1.0)
    key = jax.random.key_data(jax.random.key(0))
    state = step.TrainState(jnp.zeros((), jnp.int32), adapter, tx.init(adapter.trainable), key)
    state, metrics = jax.jit(step.make_step(run, tx))(state, run.params, batch)
    return state.peft_state, metrics.loss


def _distance(mine: Any, theirs: Any) -> float:
    mine, theirs = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
    largest = np.abs(mine).max(initial=0.0)
    return float(np.abs(mine - theirs).max(initial=0.0) / max(largest, 1e-6))


def _compiled(
    run: Experiment, chosen: Sequence[Member], steps: int, batches: Sequence[pipeline.Batches]
) -> Any:
    """The jitted (state, batch) -> (state, metrics) of all members."""
    numbers = {
        name: jnp.asarray([member.config.optimizer[name] for member in chosen], jnp.float32)
        for name in experiment.NUMBERS
    }

    def one(state: step.TrainState, numbers: Any, params: Any, batch: Any) -> Any:
        trainable, epoch = state.peft_state.trainable, batches[0].steps_per_epoch
        tx = step.optimizer(run, trainable, steps, epoch, numbers)
        return step.make_step(run, tx)(state, params, batch)

    every = jax.vmap(one, in_axes=(0, 0, None, 0 if len(batches) > 1 else None))

    def update(state: State, params: Any, batch: Any) -> tuple[State, step.Metrics]:
        runs, metrics = every(state.runs, numbers, params, batch)
        alive = state.alive & metrics.finite

        def kept(after: jax.Array, before: jax.Array) -> jax.Array:
            return jnp.where(alive.reshape(-1, *(1,) * (after.ndim - 1)), after, before)

        return State(jax.tree.map(kept, runs, state.runs), alive), metrics

    return _WithBase(jax.jit(update, donate_argnums=0), run.params)


class _WithBase(NamedTuple):
    """A jitted step that is given the base at every call, lest it becomes a constant of it."""

    jitted: Any
    params: Any

    def __call__(self, state: State, batch: Any) -> tuple[State, step.Metrics]:
        return self.jitted(state, self.params, batch)

    def lower(self, state: State, batch: Any) -> Any:
        return self.jitted.lower(state, self.params, batch)


def gathered(batches: Sequence[pipeline.Batch]) -> pipeline.Batch:
    """The members' batches, stacked and filled up to the longest; one alone stays as it is."""
    if len(batches) == 1:
        return batches[0]

    def together(*arrays: np.ndarray) -> np.ndarray:
        sizes = [max(axis) for axis in zip(*(array.shape for array in arrays), strict=True)]
        more = [
            [(0, size - own) for size, own in zip(sizes, array.shape, strict=True)]
            for array in arrays
        ]
        return np.stack([np.pad(*pair) for pair in zip(arrays, more, strict=True)])

    return {name: together(*(batch[name] for batch in batches)) for name in batches[0]}


def _placer(mesh: Any, stacked: bool) -> Callable[[Any], Any]:
    axes = (None, "data") if stacked else ("data",)
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    return lambda batch: jax.device_put(batch, where)


# ------------------------------------------------------------------------------------- running


def loop(sweep: Sweep, folder: Path, adapted: Forward) -> State:
    """From the folder's newest checkpoint, or from the start, to the last step."""
    config, state = sweep.runs[0].config.train, sweep.state
    checkpoints = checkpoint.manager(folder)
    sources: list[Any] = [iter(batches) for batches in sweep.batches]
    restored = checkpoint.restore_latest(checkpoints, state)
    start = 0
    if restored is not None:
        state, position = restored
        start = position["step"]
        for source, place in zip(sources, position["sources"], strict=True):
            source.set_state(place)
        report.console.print(f"resuming at step {start} of {sweep.steps}")
    logs, clock = _Logs(sweep, folder, start), report.Clock()
    with report.meter(sweep.steps, start) as meter:
        for now in range(start + 1, sweep.steps + 1):
            batches = list(map(next, sources))
            state, metrics = sweep.update(state, sweep.place(gathered(batches)))
            last, alive = now == sweep.steps, np.asarray(state.alive)
            if not alive.any():
                raise FloatingPointError(
                    f"step {now}: no member's loss is finite any more. Lower the learning rates, "
                    "or look at the data."
                )
            logs.write(now, metrics, alive, last or now % config.eval_every == 0, state, adapted)
            read = sum(map(pipeline.tokens, batches)) * len(alive) // len(batches)
            meter.show(now, float(np.asarray(metrics.loss)[alive].mean()), clock.rate(read))
            if last or now % config.save_every == 0:
                logs.flush()
                position = {"step": now, "sources": [source.get_state() for source in sources]}
                checkpoint.save(checkpoints, now, state, position)
    checkpoints.wait_until_finished()
    checkpoints.close()
    logs.close()
    return state


class _Logs:
    """Each member's metrics.csv and TensorBoard events.

    A class, because it holds open files.
    """

    def __init__(self, sweep: Sweep, folder: Path, start: int):
        self.sweep = sweep
        columns = sweep.runs[0].objective.columns
        self.files = [
            report.Log(_folder(folder, member), start, columns) for member in sweep.members
        ]

    def write(
        self,
        now: int,
        metrics: step.Metrics,
        alive: np.ndarray,
        scored: bool,
        state: State,
        adapted: Forward,
    ) -> None:
        """A row for every member that is still training, with its scores on dev if `scored`."""
        for k, (member, log) in enumerate(zip(self.sweep.members, self.files, strict=True)):
            if not alive[k]:
                continue
            values = {
                name: float(value[k])
                for name, value in metrics._asdict().items()
                if name != "finite"
            }
            if scored:
                scores = _score(self.sweep, state, k, adapted, "dev")
                report.show_scores(f"step {now}, member {member.name}", "dev", scores)
                values |= report.columns("dev", scores)
            log.write(now, values)

    def flush(self) -> None:
        for log in self.files:
            log.flush()

    def close(self) -> None:
        for log in self.files:
            log.close()


def _score(sweep: Sweep, state: State, k: int, adapted: Forward, split: str) -> Any:
    # The filled-up state: one compiled model serves all members.
    adapter = jax.tree.map(lambda leaf: leaf[k], state.runs.peft_state)
    return evaluate.score(sweep.runs[0], adapted, (sweep.runs[0].params, adapter), split)


def finish(sweep: Sweep, folder: Path, state: State, adapted: Forward) -> None:
    """Write every adapter, a table and a picture of all, and what train.py leaves of the best."""
    adapters = pefts.unstack(state.runs.peft_state, sweep.shapes)
    for member, run, adapter in zip(sweep.members, sweep.runs, adapters, strict=True):
        file = _folder(folder, member) / "adapter.safetensors"
        pefts.save(file, run.peft, adapter, run.params)
    alive = np.asarray(state.alive)
    scores = [
        _score(sweep, state, k, adapted, "dev") if alive[k] else None
        for k in range(len(sweep.members))
    ]
    chosen = best(sweep, scores)
    files = {"results": folder / "sweep.json", "figure": folder / "sweep.png"}
    rows = [
        {
            "member": member.name,
            **member.values,
            "finite": bool(alive[k]),
            **(score.summary() if score else {}),
        }
        for k, (member, score) in enumerate(zip(sweep.members, scores, strict=True))
    ]
    record = {"best": sweep.members[chosen].name, "steps": sweep.steps, "members": rows}
    checkpoint.write_atomically(files["results"], json.dumps(record, indent=2) + "\n")
    curves = {
        f"{member.name}: {_words(member)}": report.read_rows(
            _folder(folder, member) / "metrics.csv"
        )
        for member in sweep.members
    }
    report.sweep_figure(files["figure"], curves, chosen, sweep.runs[0].objective.columns[0])
    report.show_sweep(rows, chosen)
    own, run = _folder(folder, sweep.members[chosen]), sweep.runs[chosen]
    last = jax.tree.map(lambda leaf: leaf[chosen], state.runs)
    last = last._replace(peft_state=adapters[chosen])
    written = run.objective.finish(run, own, last, evaluate.adapted_forward(run))
    report.show_files({"best": own, **files, **{f"its {k}": v for k, v in written.items()}})


def best(sweep: Sweep, scores: Sequence[Any]) -> int:
    """The member with the best first figure on dev, the first of several."""
    sign = -1.0 if sweep.runs[0].objective.lower_is_better else 1.0
    figures = [
        -np.inf if score is None else sign * next(iter(score.summary().values()))
        for score in scores
    ]
    return int(np.argmax(figures))


def _folder(folder: Path, member: Member) -> Path:
    return folder / MEMBERS / member.name


def _words(member: Member) -> str:
    return ", ".join(
        f"{field.rpartition('.')[2]} {value}" for field, value in member.values.items()
    )
