"""A batch in parts has the gradient of the whole, in a part's memory, on any number of devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from training import accumulation

pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")


def loss(params: jax.Array, batch: Any) -> jax.Array:
    errors = (batch["x"] @ params[:, None])[:, 0] ** 2 * batch["weight"]
    return jnp.sum(errors) / jnp.sum(batch["weight"])


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_weighted_parts_are_the_whole(parts: int) -> None:
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=3), jnp.float32)
    batch = {
        "x": jnp.asarray(rng.normal(size=(12, 3)), jnp.float32),
        "weight": jnp.asarray(rng.integers(0, 5, 12) + (np.arange(12) < 6), jnp.float32),
    }
    seen = []

    def gradient(part: Any, number: jax.Array) -> Any:
        seen.append(part["x"].shape)
        return jax.value_and_grad(loss)(params, part)

    run = accumulation.in_parts(gradient, lambda part: jnp.sum(part["weight"]), parts)
    whole = jax.value_and_grad(loss)(params, batch)
    for ours, theirs in zip(jax.jit(run)(batch), whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert set(seen) == {(12 // parts, 3)}


def test_parts_are_numbered() -> None:
    run = accumulation.in_parts(lambda part, n: n.astype(jnp.float32), lambda part: jnp.ones(()), 4)
    assert float(run(jnp.zeros(8))) == 1.5


def test_bad_numbers_are_refused() -> None:
    def weight(part: Any) -> jax.Array:
        return jnp.ones(())

    with pytest.raises(ValueError, match="train.accumulate=0 must be at least 1"):
        accumulation.in_parts(lambda part, n: part, weight, 0)
    with pytest.raises(ValueError, match="accumulate=3 must divide the batch of 8 rows"):
        accumulation.in_parts(lambda part, n: jnp.sum(part), weight, 3)(jnp.ones(8))


def test_parts_divide_over_the_devices(language_config: Any) -> None:
    language_config.train.accumulate = 2
    with pytest.raises(ValueError, match=r"batch_size=8 in 2 parts .* a multiple of 16, for inst"):
        train.prepare(language_config)
    language_config.train.accumulate = 0
    with pytest.raises(ValueError, match="train.accumulate=0 must be at least 1"):
        train.prepare(language_config)


def test_training_in_parts_is_training(language_config: Any) -> None:
    language_config.data.max_length, language_config.data.batch_size = 64, 64
    states, plans = [], []
    for parts in (1, 4):
        language_config.train.accumulate = parts
        session = train.prepare(language_config)
        state, batches = session.state, iter(session.batches)
        for _ in range(3):
            state, metrics = session.update(state, session.place(next(batches)))
        states.append(jax.device_get((state.peft_state.trainable, metrics.loss)))
        plans.append(session.plan.activation_bytes)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(states[0]))
    for whole, parts in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(parts, whole, atol=2e-5 * scale, rtol=0)
    assert plans[1] < 0.6 * plans[0]
