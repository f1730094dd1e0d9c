"""LoRA-SB beyond the table: the first step it holds, projections, the official golden vectors."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts
from pefts.linalg import svd
from pefts.methods.lora_sb import first_step_size

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "official" / "lora_sb" / "golden.npz"
D_IN, D_OUT, RANK, ETA0 = 12, 7, 3, 0.01
PARAMS = {"kernel": jnp.ones((D_IN, D_OUT))}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    if not GOLDEN.exists():
        pytest.skip("the official LoRA-SB vectors (../shared/golden/official/lora_sb) are absent")
    return dict(np.load(GOLDEN))


@pytest.fixture
def G(key: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.normal(key, (D_IN, D_OUT)))


def started(gradient: Any, eta0: float = ETA0, rank: int = RANK, **kwargs: Any) -> dict:
    peft = pefts.lora_sb(rank=rank, eta0=eta0, **kwargs)
    params = {"kernel": jnp.ones(gradient.shape)}
    stats = {"kernel": {"gradient": jnp.asarray(gradient)}}
    state = peft.init(jax.random.key(0), params, stats)
    return {n: np.asarray(leaf) for group in state for n, leaf in group["kernel"].items()}


def test_the_factors_are_orthonormal_and_the_core_a_spectrum(G: np.ndarray) -> None:
    p = started(G)
    np.testing.assert_allclose(p["A"].T @ p["A"], np.eye(RANK), atol=1e-6)
    np.testing.assert_allclose(p["B"] @ p["B"].T, np.eye(RANK), atol=1e-6)
    S = np.diag(p["R"])
    np.testing.assert_array_equal(p["R"], np.diag(S))
    assert (S > 0).all() and (np.diff(S) <= 0).all() and p["scale"] == 1


def test_the_start_is_the_best_approximation_of_the_first_step(G: np.ndarray) -> None:
    p, D = started(G), -ETA0 * np.sign(G).astype(np.float64)
    left = np.linalg.svd(D, compute_uv=False)[RANK:]
    missed = np.sum((p["A"] @ p["R"] @ p["B"] - D) ** 2)
    np.testing.assert_allclose(missed, np.sum(left**2), rtol=1e-5)
    full = started(G, rank=D_OUT)
    np.testing.assert_allclose(full["A"] @ full["R"] @ full["B"], D, atol=1e-8)


def test_one_step_lowers_a_linear_loss(G: np.ndarray) -> None:
    """The sign of D: along -G, not along G."""
    p = started(G)
    assert np.sum(G * (p["A"] @ p["R"] @ p["B"])) < 0


@pytest.mark.parametrize("factor", [1e-9, 3.7e5])
def test_the_scale_of_the_loss_does_not_matter(G: np.ndarray, factor: float) -> None:
    for name, leaf in started(G).items():
        np.testing.assert_array_equal(started(factor * G)[name], leaf, name)


def test_where_there_is_no_gradient_there_is_no_step(G: np.ndarray) -> None:
    """Whole kernels, as of an expert that no token reached, and single rows."""
    p = started(np.zeros_like(G))
    assert not p["R"].any() and all(np.isfinite(leaf).all() for leaf in p.values())
    np.testing.assert_allclose(p["A"].T @ p["A"], np.eye(RANK), atol=1e-6)
    p = started(np.where(np.arange(D_IN)[:, None] < 4, 0, G))
    np.testing.assert_allclose((p["A"] @ p["R"] @ p["B"])[:4], 0, atol=1e-8)


def test_the_core_follows_the_projection_of_any_gradient(G: np.ndarray, key: jax.Array) -> None:
    """grad_R = A^T g B^T, and A grad_R B is g projected onto the factors' spans."""
    peft = pefts.lora_sb(rank=RANK, eta0=ETA0)
    state = peft.init(key, PARAMS, {"kernel": {"gradient": jnp.asarray(G)}})
    g = np.asarray(jax.random.normal(jax.random.fold_in(key, 1), G.shape), np.float64)

    def loss(trainable: Any) -> jax.Array:
        W = peft.merge(PARAMS, state._replace(trainable=trainable))["kernel"]
        return jnp.sum(W * jnp.asarray(g, jnp.float32))

    grad_R = np.asarray(jax.grad(loss)(state.trainable)["kernel"]["R"])
    A, B = (np.asarray(state.frozen["kernel"][name], np.float64) for name in "AB")
    np.testing.assert_allclose(grad_R, A.T @ g @ B.T, rtol=1e-5, atol=1e-6)
    inside = A @ A.T @ g @ B.T @ B
    np.testing.assert_allclose(A @ grad_R @ B, inside, rtol=1e-5, atol=1e-6)
    outside = g - A @ grad_R @ B
    np.testing.assert_allclose(A.T @ outside @ B.T, 0, atol=1e-5)


