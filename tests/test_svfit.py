"""SVFit beyond the table: the spectrum it moves, its gradient, ranks by share of the spectrum."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts
from pefts import linalg
from pefts.bound import Call
from pefts.methods.svfit import rank_for

D_IN, D_OUT, RANK = 9, 14, 4
SIGMA = (7.0, -3.0, 0.5, 0.0)  # a direction turned around, two that fell below the rest, one gone


def problem(key: jax.Array) -> tuple:
    """W in float64, the method, and a state with SIGMA in place of the largest singular values."""
    W = jax.random.normal(key, (D_IN, D_OUT), jnp.float64)
    peft = pefts.svfit(rank=RANK, targets="kernel")
    state = peft.init(key, {"kernel": W})
    moved = state._replace(trainable={"kernel": {"sigma": jnp.asarray(SIGMA)}})
    return W, peft, state, moved


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def test_sigma_starts_at_the_largest_singular_values(key):
    W, _, state, _ = problem(key)
    S = np.linalg.svd(np.asarray(W), compute_uv=False)
    np.testing.assert_allclose(state.trainable["kernel"]["sigma"], S[:RANK], rtol=1e-12)


def test_merged_singular_values_are_sigma_and_the_rest(key):
    W, peft, _, moved = problem(key)
    S = np.linalg.svd(np.asarray(W), compute_uv=False)
    merged = np.linalg.svd(np.asarray(peft.merge({"kernel": W}, moved)["kernel"]), compute_uv=False)
    wanted = np.sort(np.concatenate([np.abs(SIGMA), S[RANK:]]))[::-1]
    np.testing.assert_allclose(merged, wanted, rtol=1e-12, atol=1e-12)


def test_the_singular_subspaces_stay(key):
    W, peft, _, moved = problem(key)
    merged = np.asarray(peft.merge({"kernel": W}, moved)["kernel"])
    U, S, V = (np.asarray(part) for part in linalg.svd(W))
    np.testing.assert_allclose(
        U.T @ merged @ V, np.diag(np.concatenate([SIGMA, S[RANK:]])), atol=1e-12
    )
    larger = moved._replace(trainable={"kernel": {"sigma": jnp.arange(1.0, 5.0) * 2 * S[0]}})
    again = linalg.svd(peft.merge({"kernel": W}, larger)["kernel"], RANK)
    assert float(linalg.projector_distance(again.U, U[:, :RANK])) < 1e-10
    assert float(linalg.projector_distance(again.V, V[:, :RANK])) < 1e-10


def test_the_gradient_of_sigma_is_the_kernels_along_its_direction(key):
    """dL / dsigma_i = u_i^T (dL / dW') v_i, by the product beside W and by the dense kernel."""
    W, peft, _, moved = problem(key)
    x = jax.random.normal(jax.random.fold_in(key, 1), (5, D_IN), jnp.float64)
    target = jax.random.normal(jax.random.fold_in(key, 2), (5, D_OUT), jnp.float64)
    bound = peft.bind({"kernel": W}, moved)["kernel"]

    def loss(y: jax.Array) -> jax.Array:
        return jnp.sum(jnp.cos(y) * target)

    def factored(sigma: jax.Array) -> jax.Array:
        return loss(bound.rule.linear(x, W, {**bound.state, "sigma": sigma}, Call()))

    def dense(sigma: jax.Array) -> jax.Array:
        return loss(x @ bound.rule.effective(W, {**bound.state, "sigma": sigma}, Call()))

    G = jax.grad(lambda kernel: loss(x @ kernel))(peft.merge({"kernel": W}, moved)["kernel"])
    wanted = np.einsum("ir,io,or->r", bound.state["U"], G, bound.state["V"])
    for run in (factored, dense):
        got = jax.grad(run)(moved.trainable["kernel"]["sigma"])
        np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-12)


def test_all_of_the_spectrum_can_be_trained(key):
    """r = k, where the rest of W is rounding alone."""
    W = jax.random.normal(key, (D_IN, D_OUT), jnp.float32)
    peft = pefts.svfit(rank=D_IN, targets="kernel")
    state = peft.init(key, {"kernel": W})
    np.testing.assert_array_equal(peft.merge({"kernel": W}, state)["kernel"], W)
    doubled = jax.tree.map(lambda sigma: 2 * sigma, state.trainable)
    merged = peft.merge({"kernel": W}, state._replace(trainable=doubled))["kernel"]
    np.testing.assert_allclose(merged, 2 * W, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["conv", "embed"])
