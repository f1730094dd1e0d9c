"""OLoRA beyond the table: what is taken over and what stays, and peft's own."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts

RANK, ALPHA = 5, 2.0
SHAPES = pytest.mark.parametrize("shape", [(30, 22), (22, 30)])


def kernel(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


def started(W: np.ndarray) -> dict[str, np.ndarray]:
    """A, B, A0, B0 and the scale at step 0, in float64."""
    peft = pefts.olora(rank=RANK, alpha=ALPHA, targets="kernel")
    state = peft.init(jax.random.key(0), {"kernel": jnp.asarray(W, jnp.float32)})
    groups = {**state.trainable["kernel"], **state.frozen["kernel"]}
    return {name: np.asarray(leaf, np.float64) for name, leaf in groups.items()}


@SHAPES
def test_the_factors_are_the_first_of_a_qr_of_the_transpose(shape: tuple[int, int]) -> None:
    W, p = kernel(shape), started(kernel(shape))
    Q, R = np.linalg.qr(W.T)
    np.testing.assert_allclose(p["A0"] @ p["B0"], (Q[:, :RANK] @ R[:RANK]).T, atol=1e-5)
    np.testing.assert_allclose(p["B0"] @ p["B0"].T, np.eye(RANK), atol=1e-6)
    np.testing.assert_allclose(p["A0"] @ p["A0"].T, R[:RANK].T @ R[:RANK], atol=1e-4)
    # R is upper triangular: feature i lies in the first i columns of Q.
    assert np.abs(np.triu(p["A0"][:RANK], 1)).max() < 1e-5


@SHAPES
def test_what_stays_lost_the_first_rows_and_their_directions(shape: tuple[int, int]) -> None:
    W, p = kernel(shape), started(kernel(shape))
    left = W - p["A0"] @ p["B0"]
    np.testing.assert_allclose(left[:RANK], 0, atol=1e-5)
    assert np.linalg.matrix_rank(left, tol=1e-4) == min(shape) - RANK


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_fresh_adapter_changes_no_bit(dtype: Any, key: jax.Array) -> None:
    model, x = nn.Dense(22, dtype=dtype, param_dtype=dtype), jax.random.normal(key, (6, 30), dtype)
    params = model.init(key, x)["params"]
    peft = pefts.olora(rank=RANK, alpha=ALPHA, targets="kernel")
    state = peft.init(key, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    y = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    np.testing.assert_array_equal(y, model.apply({"params": params}, x))


@SHAPES
def test_peft_takes_the_same_part_over(shape: tuple[int, int]) -> None:
    hf_pair = pytest.importorskip("hf_pair")
    torch, hf = hf_pair.torch, hf_pair.hf
    W = kernel(shape).astype(np.float32)
    linear = torch.nn.Linear(*shape)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(W.T))
    config = hf.LoraConfig(
        r=RANK, lora_alpha=ALPHA, init_lora_weights="olora", target_modules=["linear"]
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
    p = started(W)
    s = ALPHA / RANK
    np.testing.assert_allclose(p["scale"], s, rtol=1e-7)
    np.testing.assert_allclose(p["scale"] * p["A"] @ p["B"], s * A @ B, atol=3e-6)
    np.testing.assert_allclose(W - p["scale"] * p["A0"] @ p["B0"], left, atol=3e-6)
    np.testing.assert_allclose(p["A"] @ p["A"].T, A @ A.T, atol=1e-4)
    np.testing.assert_allclose(p["B"].T @ p["B"], B.T @ B, atol=3e-6)
