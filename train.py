"""Adapt a pretrained model: python train.py --config=configs/minilm_stdlib_docs_lora.py

Any field of a config can be overridden (--config.method.rank=16); ":tiny" behind the config's name
shrinks the run to seconds. The same command resumes a run that was interrupted. --plan prints what
the run would hold and cost, and stops.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from absl import app, flags, logging
from ml_collections import config_flags

import pefts
from configs.base import Config
from data import pipeline
from data.pipeline import Batches
from models import sharding
from training import checkpoint, evaluate, experiment, plan, report, seeds, sweep
from training.objective import Experiment, Forward
from training.step import Metrics, TrainState, initial_state, make_step

DEFAULT = str(Path(__file__).parent / "configs" / "minilm_stdlib_docs_lora.py")
CONFIG = config_flags.DEFINE_config_file("config", DEFAULT, "the experiment", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "the run's folder; runs/<config.name> if not given")
PLAN = flags.DEFINE_bool("plan", False, "print counts, memory and steps, and stop")


class Session(NamedTuple):
    """A run that is ready to start."""

    run: Experiment
    batches: Batches
    steps: int
    state: TrainState
    place: Callable[[Any], Any]  # a batch onto the devices
    update: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    plan: plan.Plan
    tx: optax.GradientTransformation


def train(config: Config, folder: Path, plan_only: bool = False) -> None:
    """Train, evaluate and report one experiment, resuming what the folder holds."""
    if config.get("sweep"):
        sweep.train(config, folder, plan_only)
        return
    session = prepare(config)
    report.show_plan(_title(session.run, folder), session.plan)
    if plan_only:
        return
    checkpoint.claim(folder, config)
    adapted = evaluate.adapted_forward(session.run)
    state = loop(session, folder, adapted)
    finish(session.run, folder, state, adapted)


def prepare(config: Config) -> Session:
    """Load everything, place it on the mesh, and compile the step for the longest batch."""
    mesh = sharding.data_mesh(config.data.batch_size, config.train.accumulate)
    run = experiment.build(config)
    run = run._replace(params=sharding.replicate(mesh, run.params))
    batches = run.objective.train_batches(run)
    steps = experiment.total_steps(config, batches)
    first = (batches[n] for n in range(config.calibrate.batches))
    stats = experiment.statistics(run, (sharding.split_batch(mesh, batch) for batch in first))
    state, tx = initial_state(run, steps, stats, batches.steps_per_epoch)
    state = sharding.replicate(mesh, state)

    # One executable per batch length: nothing compiles again after the first batch of its length.
    step_fn = jax.jit(make_step(run, tx), donate_argnums=0)
    compiled: dict[tuple[int, ...], Any] = {}

    def update(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        shape = pipeline.inputs_shape(batch)
        if shape not in compiled:
            compiled[shape] = step_fn.lower(state, run.params, batch).compile()
        return compiled[shape](state, run.params, batch)

    def place(batch: Any) -> Any:
        return sharding.split_batch(mesh, batch)

    lowered = step_fn.lower(state, run.params, place(batches.longest()))
    compiled[batches.shapes[-1]] = lowered.compile()
    the_plan = plan.plan(run.params, state, compiled[batches.shapes[-1]], steps)
    return Session(run, batches, steps, state, place, update, the_plan, tx)


def loop(session: Session, folder: Path, adapted: Forward) -> TrainState:
    """From the folder's newest checkpoint, or from the start, to the last step."""
    run, steps, state = session.run, session.steps, session.state
    config = run.config.train
    checkpoints = checkpoint.manager(folder)
    source = iter(session.batches)
    restored = checkpoint.restore_latest(checkpoints, state)
    if restored is not None:
        state, position = restored
        source.set_state(position)
        report.console.print(f"resuming at step {int(state.step)} of {steps}")
    start = int(state.step)
    log, clock = report.Log(folder, start, run.objective.columns), report.Clock()
    recorder = seeds.Recorder(
        folder, session.tx, state.peft_state.trainable, state.opt_state, start
    )
    norms: deque[float] = deque(maxlen=5)
    with report.meter(steps, start) as meter:
        for step in range(start + 1, steps + 1):
            batch = next(source)
            state, metrics = session.update(state, session.place(batch))
            recorder.add(state.opt_state)
            values = _values(metrics)
            norms.append(values["grad_norm"])
            if not bool(metrics.finite):
                _stop(step, values, norms, checkpoints)
            meter.show(step, values["loss"], clock.rate(pipeline.tokens(batch)))
            if step == steps or step % config.eval_every == 0:
                scores = evaluate.score(run, adapted, (run.params, state.peft_state), "dev")
                report.show_scores(f"step {step}", "dev", scores)
                values |= report.columns("dev", scores)
            log.write(step, values)
            if step == steps or step % config.save_every == 0:
                log.flush()
                recorder.write()
                checkpoint.save(checkpoints, step, state, source.get_state())
    checkpoints.wait_until_finished()
    checkpoints.close()
    log.close()
    return state


def finish(run: Experiment, folder: Path, state: TrainState, adapted: Forward) -> None:
    """Write the adapter, and what the objective makes of it: scores and a figure."""
    pefts.save(folder / "adapter.safetensors", run.peft, state.peft_state, run.params)
    written = run.objective.finish(run, folder, state, adapted)
    report.show_files(
        {
            "adapter": folder / "adapter.safetensors",
            "checkpoints": folder / "checkpoints",
            "metrics": folder / "metrics.csv",
            "tensorboard": folder / "tensorboard",
            **seeds.files(folder),
            **written,
        }
    )


def _title(run: Experiment, folder: Path) -> dict[str, str]:
    config = run.config
    return {
        "data": run.objective.describe(run),
        "model": f"{config.model.source} in {config.model.dtype} on {len(jax.devices())} device(s)",
        "method": str(config.method.method),
        "run folder": str(folder),
    }


def _values(metrics: Metrics) -> dict[str, float]:
    return {name: float(value) for name, value in metrics._asdict().items() if name != "finite"}


def _stop(step: int, values: dict[str, float], norms: Iterable[float], checkpoints: Any) -> None:
    checkpoints.wait_until_finished()
    saved = checkpoints.latest_step()
    good = (
        "No checkpoint was saved yet."
        if saved is None
        else f"The checkpoint of step {saved} is good."
    )
    raise FloatingPointError(
        f"step {step}: loss {values['loss']}, penalty {values['penalty']}; the last gradient norms "
        f"were {', '.join(f'{norm:.4g}' for norm in norms)}. The update was not made. {good} Lower "
        "optimizer.learning_rate or optimizer.clip_norm, or look at the data."
    )


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; options start with --")
    logging.set_verbosity(logging.WARNING)
    config = CONFIG.value
    folder = Path(WORKDIR.value or f"runs/{config.name}")
    try:
        train(config, folder, PLAN.value)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
