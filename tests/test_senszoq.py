"""SensZOQ: which entries are chosen, that they alone move, by gradients and by values alone."""

import dataclasses
import functools
import math
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from subject import base_inputs, base_params, calibrated, model_axes, random_logits

import pefts
from pefts import paths, views
from pefts.bound import Call
from pefts.core import GRADIENTS
from pefts.methods.senszoq import effective, entries
from pefts.zeroth_order import mezo
from training import experiment

RATIO = 0.05


def on_one(F: Any, ratio: float, W: Any = None) -> tuple[pefts.Peft, dict, pefts.PeftState]:
    """The method on a single kernel with these sensitivities."""
    F = jnp.asarray(F, jnp.float32)
    params = {"kernel": jnp.arange(1.0, 1 + F.size).reshape(F.shape) if W is None else W}
    peft = pefts.senszoq(ratio, targets="kernel")
    stats = {"kernel": dict.fromkeys(GRADIENTS, F)}
    return peft, params, peft.init(jax.random.key(0), params, stats)


@functools.cache
def on_the_tiny_model() -> tuple[pefts.Peft, Any, pefts.PeftState]:
    """Scanned layers, kernels with head axes."""
    peft, stats = pefts.senszoq(RATIO, axes=model_axes(True)), calibrated(GRADIENTS, 0)
    return peft, stats, jax.jit(peft.init)(jax.random.key(0), base_params(), stats)


def largest(F: np.ndarray, k: int) -> list[int]:
    """Brute force: the k largest, of equals the first, in the order of their places."""
    return sorted(sorted(range(F.size), key=lambda n: (-F.flat[n], n))[:k])


def matrices(params: Any, path: str) -> np.ndarray:
    axes = pefts.targets.selection(axes=model_axes(True))
    leaf = paths.flatten(params)[path]
    return np.asarray(views.to_matrix(leaf, axes.axes_of(path, leaf.shape)))


# --- which entries ---


@pytest.mark.parametrize(
    ("ratio", "size", "k"),
    [(0.07, 100, 7), (1e-3, 3000, 3), (1e-3, 3001, 4), (1e-9, 5, 1), (1, 5, 5), (0.5, 5, 3)],
)
def test_k_is_the_ceiling_of_the_decimal_ratio(ratio: float, size: int, k: int) -> None:
    assert entries(ratio, size) == k
    assert on_one(np.zeros((1, size)), ratio)[2].trainable["kernel"]["values"].shape == (k,)


def test_each_layer_has_its_own_most_sensitive_entries() -> None:
    _, stats, state = on_the_tiny_model()
    differ = 0
    for path, group in state.frozen.items():
        F = np.asarray(stats[path]["squared_gradient"])
        W, k = matrices(base_params(), path), math.ceil(Fraction(1, 20) * F[0].size)
        assert group["indices"].shape == (tiny.LAYERS, k) and group["indices"].dtype == jnp.int32
        for layer in range(tiny.LAYERS):
            chosen = np.asarray(group["indices"][layer])
            assert chosen.tolist() == largest(F[layer], k), f"{path} {layer}"
            values = state.trainable[path]["values"][layer]
            np.testing.assert_array_equal(values, W[layer].flat[chosen])
        differ += group["indices"][0].tolist() != group["indices"][1].tolist()
    assert differ and len(state.frozen) == 6
    assert {frozenset(group) for group in state.frozen.values()} == {frozenset({"indices"})}


def test_of_equal_sensitivities_the_first_are_taken() -> None:
    F = np.array([[1, 3, 1, 0], [3, 1, 2, 1], [0, 1, 3, 1]])
    for k in (1, 3, 5, 6, 9, 12):
        state = on_one(F, k / 12 - 0.01)[2]
        assert state.frozen["kernel"]["indices"].tolist() == largest(F, k)
    assert largest(F, 5) == [0, 1, 4, 6, 10]


def test_it_is_the_squares_that_count() -> None:
    """Not the mean gradient, which may cancel."""
    F, G = jnp.asarray([[4.0, 1.0, 0.0]]), jnp.asarray([[0.0, 1.0, -9.0]])
    stats = {"kernel": {"squared_gradient": F, "gradient": G}}
    peft = pefts.senszoq(0.3, targets="kernel")
    state = peft.init(jax.random.key(0), {"kernel": jnp.ones((1, 3))}, stats)
    assert state.frozen["kernel"]["indices"].tolist() == [0]


