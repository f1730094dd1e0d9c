"""The Riemannian preconditioner against numpy, Hugging Face PEFT's, and as a citizen of optax."""

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
from pefts.optimizers.riemannian import damped_inverse, riemannian, scale_by_riemannian

GOLDEN = Path(__file__).parents[1] / "../shared/golden/official/lora_optimizers/golden.npz"

pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")


@pytest.fixture(scope="module")
def golden() -> Any:
    if not GOLDEN.exists():
        pytest.skip("the golden vectors of Hugging Face PEFT are not beside this repository")
    return np.load(GOLDEN)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_the_official_trajectory(kind: str, golden: Any, x64: None) -> None:
    reg, lr = float(golden["riemannian_reg"]), float(golden["lr"])
    decay = float(golden["weight_decay"]) if kind == "adamw" else 0.0
    inner = optax.scale_by_adam() if kind == "adamw" else optax.identity()
    tx = riemannian(lr, reg=reg, inner=inner, weight_decay=decay)
    params = official_pairs(golden, "A0", "B0")
    state, precondition = tx.init(params), scale_by_riemannian(reg=reg, inner=optax.identity())
    for t in range(int(golden["n_steps"])):
        grads = official_pairs(golden, "GA", "GB", t)
        if kind == "sgd":
            seen, _ = jitted(precondition.update)(grads, precondition.init(params), params)
            name = "riemannian_sgd__precond_G"
            close(seen, official_pairs(golden, f"{name}A", f"{name}B", t), 1e-11, 1e-12)
        params, state, _ = run(tx, params, [grads], state)
        name = f"riemannian_{kind}__"
        close(params, official_pairs(golden, f"{name}A", f"{name}B", t), 0, 1e-11)


