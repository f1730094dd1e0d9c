"""OFT beyond the table: rotations, the sign, the series, sharing, the constraint, dropout."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts
from pefts.bound import Call
from pefts.methods.oft import project


def rule(**kwargs: Any) -> Any:
    return pefts.oft.__wrapped__(**kwargs).rule


def rotation(Q: Any, d_in: int, **kwargs: Any) -> np.ndarray:
    """R (d_in, d_in): what becomes of the identity."""
    return np.asarray(rule(**kwargs).effective(jnp.eye(d_in), {"Q": jnp.asarray(Q)}, Call()))


def random(n: int, b: int, scale: float = 0.5, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (scale * rng.normal(size=(n, b * (b - 1) // 2))).astype(np.float32)


def defect(R: np.ndarray) -> float:
    return float(np.abs(R @ R.T - np.eye(len(R))).max())


def test_the_exact_form_is_a_rotation() -> None:
    R = rotation(random(3, 4), 12, terms=None)
    assert defect(R) < 1e-6
    assert np.linalg.det(R) == pytest.approx(1.0, abs=1e-5)
    outside = R[~np.kron(np.eye(3), np.ones((4, 4))).astype(bool)]
    assert not outside.any()


def test_lengths_and_angles_of_the_columns_stay(key: jax.Array) -> None:
    W = jax.random.normal(key, (12, 5))
    turned = np.asarray(rule(terms=None).effective(W, {"Q": jnp.asarray(random(3, 4))}, Call()))
    np.testing.assert_allclose(turned.T @ turned, np.asarray(W.T @ W), rtol=1e-5, atol=1e-5)
    assert np.abs(turned - np.asarray(W)).max() > 0.5


@pytest.mark.parametrize("terms", [2, 4, 5])
def test_the_series_is_orthogonal_to_its_order(terms: int) -> None:
    """Half of Q: 2^(terms - 1) of the defect, or less of it where an odd power drops out."""
    with jax.enable_x64(True):
        Q = random(2, 4, 0.05).astype(np.float64)
        large, small = (defect(rotation(q, 8, terms=terms)) for q in (Q, Q / 2))
    assert 1e-12 < small < 1.1 * large / 2 ** (terms - 1)


@pytest.mark.parametrize("terms", [None, 2, 3, 4, 5, 9])
def test_every_form_turns_the_same_way(terms: int | None) -> None:
    """On one 2 x 2 block with q = 0.05 the exact R_12 is -2 q / (1 + q^2)."""
    R = rotation([[0.05]], 2, terms=terms)
    exact = -0.1 / 1.0025
    if terms == 2:
        exact /= 2  # the last power has the coefficient 1
    assert R[0, 1] == pytest.approx(exact, abs=3e-4)
    assert R[1, 0] == pytest.approx(-exact, abs=3e-4)


def test_more_terms_come_nearer() -> None:
    Q = random(2, 4, 0.1)
    exact = rotation(Q, 8, terms=None)
    errors = [np.abs(rotation(Q, 8, terms=terms) - exact).max() for terms in (2, 4, 6, 8)]
    assert all(4 * later < earlier for earlier, later in zip(errors, errors[1:], strict=False))


def test_a_shared_block_is_that_block_everywhere() -> None:
    Q = random(1, 4)
    np.testing.assert_array_equal(
        rotation(Q, 12, block_share=True), rotation(np.tile(Q, (3, 1)), 12)
    )


def test_sizes_by_number_and_by_default(key: jax.Array) -> None:
    params = {"a": {"kernel": jnp.ones((64, 3))}, "b": {"kernel": jnp.ones((96, 3))}}

    def shapes(**kwargs: Any) -> list[tuple[int, ...]]:
        state = pefts.oft(**kwargs).init(key, params)
        return [group["Q"].shape for group in state.trainable.values()]

    assert shapes() == [(2, 496), (3, 496)]
    assert shapes(blocks=16) == [(16, 6), (16, 15)]
    assert shapes(block_size=4, block_share=True) == [(1, 6), (1, 6)]


def test_the_constraint_holds_after_every_update(key: jax.Array) -> None:
    """A step far outside comes back to the sphere, in its direction; inside nothing happens."""
    eps, params = 0.3, {"kernel": jax.random.normal(key, (12, 5))}
    peft = pefts.oft(4, coft_eps=eps, targets="kernel")
    state = peft.init(key, params)
    far = jax.tree.map(lambda leaf: leaf.at[0].set(5.0).at[1, 0].set(0.01), state)
    held = jax.jit(peft.update)(far, None, jnp.int32(0)).trainable["kernel"]["Q"]
    radius = eps / np.sqrt(3)
    np.testing.assert_allclose(np.sqrt(2) * np.linalg.norm(held[0]), radius, rtol=1e-6)
    np.testing.assert_allclose(held[0], np.full(6, held[0, 0]), rtol=1e-6)
    np.testing.assert_array_equal(held[1], far.trainable["kernel"]["Q"][1])
    assert not np.asarray(held[2]).any()
    moved = state._replace(trainable={"kernel": {"Q": held}})
    ours, theirs = (peft.merge(params, one)["kernel"] for one in (far, moved))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_constraint_passes_the_gradient_of_where_it_projects() -> None:
    """Outside the sphere the gradient is that at the projected Q, as after an update."""
    Q, W = random(3, 4, 2.0), jnp.eye(12)[:, :5]
    inside = np.asarray(project(jnp.asarray(Q), 0.3))

    def loss(Q: jax.Array) -> jax.Array:
        out = rule(coft_eps=0.3).effective(W, {"Q": Q}, Call())
        return jnp.sum(jnp.sin(jnp.arange(60.0)).reshape(12, 5) * out)

    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(Q)), jax.grad(loss)(inside), rtol=1e-5)


def test_dropout_leaves_blocks_unrotated(key: jax.Array) -> None:
    product, W = rule(dropout=0.25).linear, jnp.eye(64)
    x, p = jnp.ones((1, 64)), {"Q": jnp.asarray(random(16, 4))}
    plain = np.asarray(product(x, W, p, Call())).reshape(16, 4)
    drawn = [
        np.asarray(product(x, W, p, Call(key=jax.random.key(n)))).reshape(16, 4) for n in range(20)
    ]
    left_out = np.array([(rows == 1).all(1) for rows in drawn])
    turned = np.array([np.isclose(rows, plain, rtol=1e-6).all(1) for rows in drawn])
    assert (left_out ^ turned).all()
    assert 0.18 < left_out.mean() < 0.32
    assert not (plain == 1).all(1).any()


def test_a_convolution_is_rotated_over_its_window(key: jax.Array) -> None:
    model, x = nn.Conv(5, (2, 3)), jax.random.normal(key, (2, 5, 6, 4))
    params = model.init(key, x)["params"]
    peft = pefts.oft(3, targets="kernel", axes={"kernel": "kkio"})
    state = pefts.randomize(key, peft.init(key, params), 0.5)
    ours = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    dense = np.asarray(model.apply({"params": peft.merge(params, state)}, x))
    np.testing.assert_allclose(ours, dense, rtol=1e-5, atol=1e-5)
    assert np.abs(ours - model.apply({"params": params}, x)).max() > 0.1


@pytest.mark.parametrize("terms", [None, 5])
def test_no_kernel_is_built_in_training(terms: int | None) -> None:
    """Neither R W nor R of its size, forwards or backwards."""
    W, x, product = jnp.ones((64, 48)), jnp.ones((2, 64)), rule(terms=terms).linear

    def loss(Q: jax.Array) -> jax.Array:
        return product(x, W, {"Q": Q}, Call()).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(jnp.zeros((16, 6)))
    made = {var.aval.shape for eqn in jaxpr.jaxpr.eqns for var in eqn.outvars}
    assert not made & {(64, 48), (64, 64)}


def test_nearest_divisors_are_named_on_both_sides(key: jax.Array) -> None:
    params = {"a": {"kernel": jnp.ones((40, 3))}}
    for kwargs, near in (
        ({"block_size": 32}, r"\[20, 40\]"),
        ({"block_size": 6}, r"\[5, 8\]"),
        ({"block_size": 64}, r"\[40\]"),
        ({"blocks": 40}, r"\[20\]"),
        ({"blocks": 6}, r"\[5, 8\]"),
        ({}, r"\[20, 40\]"),
    ):
        with pytest.raises(ValueError, match=f"the 40 inputs of 'a/kernel' .*divisors are {near}"):
            pefts.oft(**kwargs).init(key, params)