def test_the_gradient_of_calibration_is_the_one_it_starts_from(key: jax.Array) -> None:
    model, x = nn.Dense(D_OUT), jax.random.normal(key, (9, D_IN))
    params = model.init(key, x)["params"]
    target = jax.random.normal(jax.random.fold_in(key, 1), (9, D_OUT))

    def run(variables: Any, batch: Any) -> jax.Array:
        return model.apply(variables, batch[0])

    def loss(y: jax.Array, batch: Any) -> jax.Array:
        return jnp.mean((y - batch[1]) ** 2)

    stats = pefts.calibrate(run, params, [(x, target)], "kernel", collect="gradient", loss=loss)
    peft = pefts.lora_sb(rank=RANK, eta0=1e-3)
    state = peft.init(key, params, stats)
    delta = np.asarray(peft.merge(params, state)["kernel"] - params["kernel"], np.float64)
    G = np.asarray(x).T @ np.asarray(model.apply({"params": params}, x) - target)
    U, S, V = (np.asarray(part) for part in svd(-1e-3 * np.sign(G), RANK))
    np.testing.assert_allclose(delta, U * S @ V.T, atol=1e-6)
    dense = peft.merge(params, state)
    before, after = (loss(model.apply({"params": p}, x), (x, target)) for p in (params, dense))
    assert after < before


def test_official_start(golden: dict[str, np.ndarray]) -> None:
    rank, eta0 = int(golden["rank"]), float(golden["eta0"])
    p, D = started(golden["G"].T, eta0, rank), golden["step"].T.astype(np.float64)
    ours, theirs = p["A"] @ p["R"] @ p["B"], golden["delta"].T
    missed = [np.linalg.norm(delta - D) for delta in (ours, theirs)]
    np.testing.assert_allclose(missed[0], missed[1], rtol=1e-4)
    largest = np.abs(golden["exact_truncation"]).max()
    np.testing.assert_allclose(ours, golden["exact_truncation"].T, atol=1e-6 * largest)
    allowed = 5 * float(golden["delta_vs_exact_rel"]) * largest
    np.testing.assert_allclose(ours, theirs, atol=allowed)
    np.testing.assert_allclose(np.diag(p["R"]), golden["exact_S"][:rank], rtol=1e-5)


def test_official_forward_and_gradient(golden: dict[str, np.ndarray]) -> None:
    W = jnp.asarray(golden["W"].T)
    frozen = {"A": golden["lora_A"].T, "B": golden["lora_B"].T, "scale": np.float32(1)}
    state = pefts.PeftState(
        {"kernel": {"R": jnp.asarray(golden["R"].T)}},
        {"kernel": jax.tree.map(jnp.asarray, frozen)},
    )
    peft, model = pefts.lora_sb(rank=int(golden["rank"]), eta0=1.0), nn.Dense(W.shape[1], False)

    def run(trainable: Any) -> jax.Array:
        bound = peft.bind({"kernel": W}, state._replace(trainable=trainable))
        return pefts.apply(model.apply)({"params": bound}, jnp.asarray(golden["x"]))

    with jax.default_matmul_precision("highest"):
        y, pull = jax.vjp(run, state.trainable)
        grad_R = pull(jnp.asarray(golden["cot"]))[0]["kernel"]["R"]
    np.testing.assert_allclose(y, golden["y"], rtol=2e-6, atol=2e-6)
    largest = np.abs(golden["grad_R"]).max()
    np.testing.assert_allclose(grad_R, golden["grad_R"].T, atol=2e-6 * largest)


def test_first_step_size(golden: dict[str, np.ndarray]) -> None:
    assert first_step_size(1e-3, 0) == first_step_size(1e-3, 1) == 1e-3
    np.testing.assert_allclose(first_step_size(2e-3, 40), 5e-5)
    warmup = float(golden["warmup_ratio"]) * int(golden["steps"])
    official = float(golden["lr"]) / warmup
    np.testing.assert_allclose(official, golden["eta0"])
    np.testing.assert_allclose(first_step_size(float(golden["lr"]), 7), official, rtol=0.03)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [((0.0, 3), "learning_rate=0.0"), ((1e-3, -1), "warmup_steps=-1"), ((1e-3, 0.5), "=0.5")],
)
def test_first_step_size_refuses(arguments: tuple, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        first_step_size(*arguments)


def test_gradients_are_asked_for(key: jax.Array) -> None:
    with pytest.raises(ValueError, match="'gradient', and there is none for 'kernel'"):
        pefts.lora_sb(rank=RANK, eta0=ETA0).init(key, PARAMS)
