"""Coordinate-wise estimates: exact on quadratics, the official numbers, any way to compute them."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradients import near
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pefts.zeroth_order.coordinates import (
    all_coordinates,
    index_sets,
    is_matrix,
    layers_of,
    random_coordinates,
    value_and_cge,
)

GOLDEN = Path(__file__).parents[1] / "../shared/golden/official/deepzero/golden.npz"
NAMES = ("W1", "b1", "W2", "b2")
Array = np.ndarray


@pytest.fixture(scope="module")
def golden() -> Any:
    if not GOLDEN.exists():
        pytest.skip("the golden vectors of the official code are not beside this repository")
    return np.load(GOLDEN)


def official_params(golden: Any) -> dict[str, jax.Array]:
    return {name: jnp.asarray(golden[name].T) for name in NAMES}


def official_loss(params: dict, golden: Any) -> jax.Array:
    """Linear - tanh - Linear, cross-entropy, in Flax's orientation."""
    hidden = jnp.tanh(golden["x"] @ params["W1"] + params["b1"][None])
    logs = jax.nn.log_softmax(hidden @ params["W2"] + params["b2"][None])
    return -jnp.mean(logs[np.arange(6), golden["y"]])


def quadratic(n: int, seed: int = 0) -> tuple[Array, Array]:
    A = np.random.default_rng(seed).normal(size=(n, n))
    return A + A.T, np.random.default_rng(seed + 1).normal(size=n)


# --- the numbers ---


@pytest.mark.parametrize("mu", [5e-3, 0.3])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_of_a_quadratic_it_is_the_gradient_and_half_mu_of_the_diagonal(mu, chunk, x64) -> None:
    A, theta = quadratic(7)
    loss = lambda p: 0.5 * p["w"] @ (A @ p["w"])  # noqa: E731
    value, ghat = value_and_cge(loss, {"w": jnp.asarray(theta)}, mu=mu, chunk=chunk)
    near(value, 0.5 * theta @ A @ theta, 1e-13)
    near(ghat["w"], A @ theta + mu / 2 * np.diag(A), 2e-12)


def test_it_is_the_official_estimate(golden: Any, x64: None) -> None:
    params, mu = official_params(golden), float(golden["mu"])
    loss = functools.partial(official_loss, golden=golden)
    value, ghat = jax.jit(lambda p: value_and_cge(loss, p, mu=mu, chunk=3))(params)
    near(value, golden["base_loss"], 1e-14)
    for name in NAMES:
        near(ghat[name], golden[f"cge_full__{name}"].T, 1e-12)


def test_of_a_network_with_masked_weights_it_is_the_official_estimate(golden, x64) -> None:
    params, mu = official_params(golden), float(golden["mu"])
    masks = {"W1": golden["mask1"].T, "W2": golden["mask2"].T}
    chosen = {name: np.flatnonzero(masks.get(name, np.ones(params[name].shape))) for name in NAMES}
    assert 0 < masks["W1"].sum() < masks["W1"].size

    def loss(params: dict) -> jax.Array:
        return official_loss({**params, **{k: params[k] * masks[k] for k in masks}}, golden)

    value, ghat = jax.jit(lambda p: value_and_cge(loss, p, chosen, mu=mu))(params)
    near(value, golden["base_loss_masked_net"], 1e-14)
    for name in NAMES:
        near(ghat[name], golden[f"cge_masked_net__{name}"].T, 1e-12)
    # Of the dense network, the masks choose entries of the full estimate.
    dense = functools.partial(official_loss, golden=golden)
    _, ghat = jax.jit(lambda p: value_and_cge(dense, p, chosen, mu=mu))(params)
    for name in NAMES:
        full = golden[f"cge_full__{name}"].T * masks.get(name, 1)
        near(ghat[name], full, 1e-12)
        assert np.all((np.asarray(ghat[name]) == 0) == (full == 0))


