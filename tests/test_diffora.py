"""DiffoRA-style selection beyond the table: who learns when, what is chosen, plain LoRA after."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pefts
from pefts.methods.diffora import FACTORS, FIXED, GATES, gates

AXES = {"layers": "lio"}
SHAPES = {
    "layers/down": (3, 6, 8),
    "layers/up": (3, 8, 6),
    "layers/value": (3, 8, 7),
    "head": (8, 5),
    "pool": (8, 4),
}


def parameters() -> dict:
    draw = np.random.default_rng(0).normal
    flat = {path: jnp.asarray(draw(size=shape), jnp.float32) for path, shape in SHAPES.items()}
    layers = {path[7:]: {"kernel": leaf} for path, leaf in flat.items() if path[:6] == "layers"}
    return {
        "layers": layers,
        "readout": {"kernel": flat["head"]},
        "pool": {"kernel": flat["pool"]},
    }


def method(**kwargs) -> pefts.Peft:
    defaults = {"rank": 2, "alpha": 4.0, "keep": 1, "schedule": (2, 5, 2)}
    return pefts.diffora(**{**defaults, **kwargs}, axes=AXES)


def loss_of(peft: pefts.Peft, params: dict, targets: dict):
    """Squared distance of merged kernels from targets, as a function of the trainable tree."""

    def loss(trainable, frozen):
        merged = peft.merge(params, pefts.PeftState(trainable, frozen))
        pairs = zip(jax.tree.leaves(merged), jax.tree.leaves(targets), strict=True)
        return sum(jnp.sum((a - b) ** 2) for a, b in pairs)

    return loss


def trained(peft, steps: int, tx=None, targets=None, params=None) -> list:
    """(state, gradients) after each step, the start first."""
    params = parameters() if params is None else params
    if targets is None:
        targets = jax.tree.map(
            lambda leaf: leaf + jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params
        )
    tx = optax.adamw(1e-2, weight_decay=0.1) if tx is None else tx
    loss = loss_of(peft, params, targets)

    @jax.jit
    def one(state, moments, step):
        grads = jax.grad(loss)(*state)
        with jax.numpy_dtype_promotion("standard"):  # optax counts its steps in mixed types
            updates, moments = tx.update(grads, moments, state.trainable)
        state = state._replace(trainable=optax.apply_updates(state.trainable, updates))
        return peft.update(state, grads, step), moments, grads

    state = jax.jit(peft.init)(jax.random.key(0), params)
    moments, states = tx.init(state.trainable), [(state, None)]
    for step in range(steps):
        state, moments, grads = one(state, moments, jnp.int32(step))
        states.append((state, grads))
    assert one._cache_size() == 1
    return states


@functools.cache
def adamw_run() -> list:
    return trained(method(), 10)


def moved(name: str, step: int) -> bool:
    (before, _), (after, _) = adamw_run()[step : step + 2]
    return any(
        not np.array_equal(before.trainable[path][name], group[name])
        for path, group in after.trainable.items()
    )


def test_each_step_moves_one_part_alone_whatever_the_optimizer_does():
    """AdamW's momentum and decay would move all of it at every step."""
    phases = [int(state.frozen["shared"]["phase"]) for state, _ in adamw_run()]
    wanted = [FACTORS, FACTORS, GATES, FACTORS, GATES, FACTORS, GATES, FIXED, FIXED, FIXED, FIXED]
    assert phases == wanted
    for step, phase in enumerate(wanted[:-1]):
        assert moved("a", step) == (phase == GATES)
        assert moved("A", step) == moved("B", step) == (phase != GATES)


def test_the_gates_have_no_gradient_before_B_has_moved_nor_the_factors_in_the_gates_steps():
    for step in range(10):
        (state, _), (_, grads) = adamw_run()[step : step + 2]
        phase = int(state.frozen["shared"]["phase"])
        for group in grads.values():
            assert bool(jnp.all(group["a"] == 0)) == (step == 0 or phase == FIXED)
            if phase == GATES:
                assert not group["A"].any() and not group["B"].any()
            elif phase == FACTORS:
                assert group["B"].any() and bool(group["A"].any()) == (step > 0)


def test_the_gates_follow_an_adam_of_their_own():
    rate = 0.05
    m, v, a, count = 0.0, 0.0, np.zeros(3), 0
    for step in (2, 4, 6):
        state, grads = adamw_run()[step + 1]
        g, count = np.asarray(grads["layers/up/kernel"]["a"], np.float64), count + 1
        m, v = 0.5 * m + 0.5 * g, 0.999 * v + 0.001 * g**2
        a = a - rate * (m / (1 - 0.5**count)) / np.sqrt(v / (1 - 0.999**count))
        np.testing.assert_allclose(state.trainable["layers/up/kernel"]["a"], a, rtol=1e-4)


def ranked(peft: pefts.Peft, a: dict) -> dict:
    """The gates after the search's end, where the logits were `a`."""
    params = parameters()
    state = peft.init(jax.random.key(0), params)
    for path, values in a.items():
        state.trainable[path]["a"] = jnp.asarray(values, jnp.float32)
        state.frozen[path]["held_a"] = state.trainable[path]["a"]
    grads = jax.tree.map(jnp.zeros_like, state.trainable)
    frozen = {**state.frozen, "shared": {"phase": jnp.int32(FACTORS)}}
    return gates(peft.update(pefts.PeftState(state.trainable, frozen), grads, jnp.int32(6)))