def factors(layers: int = 2, d_in: int = 7, d_out: int = 5, r: int = 3, seed: int = 0) -> dict:
    """A stack of pairs, one that is not stacked, and what is no pair."""
    draw = np.random.default_rng(seed).normal
    shapes = {
        "layers/query/kernel": {"A": (layers, d_in, r), "B": (layers, r, d_out)},
        "head/kernel": {"A": (d_in, r), "B": (r, d_out)},
        "norm/scale": {"value": (d_in,)},
        "alone/kernel": {"A": (d_in, r)},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(draw(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def oracle(A: Any, B: Any, gA: Any, gB: Any, reg: float) -> tuple[Any, Any]:
    A, B, gA, gB = (np.asarray(x, np.float64) for x in (A, B, gA, gB))
    eye = reg * np.eye(len(B))
    return gA @ np.linalg.inv(B @ B.T + eye), np.linalg.inv(A.T @ A + eye) @ gB


def preconditioned(params: dict, grads: dict, reg: float) -> dict:
    tx = scale_by_riemannian(reg=reg, inner=optax.identity())
    return jitted(tx.update)(grads, tx.init(params), params)[0]


def test_every_pair_is_preconditioned_layer_by_layer_and_nothing_else() -> None:
    params, grads = factors(), factors(seed=1)
    with jax.numpy_dtype_promotion("strict"):
        updates = preconditioned(params, grads, 0.1)
    stack, pair = "layers/query/kernel", "head/kernel"
    for layer in range(2):
        args = (tree[stack][name][layer] for tree in (params, grads) for name in "AB")
        for name, expected in zip("AB", oracle(*args, 0.1), strict=True):
            near(updates[stack][name][layer], expected, 2e-5)
    args = (tree[pair][name] for tree in (params, grads) for name in "AB")
    for name, expected in zip("AB", oracle(*args, 0.1), strict=True):
        near(updates[pair][name], expected, 2e-5)
    for path in ("norm/scale", "alone/kernel"):
        jax.tree.map(np.testing.assert_array_equal, updates[path], grads[path])


def test_the_step_of_the_product_does_not_see_how_it_is_divided(x64: None) -> None:
    draw = np.random.default_rng(3).normal
    A, B, G, T = (jnp.asarray(draw(size=s)) for s in ((7, 3), (3, 5), (7, 5), (3, 3)))

    def step(A: Any, B: Any) -> Any:
        """First-order change of A B for the gradient G of the product."""
        params, grads = {"A": A, "B": B}, {"A": G @ B.T, "B": A.T @ G}
        updates = preconditioned(params, grads, 0.0)
        return updates["A"] @ B + A @ updates["B"]

    near(step(A, B), step(A @ T, jnp.linalg.solve(T, B)), 1e-11)
    plain = G @ B.T @ B + A @ A.T @ G
    other, back = A @ T, jnp.linalg.solve(T, B)
    assert not np.allclose(plain, G @ back.T @ back + other @ other.T @ G, atol=0.1)


@pytest.mark.parametrize("reg", [0.0, 1e-10, 1e-2])
def test_a_factor_without_full_rank_makes_nothing_infinite(reg: float) -> None:
    params, grads = factors(), factors(seed=1)
    pair = params["head/kernel"]
    pair["A"] = pair["A"].at[:, 2].set(pair["A"][:, 0] + pair["A"][:, 1])
    pair["B"] = jnp.zeros_like(pair["B"])
    updates = preconditioned(params, grads, reg)["head/kernel"]
    expected = grads["head/kernel"]["A"] / reg if reg else 0 * grads["head/kernel"]["A"]
    np.testing.assert_allclose(updates["A"], expected, rtol=1e-5)
    A, g = (
        np.asarray(tree["head/kernel"][n], np.float64) for tree, n in ((params, "A"), (grads, "B"))
    )
    if reg < 1e-7:  # below what float32 tells from zero
        near(updates["B"], np.linalg.pinv(A.T @ A, rcond=1e-6) @ g, 1e-4)
    else:
        near(updates["B"], np.linalg.inv(A.T @ A + reg * np.eye(3)) @ g, 1e-2)


def test_a_factor_that_is_not_finite_is_not_hidden() -> None:
    params, grads = factors(), factors(seed=1)
    params["head/kernel"]["B"] = params["head/kernel"]["B"].at[0, 0].set(jnp.nan)
    updates = preconditioned(params, grads, 1e-2)
    assert np.isnan(updates["head/kernel"]["A"]).all()
    assert np.isfinite(updates["head/kernel"]["B"]).all()
    assert np.isnan(damped_inverse(jnp.full((3, 3), jnp.inf), 0.1)).any()


def test_decompositions_run_layer_by_layer() -> None:
    jaxpr = str(jax.make_jaxpr(lambda G: damped_inverse(G, 0.1))(jnp.zeros((4, 3, 3))))
    assert "scan" in jaxpr and "f32[4,3,3] f32[4,3] = eigh" not in jaxpr
    assert jaxpr.count("eigh[") == 1


def test_bfloat16_leaves_have_a_float32_state_and_bfloat16_updates() -> None:
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), factors())
    grads = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), factors(seed=1))
    tx = scale_by_riemannian()
    updates, state = jitted(tx.update)(grads, tx.init(half), half)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(t) for t in ("f4", "i4")}
    up = functools.partial(jax.tree.map, lambda leaf: leaf.astype(jnp.float32))
    expected, _ = jitted(tx.update)(up(grads), tx.init(up(half)), up(half))
    close(up(updates), expected, 1e-2, 1e-3)


def test_its_only_state_is_adams() -> None:
    params = factors()
    state = riemannian(0.1).init(params)
    assert pefts.count(state) == 2 * pefts.count(params) + 1


def test_it_is_the_chain_of_its_parts_and_takes_schedules_and_injection() -> None:
    params, grads = factors(), [factors(seed=t) for t in (1, 2, 3)]
    schedule = optax.linear_schedule(0.1, 0.0, 4)
    alias = riemannian(schedule, reg=0.5, weight_decay=0.3)
    chain = optax.chain(
        scale_by_riemannian(reg=0.5),
        optax.add_decayed_weights(0.3),
        optax.scale_by_learning_rate(schedule),
    )
    injected = optax.inject_hyperparams(riemannian)(schedule, reg=0.5, weight_decay=0.3)
    assert set(injected.init(params).hyperparams) == {"learning_rate", "reg", "weight_decay"}
    end = run(alias, params, grads)[0]
    close(end, run(chain, params, grads)[0], 1e-5, 1e-6)
    close(end, run(injected, params, grads)[0], 1e-5, 1e-6)


