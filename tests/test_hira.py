"""HiRA beyond the table: the rank of the change, every kind of module, what is kept in memory."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts
from pefts.bound import Call


def test_the_change_has_any_rank(key: jax.Array) -> None:
    """Of rank 2 factors on a kernel of full rank: up to 2 times that, cut off by the sides."""
    for rank_of_W, expected in ((1, 2), (2, 4), (12, 12)):
        left, right, start, moved = jax.random.split(key, 4)
        W = jax.random.normal(left, (12, rank_of_W)) @ jax.random.normal(right, (rank_of_W, 16))
        params, peft = {"kernel": W}, pefts.hira(rank=2, targets="kernel")
        state = pefts.randomize(moved, peft.init(start, params), 1.0)
        with jax.default_matmul_precision("highest"):
            change = np.asarray(peft.merge(params, state)["kernel"] - W, np.float64)
        assert np.linalg.matrix_rank(change, tol=1e-4 * np.abs(change).max()) == expected


def test_zeros_stay_zero(key: jax.Array) -> None:
    third = jnp.arange(24).reshape(6, 4) % 3 == 0
    W = jnp.where(third, jnp.zeros((6, 4)), jax.random.normal(key, (6, 4)))
    peft = pefts.hira(rank=2, targets="kernel")
    state = pefts.randomize(key, peft.init(key, {"kernel": W}), 1.0)
    merged = np.asarray(peft.merge({"kernel": W}, state)["kernel"])
    np.testing.assert_array_equal(merged == 0, np.asarray(W) == 0)


MODULES = {
    "dense": (nn.Dense(5), (4, 6), {"kernel": "io"}),
    "heads": (nn.DenseGeneral((2, 3)), (4, 6), {"kernel": "ioo"}),
    "conv": (nn.Conv(5, (2, 3)), (2, 5, 6, 4), {"kernel": "kkio"}),
    "grouped": (nn.Conv(6, (2,), feature_group_count=2), (2, 5, 4), {"kernel": "kio"}),
    "embed": (nn.Embed(7, 4), (), {"embedding": "io"}),
}


@pytest.mark.parametrize("name", MODULES)
def test_every_module_computes_the_merged_kernels_outputs(name: str, key: jax.Array) -> None:
    model, shape, axes = MODULES[name]
    x = jax.random.normal(key, shape) if shape else jnp.arange(6)
    params = model.init(key, x)["params"]
    peft = pefts.hira(rank=2, targets="kernel|embedding", axes=axes)
    state = pefts.randomize(key, peft.init(key, params), 1.0)

    def ours(state: Any) -> jax.Array:
        return pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)

    def theirs(state: Any) -> jax.Array:
        return model.apply({"params": peft.merge(params, state)}, x)

    assert np.abs(ours(state) - model.apply({"params": params}, x)).max() > 0.1
    np.testing.assert_allclose(ours(state), theirs(state), rtol=1e-4, atol=1e-5)
    grads = [jax.grad(lambda s, f=f: jnp.sum(f(s) ** 2))(state).trainable for f in (ours, theirs)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *grads)


def test_it_multiplies_the_kernel_that_others_left(key: jax.Array) -> None:
    model, x = nn.Dense(5), jax.random.normal(key, (4, 6))
    params = model.init(key, x)["params"]
    low_rank, peft = pefts.lora(rank=2, targets="kernel"), pefts.hira(rank=2, targets="kernel")
    for both in (pefts.chain(low_rank, peft), pefts.chain(peft, low_rank)):
        state = pefts.randomize(key, both.init(key, params), 1.0)
        ours = pefts.apply(model.apply)({"params": both.bind(params, state)}, x)
        dense = np.asarray(model.apply({"params": both.merge(params, state)}, x))
        np.testing.assert_allclose(ours, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_adapted_kernel_is_not_kept_for_the_backward_pass(dtype: Any) -> None:
    """Of the kernel's size, W alone, as it is, lives until the backward pass."""
    rule = pefts.hira.__wrapped__(rank=2).rule
    W, x = jnp.ones((64, 48), dtype), jnp.ones((3, 64), dtype)

    def kept(A: jax.Array, B: jax.Array, x: jax.Array) -> Any:
        run = lambda A, B, x: rule.linear(x, W, {"A": A, "B": B}, Call())  # noqa: E731
        return jax.vjp(run, A, B, x)[1]

    residuals = jax.eval_shape(kept, jnp.ones((64, 2)), jnp.ones((2, 48)), x)
    leaves = jax.tree.leaves(residuals)
    assert [leaf.dtype for leaf in leaves if leaf.size >= 64 * 48] in ([], [dtype])
    assert sum(leaf.size for leaf in leaves) <= 64 * 48 + 64 * 2 + 2 * 48 + 2 * 3 * 64


def test_dropout_drops_inputs_of_the_change_alone(key: jax.Array) -> None:
    """y - x W = drop(x) (W * (A B)): with one input, all of it or nothing."""
    rule = pefts.hira.__wrapped__(rank=1, dropout=0.5).rule
    W, x = jnp.full((1, 3), 2.0), jnp.ones((40, 1))
    p = {"A": jnp.ones((1, 1)), "B": jnp.full((1, 3), 0.25)}
    np.testing.assert_allclose(rule.linear(x, W, p, Call()), np.full((40, 3), 2.5))
    y = np.asarray(rule.linear(x, W, p, Call(key=key)))
    assert set(np.unique(y)) == {2.0, 3.0}
    assert 5 < (y[:, 0] == 2.0).sum() < 35
