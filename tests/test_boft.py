"""BOFT beyond the table: orthogonality, which entries meet, the place of s, what is never built."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts
from pefts.bound import Call
from pefts.methods.boft import factor_product, rotations


def product(A: Any, s: Any, W: Any) -> np.ndarray:
    A = jnp.asarray(A)
    rule = pefts.boft.__wrapped__(block_size=A.shape[-1], factors=len(A)).rule
    return np.asarray(rule.effective(jnp.asarray(W), {"A": A, "s": jnp.asarray(s)}, Call()))


def random(m: int, n: int, b: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(m, n, b, b)).astype(np.float32)


@pytest.mark.parametrize(("m", "n", "b"), [(1, 4, 3), (2, 6, 4), (4, 8, 2), (3, 4, 6)])
def test_the_product_is_orthogonal(m: int, n: int, b: int) -> None:
    R = product(random(m, n, b), np.ones(n * b, np.float32), np.eye(n * b, dtype=np.float32))
    np.testing.assert_allclose(R @ R.T, np.eye(n * b), rtol=0, atol=3e-6)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_m_factors_mix_blocks_of_twice_the_size_each(m: int) -> None:
    """Nothing leaves a stretch of 2^(m-1) blocks, and everything in one meets."""
    R = product(random(m, 8, 2), np.ones(16, np.float32), np.eye(16, dtype=np.float32))
    span = 2 * 2 ** (m - 1)
    inside = np.kron(np.eye(16 // span), np.ones((span, span))).astype(bool)
    assert np.abs(R[inside]).min() > 0
    assert not R[~inside].any()


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_factor_pairs_half_blocks_that_lie_apart(level: int) -> None:
    D = rotations(jnp.asarray(random(1, 4, 4)))[0]
    F = np.asarray(factor_product(jnp.eye(16), D, level))
    half = np.abs(F).reshape(8, 2, 8, 2).sum((1, 3)) > 0  # which half blocks meet
    expected = np.eye(8, dtype=bool)
    for u in range(8):
        expected[u, u ^ 2**level] = True
    np.testing.assert_array_equal(half, expected)
    assert np.count_nonzero(F) == 16 * 4


def test_one_factor_is_a_block_rotation() -> None:
    """With the strict upper triangle as OFT has it, A = 2 Q there and zero elsewhere."""
    Q = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    A = np.zeros((1, 3, 4, 4), np.float32)
    A[:, :, *np.triu_indices(4, 1)] = 2 * Q
    W = np.random.default_rng(1).normal(size=(12, 5)).astype(np.float32)
    rule = pefts.oft.__wrapped__(4, terms=None).rule
    expected = rule.effective(jnp.asarray(W), {"Q": jnp.asarray(Q)}, Call())
    np.testing.assert_allclose(product(A, np.ones(5, np.float32), W), expected, rtol=1e-5)


def test_the_symmetric_half_of_a_changes_nothing() -> None:
    A, W = random(2, 4, 4), np.eye(16, dtype=np.float32)
    S = random(2, 4, 4)
    ones = np.ones(16, np.float32)
    np.testing.assert_allclose(
        product(A, ones, W), product(A + S + np.swapaxes(S, -1, -2), ones, W), atol=1e-5
    )


def test_the_output_is_scaled_before_the_bias(key: jax.Array) -> None:
    model, x = nn.Dense(5), jax.random.normal(key, (3, 8))
    params = {"kernel": jax.random.normal(key, (8, 5)), "bias": jnp.arange(5.0)}
    peft = pefts.boft(2, factors=2, targets="kernel")
    state = peft.init(key, params)
    state.trainable["kernel"]["s"] = jnp.zeros(5)
    ours = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    np.testing.assert_array_equal(ours, np.tile(np.arange(5.0), (3, 1)))
    np.testing.assert_array_equal(peft.merge(params, state)["bias"], params["bias"])


def test_a_dropped_block_is_the_identity(key: jax.Array) -> None:
    rule, W = pefts.boft.__wrapped__(2, dropout=0.25).rule, jnp.eye(32)
    p = {"A": jnp.asarray(random(1, 16, 2)), "s": jnp.ones(32)}
    x = jnp.ones((1, 32))
    plain = np.asarray(rule.linear(x, W, p, Call())).reshape(16, 2)
    drawn = np.stack([rule.linear(x, W, p, Call(key=jax.random.key(n))) for n in range(20)])
    rows = drawn.reshape(20, 16, 2)
    left_out, turned = (rows == 1).all(-1), np.isclose(rows, plain, rtol=1e-6).all(-1)
    assert (left_out ^ turned).all()
    assert 0.18 < left_out.mean() < 0.32


@pytest.mark.parametrize("m", [1, 3])
def test_no_matrix_of_the_inputs_size_is_built(m: int) -> None:
    """Neither a shuffle nor a rotation (d_in, d_in), nor R W, forwards or backwards."""
    W, x = jnp.ones((64, 48)), jnp.ones((2, 64))
    rule = pefts.boft.__wrapped__(4, factors=m).rule

    def loss(p: Any) -> jax.Array:
        return rule.linear(x, W, p, Call()).sum()

    p = {"A": jnp.zeros((m, 16, 4, 4)), "s": jnp.ones(48)}
    jaxpr = jax.make_jaxpr(jax.grad(loss))(p)
    made = {var.aval.shape for eqn in jaxpr.jaxpr.eqns for var in eqn.outvars}
    assert not made & {(64, 64), (64, 48)}
    assert max(np.prod(shape) for shape in made) <= m * 16 * 4 * 4


def test_factors_that_do_not_fit_are_refused(key: jax.Array) -> None:
    params = {"a": {"kernel": jnp.ones((24, 3))}}
    for kwargs, message in (
        ({"block_size": 4, "factors": 3}, "factors=3 mix 4 .* n=6 blocks of 'a/kernel'.* 1 to 2"),
        ({"block_size": 3, "factors": 2}, "'a/kernel' have b=3 entries, an odd number"),
        ({"blocks": 3, "factors": 2}, "factors=2 mix 2 .* n=3 .* from 1 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            pefts.boft(**kwargs).init(key, params)
    pefts.boft(4, factors=2).init(key, params)
    pefts.boft(3, factors=1).init(key, params)
