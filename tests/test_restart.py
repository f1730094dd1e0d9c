"""restart_at against optimizers that are run one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pefts.optimizers import restart_at

STEPS = 7


@pytest.fixture(autouse=True)
def promotion() -> None:
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
        yield


@pytest.fixture
def params() -> dict:
    return {"a": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": {"c": jnp.ones(4)}}


def gradient(params: dict, step: int) -> dict:
    return jax.tree.map(lambda leaf: jnp.sin(leaf + step) + leaf, params)


def run(tx: optax.GradientTransformation, params: dict, steps: range, **extra) -> dict:
    state, update = tx.init(params), jax.jit(tx.update)
    for step in steps:
        updates, state = update(gradient(params, step), state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("steps", [(3,), (1, 4), (STEPS - 1,)])
def test_it_is_one_fresh_optimizer_after_another(steps: tuple, params: dict) -> None:
    inner = optax.adamw(0.1, weight_decay=0.3)
    actual = run(restart_at(inner, steps), params, range(STEPS))
    expected, edges = params, [0, *steps, STEPS]
    for start, end in zip(edges, edges[1:], strict=False):
        expected = run(inner, expected, range(start, end))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    without = run(inner, params, range(STEPS))
    assert not np.allclose(actual["a"], without["a"], atol=1e-4)


def test_a_restart_after_the_last_update_changes_nothing(params: dict) -> None:
    inner = optax.adam(0.1)
    actual = run(restart_at(inner, (STEPS,)), params, range(STEPS))
    jax.tree.map(np.testing.assert_array_equal, actual, run(inner, params, range(STEPS)))


def test_without_steps_it_is_the_inner_transformation(params: dict) -> None:
    tx = restart_at(optax.adam(0.1), ())
    assert jax.tree.structure(tx.init(params)) == jax.tree.structure(optax.adam(0.1).init(params))
    jax.tree.map(
        np.testing.assert_array_equal,
        run(tx, params, range(3)),
        run(optax.adam(0.1), params, range(3)),
    )


def test_extra_arguments_reach_the_inner_transformation(params: dict) -> None:
    def update(updates, state, params=None, *, scale, **extra):
        del params, extra
        return jax.tree.map(lambda leaf: scale * leaf, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    for steps in ((), (2,)):
        tx = restart_at(inner, steps)
        updates, _ = tx.update(params, tx.init(params), params, scale=3.0)
        np.testing.assert_allclose(updates["a"], 3 * params["a"])


def test_a_random_key_in_the_state_starts_anew(params: dict) -> None:
    tx = restart_at(optax.add_noise(1.0, 0.5, jax.random.key(0)), (2,))
    state, zeros, seen = tx.init(params), jax.tree.map(jnp.zeros_like, params), []
    for _ in range(4):
        updates, state = jax.jit(tx.update)(zeros, state, params)
        seen.append(np.asarray(updates["a"]))
    np.testing.assert_array_equal(seen[0], seen[2])
    np.testing.assert_array_equal(seen[1], seen[3])
    assert not np.array_equal(seen[0], seen[1])


def test_the_step_compiles_once_and_scans(params: dict) -> None:
    tx = restart_at(optax.adam(0.1), (2,))

    def body(carry, step):
        params, state = carry
        updates, state = tx.update(gradient(params, step), state, params)
        return (optax.apply_updates(params, updates), state), None

    (scanned, state), _ = jax.lax.scan(body, (params, tx.init(params)), jnp.arange(4))
    assert int(state.count) == 4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        scanned,
        run(tx, params, range(4)),
    )


@pytest.mark.parametrize("steps", [(0,), (2, -1), (1.5,), (True,)])
def test_steps_out_of_range_are_refused(steps: tuple) -> None:
    with pytest.raises(ValueError, match="is no number of updates from 1"):
        restart_at(optax.adam(0.1), steps)


def test_parameters_are_required(params: dict) -> None:
    tx = restart_at(optax.adam(0.1), (2,))
    with pytest.raises(ValueError, match=r"call update\(grads, state, params\)"):
        tx.update(params, tx.init(params))
