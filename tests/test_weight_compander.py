"""Weight Compander beyond the table: where it starts, its bound, what its two numbers do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts
from pefts.bound import Call
from pefts.methods.weight_compander import effective


def started(W: jax.Array, kappa: float = 1.5) -> tuple[pefts.Peft, pefts.PeftState]:
    peft = pefts.weight_compander(kappa, targets="kernel")
    return peft, peft.init(jax.random.key(0), {"kernel": W})


def moved(state: pefts.PeftState, log_a: float, log_b: float) -> pefts.PeftState:
    group = {"log_a": jnp.float32(log_a), "log_b": jnp.float32(log_b)}
    return state._replace(trainable={"kernel": group})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kappa", [1.000001, 1.5, 1e6])
def test_the_start_is_the_kernel_bit_for_bit(key, dtype, kappa):
    W = jax.random.normal(key, (30, 20), dtype)
    peft, state = started(W, kappa)
    np.testing.assert_array_equal(peft.merge({"kernel": W}, state)["kernel"], W)
    assert float(state.frozen["kernel"]["a_0"]) * np.pi / 2 == pytest.approx(
        kappa * np.abs(np.asarray(W, np.float64)).max(), rel=1e-5
    )


def test_no_weight_passes_the_bound_and_none_changes_its_order(key):
    """Psi is odd and rises; |w| < a pi / 2 whatever a and b are."""
    W = jnp.sort(jax.random.normal(key, (2000, 1)), axis=0)
    peft, state = started(W, 1.05)
    a_0 = float(state.frozen["kernel"]["a_0"])
    for log_a, log_b in ((0.3, -2.0), (-0.5, 1.0), (0.0, -4.0)):
        w = peft.merge({"kernel": W}, moved(state, log_a, log_b))["kernel"]
        mirrored = peft.merge({"kernel": -W}, moved(state, log_a, log_b))["kernel"]
        np.testing.assert_array_equal(mirrored, -w)
        assert np.all(np.diff(w[:, 0]) > -1e-6)
        assert np.abs(w).max() < a_0 * np.exp(log_a) * np.pi / 2


def test_a_smaller_b_pushes_small_weights_away_from_zero(key):
    W = jnp.asarray([[1e-3], [0.3], [1.0]])
    peft, state = started(W)
    a_0 = float(state.frozen["kernel"]["a_0"])
    w = np.asarray(peft.merge({"kernel": W}, moved(state, 0.0, -1.0))["kernel"])
    growth = (w / np.asarray(W))[:, 0]
    np.testing.assert_allclose(growth[0], np.e, rtol=1e-3)
    assert growth[0] > growth[1] > growth[2] > 1 and w.max() < a_0 * np.pi / 2
    w = np.asarray(peft.merge({"kernel": W}, moved(state, 0.4, 0.0))["kernel"])
    np.testing.assert_allclose(w, np.exp(0.4) * W, rtol=1e-6)


@pytest.mark.parametrize("kappa", [1.0001, 2.0])
def test_gradients_are_those_of_the_formula_and_finite_at_the_bound(key, kappa):
    """dw / dlog a = w; dw / dlog b = -a (v / b) / (1 + (v / b)^2); dw / dv = a b / (b^2 + v^2)."""
    with jax.enable_x64(True):
        W = jax.random.normal(key, (40, 3), jnp.float64)
        a_0 = started(W, kappa)[1].frozen["kernel"]["a_0"].astype(jnp.float64)
        log = {"log_a": jnp.float64(0.2), "log_b": jnp.float64(-0.6)}

        def run(log, W):
            return effective(W, {**log, "a_0": a_0}, Call())

        a, b, v = a_0 * np.exp(0.2), np.exp(-0.6), np.tan(W / a_0)
        jacobian = jax.jacfwd(run)(log, W)
        np.testing.assert_allclose(jacobian["log_a"], run(log, W), rtol=1e-8)
        np.testing.assert_allclose(jacobian["log_b"], -a * v / b / (1 + (v / b) ** 2), rtol=1e-8)
        _, slope = jax.jvp(lambda W: run(log, W), (W,), (jnp.ones_like(W),))
        by_v = slope * a_0 / (1 + v**2)  # v = tan(W / a_0)
        np.testing.assert_allclose(by_v, a * b / (b**2 + v**2), rtol=1e-6)


def test_stacked_layers_have_bounds_of_their_own(key):
    W = jax.random.normal(key, (2, 5, 4)) * jnp.asarray([1.0, 10.0])[:, None, None]
    peft = pefts.weight_compander(2.0, axes={"kernel": "lio"})
    a_0 = peft.init(key, {"kernel": W}).frozen["kernel"]["a_0"]
    np.testing.assert_allclose(a_0, 4 / np.pi * np.abs(W).max((1, 2)), rtol=1e-6)


def test_a_kernel_of_zeros_is_refused():
    with pytest.raises(
        ValueError, match="'a_0' of 'kernel' is not finite: the kernel is all zeros"
    ):
        started(jnp.zeros((3, 2)))
