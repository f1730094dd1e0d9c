"""LoRA-XS beyond the table: the frozen factors, the core's start, the official golden vectors."""

import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "official" / "lora_xs" / "golden.npz"
D_IN, D_OUT, RANK = 12, 7, 3


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    if not GOLDEN.exists():
        pytest.skip("the official LoRA-XS vectors (../shared/golden/official/lora_xs) are absent")
    return dict(np.load(GOLDEN))


def started(key: jax.Array, W: Any, **kwargs: Any) -> dict[str, jax.Array]:
    peft = pefts.lora_xs(**{"rank": RANK, **kwargs})
    state = peft.init(key, {"kernel": jnp.asarray(W)})
    return {**state.trainable["kernel"], **state.frozen["kernel"]}


@pytest.fixture
def W(key: jax.Array) -> jax.Array:
    return jax.random.normal(key, (D_IN, D_OUT))


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_official_factors(golden: dict[str, np.ndarray], key: jax.Array, svd: str) -> None:
    with jax.enable_x64(True):
        p = started(key, golden["W"].T, rank=int(golden["rank"]), svd=svd)
        A, B = np.asarray(p["A"]), np.asarray(p["B"])
    theirs_A, theirs_B = golden["lora_A"].T, golden["lora_B"].T
    np.testing.assert_allclose(A @ B, golden["reconstruction"].T, atol=1e-6)
    np.testing.assert_allclose(A @ A.T, theirs_A @ theirs_A.T, atol=1e-6)
    np.testing.assert_allclose(B.T @ B, theirs_B.T @ theirs_B, atol=1e-6)


def test_official_forward_merge_and_gradients(golden: dict[str, np.ndarray]) -> None:
    with jax.enable_x64(True):
        rank, alpha = int(golden["rank"]), float(golden["alpha"])
        params = {"kernel": jnp.asarray(golden["W"].T), "bias": jnp.asarray(golden["b"])}
        model = nn.Dense(len(golden["b"]), param_dtype=jnp.float64, dtype=jnp.float64)
        peft = pefts.lora_xs(rank=rank, alpha=alpha)
        frozen = {
            "A": jnp.asarray(golden["lora_A"].T),
            "B": jnp.asarray(golden["lora_B"].T),
            "scale": jnp.float64(alpha / rank),
        }
        state = pefts.PeftState({"kernel": {"R": jnp.asarray(golden["R"].T)}}, {"kernel": frozen})

        def run(trainable: Any, x: jax.Array) -> jax.Array:
            bound = peft.bind(params, state._replace(trainable=trainable))
            return pefts.apply(model.apply)({"params": bound}, x)

        y, pull = jax.vjp(run, state.trainable, jnp.asarray(golden["x"]))
        grads, grad_x = pull(jnp.asarray(golden["cot"]))
        merged = peft.merge(params, state)["kernel"]
        close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
        close(y, golden["y"])
        close(merged, golden["W_eff"].T)
        close(grads["kernel"]["R"], golden["grad_R"].T)
        close(grad_x, golden["grad_x"])


def test_an_identity_core_adds_the_truncation_of_the_kernel(
    golden: dict[str, np.ndarray], key: jax.Array
) -> None:
    with jax.enable_x64(True):
        rank = int(golden["rank"])
        peft = pefts.lora_xs(rank=rank, alpha=float(rank))
        params = {"kernel": jnp.asarray(golden["W"].T)}
        state = peft.init(key, params)
        state = state._replace(trainable={"kernel": {"R": jnp.eye(rank, dtype=jnp.float64)}})
        delta = peft.merge(params, state)["kernel"] - params["kernel"]
        np.testing.assert_allclose(delta, golden["delta_R_identity_s1"].T, atol=1e-6)


