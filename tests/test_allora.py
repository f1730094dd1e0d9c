"""ALLoRA's coefficients against numpy, before and after Adam, and as a citizen of optax."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients import close, jitted, near, run

import pefts
from pefts.optimizers.allora import allora, scale_by_inverse_norm

pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")
STACK, HEAD = "layers/query/kernel", "head/kernel"


def factors(seed: int = 0) -> dict:
    """A stack of two pairs, one that is not stacked, and what is no factor."""
    draw = np.random.default_rng(seed).normal
    shapes = {
        STACK: {"A": (2, 7, 3), "B": (2, 3, 5)},
        HEAD: {"A": (7, 3), "B": (3, 5)},
        "norm/scale": {"value": (7,)},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(draw(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def scaled(params: dict, grads: dict, eta: float, **kwargs: Any) -> dict:
    tx = scale_by_inverse_norm(eta, **kwargs)
    with jax.numpy_dtype_promotion("strict"):
        return jitted(tx.update)(grads, tx.init(params), params)[0]


@pytest.mark.parametrize("per", ["unit", "rank"])
def test_every_slice_has_its_own_coefficient_and_the_rest_passes(per: str) -> None:
    """c = 1 / sqrt(||b|| + eta^-2), a column or a row of B at a time, layer by layer."""
    params, grads = factors(), factors(1)
    updates = scaled(params, grads, 3.0, per=per)
    pairs = [(STACK, 0), (STACK, 1), (HEAD, None)]
    for path, layer in pairs:
        B, g, got = (
            np.asarray(tree[path]["B"] if layer is None else tree[path]["B"][layer], np.float64)
            for tree in (params, grads, updates)
        )
        wanted = np.empty_like(g)
        for n in range(B.shape[1 if per == "unit" else 0]):
            at = (slice(None), n) if per == "unit" else n
            wanted[at] = g[at] / np.sqrt(np.linalg.norm(B[at]) + 3.0**-2)
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
        np.testing.assert_array_equal(updates[path]["A"], grads[path]["A"])
    np.testing.assert_array_equal(updates["norm/scale"]["value"], grads["norm/scale"]["value"])


@pytest.mark.parametrize("per", ["unit", "rank"])
def test_slices_of_A_lie_the_other_way(per: str) -> None:
    params, grads = factors(), factors(1)
    updates = scaled(params, grads, 3.0, per=per, leaves=r"/(A|B)$", exponent=1.0)
    A = np.asarray(params[HEAD]["A"], np.float64)
    norms = np.linalg.norm(A, axis=1 if per == "unit" else 0, keepdims=True)
    wanted = grads[HEAD]["A"] / (norms + 1 / 3.0)
    np.testing.assert_allclose(updates[HEAD]["A"], wanted, rtol=1e-5)
    assert not np.array_equal(updates[HEAD]["B"], grads[HEAD]["B"])


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_eta_at_zero_and_less_the_longer(exponent: float) -> None:
    lengths = np.array([0.0, 0.01, 0.1, 1.0, 10.0, 1e6], np.float32)
    tree = {"B": jnp.asarray(lengths)[None] / np.sqrt(2) * jnp.ones((2, 1))}
    found = scaled(tree, {"B": jnp.ones((2, 6))}, 4.0, exponent=exponent)["B"][0]
    assert float(found[0]) == pytest.approx(4.0, rel=1e-6)
    assert np.all(np.diff(found) < 0)
    assert float(found[-1]) == pytest.approx(1e6**-exponent, rel=1e-2)


def test_the_first_step_of_descent_from_zero_is_eta_times_the_gradient(key: jax.Array) -> None:
    peft = pefts.lora(rank=3, alpha=3.0, targets="kernel")
    state = peft.init(key, {"kernel": jnp.ones((6, 4))})
    grads = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), state[0])
    for mode in ("grad", "update"):
        tx = allora(0.1, eta=5.0, mode=mode, inner=optax.identity())
        updates, _ = tx.update(grads, tx.init(state.trainable), state.trainable)
        close(updates["kernel"]["B"], -0.5 * grads["kernel"]["B"])
        close(updates["kernel"]["A"], -0.1 * grads["kernel"]["A"])


def test_adam_takes_a_factor_back_that_comes_before_it() -> None:
    """At the first step Adam's direction is a sign: c is lost in front of it, whole behind it."""
    params, grads = factors(), factors(1)
    directions = {
        mode: run(allora(1.0, eta=2.0, mode=mode), params, [grads])[0]
        for mode in ("grad", "update")
    }
    step = {
        mode: np.asarray(end[HEAD]["B"] - params[HEAD]["B"]) for mode, end in directions.items()
    }
    B, g = np.asarray(params[HEAD]["B"]), np.asarray(grads[HEAD]["B"])
    near(step["grad"], -np.sign(g), 1e-5)
    near(step["update"], -np.sign(g) / np.sqrt(np.linalg.norm(B, axis=0) + 0.25), 1e-5)