def test_a_run_collects_them_with_its_loss_and_without_weights() -> None:
    """Padding is masked in the loss of a run; the weights of inputs reach no gradient."""

    def call(apply: Any) -> Any:
        return lambda variables, batch: apply(variables, batch["tokens"], batch["mask"])

    def loss(logits: jax.Array, batch: Any) -> jax.Array:
        del batch
        return jnp.mean((logits - random_logits()) ** 2)

    peft = pefts.senszoq(RATIO, targets="(up|down)/kernel", axes=model_axes(True))
    needs = ("squared_gradient",)
    run: Any = SimpleNamespace(
        peft=peft._replace(traits=dataclasses.replace(peft.traits, needs=needs)),
        objective=SimpleNamespace(call=call, loss=loss),
        model=tiny.Classifier(),
        params=base_params(),
    )
    batches = [dict(zip(("tokens", "mask"), tiny.inputs(seed), strict=True)) for seed in (5, 6)]
    found, want = experiment.statistics(run, batches), calibrated(GRADIENTS, 0)
    assert found.keys() == {"layers/up/kernel", "layers/down/kernel"}
    for path, group in found.items():
        assert group.keys() == set(needs)
        F, scale = want[path]["squared_gradient"], float(want[path]["squared_gradient"].max())
        np.testing.assert_allclose(group["squared_gradient"], F, rtol=1e-4, atol=1e-5 * scale)


# --- what they do ---


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_merging_at_the_start_gives_every_bit_back(dtype: Any) -> None:
    params = tiny.cast(base_params(), dtype)
    peft, stats, _ = on_the_tiny_model()
    state = jax.jit(peft.init)(jax.random.key(0), params, stats)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.trainable))
    merged, base = paths.flatten(jax.jit(peft.merge)(params, state)), paths.flatten(params)
    for path, leaf in base.items():
        assert merged[path].dtype == leaf.dtype
        np.testing.assert_array_equal(np.asarray(merged[path]), np.asarray(leaf))


def test_what_the_base_holds_at_the_entries_is_not_read() -> None:
    """So that a quantised base may leave them out."""
    rng = np.random.default_rng(0)
    peft, params, state = on_one(rng.random((5, 7)), 0.2, jnp.asarray(rng.random((5, 7))))
    holes = params["kernel"].reshape(-1).at[state.frozen["kernel"]["indices"]].set(0)
    merged = peft.merge({"kernel": holes.reshape(5, 7)}, state)["kernel"]
    np.testing.assert_array_equal(merged, params["kernel"])
    assert int(jnp.sum(holes == 0)) == 7


def loss_of(peft: pefts.Peft, state: pefts.PeftState, trainable: Any) -> jax.Array:
    bound = peft.bind(base_params(), state._replace(trainable=trainable))
    logits = pefts.apply(tiny.Classifier().apply)({"params": bound}, *base_inputs())
    return jnp.mean((logits - random_logits()) ** 2)


def check_only_chosen_entries_moved(start: pefts.PeftState, end: pefts.PeftState) -> None:
    peft = on_the_tiny_model()[0]
    merged = jax.jit(peft.merge)(base_params(), end)
    before, after = paths.flatten(base_params()), paths.flatten(merged)
    for path in before.keys() - start.frozen.keys():
        np.testing.assert_array_equal(after[path], before[path])
    for path, group in start.frozen.items():
        old, new = matrices(base_params(), path), matrices(merged, path)
        for layer in range(tiny.LAYERS):
            moved = np.flatnonzero(old[layer] != new[layer])
            assert moved.tolist() == group["indices"][layer].tolist(), path


@pytest.mark.usefixtures("optax_promotes_its_step_count")
def test_adam_moves_the_chosen_entries_alone() -> None:
    peft, _, start = on_the_tiny_model()
    tx = optax.adamw(1e-2, weight_decay=0.1)

    @jax.jit
    def run(theta: Any) -> tuple[Any, jax.Array]:
        def step(carry: Any, _: Any) -> tuple[Any, jax.Array]:
            theta, moments = carry
            loss, grads = jax.value_and_grad(functools.partial(loss_of, peft, start))(theta)
            updates, moments = tx.update(grads, moments, theta)
            return (optax.apply_updates(theta, updates), moments), loss

        (theta, _), losses = jax.lax.scan(step, (theta, tx.init(theta)), length=5)
        return theta, losses

    theta, losses = run(start.trainable)
    assert losses[-1] < 0.98 * losses[0]
    check_only_chosen_entries_moved(start, start._replace(trainable=theta))
    moments = jax.eval_shape(tx.init, start.trainable)
    assert pefts.count(moments) == 2 * pefts.count(start.trainable) + 1


