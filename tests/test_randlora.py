"""RandLoRA beyond the table: its bases, its rank, its memory."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts
from pefts import core


def kernels(*shapes: tuple[int, int]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    values = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    return {f"dense_{n}": {"kernel": value} for n, value in enumerate(values)}


def pair_of(params: Any, **kwargs: Any) -> dict[str, jax.Array]:
    return pefts.randlora(**kwargs).init(jax.random.key(0), params).frozen[core.SHARED]


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (12, 12)])
@pytest.mark.parametrize("rank", [2, 5])
def test_the_update_has_full_rank(shape: tuple[int, int], rank: int) -> None:
    params = kernels(shape)
    peft = pefts.randlora(rank=rank)
    state = pefts.randomize(jax.random.key(1), peft.init(jax.random.key(0), params), scale=0.3)
    update = peft.merge(params, state)["dense_0"]["kernel"] - params["dense_0"]["kernel"]
    values = np.linalg.svd(np.asarray(update), compute_uv=False)
    assert values[-1] > 1e-4 * values[0]


def test_it_is_the_papers_sum_for_bases_with_their_columns_in_another_order() -> None:
    """There B_i is a block of neighbouring columns."""
    params = kernels((14, 9))
    peft = pefts.randlora(rank=3, alpha=3.0, scaling="hf")
    state = pefts.randomize(jax.random.key(1), peft.init(jax.random.key(0), params))
    A, B = (np.asarray(state.frozen["shared"][name], np.float64) for name in "AB")
    p = state.trainable["dense_0/kernel"]
    lambda_, gamma = (np.asarray(p[name], np.float64) for name in ("lambda", "gamma"))
    blocks = B.reshape(14, 3, 3).transpose(0, 2, 1).reshape(14, 9)
    D = sum(
        blocks[:, 3 * i : 3 * i + 3] @ np.diag(lambda_[:, i]) @ A @ np.diag(gamma[i])
        for i in range(3)
    )
    update = peft.merge(params, state)["dense_0"]["kernel"] - params["dense_0"]["kernel"]
    np.testing.assert_allclose(update, D, atol=1e-6)
    assert np.abs(D).max() > 0.01


def test_the_pair_spans_the_largest_sides_and_is_shared() -> None:
    params = kernels((12, 20), (20, 8), (8, 8))
    peft = pefts.randlora(rank=5)
    state = peft.init(jax.random.key(0), params)
    shapes = {name: leaf.shape for name, leaf in state.frozen["shared"].items()}
    assert shapes == {"A": (5, 20), "B": (20, 20)}
    assert list(state.frozen) == ["shared"]
    gamma = state.trainable["dense_0/kernel"]["gamma"]
    np.testing.assert_array_equal(gamma, np.full((3, 12), 1 / 12, np.float32))
    thin = pefts.randlora(rank=1).init(jax.random.key(0), kernels((3, 30)))
    assert float(thin.trainable["dense_0/kernel"]["gamma"][0, 0]) == np.float32(1 / 3)


@pytest.mark.parametrize(
    ("bases", "nonzero"), [("uniform", 1.0), ("sparse", 1 / 3), ("very_sparse", 1 / 12)]
)
def test_the_bases_have_unit_variance_and_their_density(bases: str, nonzero: float) -> None:
    pair = pair_of(kernels((144, 150)), rank=16, bases=bases)
    for name, leaf in pair.items():
        values = np.asarray(leaf, np.float64)
        assert abs(values.std() - 1) < 1e-5, name
        assert abs(values.mean()) < 0.1, name
        assert abs((values != 0).mean() - nonzero) < 0.2 * nonzero, name
        if bases == "uniform":
            assert 0.98 * np.sqrt(3) < np.abs(values).max() < 1.02 * np.sqrt(3), name
        else:
            assert len(np.unique(values)) == 3, name
            assert values.max() == -values.min(), name


def test_the_pair_depends_on_the_seed_and_not_on_the_key() -> None:
    params = kernels((6, 4))
    first = pair_of(params, rank=2)
    other = pefts.randlora(rank=2).init(jax.random.key(7), params).frozen["shared"]
    jax.tree.map(np.testing.assert_array_equal, first, other)
    with jax.default_prng_impl("rbg"):
        again = pefts.randlora(rank=2).init(jax.random.key(0), params).frozen["shared"]
    jax.tree.map(np.testing.assert_array_equal, first, again)
    for name, leaf in pair_of(params, rank=2, seed=1).items():
        assert not np.allclose(leaf, first[name])


def test_the_pair_is_the_one_of_earlier_releases() -> None:
    """Values that stay: a change would silently give every saved seed another pair."""
    pair = pair_of(kernels((3, 2)), rank=2)
    np.testing.assert_allclose(
        pair["A"], [[1.1777109, -1.0927569], [-0.9386271, -1.3048704]], rtol=1e-5
    )
    B = [[-2.4343863, -2.3672037], [0.40231594, -0.6826375], [-1.3684285, -1.8810384]]
    np.testing.assert_allclose(pair["B"], B, rtol=1e-5)


def test_bases_of_zeros_are_refused() -> None:
    with pytest.raises(ValueError, match=r"randlora.*'A' of 'shared'.*another seed or a larger"):
        pair_of(kernels((2, 2)), rank=1, bases="very_sparse", seed=2)


@pytest.mark.parametrize("rank", [4, 5])
def test_the_presets_differ_by_their_published_factor(rank: int) -> None:
    """20 against 2 / sqrt(n)."""
    params = kernels((12, 20))
    updates = []
    for scaling in ("hf", "official"):
        peft = pefts.randlora(rank=rank, scaling=scaling)
        state = pefts.randomize(jax.random.key(1), peft.init(jax.random.key(0), params))
        updates.append(peft.merge(params, state)["dense_0"]["kernel"] - params["dense_0"]["kernel"])
    ratio = 10 * np.sqrt(-(-12 // rank))
    np.testing.assert_allclose(updates[0], ratio * updates[1], rtol=1e-3, atol=1e-3)


METHODS = {
    "randlora": functools.partial(pefts.randlora, rank=4),
    "nola": functools.partial(pefts.nola, rank=4, bases=6, chunk=4),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["conv", "embed", "chain"])
def test_the_product_finds_its_kernels_shape_everywhere(kind: str, name: str) -> None:
    """In a convolution, in an embedding, and where another method has bound the kernel already."""
    key = jax.random.key(0)
    model: Any = nn.Conv(7, (3,)) if kind == "conv" else nn.Embed(11, 6)
    x = jax.random.normal(key, (2, 9, 4)) if kind == "conv" else jnp.arange(8).reshape(2, 4)
    if kind == "chain":
        model, x = nn.DenseGeneral((2, 5), axis=(-2, -1)), jax.random.normal(key, (3, 4, 2))
    params = model.init(key, x)["params"]
    axes = pefts.infer_axes(model.apply, params, x)
    peft = METHODS[name](targets=["kernel", "embedding"][kind == "embed"], axes=axes)
    if kind == "chain":
        peft = pefts.chain(pefts.lora(rank=2, targets="kernel", axes=axes), peft)
    state = pefts.randomize(key, peft.init(key, params), scale=0.3)
    factored = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    merged = model.apply({"params": peft.merge(params, state)}, x)
    np.testing.assert_allclose(factored, merged, rtol=2e-5, atol=2e-5)
    assert not np.allclose(merged, model.apply({"params": params}, x), atol=1e-2)


class Stack(nn.Module):
    """A narrow and a wide kernel in each layer, under nn.scan."""

    layers: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        class Layer(nn.Module):
            @nn.compact
            def __call__(layer, x: jax.Array) -> tuple[jax.Array, None]:  # noqa: N805
                hidden = jnp.tanh(nn.Dense(self.width // 2, name="narrow")(x))
                return jnp.tanh(nn.Dense(self.width, name="wide")(hidden)), None

        scanned = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
        )
        return scanned(name="layers")(x)[0]


def test_training_keeps_no_copies_of_the_base() -> None:
    """The factor with lambda and gamma, n copies of A, is not kept for the backward pass.

    It is the second factor of the narrow kernel and the first of the wide one.
    """
    layers, width = 24, 96
    model, x = Stack(layers, width), jnp.ones((1, width))
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    peft = pefts.randlora(rank=4, axes={"kernel": "lio"})
    state = jax.eval_shape(peft.init, jax.random.key(0), params)

    def loss(trainable: Any, frozen: Any, params: Any) -> jax.Array:
        bound = peft.bind(params, pefts.PeftState(trainable, frozen))
        return jnp.sum(pefts.apply(model.apply)({"params": bound}, x) ** 2)

    lowered = jax.jit(jax.grad(loss)).lower(state.trainable, state.frozen, params)
    memory: Any = lowered.compile().memory_analysis()
    copies = 4 * (width // 2) ** 2  # of one kernel
    assert memory.temp_size_in_bytes < layers * copies