def test_decay_is_neither_scaled_nor_seen_by_the_inner_one() -> None:
    params, zero = factors(), jax.tree.map(jnp.zeros_like, factors())
    for mode in ("grad", "update"):
        end, _, _ = run(allora(0.1, eta=2.0, mode=mode, weight_decay=0.5), params, [zero])
        close(end, jax.tree.map(lambda leaf: 0.95 * leaf, params))


def test_the_coefficients_follow_the_parameters() -> None:
    params, grads = factors(), [factors(seed) for seed in (1, 2)]
    end, _, _ = run(allora(0.1, eta=2.0, inner=optax.identity()), params, grads)
    B = np.asarray(params[HEAD]["B"], np.float64)
    for grad in grads:
        B = B - 0.1 * np.asarray(grad[HEAD]["B"]) / np.sqrt(np.linalg.norm(B, axis=0) + 0.25)
    near(end[HEAD]["B"], B, 1e-5)


def test_bfloat16_in_bfloat16_out_of_float32_arithmetic() -> None:
    def half(tree: dict) -> dict:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)

    up = functools.partial(jax.tree.map, lambda leaf: leaf.astype(jnp.float32))
    params, grads = half(factors()), half(factors(1))
    updates = scaled(params, grads, 30.0)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    exact = scaled(up(params), up(grads), 30.0)
    jax.tree.map(np.testing.assert_array_equal, updates, half(exact))


def test_hyperparameters_can_be_injected() -> None:
    params, grads = factors(), [factors(seed) for seed in (1, 2)]
    schedule = optax.linear_schedule(0.1, 0.0, 4)
    tx = optax.inject_hyperparams(allora)(schedule, eta=2.0, weight_decay=0.1)
    assert set(tx.init(params).hyperparams) == {
        *("learning_rate", "eta", "exponent", "weight_decay")
    }
    expected, _, _ = run(allora(schedule, eta=2.0, weight_decay=0.1), params, grads)
    close(run(tx, params, grads)[0], expected, 1e-5, 1e-6)


def test_it_takes_a_part_of_a_tree() -> None:
    params, grads = factors(), [factors(seed) for seed in (1, 2)]
    labels = {path: "pairs" if path.endswith("kernel") else "rest" for path in params}
    tx = optax.partition({"pairs": allora(0.1, eta=2.0), "rest": optax.sgd(0.5)}, labels)
    end, _, _ = run(tx, params, grads)
    part = {path: params[path] for path in (STACK, HEAD)}
    expected, _, _ = run(
        allora(0.1, eta=2.0), part, [{path: grad[path] for path in part} for grad in grads]
    )
    close({path: end[path] for path in part}, expected, 1e-5, 1e-6)


def test_optax_may_ask_for_the_state_of_an_empty_tree() -> None:
    """So that it knows which leaves of a state are like the parameters."""
    tx, params = allora(0.1, eta=2.0), factors()
    marked = optax.tree.map_params(tx, lambda leaf: leaf + 1, tx.init(params))
    moments = [leaf for leaf in jax.tree.leaves(marked) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(params))
    assert {float(leaf.min()) for leaf in moments} == {1.0}
    assert jax.tree.leaves(scale_by_inverse_norm(2.0).init({})) == []


def test_what_does_not_fit_is_refused() -> None:
    params = factors()
    for eta in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="eta=.*: give a finite number above 0"):
            allora(0.1, eta=eta)
    with pytest.raises(ValueError, match="exponent=0: give a finite number above 0"):
        allora(0.1, eta=1.0, exponent=0)
    with pytest.raises(ValueError, match="mode='both' is unknown"):
        allora(0.1, eta=1.0, mode="both")
    with pytest.raises(ValueError, match="per='row' is unknown"):
        allora(0.1, eta=1.0, per="row")
    with pytest.raises(ValueError, match="is no gradient transformation"):
        allora(0.1, eta=1.0, inner=optax.sgd)
    with pytest.raises(ValueError, match="leaves: '/C\\$' matches no"):
        allora(0.1, eta=1.0, leaves="/C$").init(params)
    with pytest.raises(ValueError, match="matches 'norm/scale/value' of shape"):
        allora(0.1, eta=1.0, leaves=".").init(params)
    tx = scale_by_inverse_norm(1.0)
    with pytest.raises(ValueError, match="reads the factors: call update"):
        tx.update(params, tx.init(params))