@pytest.mark.parametrize(
    ("sigma_on", "power_A", "power_B"), [("input", 1, 0), ("output", 0, 1), ("both", 0.5, 0.5)]
)
def test_where_the_singular_values_stand(
    W: jax.Array, key: jax.Array, sigma_on: str, power_A: float, power_B: float
) -> None:
    p = started(key, W, sigma_on=sigma_on)
    U, S, Vt = np.linalg.svd(np.asarray(W, np.float64), full_matrices=False)
    U, S, Vt = U[:, :RANK], S[:RANK], Vt[:RANK]
    A, B = np.asarray(p["A"]), np.asarray(p["B"])
    np.testing.assert_allclose(A @ B, U * S @ Vt, atol=1e-5)
    np.testing.assert_allclose(A.T @ A, np.diag(S ** (2 * power_A)), atol=1e-4)
    np.testing.assert_allclose(B @ B.T, np.diag(S ** (2 * power_B)), atol=1e-4)


def test_a_random_basis_ignores_the_kernel(W: jax.Array, key: jax.Array) -> None:
    p, of_other = (started(key, kernel, basis="random") for kernel in (W, 3 * W))
    for name, bound in (("A", RANK**-0.5), ("B", D_OUT**-0.5)):
        np.testing.assert_array_equal(p[name], of_other[name])
        largest = float(jnp.abs(p[name]).max())
        assert 0.8 * bound < largest <= bound


def test_the_core_starts_small_and_differs_between_layers(key: jax.Array) -> None:
    params = {"kernel": jax.random.normal(key, (3, 40, 30))}
    R = np.asarray(
        pefts.lora_xs(rank=30, axes={"kernel": "lio"}).init(key, params).trainable["kernel"]["R"]
    )
    np.testing.assert_allclose(R.std(), 1e-5, rtol=0.05)
    assert not np.allclose(R[0], R[1], rtol=0.5)


def test_a_core_of_zeros_learns(W: jax.Array, key: jax.Array) -> None:
    model, params = nn.Dense(D_OUT, use_bias=False), {"kernel": W}
    x = jax.random.normal(key, (5, D_IN))
    peft = pefts.lora_xs(rank=RANK, init_std=0.0)
    state = peft.init(key, params)
    assert peft.traits.identity_at_init and not pefts.lora_xs(rank=RANK).traits.identity_at_init

    def loss(trainable: Any) -> jax.Array:
        bound = peft.bind(params, state._replace(trainable=trainable))
        return jnp.sum(pefts.apply(model.apply)({"params": bound}, x) ** 2)

    assert float(loss(state.trainable)) == float(jnp.sum((x @ W) ** 2))
    grads = jax.grad(loss)(state.trainable)
    assert grads["kernel"].keys() == {"R"}
    assert (np.abs(grads["kernel"]["R"]) > 0).all()


def test_the_backward_pass_builds_no_factor_sized_gradient(W: jax.Array, key: jax.Array) -> None:
    """R's gradient comes from products with r columns: nothing is as large as A, B or W."""
    rows = 5
    peft, params = pefts.lora_xs(rank=RANK), {"kernel": W}
    state = peft.init(key, params)
    bound = peft.bind(params, state)["kernel"]

    def loss(R: jax.Array) -> jax.Array:
        y = bound.rule.linear(
            jnp.ones((rows, D_IN)), W, {**bound.state, "R": R}, pefts.bound.Call()
        )
        return jnp.sum(y)

    made = {
        tuple(variable.aval.shape)
        for equation in jax.make_jaxpr(jax.grad(loss))(bound.state["R"]).eqns
        if equation.primitive.name == "dot_general"
        for variable in equation.outvars
    }
    assert (RANK, RANK) in made
    assert not made & {(D_IN, RANK), (RANK, D_IN), (RANK, D_OUT), (D_OUT, RANK), (D_IN, D_OUT)}


def test_a_lora_does_the_same(key: jax.Array, W: jax.Array) -> None:
    params, x = {"kernel": W}, jax.random.normal(key, (5, D_IN))
    peft = pefts.lora_xs(rank=RANK)
    state = pefts.randomize(key, peft.init(key, params))
    lora, converted = pefts.to_lora(peft, state, params)
    assert lora.config["rank"] == RANK
    wanted, found = (
        x @ p.merge(params, s)["kernel"] for p, s in ((peft, state), (lora, converted))
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
