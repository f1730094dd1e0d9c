"""LoRA-FA against numpy, Hugging Face PEFT's, and as a citizen of optax."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients import close, jitted, near, official_pairs, run
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import pefts
from pefts.optimizers.lora_fa import lora_fa, scale_by_lora_fa

GOLDEN = Path(__file__).parents[1] / "../shared/golden/official/lora_optimizers/golden.npz"

pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")


@pytest.fixture(scope="module")
def golden() -> Any:
    if not GOLDEN.exists():
        pytest.skip("the golden vectors of Hugging Face PEFT are not beside this repository")
    return np.load(GOLDEN)


def test_the_official_trajectory(golden: Any, x64: None) -> None:
    lr, decay = float(golden["lr"]), float(golden["weight_decay"])
    assert float(golden["lorafa_eps"]) == 1e-6
    tx = lora_fa(lr, scaling=float(golden["scaling"]))
    ours = lora_fa(lr, scaling=float(golden["scaling"]), weight_decay=decay)
    start = params = alias = official_pairs(golden, "A0", "B0")
    state, alias_state = tx.init(params), ours.init(params)
    for t in range(int(golden["n_steps"])):
        grads = official_pairs(golden, "GA", "GB", t)
        params, state, _ = run(tx, params, [grads], state)
        alias, alias_state, _ = run(ours, alias, [grads], alias_state)
        for i, (path, pair) in enumerate(params.items()):
            pair["B"] = pair["B"] * (1 - lr * decay)  # the official decay follows the step
            near(pair["B"], golden[f"lorafa__B_{i}"][t].T, 1e-11)
            near(alias[path]["B"], golden[f"lorafa__B_{i}"][t].T, 2e-4)
            np.testing.assert_array_equal(alias[path]["A"], start[path]["A"])


def factors(layers: int = 2, d_in: int = 7, d_out: int = 5, r: int = 3, seed: int = 0) -> dict:
    """A stack of pairs, one that is not stacked, and what is no pair."""
    draw = np.random.default_rng(seed).normal
    shapes = {
        "layers/query/kernel": {"A": (layers, d_in, r), "B": (layers, r, d_out)},
        "head/kernel": {"A": (d_in, r), "B": (r, d_out)},
        "norm/scale": {"value": (d_in,)},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(draw(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def projected(params: dict, grads: dict, scaling: Any, damping: float = 1e-8) -> dict:
    tx = scale_by_lora_fa(scaling=scaling, damping=damping, inner=optax.identity())
    return jitted(tx.update)(grads, tx.init(params), params)[0]


def test_every_B_follows_its_own_layer_and_scale_and_A_stays() -> None:
    params, grads = factors(), factors(seed=1)
    with jax.numpy_dtype_promotion("strict"):
        updates = projected(params, grads, {"head": 4.0, "kernel": 0.5}, damping=0.1)

    def oracle(A: Any, g: Any, s: float) -> Any:
        A, g = np.asarray(A, np.float64), np.asarray(g, np.float64)
        return np.linalg.inv(A.T @ A + 0.1 * np.eye(3)) @ g / s**2

    A, B = (params["layers/query/kernel"]["A"], grads["layers/query/kernel"]["B"])
    for layer in range(2):
        ours = updates["layers/query/kernel"]["B"][layer]
        np.testing.assert_allclose(ours, oracle(A[layer], B[layer], 0.5), rtol=2e-5, atol=1e-5)
    expected = oracle(params["head/kernel"]["A"], grads["head/kernel"]["B"], 4.0)
    np.testing.assert_allclose(updates["head/kernel"]["B"], expected, rtol=2e-5, atol=1e-6)
    for path in ("head/kernel", "layers/query/kernel"):
        np.testing.assert_array_equal(updates[path]["A"], 0)
    np.testing.assert_array_equal(updates["norm/scale"]["value"], grads["norm/scale"]["value"])


@pytest.mark.parametrize("rslora", [False, True])
def test_the_step_is_the_nearest_to_the_gradient_of_the_kernel(rslora, key, x64) -> None:
    """s A U_B is the least-squares fit of G by columns of A, with s that of `pefts.lora`."""
    params = {"kernel": jnp.asarray(np.random.default_rng(1).normal(size=(7, 5)))}
    peft = pefts.lora(rank=3, alpha=12, rslora=rslora, targets="kernel")
    state = pefts.randomize(key, peft.init(key, params))
    state = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state)
    G = jnp.asarray(np.random.default_rng(2).normal(size=(7, 5)))

    def loss(trainable: Any) -> jax.Array:
        return jnp.sum(G * peft.merge(params, state._replace(trainable=trainable))["kernel"])

    s = 12 / np.sqrt(3) if rslora else 4.0
    near(state.frozen["kernel"]["scale"], s, 1e-6)
    grads = jax.grad(loss)(state.trainable)
    A = np.asarray(state.trainable["kernel"]["A"])
    updates = projected(state.trainable, grads, float(state.frozen["kernel"]["scale"]), 0.0)
    best, *_ = np.linalg.lstsq(A, np.asarray(G), rcond=None)
    near(s * A @ updates["kernel"]["B"], A @ best, 1e-6)


def test_A_has_no_state() -> None:
    params = factors()
    sizes = 2 * 3 * 5 + 3 * 5 + 7
    state = lora_fa(0.1, scaling=2.0).init(params)
    assert pefts.count(state) == 2 * sizes + 2  # the moments and two counts of steps
    shifted = optax.tree.map_params(
        lora_fa(0.1, scaling=2.0), lambda leaf: leaf + 1, state, transform_non_params=lambda x: x
    )
    assert {float(leaf.min()) for leaf in jax.tree.leaves(shifted) if leaf.ndim} == {1.0}


def test_A_neither_moves_nor_decays_while_the_rest_follows_adam() -> None:
    params, grads = factors(), [factors(seed=t) for t in (1, 2, 3)]
    end, _, _ = run(lora_fa(0.1, scaling=2.0, weight_decay=0.5), params, grads)
    for path in ("head/kernel", "layers/query/kernel"):
        np.testing.assert_array_equal(end[path]["A"], params[path]["A"])
        assert np.all(end[path]["B"] != params[path]["B"])
    norm = "norm/scale"
    adam = optax.adamw(0.1, eps=0.0, weight_decay=0.5)
    expected, _, _ = run(adam, params[norm], [grad[norm] for grad in grads])
    close(end[norm], expected, 1e-4, 1e-4)


def test_the_step_never_computes_the_gradient_of_A(key: jax.Array) -> None:
    x, W = jnp.ones((64, 96)), {"kernel": jnp.ones((96, 80))}
    peft = pefts.lora(rank=16, targets="kernel")
    state, tx = peft.init(key, W), lora_fa(0.1, scaling=0.5)

    def flops(prepare: Any) -> float:
        def step(trainable: Any, opt: Any) -> Any:
            def loss(trainable: Any) -> jax.Array:
                return jnp.sum((x @ (trainable["kernel"]["A"] @ trainable["kernel"]["B"])) ** 2)

            return tx.update(prepare(jax.grad(loss)(trainable)), opt, trainable)

        opt = tx.init(state.trainable)
        compiled = jax.jit(step).lower(state.trainable, opt).compile()
        return compiled.cost_analysis()["flops"]

    def clip(grads: Any) -> Any:
        norm = optax.tree.norm(grads)
        return jax.tree.map(lambda leaf: leaf / norm, grads)

    gradient_of_A = 2 * 96 * 80 * 16
    assert flops(clip) - flops(lambda grads: grads) > 0.9 * gradient_of_A


def test_bfloat16_leaves_have_a_float32_state_and_bfloat16_updates() -> None:
    up = functools.partial(jax.tree.map, lambda leaf: leaf.astype(jnp.float32))
    half, grads = (
        jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), factors(seed=t)) for t in (0, 1)
    )
    tx = lora_fa(0.1, scaling=2.0, weight_decay=0.1)
    updates, state = jitted(tx.update)(grads, tx.init(half), half)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(t) for t in ("f4", "i4")}
    expected, _ = jitted(tx.update)(up(grads), tx.init(up(half)), up(half))
    close(up(updates), expected, 1e-2, 1e-3)


def test_an_A_of_zeros_or_without_full_rank_makes_nothing_infinite() -> None:
    params, grads = factors(), factors(seed=1)
    params["head/kernel"]["A"] = jnp.zeros((7, 3))
    stack = params["layers/query/kernel"]
    stack["A"] = stack["A"].at[1, :, 2].set(stack["A"][1, :, 0])
    updates = projected(params, grads, 1.0, damping=0.0)
    np.testing.assert_array_equal(updates["head/kernel"]["B"], 0)
    A, g = np.asarray(stack["A"][1], np.float64), grads["layers/query/kernel"]["B"][1]
    near(updates["layers/query/kernel"]["B"][1], np.linalg.pinv(A.T @ A, 1e-6) @ g, 1e-4)


def test_hyperparameters_can_be_injected() -> None:
    params, grads = factors(), [factors(seed=t) for t in (1, 2)]
    schedule = optax.linear_schedule(0.1, 0.0, 4)
    tx = optax.inject_hyperparams(lora_fa)(schedule, scaling=2.0, weight_decay=0.1)
    state = tx.init(params)
    assert set(state.hyperparams) == {"learning_rate", "scaling", "damping", "weight_decay"}
    expected, _, _ = run(lora_fa(schedule, scaling=2.0, weight_decay=0.1), params, grads)
    close(run(tx, params, grads)[0], expected, 1e-5, 1e-6)


def test_it_takes_a_part_of_a_tree_and_means_of_gradients() -> None:
    params, grads = factors(), [factors(seed=t) for t in (1, 2)]
    labels = {path: "fa" if path.endswith("kernel") else "rest" for path in params}
    tx = optax.partition({"fa": lora_fa(0.1, scaling=2.0), "rest": optax.sgd(0.5)}, labels)
    end, _, _ = run(optax.MultiSteps(tx, 2).gradient_transformation(), params, grads)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    part = {path: params[path] for path in params if path.endswith("kernel")}
    expected, _, _ = run(lora_fa(0.1, scaling=2.0), part, [{path: mean[path] for path in part}])
    close({path: end[path] for path in part}, expected, 1e-5, 1e-6)


def test_eight_devices_give_what_one_gives_in_one_program() -> None:
    params, grads = factors(2, 16, 8), [factors(2, 16, 8, seed=t) for t in (1, 2)]
    tx = lora_fa(0.1, scaling=2.0, weight_decay=0.1)
    expected, _, _ = run(tx, params, grads)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    spec = {
        "layers/query/kernel": {"A": P(None, "fsdp", None), "B": P(None, None, "data")},
        "head/kernel": {"A": P("fsdp", None), "B": P(None, "data")},
        "norm/scale": {"value": P("data")},
    }
    place = functools.partial(
        jax.tree.map, lambda spec, leaf: jax.device_put(leaf, NamedSharding(mesh, spec)), spec
    )

    @jax.jit
    def step(grad: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grad, state, params)
        params = optax.apply_updates(params, updates)
        return jax.lax.with_sharding_constraint(params, shardings), state

    placed = place(params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)
    state = jax.jit(tx.init)(placed)
    for grad in grads:
        placed, state = step(place(grad), state, placed)
    close(placed, expected, 0, 1e-5)
    assert len(placed["head/kernel"]["B"].sharding.device_set) == 8


def test_what_does_not_fit_is_refused() -> None:
    params = factors()
    for scaling in (0, -1.0, float("inf"), {"head": 0.0}):
        with pytest.raises(ValueError, match="scaling=.*: give s, alpha / r"):
            lora_fa(0.1, scaling=scaling)
    with pytest.raises(ValueError, match="damping=-1: give what is added"):
        lora_fa(0.1, scaling=1.0, damping=-1)
    with pytest.raises(ValueError, match="is no gradient transformation"):
        lora_fa(0.1, scaling=1.0, inner=optax.sgd)
    with pytest.raises(ValueError, match="scaling: 'haed' matches no parameter.*head"):
        lora_fa(0.1, scaling={"haed": 1.0}).init(params)
    with pytest.raises(ValueError, match="has no scale for 'layers/query/kernel': add a pattern"):
        lora_fa(0.1, scaling={"head": 1.0}).init(params)
    with pytest.raises(ValueError, match="no node of the tree has matrices A and B"):
        lora_fa(0.1, scaling=1.0).init({"x": {"value": jnp.ones((2, 2))}})
    tx = lora_fa(0.1, scaling=1.0)
    with pytest.raises(ValueError, match="lora_fa reads the factors"):
        tx.update(params, tx.init(params))
