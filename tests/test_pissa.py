"""PiSSA beyond the table: what is taken over and what stays, both decompositions, peft's own."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts
from pefts import linalg

# Sides that leave the randomised decomposition something to leave out.
D_IN, D_OUT, RANK, ALPHA = 80, 60, 5, 2.0
SCALE = ALPHA / RANK
SPECTRUM = 3.0 * 0.9 ** np.arange(D_OUT)


def kernel(spectrum: np.ndarray = SPECTRUM) -> np.ndarray:
    """A float64 kernel with these singular values."""
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.normal(size=(n, D_OUT)))[0] for n in (D_IN, D_OUT))
    return U @ np.diag(spectrum) @ V.T


def started(W: Any, **kwargs: Any) -> dict[str, np.ndarray]:
    """A, B, A0, B0 and the scale at step 0, in float64."""
    peft = pefts.pissa(rank=RANK, alpha=ALPHA, targets="kernel", **kwargs)
    state = peft.init(jax.random.key(0), {"kernel": jnp.asarray(W, jnp.float32)})
    groups = {**state.trainable["kernel"], **state.frozen["kernel"]}
    return {name: np.asarray(leaf, np.float64) for name, leaf in groups.items()}


def product(p: dict[str, np.ndarray]) -> np.ndarray:
    return p["scale"] * p["A0"] @ p["B0"]


BOTH = pytest.mark.parametrize("svd", linalg.METHODS)


@BOTH
def test_the_part_taken_over_is_the_truncated_svd(svd: str) -> None:
    W = kernel()
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    wanted = U[:, :RANK] * S[:RANK] @ Vt[:RANK]
    np.testing.assert_allclose(product(started(W, svd=svd)), wanted, atol=2e-6)


@BOTH
def test_what_stays_frozen_has_the_smaller_singular_values(svd: str) -> None:
    W = kernel()
    left = np.linalg.svd(W - product(started(W, svd=svd)), compute_uv=False)
    np.testing.assert_allclose(left[0], SPECTRUM[RANK], rtol=1e-6)
    assert np.sum(left > 1e-5) == D_OUT - RANK
    np.testing.assert_allclose(left[: D_OUT - RANK], SPECTRUM[RANK:], atol=2e-6)


@BOTH
def test_both_factors_carry_the_root(svd: str) -> None:
    p = started(kernel(), svd=svd)
    wanted = SPECTRUM[:RANK].sum() / SCALE
    np.testing.assert_allclose(p["scale"], SCALE, rtol=1e-7)
    for name in ("A", "B", "A0", "B0"):
        np.testing.assert_allclose(np.sum(p[name] ** 2), wanted, rtol=1e-6, err_msg=name)
    for gram in (p["A"].T @ p["A"], p["B"] @ p["B"].T):
        np.testing.assert_allclose(gram, np.diag(SPECTRUM[:RANK]) / SCALE, atol=2e-5)


def test_iterations_sharpen_the_randomised_subspace() -> None:
    """On a slowly falling spectrum the range of a few Gaussian columns alone is far off."""
    W = kernel(3.0 * 0.99 ** np.arange(D_OUT))
    exact = product(started(W))
    errors = [
        np.linalg.norm(product(started(W, svd="randomized", iterations=n)) - exact, 2)
        for n in (0, 4, 32)
    ]
    assert errors[0] > 2 * errors[1] > 10 * errors[2] > 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_fresh_adapter_changes_no_bit(dtype: Any, key: jax.Array) -> None:
    model = nn.Dense(D_OUT, dtype=dtype, param_dtype=dtype)
    x = jax.random.normal(key, (6, D_IN), dtype)
    params = {"kernel": jnp.asarray(kernel(), dtype), "bias": jnp.ones(D_OUT, dtype)}
    peft = pefts.pissa(rank=RANK, alpha=ALPHA, targets="kernel")
    state = peft.init(key, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    y = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    np.testing.assert_array_equal(y, model.apply({"params": params}, x))
    np.testing.assert_array_equal(peft.merge(params, state)["kernel"], params["kernel"])


def test_a_kernel_of_lower_rank_starts_finite() -> None:
    p = started(np.zeros((D_IN, D_OUT)))
    assert not any(p[name].any() for name in ("A", "B"))
    low = started(kernel(np.where(np.arange(D_OUT) < 2, 1.0, 0.0)))
    np.testing.assert_allclose(
        product(low), kernel(np.where(np.arange(D_OUT) < 2, 1.0, 0.0)), atol=1e-6
    )


def test_rank_and_alpha_patterns_keep_the_part_whole(key: jax.Array) -> None:
    """s stands in the factors' roots, so that the part does not depend on it."""
    params = {name: {"kernel": jnp.asarray(kernel(), jnp.float32)} for name in ("up", "down")}
    peft = pefts.pissa(rank=3, alpha=9.0, rank_pattern={"up": 7}, alpha_pattern={"up": 1.0})
    state = peft.init(key, params)
    for name, rank, s in (("up", 7, 1 / 7), ("down", 3, 3.0)):
        p = state.frozen[f"{name}/kernel"]
        assert p["A0"].shape == (D_IN, rank)
        np.testing.assert_allclose(p["scale"], s, rtol=1e-6)
        residual = np.asarray(params[name]["kernel"] - p["scale"] * p["A0"] @ p["B0"])
        np.testing.assert_allclose(np.linalg.norm(residual, 2), SPECTRUM[rank], rtol=1e-5)


@pytest.mark.parametrize(("svd", "name"), [("exact", "pissa"), ("randomized", "pissa_niter_16")])
def test_peft_takes_the_same_part_over(svd: str, name: str) -> None:
    hf_pair = pytest.importorskip("hf_pair")
    torch, hf = hf_pair.torch, hf_pair.hf
    # A gap behind the r-th value: torch's randomised decomposition takes no columns beyond r.
    W = kernel(np.where(np.arange(D_OUT) < RANK, 1.0, 0.5) * SPECTRUM).astype(np.float32)
    linear = torch.nn.Linear(D_IN, D_OUT)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(W.T))
    config = hf.LoraConfig(
        r=RANK, lora_alpha=ALPHA, init_lora_weights=name, target_modules=["linear"]
    )
    theirs = hf.get_peft_model(torch.nn.ModuleDict({"linear": linear}), config)
    module = theirs.base_model.model["linear"]
    A, B, left = (
        weight.detach().numpy().T.astype(np.float64)
        for weight in (
            module.lora_A["default"].weight,
            module.lora_B["default"].weight,
            module.base_layer.weight,
        )
    )
    p = started(W, svd=svd)
    np.testing.assert_allclose(product(p), SCALE * A @ B, atol=3e-6)
    np.testing.assert_allclose(W - product(p), left, atol=3e-6)
    np.testing.assert_allclose(p["A"] @ p["A"].T, A @ A.T, atol=2e-5)
    np.testing.assert_allclose(p["B"].T @ p["B"], B.T @ B, atol=2e-5)
