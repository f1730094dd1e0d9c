"""PVeRA beyond the table: its noise, and Hugging Face PEFT's files."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import pefts


def problem(**kwargs: Any) -> tuple[Any, ...]:
    key = jax.random.key(0)
    model, x = nn.Dense(4), jax.random.normal(key, (3, 6))
    params = model.init(key, x)["params"]
    peft = pefts.pvera(rank=5, targets="kernel", **kwargs)
    return model, x, params, peft, pefts.randomize(key, peft.init(key, params), scale=0.5)


def test_samples_have_the_mean_and_the_variance_of_the_formula() -> None:
    model, x, params, peft, state = problem()
    bound = {"params": peft.bind(params, state)}

    def sample(key: jax.Array) -> jax.Array:
        return pefts.apply(model.apply)(bound, x, rngs={"dropout": key})

    ys = np.asarray(jax.vmap(sample)(jax.random.split(jax.random.key(1), 4000)), np.float64)
    mean = pefts.apply(model.apply)(bound, x)
    np.testing.assert_allclose(
        mean, model.apply({"params": peft.merge(params, state)}, x), atol=1e-5
    )
    A, B = (np.asarray(state.frozen["shared"][name], np.float64) for name in "AB")
    p = {name: np.asarray(leaf) for name, leaf in state.trainable["kernel"].items()}
    variance = np.exp(np.asarray(x) @ A[:, 5:] * p["lambda_d"][5:])
    expected = variance @ (B * p["lambda_b"]) ** 2
    np.testing.assert_allclose(ys.var(0), expected, rtol=0.15)
    assert (np.abs(ys.mean(0) - mean) < 5 * np.sqrt(expected / 4000)).all()


def test_the_variance_is_trained_in_calls_with_noise_alone() -> None:
    model, x, params, peft, state = problem()

    def loss(trainable: Any, **kwargs: Any) -> jax.Array:
        bound = peft.bind(params, state._replace(trainable=trainable))
        return jnp.sum(pefts.apply(model.apply)({"params": bound}, x, **kwargs) ** 2)

    quiet = jax.grad(loss)(state.trainable)["kernel"]["lambda_d"]
    noisy = jax.grad(loss)(state.trainable, rngs={"dropout": jax.random.key(2)})["kernel"]
    assert (quiet[5:] == 0).all() and (quiet[:5] != 0).all()
    assert (noisy["lambda_d"] != 0).all()


def test_the_pair_spans_the_largest_sides_and_has_its_bounds() -> None:
    params = {name: {"kernel": jnp.ones(s)} for name, s in (("a", (9, 4)), ("b", (3, 14)))}
    state = pefts.pvera(rank=30).init(jax.random.key(0), params)
    A, B = (state.frozen["shared"][name] for name in "AB")
    assert (A.shape, B.shape) == ((9, 60), (30, 14))
    for factor, fan in ((A, 9), (B, 30)):
        assert 0.95 < float(jnp.abs(factor).max()) / np.sqrt(6 / fan) <= 1
    other = pefts.pvera(rank=30).init(jax.random.key(7), params)
    jax.tree.map(np.testing.assert_array_equal, state, other)
