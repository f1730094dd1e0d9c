"""The training step: a pure function, and the state that goes round in it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import pefts
from pefts.zeroth_order import ZerothOrder, engine
from training import accumulation, distill, experiment
from training.objective import Experiment


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


def optimizer(
    run: Experiment,
    trainable: Any,
    steps: int,
    epoch_steps: int | None = None,
    numbers: Mapping[str, Any] | None = None,
) -> optax.GradientTransformation:
    """The run's optimizer; `numbers`: traced ones in the place of the config's (a sweep's)."""
    restarts = run.peft.traits.restart_steps
    return experiment.optimizer(run.config, trainable, steps, restarts, epoch_steps, numbers)


def start(run: Experiment, stats: Any) -> tuple[pefts.PeftState, jax.Array]:
    """The adapter at step 0, and the key data of its noise."""
    init_key, dropout_key = jax.random.split(jax.random.key(run.config.seed))
    return run.peft.init(init_key, run.params, stats), jax.random.key_data(dropout_key)


def initial_state(
    run: Experiment, steps: int, stats: Any, epoch_steps: int | None = None
) -> tuple[TrainState, optax.GradientTransformation]:
    """The state at step 0 and the optimizer that made it."""
    peft_state, rng = start(run, stats)
    tx = optimizer(run, peft_state.trainable, steps, epoch_steps)
    return TrainState(jnp.zeros((), jnp.int32), peft_state, tx.init(peft_state.trainable), rng), tx
