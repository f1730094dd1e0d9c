"""CorDA beyond the table: the official code's vectors, the damping, both modes, float32."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts
from pefts.methods.corda import MODES, damped

GOLDEN = Path(__file__).parents[2] / "shared/golden/official/corda/golden.npz"
D_IN, D_OUT, RANK, ALPHA = 24, 16, 5, 2.0


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    if not GOLDEN.exists():
        pytest.skip("the official CorDA vectors (../shared/golden/official/corda) are absent")
    with np.load(GOLDEN) as file:
        return dict(file)


def kernel(shape: tuple[int, int] = (D_IN, D_OUT)) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


def moment(d_in: int = D_IN, condition: float = 1e4) -> np.ndarray:
    """A second moment whose eigenvalues fall geometrically."""
    rng = np.random.default_rng(1)
    Q = np.linalg.qr(rng.normal(size=(d_in, d_in)))[0]
    return Q @ np.diag(condition ** -np.linspace(0, 1, d_in)) @ Q.T


def initial(
    W: np.ndarray, C: np.ndarray, rank: int = RANK, alpha: float = ALPHA, **kwargs: Any
) -> tuple[pefts.Peft, dict, pefts.PeftState]:
    params = {"kernel": jnp.asarray(W, jnp.float32)}
    stats = {"kernel": {"sample_moment": jnp.asarray(C, jnp.float32), "samples": 3.0}}
    peft = pefts.corda(rank=rank, alpha=alpha, targets="kernel", **kwargs)
    return peft, params, peft.init(jax.random.key(0), params, stats)


def started(*args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
    """A, B, A0, B0 and the scale at step 0, in float64."""
    _, _, state = initial(*args, **kwargs)
    groups = {**state.trainable["kernel"], **state.frozen["kernel"]}
    return {name: np.asarray(leaf, np.float64) for name, leaf in groups.items()}


def product(p: dict[str, np.ndarray]) -> np.ndarray:
    return p["scale"] * p["A0"] @ p["B0"]


def damped64(C: np.ndarray, delta: float = 0.01) -> np.ndarray:
    return C + delta * np.mean(np.diag(C)) * np.eye(len(C))


# --- the released programs ---


@pytest.mark.parametrize(
    ("run", "mode"),
    [("peft_ipm", "ipm"), ("peft_kpm", "kpm"), ("off_first", "ipm"), ("off_last", "kpm")],
)
def test_official_vectors(run: str, mode: str, golden: dict[str, np.ndarray]) -> None:
    """Residual, product and Gram matrices; signs of the singular vectors are free.

    Both programs multiply by a float32 inverse, which puts their residuals 1.2e-5 from float64's;
    ours are within 1e-6, and within 1e-5 where the smallest singular values, 1e-3 of the largest,
    choose the part.
    """
    rank = int(golden["rank"])
    alpha = float(golden["alpha"]) if run.startswith("peft") else float(rank)
    W, C = golden["W"].T, golden["C"]
    p = started(W, C, rank, alpha, mode=mode)
    V = np.linalg.svd(damped64(C.astype(np.float64)) @ W)[2][:12].T
    V = V[:, :rank] if mode == "ipm" else V[:, -rank:]
    np.testing.assert_allclose(product(p), W @ V @ V.T, atol=1e-6 if mode == "ipm" else 1e-5)
    names = ("lora_A", "lora_B") if run.startswith("peft") else ("A", "B")
    A, B = (golden[f"{run}_{name}"].T.astype(np.float64) for name in names)
    np.testing.assert_allclose(product(p), alpha / rank * A @ B, atol=2e-5)
    np.testing.assert_allclose(W - product(p), golden[f"{run}_W_res"].T, atol=2e-5)
    for ours, theirs in ((p["A"] @ p["A"].T, A @ A.T), (p["B"].T @ p["B"], B.T @ B)):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    np.testing.assert_allclose(golden["damp"], 0.01)


@pytest.mark.parametrize(("run", "mode"), [("off_first", "ipm"), ("off_last", "kpm")])
def test_official_outputs_and_gradients(run: str, mode: str, golden: dict[str, np.ndarray]) -> None:
    rank, x = int(golden["rank"]), jnp.asarray(golden["x"])
    peft, params, state = initial(golden["W"].T, golden["C"], rank, float(rank), mode=mode)
    model = nn.Dense(params["kernel"].shape[1])
    params = {**params, "bias": jnp.asarray(golden["b"])}

    def outputs(trainable: Any) -> jax.Array:
        bound = peft.bind(params, state._replace(trainable=trainable))
        return pefts.apply(model.apply)({"params": bound}, x)

    np.testing.assert_allclose(outputs(state.trainable), golden[f"{run}_y_init"], atol=2e-5)
    grads = jax.grad(lambda t: jnp.sum(outputs(t) * golden["cot"]))(state.trainable)["kernel"]
    p = state.trainable["kernel"]
    theirs = {name: golden[f"{run}_{name}"].T for name in ("A", "B", "grad_A", "grad_B")}
    np.testing.assert_allclose(
        p["A"] @ grads["A"].T, theirs["A"] @ theirs["grad_A"].T, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        p["B"].T @ grads["B"], theirs["B"].T @ theirs["grad_B"], rtol=1e-4, atol=1e-4
    )


# --- the decomposition ---


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_the_part_taken_over_in_the_papers_notation(mode: str, shape: tuple[int, int]) -> None:
    W, C = kernel(shape), moment(shape[0], 100.0)
    U, S, Vt = np.linalg.svd(damped64(C) @ W, full_matrices=False)
    chosen = slice(RANK) if mode == "ipm" else slice(-RANK, None)
    s, p = ALPHA / RANK, started(W, C, mode=mode)
    A = np.linalg.inv(damped64(C)) @ U[:, chosen] * np.sqrt(S[chosen] / s)
    B = np.sqrt(S[chosen] / s)[:, None] * Vt[chosen]
    np.testing.assert_allclose(p["scale"], s, rtol=1e-7)
    np.testing.assert_allclose(product(p), s * A @ B, atol=1e-4)
    np.testing.assert_allclose(p["A"] @ p["A"].T, A @ A.T, rtol=1e-3, atol=1e-3 * (A**2).max())
    np.testing.assert_allclose(p["B"].T @ p["B"], B.T @ B, atol=1e-5 * (B**2).max())


def test_the_identity_as_moment_gives_pissa() -> None:
    W = kernel()
    peft = pefts.pissa(rank=RANK, alpha=ALPHA, targets="kernel")
    state = peft.init(jax.random.key(0), {"kernel": jnp.asarray(W, jnp.float32)})
    theirs = {n: np.asarray(leaf, np.float64) for n, leaf in state.trainable["kernel"].items()}
    p = started(W, np.eye(D_IN) / 1.01)
    np.testing.assert_allclose(p["A"] @ p["B"], theirs["A"] @ theirs["B"], atol=1e-5)
    np.testing.assert_allclose(p["A"] @ p["A"].T, theirs["A"] @ theirs["A"].T, atol=1e-5)
    np.testing.assert_allclose(p["B"].T @ p["B"], theirs["B"].T @ theirs["B"], atol=1e-5)


def test_the_first_parts_are_the_best_in_the_moments_norm() -> None:
    W, C = kernel(), moment()
    C_d = damped64(C)

    def loss(candidate: np.ndarray) -> float:
        return float(np.linalg.norm(C_d @ (W - candidate)))

    S = np.linalg.svd(C_d @ W, compute_uv=False)
    part = product(started(W, C))
    best = loss(part)
    np.testing.assert_allclose(best, np.linalg.norm(S[RANK:]), rtol=1e-5)
    U, S_W, Vt = np.linalg.svd(W)
    assert best < 0.9 * loss(U[:, :RANK] * S_W[:RANK] @ Vt[:RANK])
    rng = np.random.default_rng(2)
    for _ in range(20):
        nearby = part + 0.01 * rng.normal(size=W.shape)
        U, S, Vt = np.linalg.svd(nearby)
        assert best < loss(U[:, :RANK] * S[:RANK] @ Vt[:RANK])


def test_the_modes_divide_the_kernel() -> None:
    """The first k - r parts and the last r are all of W."""
    W, C = kernel(), moment()
    first = product(started(W, C, D_OUT - RANK, mode="ipm"))
    last = product(started(W, C, RANK, mode="kpm"))
    np.testing.assert_allclose(first + last, W, atol=1e-5)


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e12])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(96, 64), (64, 64), (64, 96)])
def test_at_full_rank_float32_takes_all_of_the_kernel_over(
    shape: tuple[int, int], mode: str, condition: float
) -> None:
    W, C = kernel(shape), moment(shape[0], condition)
    p = started(W, C, min(shape), mode=mode)
    assert np.linalg.norm(product(p) - W) < 1e-4 * np.linalg.norm(W)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_fresh_adapter_changes_no_bit(dtype: Any, key: jax.Array) -> None:
    model = nn.Dense(D_OUT, dtype=dtype, param_dtype=dtype)
    x = jax.random.normal(key, (6, 7, D_IN), dtype)
    params = model.init(key, x)["params"]
    peft = pefts.corda(rank=RANK, alpha=ALPHA, targets="kernel")
    stats = pefts.calibrate(
        lambda v, x: model.apply(v, x), params, [x], "kernel", collect="sample_moment"
    )
    state = peft.init(key, params, stats)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    y = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    np.testing.assert_array_equal(y, model.apply({"params": params}, x))


def test_a_kernel_of_lower_rank_starts_finite_and_small() -> None:
    """Its last parts are rounding: they must not blow up where a root of S divides."""
    W = kernel((D_IN, 3)) @ kernel((3, D_OUT))
    W[:, 4] = 0
    p = started(W, moment(), mode="kpm")
    assert max(np.abs(p[name]).max() for name in ("A", "B")) < 1e-2
    assert not started(np.zeros_like(W), moment())["A"].any()


# --- the damping ---


def delta_of(C: np.ndarray) -> float:
    with jax.enable_x64(True):
        C_d = np.asarray(jax.jit(damped)(jnp.asarray(C)))
    ridge = (C_d - C) / np.mean(np.diag(C))
    np.testing.assert_allclose(ridge, ridge[0, 0] * np.eye(len(C)), atol=1e-12)
    return float(ridge[0, 0])


@pytest.mark.parametrize(
    ("smallest", "delta"), [(0.0, 0.01), (-0.005, 0.01), (-0.05, 0.08), (-0.5, 0.64)]
)
def test_the_damping_doubles_until_the_moment_is_invertible(smallest: float, delta: float) -> None:
    C = np.eye(8)
    C[0, 0] = smallest
    np.testing.assert_allclose(delta_of(C), delta, rtol=1e-6)


def test_a_bad_inverse_is_damped_too() -> None:
    """In float32 the inverse of a large moment of rank one misses the identity by over 0.05."""
    ones = jnp.ones((1024, 1024), jnp.float32)
    eye = jnp.eye(1024, dtype=jnp.float32)
    C_d = damped(ones)
    error = jnp.linalg.norm(C_d @ jnp.linalg.solve(C_d, eye) - eye)
    assert float(C_d[0, 0]) - 1 > 0.011
    assert float(error) < 0.1


@pytest.mark.parametrize("C", [np.zeros((D_IN, D_IN)), np.full((D_IN, D_IN), np.nan)])
def test_moments_that_no_damping_repairs_are_refused(C: np.ndarray) -> None:
    with pytest.raises(ValueError, match="corda: the initial 'A' of 'kernel' .* stays singular"):
        started(kernel(), C)


def test_without_statistics_the_call_to_make_is_named(key: jax.Array) -> None:
    with pytest.raises(ValueError, match=r"'sample_moment', and .* pefts.calibrate\("):
        pefts.corda(targets="kernel").init(key, {"kernel": jnp.ones((D_IN, D_OUT))})


def test_tokens_and_samples_count_as_in_the_released_code(golden: dict[str, np.ndarray]) -> None:
    """From activations to the factors, in one go."""
    model = nn.Dense(golden["W"].shape[0])
    params = {"kernel": jnp.asarray(golden["W"].T), "bias": jnp.asarray(golden["b"])}
    peft = pefts.corda(rank=4, alpha=6.0, targets="kernel")
    stats = pefts.calibrate(
        lambda v, x: model.apply(v, x),
        params,
        [jnp.asarray(golden["calib"][:1]), jnp.asarray(golden["calib"][1:])],
        "kernel",
        collect="sample_moment",
    )
    np.testing.assert_allclose(stats["kernel"]["sample_moment"], golden["C"], rtol=1e-5, atol=1e-6)
    p = peft.init(jax.random.key(0), params, stats).trainable["kernel"]
    theirs = golden["peft_ipm_lora_A"].T @ golden["peft_ipm_lora_B"].T
    np.testing.assert_allclose(p["A"] @ p["B"], theirs, atol=2e-5)