def test_factored_equals_merged_in_convolutions_and_embeddings(key, kind):
    if kind == "conv":
        model, x = nn.Conv(7, (3,)), jax.random.normal(key, (2, 9, 4), jnp.float32)
    else:
        model, x = nn.Embed(11, 6), jnp.arange(8).reshape(2, 4)
    params = model.init(key, x)["params"]
    peft = pefts.svfit(rank=3, targets=".", axes=pefts.infer_axes(model.apply, params, x))
    state = pefts.randomize(key, peft.init(key, params), 1.0)
    factored = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    merged = model.apply({"params": peft.merge(params, state)}, x)
    np.testing.assert_allclose(factored, merged, rtol=2e-5, atol=2e-6)
    assert not np.allclose(merged, model.apply({"params": params}, x), atol=1e-2)


def test_it_converts_to_a_lora(key):
    W, peft, _, moved = problem(key)
    lora, state = pefts.to_lora(peft, moved, {"kernel": W})
    assert lora.config["rank"] == RANK
    merged = (
        method.merge({"kernel": W}, s)["kernel"] for method, s in ((peft, moved), (lora, state))
    )
    np.testing.assert_allclose(*merged, rtol=1e-5, atol=1e-5)


# --- ranks by their share of the spectrum ---


def kernels() -> dict:
    """One kernel with a known spectrum, and two layers whose spectra differ."""
    values = np.array([[8.0, 4.0, 2.0, 1.0], [4.0, 4.0, 4.0, 4.0], [1.0, 0.0, 0.0, 0.0]])
    rng = np.random.default_rng(0)
    made = []
    for S in values:
        U, V = (np.linalg.qr(rng.normal(size=(n, 4)))[0] for n in (6, 5))
        made.append((U * S) @ V.T)
    return {"one": {"kernel": jnp.asarray(made[0])}, "two": {"kernel": jnp.asarray(made[1:])}}


@pytest.mark.parametrize(
    ("share", "power", "one", "two"),
    [
        (0.7, 2, 1, 3),  # squares 64, 16, 4, 1 of 85: 0.753, 0.941, 0.988, 1
        (0.76, 2, 2, 4),
        (0.99, 2, 4, 4),
        (0.53, 1, 1, 3),  # 8, 4, 2, 1 of 15: 0.533, 0.8, 0.933, 1
        (0.54, 1, 2, 3),
        (0.94, 1, 4, 4),
    ],
)
def test_the_smallest_ranks_that_hold_a_share(share, power, one, two):
    found = rank_for(kernels(), share, power=power, axes={"two": "lio"})
    assert found == {"^one/kernel$": one, "^two/kernel$": two}


def test_the_ranks_are_a_pattern_of_the_method():
    params, axes = kernels(), {"two": "lio"}
    pattern = rank_for(params, 0.76, axes=axes)
    state = pefts.svfit(rank=1, rank_pattern=pattern, axes=axes).init(jax.random.key(0), params)
    assert state.trainable["one/kernel"]["sigma"].shape == (2,)
    assert state.trainable["two/kernel"]["sigma"].shape == (2, 4)


def test_a_kernel_of_zeros_keeps_one_rank_and_the_targets_are_respected():
    params = {"a": {"kernel": jnp.zeros((3, 4))}, "b": {"kernel": jnp.ones((3, 4))}}
    assert rank_for(params, targets="a/") == {"^a/kernel$": 1}


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"share": 0.0}, "share=0.0"),
        ({"share": 1.01}, "share=1.01"),
        ({"power": 3}, "power=3 is unknown"),
        ({"targets": "querry"}, "matches no parameter"),
    ],
)
def test_bad_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        rank_for({"query": {"kernel": jnp.ones((3, 4))}}, **kwargs)


def test_ranks_need_finite_values_that_are_known():
    with pytest.raises(ValueError, match="'a/kernel' .* NaN or"):
        rank_for({"a": {"kernel": jnp.full((3, 4), jnp.nan)}})
    with pytest.raises(ValueError, match="inside jit"):
        jax.jit(lambda W: rank_for({"a": {"kernel": W}}))(jnp.ones((3, 4)))
