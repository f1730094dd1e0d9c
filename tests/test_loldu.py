"""LoLDU beyond the table: vectors of the official code, the decomposition, start values, pivots."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts
from pefts.bound import Call
from pefts.methods.loldu import FORGOTTEN, INITS

GOLDEN = Path(__file__).parents[2] / "shared/golden/official/loldu/golden.npz"
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}  # of a float32 decomposition
SETTINGS = {
    "lu_a1": {"init": "lu"},
    "lu_a8": {"init": "lu"},
    "const_a1": {"init": "constant"},
    "ones_a1": {"init": "ones", "parity": True},
}
D_IN, D_OUT = 9, 14


@pytest.fixture
def golden():
    if not GOLDEN.exists():
        pytest.skip("the official LoLDU vectors (../shared/golden/official/loldu) are absent")
    return dict(np.load(GOLDEN))


def state_of(key: jax.Array, W: jax.Array, rank: int, **kwargs) -> tuple:
    peft = pefts.loldu(rank, targets="kernel", **kwargs)
    return peft, peft.init(key, {"kernel": W})


def arrays(state: pefts.PeftState) -> dict[str, np.ndarray]:
    both = {**state.frozen["kernel"], **state.trainable["kernel"]}
    return {name: np.asarray(leaf, np.float64) for name, leaf in both.items()}


@pytest.mark.parametrize("setting", SETTINGS)
def test_values_are_those_of_the_released_code(golden, key, setting):
    own = {
        name.removeprefix(f"{setting}_"): value
        for name, value in golden.items()
        if name.startswith(setting)
    }
    W, x, b = (jnp.asarray(golden[name]) for name in "Wxb")
    rank = int(golden["rank"])
    peft, state = state_of(key, W.T, rank, alpha=float(own["alpha"]), **SETTINGS[setting])
    p = arrays(state)
    residual = np.asarray(W, np.float64) - p["scale"] * p["L"] @ np.diag(p["z0"]) @ p["U"]

    def outputs(z):
        bound = peft.bind({"kernel": W.T}, state)["kernel"]
        return bound.rule.linear(x, W.T, {**bound.state, "z": z}, Call()) + b[None]

    z1 = jnp.asarray(own["z1"])
    y1, pull = jax.vjp(outputs, z1)
    later = state._replace(trainable={"kernel": {"z": z1}})
    found = {
        "s": p["scale"],
        "z0": p["z"],  # their name for where z starts
        "W_res": residual,
        "y_init": outputs(state.trainable["kernel"]["z"]),
        "y1": y1,
        "W_eff1": peft.merge({"kernel": W.T}, later)["kernel"].T,
        "grad_z1": pull(jnp.asarray(golden["cot"]))[0],
    }
    for name, value in found.items():
        np.testing.assert_allclose(value, own[name], **TOLERANCE, err_msg=name)
    np.testing.assert_allclose(p["U"], golden["U_r"], **TOLERANCE)
    np.testing.assert_allclose(p["L"], golden["L_r"][golden["perm"]], **TOLERANCE)
    np.testing.assert_allclose(p["L"], golden["perm_matrix"] @ golden["L_r"], **TOLERANCE)


# --- the decomposition ---


@pytest.mark.parametrize("sides", [(9, 14), (14, 9), (9, 9)])
def test_the_factors_are_those_of_the_transposed_kernel(key, sides):
    """W^T = Pm L diag(D) U; a row of Pm L holds the one of its own column of L, and no more."""
    with jax.enable_x64(True):
        W = jax.random.normal(key, sides, jnp.float64)
        _, state = state_of(key, W, 9)
        p = arrays(state)
        np.testing.assert_allclose(p["L"] @ np.diag(p["z"]) @ p["U"], np.asarray(W).T, atol=1e-12)
    np.testing.assert_array_equal(np.diag(p["U"]), 1)
    np.testing.assert_array_equal(np.tril(p["U"], -1), 0)
    assert np.abs(p["L"]).max() == 1  # what partial pivoting is for
    # In the order of the pivots L is lower triangular with ones on its diagonal.
    pivots = [int(np.argmax(np.abs(column) == 1)) for column in p["L"].T]
    rest = [row for row in range(sides[1]) if row not in pivots]
    L = p["L"][[*pivots, *rest]]
    np.testing.assert_array_equal(np.diag(L), 1)
    np.testing.assert_array_equal(np.triu(L, 1), 0)


def test_the_buffers_are_small(key):
    """No permutation matrix, and nothing of the kernel's size."""
    _, state = state_of(key, jax.random.normal(key, (D_IN, D_OUT)), 3)
    assert pefts.count(state.frozen) == 3 * (D_IN + D_OUT) + 3 + 1
    assert pefts.count(state.trainable) == 3


# --- start values ---