def test_each_leaf_is_estimated_where_it_is_chosen_whatever_its_shape(x64: None) -> None:
    params = {
        "scalar": jnp.asarray(1.5),
        "half": jnp.ones((2, 3, 2), jnp.float32),
        "steps": jnp.arange(3),
        "none": jnp.ones(2),
    }
    weights = np.arange(1.0, 13).reshape(2, 3, 2)
    loss = lambda p: 2 * p["scalar"] + jnp.sum(p["half"].astype(jnp.float64) * weights)  # noqa: E731
    chosen = {"scalar": [0], "half": [11, 0, 4, 4], "steps": None, "none": []}
    _, ghat = jax.jit(lambda p: value_and_cge(loss, p, chosen))(params)
    near(ghat["scalar"], 2, 1e-11)
    expected = np.zeros(12)
    expected[[11, 0, 4]] = [12, 1, 5]
    near(ghat["half"], expected.reshape(2, 3, 2), 1e-6)
    assert ghat["half"].dtype == jnp.float32 and ghat["scalar"].dtype == jnp.float64
    np.testing.assert_array_equal(ghat["steps"], 0)
    np.testing.assert_array_equal(ghat["none"], 0)
    every = [S.size for S in index_sets(params)]
    assert every == [12, 2, 1, 0] == [S.size for S in jax.tree.leaves(all_coordinates(params))]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=jnp.dtype)
def test_a_step_that_the_dtype_rounds_is_divided_by_as_it_is(dtype: Any, x64: None) -> None:
    """A linear loss: exact, also where theta_i + mu is theta_i in the dtype."""
    w = jnp.asarray([0.0, 1e-3, 0.7, -0.7, 1.0, -1.0, 3.0, -8.0, 100.0, -511.0, 3e4], dtype)
    c = 2.0 ** np.arange(-4, 7)
    loss = lambda w: jnp.sum(w.astype(jnp.float64) * c)  # noqa: E731
    for estimate in (value_and_cge, jax.jit(value_and_cge, static_argnums=0)):
        _, ghat = estimate(loss, w, mu=1e-3)
        assert ghat.dtype == jnp.float32
        np.testing.assert_allclose(ghat, c, rtol=1e-5)
    # What other backends need, which may keep more digits than the dtype has.
    assert "reduce_precision" in str(jax.make_jaxpr(lambda w: value_and_cge(loss, w))(w))


# --- other ways to the same numbers ---


def network(seed: int = 0) -> tuple[dict, Array]:
    random = np.random.default_rng(seed)
    params = {
        "first": {"kernel": random.normal(size=(5, 6)), "bias": random.normal(size=6)},
        "last": {"kernel": random.normal(size=(6, 3))},
    }
    x = random.normal(size=(8, 5)).astype(np.float32)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params), x


def network_loss(params: dict, x: Any) -> jax.Array:
    h = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    return jnp.mean(jnp.square(h @ params["last"]["kernel"]))


def mesh(shape: tuple, names: tuple) -> Mesh:
    return Mesh(np.asarray(jax.devices()).reshape(shape), names)


@functools.partial(jax.jit, static_argnums=(2, 3))
def estimated(params: dict, x: Any, chunk: int, sharding: Any) -> tuple:
    loss = functools.partial(network_loss, x=x)
    return value_and_cge(loss, params, chunk=chunk, sharding=sharding)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [((8,), P("data")), ((4, 2), P("data")), ((4, 2), P(("data", "model")))],
    ids=str,
)
@pytest.mark.parametrize("chunk", [1, 2])
def test_divided_over_8_devices_it_is_the_same_to_the_bit(chunk: int, shape, spec) -> None:
    params, x = network()
    sharding = NamedSharding(mesh(shape, ("data", "model")[: len(shape)]), spec)
    alone = estimated(params, x, chunk, None)
    divided = estimated(params, x, chunk, sharding)
    jax.tree.map(np.testing.assert_array_equal, divided, alone)
    text = estimated.lower(params, x, chunk, sharding).compile().as_text()
    assert "all-gather" in text


def test_a_divided_batch_gives_the_same_estimate(x64: None) -> None:
    params, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), network())
    grid = mesh((8,), ("data",))
    placed = jax.device_put(params, NamedSharding(grid, P()))
    batch = jax.device_put(x, NamedSharding(grid, P("data")))
    _, ghat = estimated(placed, batch, 1, None)
    _, alone = estimated(params, x, 1, None)
    jax.tree.map(lambda a, b: near(a, b, 1e-11), ghat, alone)


