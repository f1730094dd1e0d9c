"""VeRA beyond the table: the shared pair, its seed, published counts."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts


def shapes(layers: int, **kernels: tuple[int, int]) -> dict:
    return {
        f"layer_{n}": {
            name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
            for name, shape in kernels.items()
        }
        for n in range(layers)
    }


class Net(nn.Module):
    """12 -> 20 -> 8 -> 20: no kernel has both of the largest sides, two have the same shape."""

    @nn.compact
    def __call__(self, x):
        for n, features in enumerate((20, 8, 20, 8)):
            x = jnp.tanh(nn.Dense(features, name=f"dense_{n}")(x))
        return x


def problem(key: jax.Array, **kwargs) -> tuple:
    model, x = Net(), jax.random.normal(key, (5, 12))
    params = model.init(key, x)["params"]
    peft = pefts.vera(rank=30, **kwargs)
    return model, x, params, peft, peft.init(key, params)


@pytest.mark.parametrize(
    ("tree", "rank", "wanted"),
    [
        (shapes(12, query=(768, 768), value=(768, 768)), 1024, 43_008),
        (shapes(24, query=(1024, 1024), value=(1024, 1024)), 256, 61_440),
        (shapes(28, query=(3072, 3072), value=(3072, 1024)), 256, 129_024),
    ],
    ids=["roberta-base", "roberta-large", "llama-3.2-3b"],
)
def test_published_counts_from_shapes_alone(tree, rank, wanted):
    state = jax.eval_shape(pefts.vera(rank=rank).init, jax.random.key(0), tree)
    assert pefts.count(state.trainable) == wanted


def test_the_pair_spans_the_largest_sides_and_has_its_bounds(key):
    *_, state = problem(key)
    A, B = state.frozen["shared"]["A"], state.frozen["shared"]["B"]
    assert (A.shape, B.shape) == ((20, 30), (30, 20))
    assert list(state.frozen) == ["shared"]
    for factor, fan in ((A, 20), (B, 30)):
        bound = math.sqrt(6 / fan)
        assert 0.95 * bound < float(jnp.abs(factor).max()) <= bound
        assert abs(float(factor.mean())) < 0.1 * bound


def test_the_pair_depends_on_the_seed_and_not_on_the_key(key):
    _, _, params, peft, state = problem(key)
    other_key = peft.init(jax.random.key(7), params)
    jax.tree.map(np.testing.assert_array_equal, state, other_key)
    for name, factor in pefts.vera(rank=30, seed=1).init(key, params).frozen["shared"].items():
        assert not np.allclose(factor, state.frozen["shared"][name])
    # Another default generator must not change what a checkpoint without the pair would need.
    with jax.default_prng_impl("rbg"):
        again = peft.init(jax.random.key(0), params)
    jax.tree.map(np.testing.assert_array_equal, state, again)


def test_the_pair_is_the_one_of_earlier_releases():
    """Values that stay: a change would silently give every saved seed another pair."""
    params = {"kernel": jnp.ones((3, 2))}
    shared = pefts.vera(rank=2, targets="kernel").init(jax.random.key(5), params).frozen["shared"]
    A = [[0.96821052, -0.89836884], [-0.77165687, -1.07274985], [-0.87168312, 0.62795329]]
    B = [[-1.70678425, -1.65968156], [0.28206968, -0.47860727]]
    np.testing.assert_allclose(shared["A"], A, rtol=1e-6)
    np.testing.assert_allclose(shared["B"], B, rtol=1e-6)


def test_kernels_of_one_shape_get_the_same_update_from_the_same_vectors(key):
    _, _, params, peft, state = problem(key)
    start = pefts.randomize(key, state).trainable
    state = state._replace(trainable={**start, "dense_3/kernel": start["dense_1/kernel"]})
    merged = peft.merge(params, state)
    updates = [merged[name]["kernel"] - params[name]["kernel"] for name in ("dense_1", "dense_3")]
    np.testing.assert_allclose(updates[0], updates[1], atol=1e-6)
    assert float(jnp.abs(updates[0]).max()) > 0.01


def test_slices_start_at_the_origin_and_factored_equals_merged(key):
    model, x, params, peft, state = problem(key)
    state = pefts.randomize(key, state)
    factored = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    A, B = (np.asarray(state.frozen["shared"][name], np.float64) for name in "AB")
    h = np.asarray(x, np.float64)
    for name in sorted(params):
        W, b = (np.asarray(params[name][leaf], np.float64) for leaf in ("kernel", "bias"))
        d, e = (np.asarray(state.trainable[f"{name}/kernel"][f"lambda_{c}"]) for c in "db")
        d_in, d_out = W.shape
        h = np.tanh(h @ (W + A[:d_in] @ np.diag(d) @ B[:, :d_out] @ np.diag(e)) + b)
    np.testing.assert_allclose(factored, h, rtol=2e-5, atol=2e-5)


def test_lambda_d_has_no_gradient_at_the_start_and_lambda_b_has(key):
    model, x, params, peft, state = problem(key)

    def loss(trainable):
        bound = peft.bind(params, state._replace(trainable=trainable))
        return jnp.sum(pefts.apply(model.apply)({"params": bound}, x) ** 2)

    for group in jax.grad(loss)(state.trainable).values():
        np.testing.assert_array_equal(group["lambda_d"], 0)
        assert float(jnp.abs(group["lambda_b"]).max()) > 1e-4


@pytest.mark.parametrize("kind", ["conv", "embed"])
def test_factored_equals_merged_in_convolutions_and_embeddings(key, kind):
    if kind == "conv":
        model, x = nn.Conv(7, (3,)), jax.random.normal(key, (2, 9, 4))
    else:
        model, x = nn.Embed(11, 6), jnp.arange(8).reshape(2, 4)
    params = model.init(key, x)["params"]
    peft = pefts.vera(rank=9, targets=".", axes=pefts.infer_axes(model.apply, params, x))
    state = pefts.randomize(key, peft.init(key, params))
    factored = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    merged = model.apply({"params": peft.merge(params, state)}, x)
    np.testing.assert_allclose(factored, merged, rtol=2e-5, atol=2e-6)
    assert not np.allclose(merged, model.apply({"params": params}, x), atol=1e-2)


def test_two_pairs_in_a_chain_stay_apart(key):
    """The outer method finds its d_in behind a kernel that is bound already, head axes and all."""
    model, x = nn.DenseGeneral((2, 5), axis=(-2, -1)), jax.random.normal(key, (3, 4, 2))
    params = model.init(key, x)["params"]
    axes = pefts.infer_axes(model.apply, params, x)
    both = pefts.chain(
        pefts.vera(rank=3, targets=".", axes=axes),
        pefts.vera(rank=6, seed=1, targets=".", axes=axes),
    )
    state = pefts.randomize(key, both.init(key, params))
    factored = pefts.apply(model.apply)({"params": both.bind(params, state)}, x)
    merged = model.apply({"params": both.merge(params, state)}, x)
    np.testing.assert_allclose(factored, merged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("argument", ["rank_pattern", "alpha_pattern"])
def test_patterns_are_refused(argument):
    with pytest.raises(ValueError, match=f"{argument}=.*kernels of vera have no"):
        pefts.vera(**{argument: {"query": 2}})
