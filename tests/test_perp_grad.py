"""Gradients orthogonal to the weights, against the official code and their definition."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients import close, jitted, near, run
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pefts.optimizers.perp_grad import perp_grad

GOLDEN = Path(__file__).parents[1] / "../shared/golden/official/stablemax_perpgrad/golden.npz"

pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")


@pytest.fixture(scope="module")
def golden() -> Any:
    if not GOLDEN.exists():
        pytest.skip("the golden vectors of the official code are not beside this repository")
    return np.load(GOLDEN)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_the_official_trajectory(base: str, golden: Any, x64: None) -> None:
    lr = float(golden[f"{base}__lr"])
    if base == "sgd":
        optimizer = optax.sgd(lr, momentum=float(golden["sgd__momentum"]))
    else:
        b1, b2, eps, decay = (
            float(golden[f"adamw__{name}"]) for name in ("beta1", "beta2", "eps", "weight_decay")
        )
        optimizer = optax.adamw(lr, b1=b1, b2=b2, eps=eps, weight_decay=decay)
    tx, alone = optax.chain(perp_grad(), optimizer), perp_grad()
    params = [jnp.asarray(golden[f"W0_{i}"]) for i in range(2)]
    state = tx.init(params)
    for t in range(int(golden["n_steps"])):
        grads = [jnp.asarray(golden[f"G_{i}"][t]) for i in range(2)]
        seen, _ = jitted(alone.update)(grads, alone.init(params), params)
        params, state, _ = run(tx, params, [grads], state)
        for i in range(2):
            near(seen[i], golden[f"{base}__perp_grad_{i}"][t], 1e-12)
            near(params[i], golden[f"{base}__W_{i}"][t], 1e-11)


def tree(seed: int, layers: int = 3) -> dict:
    draw = np.random.default_rng(seed).normal
    shapes = {
        "layers": {"kernel": (layers, 8, 6), "scale": (layers, 8)},
        "head": {"kernel": (8, 4)},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(draw(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def perpendicular(grads: Any, params: Any, **options: Any) -> Any:
    tx = perp_grad(**options)
    return jitted(tx.update)(grads, tx.init(params), params)[0]


def vectors(tree: dict) -> list[np.ndarray]:
    """The tensors, layer by layer, as float64 vectors."""
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
    stack = [tree["layers"][name][i].ravel() for name in ("kernel", "scale") for i in range(3)]
    return [*stack, tree["head"]["kernel"].ravel()]


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_it_is_the_formula_of_each_tensor_or_of_all(scope: str, rescale: bool) -> None:
    params, grads = tree(0), tree(1)
    with jax.numpy_dtype_promotion("strict"):
        updates = perpendicular(grads, params, scope=scope, rescale=rescale)
    W, G, U = (vectors(tree) for tree in (params, grads, updates))
    if scope == "global":
        W, G, U = ([np.concatenate(parts)] for parts in (W, G, U))
    for w, g, u in zip(W, G, U, strict=True):
        h = g - (w @ g) / (w @ w) * w
        norms = np.linalg.norm(w), np.linalg.norm(g), np.linalg.norm(u)
        assert abs(w @ u) < 1e-6 * norms[0] * norms[1]
        if rescale:
            assert norms[2] == pytest.approx(norms[1], rel=1e-6)
            h *= np.linalg.norm(g) / np.linalg.norm(h)
        near(u, h, 1e-5)
    if scope == "global":  # single tensors do keep a part along their weights
        w, u = (vectors(tree)[0] for tree in (params, updates))
        assert abs(w @ u) > 1e-2 * np.linalg.norm(w)


@pytest.mark.parametrize("part", [1e-2, 1e-4, 1e-5])
def test_what_is_nearly_parallel_is_orthogonal_too(part: float) -> None:
    draw = np.random.default_rng(0).normal
    w, v = (
        jnp.asarray(draw(size=(40, 30)), jnp.float32),
        jnp.asarray(draw(size=(40, 30)), jnp.float32),
    )
    g = -w + part * v
    u = np.asarray(perpendicular(g, w), np.float64)
    size = np.linalg.norm(w) * np.linalg.norm(g)
    assert abs(np.sum(u * np.asarray(w, np.float64))) < 1e-6 * size
    assert np.linalg.norm(u) == pytest.approx(float(np.linalg.norm(g)), rel=1e-5)


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("factor", [1.0, -3.7, 1e-8])
def test_a_parallel_gradient_becomes_zero_not_noise(factor: float, scope: str) -> None:
    w = jnp.asarray(np.random.default_rng(0).normal(size=(50, 7)), jnp.float32)
    np.testing.assert_array_equal(perpendicular(factor * w, w, scope=scope), 0)


def test_only_the_layer_whose_gradient_is_parallel_becomes_zero() -> None:
    params, grads = tree(0), tree(1)
    grads["layers"]["kernel"] = (
        grads["layers"]["kernel"].at[1].set(2 * params["layers"]["kernel"][1])
    )
    updates = perpendicular(grads, params)
    zero = [not np.any(layer) for layer in updates["layers"]["kernel"]]
    assert zero == [False, True, False]


def test_weights_of_zero_leave_the_gradient_and_a_gradient_of_zero_stays() -> None:
    g = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    near(perpendicular(g, jnp.zeros((5, 3))), g, 1e-6)
    np.testing.assert_array_equal(perpendicular(jnp.zeros((5, 3)), g), 0)
    np.testing.assert_array_equal(perpendicular(jnp.zeros((5, 3)), g * 0), 0)


def test_bfloat16_gradients_are_projected_in_float32_and_integers_pass() -> None:
    half = [jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree(seed)) for seed in (0, 1)]
    with jax.numpy_dtype_promotion("strict"):
        updates = perpendicular(half[1], half[0])
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    up = [jax.tree.map(lambda leaf: leaf.astype(jnp.float32), one) for one in half]
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), perpendicular(up[1], up[0]))
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    count = {"steps": jnp.arange(3), "w": jnp.ones(2)}
    np.testing.assert_array_equal(perpendicular(count, count)["steps"], [0, 1, 2])
    del count["w"]
    assert perpendicular(count, count, scope="global")["steps"].tolist() == [0, 1, 2]


def test_it_stands_in_multi_steps_and_in_a_part_of_a_tree() -> None:
    params, grads = tree(0), [tree(1), tree(2)]
    labels = {"layers": {"kernel": "perp", "scale": "rest"}, "head": {"kernel": "rest"}}
    perp = optax.chain(perp_grad("global"), optax.sgd(0.5))
    tx = optax.partition({"perp": perp, "rest": optax.sgd(0.5)}, labels)
    end, _, _ = run(optax.MultiSteps(tx, 2).gradient_transformation(), params, grads)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    kernel = params["layers"]["kernel"]
    expected = kernel - 0.5 * perpendicular(mean["layers"]["kernel"], kernel, scope="global")
    near(end["layers"]["kernel"], expected, 1e-6)
    near(end["head"]["kernel"], params["head"]["kernel"] - 0.5 * mean["head"]["kernel"], 1e-6)
    assert jax.tree.leaves(perp_grad().init(params)) == []
    tx = perp_grad()
    tx.update(grads[0], tx.init(params), params, value=1.0)  # optax's extra arguments


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_eight_devices_give_what_one_gives(scope: str) -> None:
    params, grads = tree(0), tree(1)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    spec = {
        "layers": {"kernel": P(None, "fsdp", "data"), "scale": P(None, "fsdp")},
        "head": {"kernel": P("fsdp", "data")},
    }
    place = functools.partial(
        jax.tree.map, lambda spec, leaf: jax.device_put(leaf, NamedSharding(mesh, spec)), spec
    )
    updates = perpendicular(place(grads), place(params), scope=scope)
    close(updates, perpendicular(grads, params, scope=scope), 0, 1e-5)
    assert len(updates["head"]["kernel"].sharding.device_set) == 8


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="scope='layer' is unknown; choose one of"):
        perp_grad("layer")
    with pytest.raises(ValueError, match="perp_grad projects on the weights: call update"):
        perp_grad().update(jnp.ones(2), optax.EmptyState())
