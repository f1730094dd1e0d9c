"""Distillation from the unadapted base: distances between the two models' layers and logits."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from models.layers import BLOCK_OUTPUT
from pefts import paths
from training.objective import Apply, Experiment

Outputs = dict[str, jax.Array]  # path -> (B, T, D), or (L, B, T, D)


def watched(run: Experiment, apply: Apply) -> Callable[..., tuple[jax.Array, Outputs]]:
    """A call on a batch that returns (output, layers), the layers only where the loss reads them.

    Args:
      run: its config has the weights, its objective says how a model is called.
      apply: of the base or of the adapted model.

    Raises:
      ValueError: a weight of config.distill below 0.
    """
    for name in ("features", "logits"):
        if not run.config.distill[name] >= 0:
            raise ValueError(
                f"distill.{name}={run.config.distill[name]!r}: give a weight of at least 0."
            )
    call = run.objective.call(apply)
    if not run.config.distill.features:
        return lambda *args, **kwargs: (call(*args, **kwargs), {})

    def seeing(*args: Any, **kwargs: Any) -> tuple[jax.Array, Outputs]:
        output, seen = call(*args, mutable=["intermediates"], **kwargs)
        return output, _block_outputs(seen)

    return seeing


def loss(
    run: Experiment, params: Any, batch: Mapping[str, Any], student: tuple[jax.Array, Outputs]
) -> jax.Array:
    """features * mean over layers of MSE(student, teacher) + logits * MSE of the logits.

    The teacher is the base in evaluation mode. A layer's distance is over real tokens; nothing runs
    where both weights are 0.

    Args:
      run: its config has the weights, its model is the teacher's.
      params: the base.
      batch: what the objective calls a model with.
      student: what a `watched` model returned for the same batch.

    Raises:
      ValueError: the model names no layer outputs, or the method adds tokens.
    """
    weights = run.config.distill
    if not weights.features and not weights.logits:
        return jnp.zeros((), jnp.float32)
    teacher = watched(run, run.model.apply)({"params": params}, batch)
    total = weights.logits * jnp.mean(_squared(student[0], teacher[0]))
    if weights.features:
        total += weights.features * distance(student[1], teacher[1], batch["mask"])
    return total


def distance(student: Outputs, teacher: Outputs, mask: jax.Array) -> jax.Array:
    """The mean over layers of the mean squared difference at the tokens where mask (B, T) is 1."""
    weight = mask.astype(jnp.float32)
    weight = weight / jnp.maximum(weight.sum(), 1.0)
    layers = []
    for path, theirs in teacher.items():
        mine = student[path]
        if mine.shape != theirs.shape:
            raise ValueError(
                f"distill.features compares layer by layer, token by token, and {path!r} is "
                f"{mine.shape} in the adapted model, {theirs.shape} in the base: this method adds "
                "tokens; set distill.features=0."
            )
        per_token = jnp.mean(_squared(mine, theirs), axis=-1).reshape(-1, *mask.shape)
        layers.append(jnp.sum(per_token * weight[None], axis=(1, 2)))
    return jnp.mean(jnp.concatenate(layers))


def _squared(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a.astype(jnp.float32) - b.astype(jnp.float32)) ** 2


def _block_outputs(variables: Mapping[str, Any]) -> Outputs:
    flat = paths.flatten(variables.get("intermediates", {}))
    # A sown value is a tuple with one entry for each time that its module was called.
    found = {path: value[0] for path, value in flat.items() if path.endswith(f"/{BLOCK_OUTPUT}")}
    if not found:
        raise ValueError(
            f"distill.features: this model sows no {BLOCK_OUTPUT!r}; set distill.features=0."
        )
    return found
