"""Adapt a pretrained model: python train.py --config=configs/minilm_stdlib_docs_lora.py

Any field of a config can be overridden (--config.method.rank=16); ":tiny" behind the config's name
shrinks the run to seconds. The same command resumes a run that was interrupted. --plan prints what
the run would hold and cost, and stops.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import app, flags, logging
from ml_collections import config_flags

import pefts
from configs.base import Config
from data.pipeline import Batches
from models import sharding
from pefts.zeroth_order import ZerothOrder, engine
from training import accumulation, checkpoint, distill, evaluate, experiment, plan, report, seeds
from training.objective import Experiment, Forward

DEFAULT = str(Path(__file__).parent / "configs" / "minilm_stdlib_docs_lora.py")
CONFIG = config_flags.DEFINE_config_file("config", DEFAULT, "the experiment", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "the run's folder; runs/<config.name> if not given")
PLAN = flags.DEFINE_bool("plan", False, "print counts, memory and steps, and stop")


class TrainState(NamedTuple):
    """Everything that changes; the frozen base is not in it."""

    step: jax.Array  # completed updates
    peft_state: pefts.PeftState
    opt_state: Any
    rng: jax.Array  # key data; step n draws from fold_in(rng, n)


class Metrics(NamedTuple):
    """Of one step, still on the device."""

    loss: jax.Array
    penalty: jax.Array  # all that is added to the loss
    grad_norm: jax.Array  # without gradients: an estimate of it, from how steep the values are
    finite: jax.Array


# ---------------------------------------------------------------------------------------- the step


def make_step(run: Experiment, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """The pure update (state, params, batch) -> (state, metrics)."""
    forward, peft = distill.watched(run, pefts.apply(run.model.apply)), run.peft
    deterministic = not run.config.train.base_dropout
    parts = run.config.train.accumulate
    lowered = experiment.lowered(run, tx)

    def loss_fn(trainable: Any, state: TrainState, params: Any, batch: Any, part: Any) -> Any:
        peft_state = state.peft_state._replace(trainable=trainable)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        key = key if parts == 1 else jax.random.fold_in(key, part)
        output, layers = forward(
            {"params": peft.bind(params, peft_state)},
            batch,
            deterministic=deterministic,
            rngs={"dropout": key},
        )
        loss = lowered(output, batch)
        penalty = peft.penalty(peft_state, params)
        penalty += distill.loss(run, params, batch, (output, layers))
        return loss + penalty, (loss, penalty)

    def by_values(state: TrainState, params: Any, batch: Any) -> tuple[TrainState, Metrics]:
        assert isinstance(tx, ZerothOrder)

        def value(trainable: Any) -> jax.Array:
            def of_part(batch: Any, part: Any) -> Any:
                return loss_fn(trainable, state, params, batch, part)[0]

            return accumulation.in_parts(of_part, run.objective.weight, parts)(batch)

        trainable, opt_state = tx.step(state.peft_state.trainable, state.opt_state, value)
        moved = state.peft_state._replace(trainable=trainable)
        peft_state = peft.update(moved, None, state.step)
        last = engine.state_of(opt_state).last
        # Nothing has moved if it is not finite; choosing the old arrays would need both.
        metrics = Metrics(
            last.value, jnp.zeros_like(last.value), last.slope, jnp.isfinite(last.value)
        )
        return TrainState(state.step + 1, peft_state, opt_state, state.rng), metrics

    def by_gradient(state: TrainState, params: Any, batch: Any) -> tuple[TrainState, Metrics]:
        trainable = state.peft_state.trainable

        def gradient(batch: Any, part: Any) -> Any:
            return jax.grad(loss_fn, has_aux=True)(trainable, state, params, batch, part)

        whole = accumulation.in_parts(gradient, run.objective.weight, parts)
        grads, (loss, penalty) = whole(batch)
        updates, opt_state = tx.update(grads, state.opt_state, trainable)
        moved = state.peft_state._replace(trainable=optax.apply_updates(trainable, updates))
        peft_state = peft.update(moved, grads, state.step)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss + penalty + grad_norm)
        new = TrainState(state.step + 1, peft_state, opt_state, state.rng)
        kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
        return kept, Metrics(loss, penalty, grad_norm, finite)

    return by_values if isinstance(tx, ZerothOrder) else by_gradient


def initial_state(
    run: Experiment, steps: int, stats: Any, epoch_steps: int | None = None
) -> tuple[TrainState, optax.GradientTransformation]:
    """The state at step 0 and the optimizer that made it."""
    key = jax.random.key(run.config.seed)
    init_key, dropout_key = jax.random.split(key)
    peft_state = run.peft.init(init_key, run.params, stats)
    restarts = run.peft.traits.restart_steps
    tx = experiment.optimizer(run.config, peft_state.trainable, steps, restarts, epoch_steps)
    opt_state = tx.init(peft_state.trainable)
    return TrainState(
        jnp.zeros((), jnp.int32), peft_state, opt_state, jax.random.key_data(dropout_key)
    ), tx


# ---------------------------------------------------------------------------------------- the run


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
    compiled: dict[int, Any] = {}

    def update(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        length = batch["tokens"].shape[1]
        if length not in compiled:
            compiled[length] = step_fn.lower(state, run.params, batch).compile()
        return compiled[length](state, run.params, batch)

    def place(batch: Any) -> Any:
        return sharding.split_batch(mesh, batch)

    shapes = batches.shapes
    numbers = range(batches.steps_per_epoch)
    longest = next(n for n in numbers if batches[n]["tokens"].shape == shapes[-1])
    lowered = step_fn.lower(state, run.params, place(batches[longest]))
    compiled[shapes[-1][1]] = lowered.compile()
    the_plan = plan.plan(run.params, state, compiled[shapes[-1][1]], steps)
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
    log, clock = report.Log(folder, start, run.objective.columns), _Clock()
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
            meter.show(step, values["loss"], clock.rate(int(batch["mask"].sum())))
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


# ---------------------------------------------------------------------------------------- details


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


class _Clock:
    """Tokens per second since the first step, its compilation left out."""

    def __init__(self) -> None:
        self.start, self.tokens = 0.0, 0

    def rate(self, tokens: int) -> float:
        if not self.start:
            self.start = time.monotonic()
            return 0.0
        self.tokens += tokens
        return self.tokens / max(time.monotonic() - self.start, 1e-9)


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
