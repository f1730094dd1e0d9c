"""Directions are keys: drawn where they are read, the same however a tree is ordered or placed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import models.create
import pefts
from models.decoder import Decoder
from pefts import deferred
from pefts.zeroth_order import directions, engine, estimator, mezo
from pefts.zeroth_order.directions import Direction, fold_in, run_key

KEY = run_key(3)


def tree(dtype: Any = jnp.float32) -> dict:
    return {
        "layers": {"kernel": jnp.ones((3, 4, 2), dtype), "bias": jnp.zeros((3, 2), dtype)},
        "head": jnp.full((2, 5), 2, dtype),
        "ids": jnp.arange(4),
    }


def dense(theta: Any) -> Any:
    return deferred.arrays(theta)


def test_the_noise_contract() -> None:
    """Sorted paths number the floating leaves, and layers are numbered inside theirs."""
    moved = dense(directions.perturb(tree(), KEY, 0.5))
    # head 0, layers/bias 1, layers/kernel 2; the integers have no number
    own = jax.random.wrap_key_data(fold_in(KEY, 0), impl=directions.IMPL)
    np.testing.assert_array_equal(moved["head"], 2 + 0.5 * jax.random.normal(own, (2, 5)))
    for layer in range(3):
        own = jax.random.wrap_key_data(fold_in(fold_in(KEY, 2), layer), impl=directions.IMPL)
        z = jax.random.normal(own, (4, 2))
        np.testing.assert_allclose(moved["layers"]["kernel"][layer], 1 + 0.5 * z, rtol=1e-6)
    np.testing.assert_array_equal(moved["ids"], tree()["ids"])


def test_only_stacked_leaves_wait() -> None:
    moved = directions.perturb(tree(), KEY, 1.0)
    assert deferred.is_deferred(moved["layers"]["kernel"])
    assert deferred.is_deferred(moved["layers"]["bias"])
    assert not deferred.is_deferred(moved["head"])


def test_what_a_layer_reads_is_what_the_stack_would() -> None:
    waiting = directions.perturb(tree(), KEY, 0.1)["layers"]["kernel"]
    read = jax.lax.map(lambda layer: layer.array(), waiting)
    np.testing.assert_allclose(read, waiting.array(), rtol=1e-6)


def test_order_of_a_tree_does_not_matter() -> None:
    one = {"b": jnp.zeros(3), "a": jnp.zeros(3)}
    two = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
    first, second = (directions.perturb(t, KEY, 1.0) for t in (one, two))
    np.testing.assert_array_equal(first["a"], second["a"])
    assert not np.array_equal(first["a"], first["b"])


def test_noise_is_float32_below_every_dtype() -> None:
    low = dense(directions.perturb(tree(jnp.bfloat16), KEY, 1.0))
    high = dense(directions.perturb(tree(), KEY, 1.0))
    assert low["head"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(low["head"], high["head"].astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_moving_adds_up_what_total_sums(dtype: Any) -> None:
    theta = tree(dtype)
    keys = jnp.stack([fold_in(KEY, n) for n in range(3)])
    c = jnp.asarray([0.3, -0.2, 0.1])
    sums = directions.total(theta, keys, c)
    moved = directions.move(theta, keys, c)
    expected: Any = jax.tree.map(jnp.zeros_like, sums)
    for n in range(3):
        base = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
        part = dense(directions.perturb(base, keys[n], c[n]))
        expected = jax.tree.map(jnp.add, expected, part)
    for path in ("head", "ids"):
        np.testing.assert_allclose(sums[path], expected[path], rtol=1e-5, atol=1e-6)
    kernel, before = sums["layers"]["kernel"], theta["layers"]["kernel"]
    np.testing.assert_allclose(kernel, expected["layers"]["kernel"], rtol=1e-5, atol=1e-6)
    after = (before.astype(jnp.float32) + kernel).astype(dtype)
    np.testing.assert_array_equal(moved["layers"]["kernel"], after)
    assert moved["head"].dtype == dtype and moved["ids"] is theta["ids"]


def test_decay_is_of_theta_before_the_step() -> None:
    theta = tree()
    shares = {"layers": {"kernel": 0.5, "bias": None}, "head": 0.25, "ids": None}
    still = directions.move(theta, KEY[None], jnp.zeros(1), decay=shares)
    np.testing.assert_array_equal(still["layers"]["kernel"], 0.5 * theta["layers"]["kernel"])
    np.testing.assert_array_equal(still["head"], 0.75 * theta["head"])
    np.testing.assert_array_equal(still["layers"]["bias"], theta["layers"]["bias"])


def test_a_mask_reads_its_own_layer() -> None:
    theta = tree()
    limits = {
        "layers": {"kernel": jnp.asarray([0.0, 2.0, 0.0]), "bias": jnp.full(3, -1.0)},
        "head": jnp.asarray(-1.0),
        "ids": jnp.zeros(()),
    }
    direction = Direction(mask=lambda value, limit: jnp.abs(value) <= limit, about=limits)
    for moved in (
        dense(directions.perturb(theta, KEY, 1.0, direction)),
        directions.move(theta, KEY[None], jnp.ones(1), direction),
    ):
        changed = np.asarray(moved["layers"]["kernel"] != theta["layers"]["kernel"])
        assert changed[1].all() and not changed[[0, 2]].any()
        np.testing.assert_array_equal(moved["head"], theta["head"])


def test_sharded_parameters_get_the_same_noise() -> None:
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=auto)
    theta = {"layers": {"kernel": jnp.zeros((2, 8, 6))}, "head": jnp.zeros((8, 6))}
    places = {
        "layers": {"kernel": NamedSharding(mesh, PartitionSpec(None, "data", "tensor"))},
        "head": NamedSharding(mesh, PartitionSpec("tensor")),
    }
    spread = jax.device_put(theta, places)
    move = jax.jit(lambda tree: directions.move(tree, KEY[None], jnp.ones(1)))
    moved = jax.jit(
        lambda tree: directions.move(tree, KEY[None], jnp.ones(1)), out_shardings=places
    )
    for ours, theirs in zip(
        jax.tree.leaves(moved(spread)), jax.tree.leaves(move(theta)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    collectives = moved.lower(spread).compile().as_text()
    assert "all-gather" not in collectives and "all-reduce" not in collectives


# ------------------------------------------------------------------------- on a scanned decoder


@pytest.fixture(scope="module")
def problem() -> Any:
    """A loss of what `full` trains of a scanned decoder, and its start."""
    config = models.create.llama(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=352,
        num_layers=16,
        num_heads=4,
        num_kv_heads=4,
        max_positions=32,
    )
    model, tokens = Decoder(config), jax.random.randint(jax.random.key(1), (2, 16), 0, 64)
    params = model.init(jax.random.key(0), tokens)["params"]
    peft = pefts.full(targets=".")
    state = peft.init(jax.random.key(1), params)

    def loss(theta: Any) -> jax.Array:
        bound = peft.bind(params, state._replace(trainable=theta))
        logits = pefts.apply(model.apply)({"params": bound}, tokens)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return jnp.mean(losses)

    return loss, state.trainable


def peak(compiled: Any) -> int:
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )


@pytest.mark.parametrize("queries", [1, 3])
def test_a_step_needs_the_memory_of_a_forward_pass(problem: Any, queries: int) -> None:
    loss, theta = problem
    tx = mezo(1e-3, queries=queries, weight_decay=0.1)
    state = tx.init(theta)
    forward = jax.jit(loss).lower(theta).compile()
    step = jax.jit(lambda theta, state: tx.step(theta, state, loss), donate_argnums=0)
    compiled = step.lower(theta, state).compile()
    assert peak(compiled) <= 1.3 * peak(forward)
    # ... which the ordinary way, noise for the whole tree at once, does not keep to.
    whole = jax.jit(lambda theta: loss(dense(directions.perturb(theta, KEY, 1e-3))))
    assert peak(whole.lower(theta).compile()) > 1.5 * peak(forward)


def test_layers_see_the_perturbed_parameters(problem: Any) -> None:
    loss, theta = problem
    lazily = jax.jit(lambda theta: loss(directions.perturb(theta, KEY, 0.05)))(theta)
    at_once = jax.jit(lambda theta: loss(dense(directions.perturb(theta, KEY, 0.05))))(theta)
    np.testing.assert_allclose(lazily, at_once, rtol=1e-5)
    assert abs(float(lazily - jax.jit(loss)(theta))) > 1e-3


def test_forward_mode_goes_through_the_same_scan(problem: Any) -> None:
    loss, theta = problem
    exact = jax.jit(lambda t: estimator.estimate(loss, t, KEY, estimator.Options(sides="forward")))
    near = jax.jit(lambda t: estimator.estimate(loss, t, KEY, estimator.Options(eps=2e-4)))
    slope = float(exact(theta).slopes[0])
    np.testing.assert_allclose(near(theta).slopes[0], slope, rtol=0.02, atol=0.02)
    key = fold_in(KEY, 0)
    z = directions.total(theta, key[None], jnp.ones(1))
    gradient = jax.jit(jax.grad(loss))(theta)
    product = sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), gradient, z)))
    np.testing.assert_allclose(slope, product, rtol=1e-3)


def test_state_holds_nothing_of_the_parameters_size(problem: Any) -> None:
    _, theta = problem
    state = mezo(1e-3, queries=4).init(theta)
    assert pefts.count(state) == 4 + 2 + 2 + 3  # coefficients; key; counts; decay, value, slope
    assert isinstance(state, engine.ZerothOrderState)
