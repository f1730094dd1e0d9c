"""SaRA's penalty: the nuclear norm, its subgradient, and the matrix that is drawn at a step."""

import jax
import jax.numpy as jnp
import numpy as np

import pefts
from pefts.methods.sara import nuclear_norm


def test_the_nuclear_norm_and_its_gradient(key) -> None:
    with jax.enable_x64(True):
        kept = jax.random.uniform(key, (5, 8)) < 0.6
        X = jnp.where(kept, jax.random.normal(key, (5, 8), jnp.float64), 0.0)
        value, grad = jax.value_and_grad(nuclear_norm)(X)
        U, sigma, Vt = np.linalg.svd(X, full_matrices=False)
        assert sigma[-1] > 1e-3
        np.testing.assert_allclose(value, sigma.sum(), rtol=1e-13)
        np.testing.assert_allclose(grad, U @ Vt, atol=1e-12)
        h, moves = 1e-6, np.eye(40).reshape(40, 5, 8)
        norm = lambda M: np.linalg.norm(M, "nuc")  # noqa: E731
        slopes = [(norm(X + h * E) - norm(X - h * E)) / (2 * h) for E in moves]
        np.testing.assert_allclose(grad, np.reshape(slopes, (5, 8)), atol=1e-8)


def test_singular_values_of_zero_have_no_part_in_the_gradient() -> None:
    a, b = jnp.asarray([3.0, 4.0, 0.0]), jnp.asarray([1.0, 0.0])
    X = a[:, None] * b[None, :]
    np.testing.assert_allclose(jax.grad(nuclear_norm)(X), X / 5, atol=1e-6)
    np.testing.assert_array_equal(jax.grad(nuclear_norm)(jnp.zeros((3, 2))), 0.0)


def test_one_random_matrix_at_each_step(key) -> None:
    """Over the steps every matrix and every stacked layer is drawn, each with its own norm."""
    shape = (3, 6, 5)
    params = {
        "layers": {
            "kernel": jax.random.normal(key, shape) * jnp.asarray([1.0, 2, 3])[:, None, None]
        },
        "other": {"kernel": 5 * jax.random.normal(key, (7, 6))},
        "small": {"kernel": jnp.ones((4, 9)), "bias": jnp.ones(30)},
    }
    axes = {"layers": "lio"}
    peft = pefts.sara(100.0, min_side=4, rank_penalty=2.0, axes=axes)
    every = pefts.sara(100.0, min_side=4, rank_penalty=2.0, rank_mode="all", axes=axes)
    state = peft.init(key, params)
    penalty = jax.jit(peft.penalty)
    seen = []
    for step in range(40):
        seen.append(float(penalty(state)))
        state = peft.update(state, state.trainable, jnp.asarray(step, jnp.int32))
    matrices = [*params["layers"]["kernel"], params["other"]["kernel"]]
    norms = [2.0 * np.linalg.norm(np.asarray(W), "nuc") for W in matrices]
    nearest = [int(np.argmin(np.abs(np.asarray(norms) - value))) for value in seen]
    np.testing.assert_allclose(seen, np.asarray(norms)[nearest], rtol=1e-5)
    assert set(nearest) == {0, 1, 2, 3}
    np.testing.assert_allclose(every.penalty(every.init(key, params)), sum(norms), rtol=1e-5)
    grads = jax.grad(lambda t: peft.penalty(state._replace(trainable=t)))(state.trainable)
    drawn = [
        bool(np.any(g))
        for g in (*grads["layers/kernel"]["values"], grads["other/kernel"]["values"])
    ]
    assert sum(drawn) == 1 and not np.any(grads["small/kernel"]["values"])