@pytest.mark.usefixtures("optax_promotes_its_step_count")
def test_mezo_lowers_the_loss_with_noise_of_their_size() -> None:
    peft, _, start = on_the_tiny_model()
    tx = mezo(0.02, eps=1e-3, queries=2)
    value = functools.partial(loss_of, peft, start)

    @jax.jit
    def run(theta: Any) -> tuple[Any, jax.Array]:
        def step(carry: Any, _: Any) -> tuple[Any, jax.Array]:
            theta, moments = carry
            return tx.step(theta, moments, value), value(theta)

        (theta, _), losses = jax.lax.scan(step, (theta, tx.init(theta)), length=60)
        return theta, losses

    theta, losses = run(start.trainable)
    assert jax.tree.map(jnp.shape, theta) == jax.tree.map(jnp.shape, start.trainable)
    assert losses[-1] < 0.95 * losses[0]
    check_only_chosen_entries_moved(start, start._replace(trainable=theta))


def test_the_gradient_is_that_of_the_kernel_at_the_entries() -> None:
    rng = np.random.default_rng(1)
    _, params, state = on_one(rng.random((4, 6)), 0.3, jnp.asarray(rng.normal(size=(4, 6))))
    C, group = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32), state.frozen["kernel"]

    def inner(values: jax.Array) -> jax.Array:
        p = {**group, "values": values}
        return jnp.sum(C * jnp.square(effective(params["kernel"], p, Call(), ratio=0.3)))

    found = jax.jit(jax.grad(inner))(state.trainable["kernel"]["values"])
    want = (2 * C * params["kernel"]).reshape(-1)[group["indices"]]
    np.testing.assert_allclose(found, want, rtol=1e-6)


# --- errors ---


@pytest.mark.parametrize("ratio", [0, -0.1, 1.0001, math.inf, math.nan])
def test_a_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"ratio={ratio!r}: give a share .* in \(0, 1\]"):
        pefts.senszoq(ratio)


@pytest.mark.parametrize("stats", [None, {}, {"kernel": {"gradient": jnp.ones((2, 3))}}])
def test_it_starts_from_squared_gradients(stats: Any) -> None:
    peft, params = pefts.senszoq(targets="kernel"), {"kernel": jnp.ones((2, 3))}
    with pytest.raises(
        ValueError, match="senszoq initialises from the statistic 'squared_gradient'"
    ):
        peft.init(jax.random.key(0), params, stats)


def test_squared_gradients_of_another_model() -> None:
    peft, params = pefts.senszoq(targets="kernel"), {"kernel": jnp.ones((2, 3))}
    stats = {"kernel": {"squared_gradient": jnp.ones((2, 2))}}
    with pytest.raises(ValueError, match=r"'squared_gradient' .* shape \(2, 2\).* needs \(2, 3\)"):
        peft.init(jax.random.key(0), params, stats)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_sensitivities_that_order_nothing(bad: float) -> None:
    with pytest.raises(ValueError, match="'squared_gradient' of 'kernel' holds NaN or infinite"):
        on_one(np.array([[1.0, bad, 2.0]]), 0.5)


def test_a_kernel_too_large_for_the_indices() -> None:
    shape = jax.ShapeDtypeStruct((2**16, 2**15), jnp.bfloat16)
    peft, stats = pefts.senszoq(targets="kernel"), {"kernel": dict.fromkeys(GRADIENTS, shape)}
    with pytest.raises(ValueError, match="'kernel' has 65536 x 32768 entries, too many"):
        jax.eval_shape(functools.partial(peft.init, jax.random.key(0)), {"kernel": shape}, stats)


def test_a_state_of_another_kernel_or_ratio() -> None:
    peft, params, state = on_one(np.ones((4, 5)), 0.5)
    with pytest.raises(ValueError, match=r"10 entries, .* shape \(6, 5\) has 15 at ratio=0.5"):
        peft.merge({"kernel": jnp.ones((6, 5))}, state)
    with pytest.raises(ValueError, match="has 2 at ratio=0.1; it was made for another model or"):
        pefts.senszoq(0.1, targets="kernel").merge(params, state)