LOGITS = {
    "layers/down/kernel": [0.1, 0.5, -0.2],
    "layers/up/kernel": [0.3, 0.2, -0.2],
    "layers/value/kernel": [0.2, 0.4, -0.9],
    "pool/kernel": -2.0,
    "readout/kernel": -1.0,
}


@pytest.mark.parametrize(
    ("keep", "scope", "wanted"),
    [
        (1, "layer", ([0, 1, 1], [1, 0, 0], [0, 0, 0], 0, 1)),
        (2, "layer", ([0, 1, 1], [1, 0, 1], [1, 1, 0], 1, 1)),
        (3, "model", ([0, 1, 0], [1, 0, 0], [0, 1, 0], 0, 0)),
        (6, "model", ([1, 1, 0], [1, 1, 0], [1, 1, 0], 0, 0)),
        (7, "model", ([1, 1, 1], [1, 1, 0], [1, 1, 0], 0, 0)),
    ],
)
def test_the_largest_gates_of_each_layer_or_of_the_model_stay(keep, scope, wanted):
    """Equal ones go by path and layer; what is in no layer is a layer of its own."""
    assert list(ranked(method(keep=keep, scope=scope), LOGITS).values()) == list(wanted)


def test_unrolled_layers_are_told_by_their_numbers():
    shapes = {"down": (6, 8), "up": (8, 6)}
    params = {
        f"layers_{n}": {
            "mlp": {f"{name}_1": {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}
        }
        for n in range(11, 13)
    }
    peft = pefts.diffora(rank=2, keep=1, schedule=(1, 1, 2))
    state = peft.init(jax.random.key(0), params)
    grads = jax.tree.map(jnp.zeros_like, state.trainable)
    late = peft.update(state, grads, jnp.int32(1))
    found = {path: z for path, z in gates(late).items() if z}
    assert found == {f"layers_{n}/mlp/down_1/kernel": 1.0 for n in range(11, 13)}


def test_fixed_gates_are_a_plain_lora_on_what_was_chosen():
    """The merged kernels, and every later step of the optimizer, are LoRA's."""
    states = trained(method(), 9, optax.sgd(1e-3))
    params, (state, _) = parameters(), states[7]
    found = gates(state)
    assert sum(np.sum(z) for z in found.values()) == 4
    plain = pefts.lora(rank=2, alpha=4.0, axes=AXES)
    reference = plain.init(jax.random.key(0), params)
    groups = {}
    for path, group in state.trainable.items():
        z = jnp.asarray(found[path])[..., None, None]
        groups[path] = {"A": group["A"], "B": group["B"] * z}
    reference = reference._replace(trainable=groups)
    targets = jax.tree.map(
        lambda leaf: leaf + jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params
    )
    gradient = jax.jit(jax.grad(loss_of(plain, params, targets)))
    for step in (7, 8):
        mine, theirs = method().merge(params, states[step][0]), plain.merge(params, reference)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), mine, theirs
        )
        grads = gradient(*reference)
        for path, group in reference.trainable.items():
            z = jnp.asarray(found[path])[..., None, None]
            for name in ("A", "B"):
                group[name] = group[name] - 1e-3 * z * grads[path][name]


def test_what_was_dropped_stays_as_it_was():
    for step in (7, 8, 9):
        (before, _), (after, _) = adamw_run()[step : step + 2]
        found, changed = gates(after), 0
        for path, group in after.trainable.items():
            dropped = np.asarray(found[path]) == 0
            for name in ("A", "B"):
                old = np.asarray(before.trainable[path][name])
                same = np.all(np.asarray(group[name]) == old, axis=(-2, -1))
                np.testing.assert_array_equal(same, dropped)
                changed += int(np.sum(~same))
        assert changed == 2 * 4


def test_the_search_finds_the_kernels_that_need_to_change():
    """Of three kernels in each of three layers another one is far from its target."""
    params = parameters()
    paths = ("down", "up", "value")
    targets = jax.tree.map(jnp.copy, params)
    for layer, name in enumerate(paths):
        leaf = targets["layers"][name]["kernel"]
        targets["layers"][name]["kernel"] = leaf.at[layer].add(0.5)
    targets["pool"]["kernel"] += 0.5
    peft = method(schedule=(5, 20, 2), gate_rate=0.1)
    (state, _) = trained(peft, 26, optax.adam(1e-2), targets, params)[-1]
    found = gates(state)
    for layer, name in enumerate(paths):
        assert found[f"layers/{name}/kernel"] == [float(n == layer) for n in range(3)]
    assert (found["pool/kernel"], found["readout/kernel"]) == (1.0, 0.0)


def test_the_chosen_kernels_convert_to_a_lora():
    params, (state, _) = parameters(), adamw_run()[8]
    peft, low_rank = pefts.to_lora(method(), state, params)
    mine, theirs = method().merge(params, state), peft.merge(params, low_rank)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), mine, theirs)


def test_a_schedule_comes_as_a_tuple_or_as_a_json_list():
    peft = pefts.from_config(json.loads(json.dumps(method().config)))
    last = trained(peft, 3)[-1][0]
    jax.tree.map(np.testing.assert_array_equal, last, adamw_run()[3][0])
