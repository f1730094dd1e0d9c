"""StableMax against the official code, float64 numpy and what softmax loses."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pefts.losses import log_stablemax, stablemax, stablemax_cross_entropy

GOLDEN = Path(__file__).parents[1] / "../shared/golden/official/stablemax_perpgrad/golden.npz"
HUGE = jnp.array([[1e4, -1e4, 0.0, 1.0]])


@pytest.fixture(scope="module")
def golden() -> Any:
    if not GOLDEN.exists():
        pytest.skip("the golden vectors of the official code are not beside this repository")
    return np.load(GOLDEN)


def test_values_and_gradients_are_the_official_ones(golden: Any, x64: None) -> None:
    logits, labels = jnp.asarray(golden["logits"]), jnp.asarray(golden["labels"])

    def loss(logits: Any) -> Any:
        return jnp.mean(stablemax_cross_entropy(logits, labels))

    value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    pairs = [
        (stablemax(logits), "probs"),
        (log_stablemax(logits), "log_probs"),
        (stablemax_cross_entropy(logits, labels)[:, None], "loss_per_example"),
        (value, "loss"),
        (gradient, "dlogits"),
    ]
    for ours, name in pairs:
        np.testing.assert_allclose(ours, golden[name], rtol=1e-12, atol=1e-14, err_msg=name)


def test_in_float32_it_is_the_formula_on_any_axis() -> None:
    x = 5 * np.random.default_rng(0).normal(size=(3, 7, 2))
    s = np.where(x >= 0, x + 1, 1 / (1 - np.minimum(x, 0)))
    expected = s / s.sum(1, keepdims=True)
    logits = jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(stablemax(logits, axis=1), expected, rtol=1e-6)
    np.testing.assert_allclose(log_stablemax(logits, axis=1), np.log(expected), rtol=1e-5)
    labels = jnp.asarray(np.random.default_rng(1).integers(0, 7, (3, 2)))
    picked = np.take_along_axis(-np.log(expected), np.asarray(labels)[:, None], 1)[:, 0]
    ours = stablemax_cross_entropy(logits, labels, axis=1)
    np.testing.assert_allclose(ours, picked, rtol=1e-5)
    moved = stablemax_cross_entropy(jnp.moveaxis(logits, 1, -1), labels)
    np.testing.assert_allclose(ours, moved, rtol=1e-6)


def test_probabilities_sum_to_one_and_grow_with_the_logit() -> None:
    x = jnp.linspace(-30.0, 30.0, 401)
    p = np.asarray(stablemax(x), np.float64)
    assert p.sum() == pytest.approx(1, abs=1e-6)
    assert np.all(np.diff(p) > 0) and np.all(p > 0)
    assert stablemax(jnp.zeros(4)).tolist() == [0.25] * 4


def test_gradients_are_finite_where_softmax_has_none() -> None:
    labels = jnp.array([0])

    def softmax(x: Any) -> Any:
        return -jax.nn.log_softmax(x)[0, 0]

    gradient = jax.grad(lambda x: stablemax_cross_entropy(x, labels)[0])(HUGE)
    assert np.isfinite(gradient).all() and np.all(np.asarray(gradient) != 0)
    assert np.all(np.asarray(jax.grad(softmax)(HUGE)) == 0)
    assert stablemax_cross_entropy(HUGE, labels)[0] > 0 and softmax(HUGE) == 0
    assert np.isfinite(jax.grad(lambda x: stablemax_cross_entropy(x, labels + 1)[0])(HUGE)).all()


@pytest.mark.parametrize("x", [-2.0, -1.0, -1e-7, 0.0, 1e-7, 1.0, 3.0])
def test_the_derivatives_of_both_branches_are_exact(x: float) -> None:
    """d/dx_i of log s(x_i) is 1 / (1 + |x_i|), at zero and at one too."""
    logits = jnp.array([x, 0.5])
    s = np.where(logits >= 0, logits + 1, 1 / (1 - np.minimum(logits, 0)))
    ds = np.where(logits >= 0, 1, s**2)
    expected = [1 / (1 + abs(x)) - ds[0] / s.sum(), -ds[1] / s.sum()]
    ours = jax.grad(lambda logits: log_stablemax(logits)[0])(logits)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-7)
    slope = jax.grad(lambda logits: jnp.log(stablemax(logits))[0])(logits)
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-7)


def test_bfloat16_logits_lose_nothing_more() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 100)), jnp.bfloat16)
    labels = jnp.arange(4)
    ours = stablemax_cross_entropy(logits, labels)
    assert ours.dtype == stablemax(logits).dtype == jnp.float32
    expected = stablemax_cross_entropy(logits.astype(jnp.float32), labels)
    np.testing.assert_array_equal(ours, expected)


def test_labels_outside_are_not_a_number_and_wrong_ones_refused() -> None:
    losses = stablemax_cross_entropy(jnp.zeros((3, 4)), jnp.array([3, 4, -1]))
    assert np.isnan(losses).tolist() == [False, True, True]
    with pytest.raises(ValueError, match="labels are float32: give integers"):
        stablemax_cross_entropy(jnp.zeros((3, 4)), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"labels have shape \(4,\), .* must be \(3,\)"):
        stablemax_cross_entropy(jnp.zeros((3, 4)), jnp.arange(4))