def test_leaves_divided_over_devices_give_the_same_estimate(x64: None) -> None:
    random = np.random.default_rng(3)
    params = {"layers": {"kernel": jnp.asarray(random.normal(size=(2, 8, 4)))}}
    loss = lambda p: jnp.sum(jnp.sin(p["layers"]["kernel"]))  # noqa: E731
    both = jax.jit(lambda p: value_and_cge(loss, p, chunk=4)[1]["layers"]["kernel"])
    placed = jax.device_put(params, NamedSharding(mesh((8,), ("fsdp",)), P(None, "fsdp")))
    assert len(placed["layers"]["kernel"].sharding.device_set) == 8
    near(both(placed), both(params), 1e-11)


def test_theta_is_never_walked() -> None:
    """Every perturbed value is taken at theta + mu e_i to the bit, and nowhere else."""
    seen = []

    def loss(w: jax.Array) -> jax.Array:
        jax.debug.callback(lambda w: seen.append(np.asarray(w)), w)
        return jnp.sum(w)

    theta = np.asarray([0.1, 0.7, 1.3], np.float32)
    value_and_cge(loss, jnp.asarray(theta), mu=0.05)
    jax.effects_barrier()
    expected = {(theta + np.float32(0.05) * e).tobytes() for e in np.eye(3, dtype=np.float32)}
    assert {w.tobytes() for w in seen} == expected | {theta.tobytes()}
    assert len(seen) == 4  # 1 + |S| values


def test_a_chunk_that_is_not_full_is_no_program_of_its_own() -> None:
    traced = []

    def loss(w: jax.Array) -> jax.Array:
        traced.append(w)
        return jnp.sum(jnp.tanh(w))

    counts = []
    for size in (8, 7):
        traced.clear()
        jax.make_jaxpr(lambda w: value_and_cge(loss, w, chunk=4))(jnp.ones(size))
        counts.append(len(traced))
    assert counts[0] == counts[1]


# --- which are drawn ---


def test_every_layer_loses_its_own_fraction() -> None:
    params = {
        "layers": {"kernel": jnp.ones((3, 4, 5)), "bias": jnp.ones((3, 5))},
        "head": {"kernel": jnp.ones((5, 7)), "bias": jnp.ones(7)},
        "steps": jnp.arange(4),
    }
    sparsity = {"layers/kernel": (0.0, 0.5, 1.0), "head/kernel": 0.6}
    draw = jax.jit(lambda key: random_coordinates(key, params, sparsity))
    S = draw(jax.random.key(0))
    layer, _ = np.divmod(S["layers"]["kernel"], 20)
    assert np.bincount(layer, minlength=3).tolist() == [20, 10, 0]
    assert S["head"]["kernel"].shape == (35 - round(0.6 * 35),) == (14,)
    assert len(set(S["head"]["kernel"].tolist())) == 14
    assert S["layers"]["bias"].tolist() == list(range(15)) and S["head"]["bias"].size == 7
    assert S["steps"].size == 0
    other = draw(jax.random.key(1))
    assert not np.array_equal(S["head"]["kernel"], other["head"]["kernel"])
    everywhere = random_coordinates(jax.random.key(0), params, 0.5)
    sizes = jax.tree.map(jnp.size, everywhere)
    assert sizes["layers"] == {"kernel": 30, "bias": 15}
    assert sizes["head"] == {"kernel": 35 - round(17.5), "bias": 7}
    # What is drawn for a leaf does not depend on the others.
    alone = random_coordinates(jax.random.key(0), {"head": params["head"]}, {"head/kernel": 0.6})
    np.testing.assert_array_equal(alone["head"]["kernel"], S["head"]["kernel"])


def test_every_entry_is_drawn_equally_often() -> None:
    params = {"kernel": jnp.ones((3, 4))}
    draw = jax.jit(jax.vmap(lambda key: random_coordinates(key, params, 0.75)["kernel"]))
    S = np.asarray(draw(jax.random.split(jax.random.key(5), 2000)))
    assert S.shape == (2000, 3)
    counts = np.bincount(S.reshape(-1), minlength=12)
    sigma = np.sqrt(2000 * 0.25 * 0.75)
    assert np.all(np.abs(counts - 500) < 4 * sigma)


