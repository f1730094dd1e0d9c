"""LoKr beyond the table: what is whole, what is built on the way, convolutions, where it starts."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts
from pefts.bound import Call
from pefts.methods.lokr import linear, shapes

D_IN, D_OUT = 36, 64


def problem(key: jax.Array, **kwargs: Any) -> tuple:
    model = nn.Dense(D_OUT)
    x = jax.random.normal(jax.random.fold_in(key, 1), (5, D_IN))
    params = model.init(key, x)["params"]
    peft = pefts.lokr(targets="kernel", **kwargs)
    return model, x, params, peft, pefts.randomize(key, peft.init(key, params), scale=0.3)


@pytest.mark.parametrize(
    ("rank", "both", "names"),
    [
        (4, False, {"K1", "K2"}),
        (3, False, {"K1", "K2_a", "K2_b"}),
        (3, True, {"K1_a", "K1_b", "K2_a", "K2_b"}),
        (4, True, {"K1", "K2"}),
    ],
)
def test_a_factor_is_whole_from_half_of_its_larger_side(rank, both, names):
    """Here K1 and K2 are 6 x 8."""
    assert set(shapes((D_IN, D_OUT), None, rank, None, both)) == names


@pytest.mark.parametrize(
    "kwargs",
    [{"rank": 8}, {"rank": 2}, {"rank": 2, "decompose_both": True}, {"decompose_factor": 2}],
)
def test_the_kronecker_product_is_never_built(key, kwargs):
    _, x, params, peft, state = problem(key, **kwargs)
    bound = peft.bind(params, state)["kernel"]

    def loss(p: Any) -> jax.Array:
        return jnp.sum(bound.rule.linear(x, bound.base, p, Call()) ** 2)

    program = jax.make_jaxpr(jax.grad(loss))(dict(bound.state))
    sizes = [v.aval.size for equation in program.jaxpr.eqns for v in equation.outvars]
    assert max(sizes) < params["kernel"].size


@pytest.mark.parametrize(("K1", "K2", "largest"), [((2, 16), (32, 16), 32), ((32, 2), (2, 128), 4)])
def test_the_cheaper_order_of_products_is_taken(K1, K2, largest):
    """By way of m k numbers for each token, or of l n."""
    m, n, tokens = K1[0], K2[0], 50
    p = {"K1": jnp.ones(K1), "K2": jnp.ones(K2), "scale": jnp.float32(1)}
    x, W = jnp.ones((tokens, m * n)), jnp.ones((m * n, K1[1] * K2[1]))
    program = jax.make_jaxpr(lambda x: linear(x, W, p, Call()))(x)
    products = [
        v.aval.size
        for equation in program.jaxpr.eqns
        if equation.primitive.name == "dot_general"
        for v in equation.outvars
    ]
    assert sorted(products) == [tokens * largest, *[tokens * W.shape[1]] * 2]


def test_a_convolution_has_its_window_in_K2(key):
    """Every place of the window is a Kronecker product with the same K1."""
    model, x = nn.Conv(12, (2, 3), strides=(1, 2)), jax.random.normal(key, (2, 5, 6, 8))
    params = model.init(key, x)["params"]
    axes = pefts.infer_axes(model.apply, params, x)
    for rank, names in ((2, {"K1", "K2"}), (1, {"K1", "K2_a", "K2_b"})):
        peft = pefts.lokr(rank, targets="kernel", axes=axes)
        state = pefts.randomize(key, peft.init(key, params), scale=0.5)
        p = state.trainable["kernel"]
        assert set(p) == names
        K2 = p["K2"] if "K2" in p else p["K2_a"] @ p["K2_b"]
        scale = state.frozen["kernel"]["scale"]
        merged = peft.merge(params, state)
        delta = np.asarray(merged["kernel"] - params["kernel"]).reshape(6, 8, 12)
        for place in range(6):
            kron = np.kron(np.asarray(p["K1"]), np.asarray(K2[place]))
            np.testing.assert_allclose(delta[place], scale * kron, rtol=1e-4, atol=1e-5)
        factored = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
        np.testing.assert_allclose(factored, model.apply({"params": merged}, x), atol=1e-4)


def test_a_window_behind_the_channels_is_refused():
    params = {"conv": {"kernel": jnp.ones((4, 3, 6))}}
    with pytest.raises(ValueError, match="'conv/kernel' has axes 'iko'"):
        pefts.lokr(1, targets="conv", axes={"conv": "iko"}).init(jax.random.key(0), params)


def test_embeddings_use_the_whole_table(key):
    model, ids = nn.Embed(12, 8), jnp.arange(8).reshape(2, 4)
    params = model.init(key, ids)["params"]
    peft = pefts.lokr(2, targets="embedding")
    state = pefts.randomize(key, peft.init(key, params), scale=0.5)
    factored = pefts.apply(model.apply)({"params": peft.bind(params, state)}, ids)
    merged = model.apply({"params": peft.merge(params, state)}, ids)
    np.testing.assert_allclose(factored, merged, rtol=1e-6, atol=1e-6)
    assert not np.allclose(merged, model.apply({"params": params}, ids), atol=1e-2)


def test_starts_where_peft_starts(key):
    """K1 (or K1_b) at zero, the rest uniform over what it sums over; s = alpha / r."""
    params = {"kernel": jnp.ones((1024, 4096))}
    bounds = {"K2_a": 1 / np.sqrt(32), "K2_b": 1 / np.sqrt(8)}
    for kwargs, bound in (
        ({"rank": 8}, bounds),
        ({"rank": 8, "decompose_both": True}, {**bounds, "K1_a": 1 / np.sqrt(32)}),
        ({"rank": 32}, {"K2": 1 / np.sqrt(32)}),
    ):
        state = pefts.lokr(alpha=4.0, targets="kernel", **kwargs).init(key, params)
        p = {name: np.asarray(leaf) for name, leaf in state.trainable["kernel"].items()}
        zero = p.pop("K1_b" if "K1_b" in p else "K1")
        assert not zero.any() and set(p) == set(bound)
        for name, limit in bound.items():
            assert 0.95 * limit < np.abs(p[name]).max() <= limit
            np.testing.assert_allclose(p[name].std(), limit / np.sqrt(3), rtol=0.15)
        assert float(state.frozen["kernel"]["scale"]) == 4.0 / kwargs["rank"]