@pytest.mark.parametrize("parity", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_which_starts_leave_the_model_as_it_is(key, init, parity):
    W = jax.random.normal(key, (D_IN, D_OUT))
    peft, state = state_of(key, W, 4, init=init, parity=parity)
    unchanged = not (parity and init in FORGOTTEN)
    assert peft.traits.identity_at_init is unchanged
    assert np.array_equal(peft.merge({"kernel": W}, state)["kernel"], W) is unchanged
    D = arrays(state_of(key, W, 4)[1])["z"]
    subtracted = arrays(state)["z" if unchanged else "z0"]
    assert np.array_equal(subtracted, D) is (init == "lu" or not unchanged)


def test_where_each_start_puts_z(key):
    W = jax.random.normal(key, (400, 400)) + 0.3
    z = {init: arrays(state_of(key, W, 400, init=init)[1])["z"] for init in INITS}
    D = z["lu"]
    mean, deviation = D.mean(), D.std(ddof=1)
    np.testing.assert_allclose(z["constant"], mean, rtol=1e-4)
    np.testing.assert_array_equal(z["ones"], 1)
    np.testing.assert_array_equal(z["zeros"], 0)
    for name, bound in (("uniform", abs(mean) / 2), ("s_uniform", 1.0)):
        assert 0.98 * bound < np.abs(z[name]).max() <= bound * (1 + 1e-6)
        assert abs(z[name].mean()) < 0.1 * bound
    for name, centre, spread in (("normal", mean, deviation), ("s_normal", 0.0, 1.0)):
        assert abs(z[name].mean() - centre) < 0.15 * spread
        assert abs(z[name].std() / spread - 1) < 0.1
    # One key gives all of them the same noise; of 400 pivots n and n - 1 are told apart by 1e-3.
    np.testing.assert_allclose(z["normal"], mean + deviation * z["s_normal"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(z["uniform"], abs(mean) / 2 * z["s_uniform"], rtol=1e-4, atol=1e-4)


def test_a_single_pivot_has_no_deviation(key):
    W = jax.random.normal(key, (D_IN, D_OUT))
    normal, lu = (arrays(state_of(key, W, 1, init=init)[1])["z"] for init in ("normal", "lu"))
    np.testing.assert_array_equal(normal, lu)


# --- pivots ---


def deficient(rank: int, size: float = 0.0) -> jax.Array:
    """A kernel whose pivots after the first `rank` are `size`."""
    rng = np.random.default_rng(0)
    L = np.tril(rng.uniform(-0.5, 0.5, (D_OUT, D_IN)), -1) + np.eye(D_OUT, D_IN)
    U = np.triu(rng.normal(size=(D_IN, D_IN)), 1) + np.eye(D_IN)
    D = np.where(np.arange(D_IN) < rank, 2.0, size)
    # Exact in float32, so that zero pivots are zeros.
    return jnp.asarray((np.round(8 * L) / 8 @ np.diag(D) @ (np.round(8 * U) / 8)).T, jnp.float32)


@pytest.mark.parametrize("init", ["lu", "ones"])
@pytest.mark.parametrize("size", [0.0, 1e-8])
def test_a_pivot_that_is_nearly_zero_is_refused(key, init, size):
    W = deficient(4, size)
    with pytest.raises(
        ValueError, match="initial 'z' of 'kernel' is not finite: a pivot of its LU"
    ):
        state_of(key, W, 5, init=init)
    _, state = state_of(key, W, 4, init=init)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_a_small_pivot_is_not(key):
    _, state = state_of(key, deficient(4, 1e-4), D_IN)
    assert np.isfinite(arrays(state)["U"]).all()


def test_a_bad_kernel_is_not_taken_for_a_bad_pivot(key):
    W = jnp.ones((D_IN, D_OUT)).at[1, 2].set(jnp.nan)
    with pytest.raises(ValueError, match="the kernel itself holds NaN or infinite values"):
        state_of(key, W, 2)


def test_inside_jit_the_outputs_say_so(key):
    W = deficient(4)
    peft = pefts.loldu(5, targets="kernel")
    merged = jax.jit(lambda W: peft.merge({"kernel": W}, peft.init(key, {"kernel": W})))(W)
    assert np.isnan(merged["kernel"]).any()


def test_it_converts_to_a_lora(key):
    params = {"kernel": jax.random.normal(key, (D_IN, D_OUT))}
    peft, state = state_of(key, params["kernel"], 4)
    moved = pefts.randomize(key, state)
    lora, plain = pefts.to_lora(peft, moved, params)
    assert lora.config["rank"] == 4
    merged = peft.merge(params, moved)["kernel"], lora.merge(params, plain)["kernel"]
    np.testing.assert_allclose(*merged, rtol=1e-5, atol=1e-5)