def test_layers_and_matrices_are_known_by_path_and_shape() -> None:
    kernel = jnp.ones((2, 3, 4))
    assert layers_of("encoder/layers/query/kernel", kernel) == 2
    assert layers_of("encoder/layers/0/kernel", kernel) == 1
    assert is_matrix("conv/kernel", kernel) and is_matrix("layers/kernel", kernel)
    assert not is_matrix("layers/bias", jnp.ones((2, 3))) and is_matrix("bias", jnp.ones((2, 3)))
    assert not is_matrix("kernel", jnp.ones((2, 3), jnp.int32))


# --- errors ---


def total(p: Any) -> jax.Array:
    return jnp.sum(p["w"])


BAD = {
    "mu=0: give the step": {"mu": 0},
    "mu=-0.1: give": {"mu": -0.1},
    "mu=nan": {"mu": float("nan")},
    "chunk=0: give how many": {"chunk": 0},
    "chunk=2.0": {"chunk": 2.0},
    "none of .'b', 'i', 'w'. has an entry": {"coordinates": {"w": [], "b": None, "i": None}},
    "coordinates of 'w': positions from 0 to 6 are given, but its 6 entries": {
        "coordinates": {"w": [0, 6], "b": None, "i": None}
    },
    "coordinates of 'w': positions from -1 to 0": {
        "coordinates": {"w": [0, -1], "b": None, "i": None}
    },
    r"coordinates of 'w': integers of shape \(k,\) are needed, got bool": {
        "coordinates": {"w": np.ones((2, 3), bool), "b": None, "i": None}
    },
    r"'w': integers of shape \(k,\) are needed, got float": {
        "coordinates": {"w": [0.5], "b": None, "i": None}
    },
    "coordinates of 'i': its dtype is int32": {"coordinates": {"w": [0], "b": None, "i": [0]}},
    "give a tree like params": {"coordinates": {"w": [0]}},
    "names the mesh axis that divides": {
        "sharding": NamedSharding(Mesh(np.asarray(jax.devices()[:2]), ("data",)), P())
    },
    "sharding='data'": {"sharding": "data"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_refused(message: str) -> None:
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(2), "i": jnp.arange(2)}
    with pytest.raises(ValueError, match=message):
        value_and_cge(total, params, **BAD[message])


@pytest.mark.parametrize(
    "loss",
    [lambda p: p["w"], lambda p: (total(p), 1.0), lambda p: jnp.argmax(p["w"]), lambda p: None],
)
def test_what_is_no_loss_is_refused_before_it_is_computed(loss: Any) -> None:
    with pytest.raises(ValueError, match="value_fn returns .* must return one floating-point"):
        jax.jit(lambda p: value_and_cge(loss, p)).lower({"w": jnp.ones(3)})


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        (1.5, "sparsity=1.5 of 'layers/kernel': give the fraction"),
        (-0.1, "sparsity=-0.1"),
        (float("nan"), "sparsity=nan"),
        ("half", "sparsity='half'"),
        ({"kernel": 0.5}, "'kernel' is no floating leaf of params; .*'layers/kernel'"),
        ({"layers/kernel": (0.5, 0.5)}, "or 3 of them, one for each layer"),
    ],
)
def test_fractions_that_do_not_fit_are_refused(sparsity: Any, message: str) -> None:
    params = {"layers": {"kernel": jnp.ones((3, 4, 5))}}
    with pytest.raises(ValueError, match=message):
        random_coordinates(jax.random.key(0), params, sparsity)


def test_a_traced_fraction_is_refused_and_a_traced_position_out_of_range_is_clipped() -> None:
    params = {"w": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match=r"\(not traced\)"):
        jax.jit(lambda s: random_coordinates(jax.random.key(0), params, s))(0.5)
    estimate = jax.jit(lambda S: value_and_cge(total, params, {"w": S})[1]["w"])
    near(estimate(jnp.asarray([1, 99])), [[0, 1, 0], [0, 0, 1]], 1e-3)