def test_it_takes_a_part_of_a_tree_and_means_of_gradients() -> None:
    params, grads = factors(), [factors(seed=t) for t in (1, 2)]
    pairs = {path: "low" if path.endswith("kernel") else "rest" for path in params}
    tx = optax.partition({"low": riemannian(0.1), "rest": optax.sgd(0.5)}, pairs)
    multi = optax.MultiSteps(tx, 2).gradient_transformation()
    end, state, _ = run(multi, params, grads)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    part = {path: params[path] for path in params if path.endswith("kernel")}
    expected, _, _ = run(riemannian(0.1), part, [{path: mean[path] for path in part}])
    close({path: end[path] for path in part}, expected, 1e-5, 1e-6)
    near(
        end["norm/scale"]["value"],
        (params["norm/scale"]["value"] - 0.5 * mean["norm/scale"]["value"]),
        1e-6,
    )
    shifted = optax.tree.map_params(
        riemannian(0.1), lambda leaf: leaf + 1, riemannian(0.1).init(params)
    )
    assert {float(leaf.min()) for leaf in jax.tree.leaves(shifted) if leaf.ndim} == {1.0}


def test_eight_devices_give_what_one_gives() -> None:
    params, grads = factors(2, 16, 8), [factors(2, 16, 8, seed=t) for t in (1, 2)]
    tx = riemannian(0.1, weight_decay=0.1)
    expected, _, _ = run(tx, params, grads)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    spec = {
        "layers/query/kernel": {"A": P(None, "fsdp", None), "B": P(None, None, "data")},
        "head/kernel": {"A": P("fsdp", None), "B": P(None, "data")},
        "norm/scale": {"value": P("data")},
        "alone/kernel": {"A": P()},
    }
    place = functools.partial(
        jax.tree.map, lambda spec, leaf: jax.device_put(leaf, NamedSharding(mesh, spec)), spec
    )
    placed = place(params)
    state, step = jax.jit(tx.init)(placed), jax.jit(tx.update)
    for grad in grads:
        updates, state = step(place(grad), state, placed)
        placed = optax.apply_updates(placed, updates)
    close(placed, expected, 0, 1e-5)
    assert len(placed["head/kernel"]["A"].sharding.device_set) == 8


def test_it_trains_lora(key: jax.Array) -> None:
    target = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    params = {"kernel": jnp.zeros((6, 4))}
    peft = pefts.lora(rank=4, targets="kernel")
    state = peft.init(key, params)

    def loss(trainable: Any) -> jax.Array:
        merged = peft.merge(params, state._replace(trainable=trainable))
        return jnp.sum((merged["kernel"] - target) ** 2)

    grads = jax.jit(jax.grad(loss))
    trainable, tx = state.trainable, riemannian(0.05, inner=optax.identity())
    opt = tx.init(trainable)
    for _ in range(40):
        updates, opt = jitted(tx.update)(grads(trainable), opt, trainable)
        trainable = optax.apply_updates(trainable, updates)
    assert loss(trainable) < 1e-3 * loss(state.trainable)


def test_what_cannot_be_preconditioned_is_refused() -> None:
    for reg in (-1e-3, float("nan")):
        with pytest.raises(ValueError, match=f"reg={reg!r}: give what is added to the diagonal"):
            riemannian(0.1, reg=reg)
    with pytest.raises(ValueError, match="is no gradient transformation"):
        scale_by_riemannian(inner=optax.scale_by_adam)
    tx = riemannian(0.1)
    with pytest.raises(ValueError, match=r"no node .* matrices A and B; there are \['x/value'\]"):
        tx.init({"x": {"value": jnp.ones((2, 2))}})
    with pytest.raises(ValueError, match=r"A \(4, 2\) and B \(3, 5\) of 'x' are no factors"):
        tx.init({"x": {"A": jnp.ones((4, 2)), "B": jnp.ones((3, 5))}})
    with pytest.raises(ValueError, match="reads the factors: call update"):
        params = factors()
        tx.update(params, tx.init(params))
