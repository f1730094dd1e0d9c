"""Slopes from values: unbiased, of the known variance, the same one by one or side by side."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pefts.zeroth_order import directions, estimator
from pefts.zeroth_order.directions import fold_in, run_key
from pefts.zeroth_order.estimator import Options

KEY = run_key(0)
D = 6


def quadratic(seed: int = 0) -> tuple[Any, jax.Array, np.ndarray]:
    """L = theta^T A theta / 2, theta, and its gradient A theta."""
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(D, D))
    A = jnp.asarray(A @ A.T, jnp.float32)
    theta = jnp.asarray(rng.normal(size=D), jnp.float32)
    return lambda t: 0.5 * t @ A @ t, theta, np.asarray(A @ theta)


@pytest.mark.parametrize("sides", ["two", "forward"])
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_unbiased_and_of_known_length(sides: str, distribution: str) -> None:
    """E[g z] = grad; E||g z||^2 = (d + 2) ||grad||^2 for Gaussian z, d ||grad||^2 for signs."""
    loss, theta, gradient = quadratic()
    how = Options(eps=1e-2, sides=sides, distribution=distribution)
    draw = directions.Direction(directions.DRAWS[distribution])

    def estimate(n: jax.Array) -> jax.Array:
        found = estimator.estimate(loss, theta, fold_in(KEY, n), how)
        return directions.total(theta, found.keys, found.slopes, draw)

    samples = np.asarray(jax.jit(jax.vmap(estimate))(jnp.arange(40_000)), np.float64)
    sigma = samples.std(0) / np.sqrt(len(samples))
    assert np.all(np.abs(samples.mean(0) - gradient) < 4.5 * sigma + 1e-4)
    lengths = np.sum(samples**2, axis=1)
    factor = D + 2 if distribution == "normal" else D
    spread = lengths.std() / np.sqrt(len(lengths))
    assert abs(lengths.mean() - factor * np.sum(gradient**2)) < 4.5 * spread


def test_one_side_is_biased_by_the_curvature_alone(x64: None) -> None:
    """(L(theta + eps z) - L(theta)) / eps = grad . z + eps z^T A z / 2."""
    loss, theta, gradient = quadratic()
    theta = theta.astype(jnp.float64)
    A = np.asarray(jax.hessian(lambda t: loss(t.astype(jnp.float32)).astype(jnp.float64))(theta))
    key = fold_in(KEY, 0)
    z = np.asarray(directions.total(theta, key[None], jnp.ones(1)), np.float64)
    exact = lambda t: 0.5 * t @ jnp.asarray(A) @ t  # noqa: E731
    found = estimator.estimate(exact, theta, KEY, Options(eps=1e-3, sides="one"))
    expected = (A @ np.asarray(theta)) @ z + 0.5e-3 * z @ A @ z
    np.testing.assert_allclose(found.slopes[0], expected, rtol=1e-9)
    np.testing.assert_allclose(A @ np.asarray(theta), gradient, rtol=1e-4)


def test_two_sides_err_by_the_square_of_eps(x64: None) -> None:
    def loss(theta: jax.Array) -> jax.Array:
        return jnp.sum(jnp.exp(theta))

    theta = jnp.linspace(-1.0, 1.0, 5)
    exact = estimator.estimate(loss, theta, KEY, Options(sides="forward")).slopes[0]
    errors = [
        float(abs(estimator.estimate(loss, theta, KEY, Options(eps=eps)).slopes[0] - exact))
        for eps in (2e-2, 1e-2)
    ]
    assert 3.9 < errors[0] / errors[1] < 4.1


@pytest.mark.parametrize("sides", estimator.SIDES)
def test_side_by_side_is_one_by_one(sides: str) -> None:
    loss, theta, _ = quadratic()
    base = estimator.estimate(loss, theta, KEY, Options(eps=0.1, queries=6, sides=sides))
    for parallel in (4, 6):
        how = Options(eps=0.1, queries=6, sides=sides, parallel=parallel)
        found = estimator.estimate(loss, theta, KEY, how)
        np.testing.assert_allclose(found.slopes, base.slopes, rtol=1e-4)
        np.testing.assert_array_equal(found.keys, base.keys)


def test_queries_over_devices_are_one_by_one() -> None:
    """Each device has its own directions, and scalars alone cross between them."""
    loss, theta, _ = quadratic()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    how = Options(eps=0.1, queries=8, parallel=8)
    place = NamedSharding(mesh, PartitionSpec("data"))
    spread = jax.jit(lambda t: estimator.estimate(loss, t, KEY, how, sharding=place))
    found = spread(jax.device_put(theta, NamedSharding(mesh, PartitionSpec())))
    base = estimator.estimate(loss, theta, KEY, Options(eps=0.1, queries=8))
    np.testing.assert_allclose(found.slopes, base.slopes, rtol=1e-4)
    text = spread.lower(theta).compile().as_text()
    assert not any(f"f32[8,{D}]" in line for line in text.splitlines() if "all-gather" in line)


@pytest.mark.parametrize("made", [1, 3, 5])
def test_fewer_queries_are_the_first_ones(made: int) -> None:
    loss, theta, _ = quadratic()
    how = Options(eps=0.1, queries=5)
    every = estimator.estimate(loss, theta, KEY, how)
    some = jax.jit(lambda n: estimator.estimate(loss, theta, KEY, how, None, n))(made)
    np.testing.assert_allclose(some.slopes[:made], every.slopes[:made], rtol=1e-4)
    assert not np.any(some.slopes[made:])
    assert np.isfinite(some.value)


def test_the_reported_value_is_near_theta() -> None:
    loss, theta, _ = quadratic()
    for sides in estimator.SIDES:
        found = estimator.estimate(loss, theta, KEY, Options(eps=1e-4, sides=sides, queries=3))
        np.testing.assert_allclose(found.value, loss(theta), rtol=1e-2)


def test_a_value_that_is_not_finite_gives_no_slope() -> None:
    found = estimator.estimate(lambda t: jnp.sum(jnp.log(t)), -jnp.ones(3), KEY, Options(queries=2))
    assert not found.finite and not np.any(found.slopes)


def test_values_are_compared_in_float32() -> None:
    found = estimator.estimate(
        lambda t: jnp.sum(t).astype(jnp.bfloat16), jnp.ones(3), KEY, Options(eps=1.0)
    )
    assert found.slopes.dtype == jnp.float32


@pytest.mark.parametrize(
    ("value_fn", "found"),
    [
        (lambda t: t, r"float32\[3\]"),
        (lambda t: jnp.sum(t > 0), r"int32\[\]"),
        (lambda t: {"loss": t}, "one floating number"),
    ],
)
def test_a_value_is_a_floating_scalar(value_fn: Any, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        estimator.estimate(value_fn, jnp.ones(3), KEY)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"eps": 0}, "eps=0: give the length"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"eps": -1e-3}, "eps=-0.001"),
        ({"queries": 0}, "queries=0: give an integer"),
        ({"queries": 1.5}, r"queries=1\.5"),
        ({"parallel": True}, "parallel=True"),
        ({"sides": "both"}, "sides='both' is unknown; choose one of"),
        ({"distribution": "uniform"}, "distribution='uniform' is unknown"),
        ({"epsilon": 1.0}, "'epsilon' is no option of sampling; known: .*'eps'"),
    ],
)
def test_bad_options_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimator.options(given)
