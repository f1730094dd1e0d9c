"""APOLLO against numpy in float64, and as a citizen of optax."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients import (
    close,
    decaying,
    gradients,
    jitted,
    multi_steps_see_the_mean,
    near,
    run,
    tree_of,
)
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import pefts
from pefts.optimizers.apollo import apollo, scale_by_apollo
from pefts.optimizers.raw_adam import correct_bias, raw_adam
from pefts.targets import site_key

B1, B2, EPS = 0.9, 0.999, 1e-8
Array = np.ndarray

pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")


# --- the equations ---


def drawn(path: str, shape: tuple, window: int, seed: int = 0, dtype: Any = jnp.float64) -> Array:
    """P (..., small, r), as the documentation says it is drawn."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), window)
    return np.asarray(jax.random.normal(site_key(key, path), shape, dtype)) / np.sqrt(shape[-1])


def oracle(
    W: Array, grads: Array, projections: list[Array], *, kind: str, lr: float, scale: float
) -> tuple[Array, Array, Array, float]:
    """W, M, V and the norm after the last step, of a wide kernel: d_in is compressed."""
    M = V = norm = 0.0
    for t, G in enumerate(grads):
        R = projections[t].T @ G
        M, V = B1 * M + (1 - B1) * R, B2 * V + (1 - B2) * R**2
        N = M / (np.sqrt(V) + EPS)
        axis = 0 if kind == "channel" else None
        phi = np.linalg.norm(N, axis=axis) / (np.linalg.norm(R, axis=axis) + 1e-8)
        S = G * phi
        if t:
            S = S / (max(np.linalg.norm(S) / (norm + 1e-8), 1.01) / 1.01)
        norm = np.linalg.norm(S)
        k = np.sqrt(1 - B2 ** (t + 1)) / (1 - B1 ** (t + 1))
        W = W - lr * (k * scale * S + 0.2 * W)
    return W, M, V, norm


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (8, 8)], ids=str)
@pytest.mark.parametrize(
    ("kind", "rank", "scale"), [("channel", 3, None), ("channel", 2, 0.5), ("tensor", 1, None)]
)
def test_full_steps_of_each_layer_are_the_papers(kind, rank, scale, shape, x64) -> None:
    sizes = np.array([1.0, 3.0, 0.5, 2.0, 4.0])  # so that the limit is met in some steps
    grads = np.stack([gradients(5, *shape, seed=5 * n) * sizes[:, None, None] for n in range(2)], 1)
    W = np.random.default_rng(9).normal(size=(2, *shape))
    tx = apollo(
        0.1, rank=rank, update_interval=2, scale=scale, scale_type=kind, seed=3, weight_decay=0.2
    )
    params = {"layers": {"kernel": jnp.asarray(W)}}
    end, (state, *_), states = run(
        tx, params, [{"layers": {"kernel": jnp.asarray(grad)}} for grad in grads]
    )
    expected = scale or (1.0 if kind == "channel" else np.sqrt(128))
    turn = np.transpose if shape[0] > shape[1] else np.asarray
    small = (2, min(shape), rank)
    P = [drawn("layers/kernel", small, t // 2, seed=3) for t in range(5)]
    for n in range(2):
        Ws, M, V, norm = oracle(
            turn(W[n]), [turn(G) for G in grads[:, n]], [p[n] for p in P],
            kind=kind, lr=0.1, scale=expected,
        )  # fmt: skip
        near(turn(end["layers"]["kernel"][n]), Ws, 1e-11)
        near(turn(state.inner_state.mu["layers"]["kernel"][n]), M, 1e-12)
        near(turn(state.inner_state.nu["layers"]["kernel"][n]), V, 1e-12)
        near(state.norms["layers"]["kernel"][n], norm, 1e-11)
    norms = np.array([s[0].norms["layers"]["kernel"] for s in states])
    growth = norms[1:] / norms[:-1]
    assert growth.max() <= 1.01 + 1e-6 and np.isclose(growth, 1.01).any()
    assert (growth < 1).any()


def test_the_first_step_of_mini_keeps_the_direction_and_its_length_is_known(x64: None) -> None:
    """R has one row: |N| = 1 in each entry once the bias is corrected."""
    G = jnp.asarray(decaying(6, 9))
    tx = optax.chain(
        scale_by_apollo(rank=1, scale_type="tensor", inner=raw_adam(eps=0.0)), correct_bias()
    )
    U, _ = tx.update(G, tx.init(G))
    R = drawn("", (6, 1), 0).T @ np.asarray(G)
    near(U, np.sqrt(128) * G * 3 / np.linalg.norm(R), 1e-6)


def test_the_limit_does_not_see_alpha(x64: None) -> None:
    grads = [jnp.asarray(G) * (1 + t) ** 2 for t, G in enumerate(gradients(4, 6, 9))]
    once, _, states = run(scale_by_apollo(rank=2, scale=3.0), jnp.zeros((6, 9)), grads)
    plain, _, _ = run(scale_by_apollo(rank=2, scale=1.0), jnp.zeros((6, 9)), grads)
    near(once, 3 * plain, 1e-12)
    free, _, _ = run(scale_by_apollo(rank=2, scale=3.0, growth=1e9), jnp.zeros((6, 9)), grads)
    assert float(jnp.linalg.norm(free)) > 1.1 * float(jnp.linalg.norm(once))
    growth = [float(b.norms / a.norms) for a, b in itertools.pairwise(states)]
    assert np.isclose(growth, 1.01).any()


def test_the_projection_has_variance_one_over_r_and_keeps_lengths(x64: None) -> None:
    """Around an inner transformation that shows R: of 4000 columns the mean of R^2 is that of G."""
    tx = scale_by_apollo(rank=4, inner=optax.trace(0.0), update_interval=1)
    G, state = jnp.ones((4, 6, 700)), None
    params = {"layers": {"kernel": G}}
    state, seen = tx.init(params), []
    for _ in range(3):
        _, state = tx.update(params, state)
        seen.append(np.asarray(state.inner_state.trace["layers"]["kernel"]))
    assert not np.allclose(seen[0], seen[1]) and not np.allclose(seen[1], seen[2])
    assert not np.allclose(seen[0][0], seen[0][1])  # a projection for each layer
    tall = drawn("layers/kernel", (4000, 6, 4), 0)
    near(np.var(tall), 1 / 4, 0.005)
    near(np.mean(np.sum(tall.sum(1) ** 2, -1)), 6, 0.2)
    np.testing.assert_allclose(
        seen[0], np.einsum("lir,lio->lro", drawn("layers/kernel", (4, 6, 4), 0), G)
    )


def test_the_projection_lasts_for_the_interval_and_is_another_for_another_seed() -> None:
    def reduced(steps: int, **options: Any) -> Array:
        tx = scale_by_apollo(rank=2, inner=optax.trace(0.0), **options)
        _, _, states = run(tx, jnp.zeros((5, 8)), [jnp.asarray(decaying(5, 8))] * steps)
        return np.stack([state.inner_state.trace for state in states])

    R = reduced(5, update_interval=2)
    np.testing.assert_array_equal(R[0], R[1])
    np.testing.assert_array_equal(R[2], R[3])
    assert len({float(row[0, 0]) for row in R}) == 3
    np.testing.assert_array_equal(reduced(3, update_interval=None), R[[0, 0, 0]])
    assert not np.allclose(reduced(1, seed=1), R[:1])


def test_the_process_default_generator_does_not_matter() -> None:
    params, grads = tree_of(2, 6, 9)
    expected, _, _ = run(scale_by_apollo(rank=2), params, grads)
    with jax.default_prng_impl("rbg"):
        tx = scale_by_apollo(rank=2)
        updates, _ = tx.update(grads[0], tx.init(params))
    close(optax.apply_updates(params, updates), expected)


# --- the state ---


@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_the_state_has_the_size_of_the_formula(shape, stack) -> None:
    module = "layers" if stack else "layer"
    params = {module: {"kernel": jax.ShapeDtypeStruct((*stack, *shape), jnp.float32)}}
    layers, scalars = (stack or (1,))[0], 3  # our count, the seed and Adam's count
    for rank in (4, 1):
        state = jax.eval_shape(scale_by_apollo(rank=rank).init, params)
        assert pefts.count(state) == layers * (2 * 20 * rank + 1) + scalars


def test_bfloat16_leaves_have_a_float32_state_and_bfloat16_updates() -> None:
    _, grads = tree_of(2, 6, 9)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), grads[0])
    tx = scale_by_apollo(rank=3)
    state = tx.init(half)
    updates, after = jitted(tx.update)(half, state)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    kinds = {leaf.dtype for leaf in jax.tree.leaves(after)}
    assert kinds == {jnp.dtype(name) for name in ("float32", "int32", "uint32")}
    full = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    expected, _ = jitted(tx.update)(full, state)
    close(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), updates), expected, 1e-2, 1e-3)


def test_strict_promotion_and_leaves_that_are_not_targeted() -> None:
    params, grads = tree_of(2, 6, 9, steps=3)
    end, _, _ = run(apollo(0.1, rank=3), params, grads)
    adam, _, _ = run(optax.adam(0.1), params, grads)
    close(end["layers"]["bias"], adam["layers"]["bias"], 1e-5, 1e-6)
    assert not np.allclose(end["layers"]["kernel"], adam["layers"]["kernel"], atol=1e-2)
    mixed = grads[0] | {"steps": jnp.arange(3)}
    with jax.numpy_dtype_promotion("strict"):
        tx = scale_by_apollo(rank=3, inner=optax.identity(), targets="kernel")
        updates, _ = jitted(tx.update)(mixed, tx.init(mixed))
    np.testing.assert_array_equal(updates["steps"], mixed["steps"])
    np.testing.assert_array_equal(updates["layers"]["bias"], grads[0]["layers"]["bias"])


def test_nothing_is_limited_after_a_step_without_gradient() -> None:
    """Else a factor of LoRA, whose first gradient is zero, would stay near zero."""
    G = jnp.asarray(decaying(6, 9), jnp.float32)
    tx = scale_by_apollo(rank=2)
    _, _, states = run(tx, jnp.zeros((6, 9)), [jnp.zeros((6, 9)), G])
    assert float(states[0].norms) == 0 and float(states[1].norms) > 0.1


# --- a citizen of optax ---


def test_inside_multi_steps_it_sees_the_mean_gradient() -> None:
    params, grads = tree_of(2, 6, 9, steps=4)
    tx = apollo(0.1, rank=3, update_interval=1)
    multi_steps_see_the_mean(tx, params, grads)


def test_its_hyperparameters_can_be_injected_and_partitioned() -> None:
    params, grads = tree_of(2, 6, 9, steps=3)
    expected, _, _ = run(apollo(0.1, rank=3, scale=0.5), params, grads)
    injected = optax.inject_hyperparams(apollo, static_args=("rank", "update_interval", "seed"))
    tx = injected(learning_rate=0.1, rank=3, scale=0.5)
    close(run(tx, params, grads)[0], expected, 1e-5, 1e-6)
    with pytest.raises(ValueError, match=r"seed=.* static_args"):
        optax.inject_hyperparams(apollo, static_args=("rank",))(0.1, rank=3).init(params)
    labels = {"layers": {"kernel": "low", "bias": "rest"}}
    tx = optax.partition({"low": apollo(0.1, rank=3, scale=0.5), "rest": optax.sgd(0.1)}, labels)
    end, _, _ = run(tx, params, grads)
    close(end["layers"]["kernel"], expected["layers"]["kernel"], 1e-5, 1e-6)
    inner = scale_by_apollo(rank=3)
    state = optax.tree.map_params(inner, lambda leaf: leaf + 1, inner.init(params))
    np.testing.assert_array_equal(state.inner_state.mu["layers"]["kernel"], 1)
    assert int(state.count) == int(state.seed) == 0


def test_the_step_compiles_once() -> None:
    params, grads = tree_of(2, 6, 9, steps=4)
    tx = scale_by_apollo(rank=3, update_interval=2)
    step, state = jax.jit(tx.update, donate_argnums=1), tx.init(params)
    for grad in grads:
        _, state = step(grad, state)
    assert step._cache_size() == 1


@pytest.mark.parametrize("kind", ["channel", "tensor"])
def test_eight_devices_give_what_one_gives(kind: str) -> None:
    params, grads = tree_of(2, 24, 32, steps=4)
    tx = apollo(0.1, rank=2, scale=1.0, update_interval=2, scale_type=kind, weight_decay=0.1)
    expected, _, _ = run(tx, params, grads)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    spec = {"layers": {"kernel": P(None, "fsdp", "data"), "bias": P(None, "data")}}
    place = functools.partial(
        jax.tree.map, lambda spec, leaf: jax.device_put(leaf, NamedSharding(mesh, spec)), spec
    )
    end, _, _ = run(tx, place(params), [place(grad) for grad in grads])
    close(end, expected, 0, 1e-5)
    assert len(end["layers"]["kernel"].sharding.device_set) == 8


@pytest.mark.parametrize("options", [{"rank": 2}, {"rank": 1, "scale_type": "tensor"}])
def test_it_learns(options: dict) -> None:
    target = jnp.asarray(decaying(8, 12), jnp.float32)
    tx, W = apollo(0.02, update_interval=10, **options), jnp.zeros((8, 12))
    state, step = tx.init(W), jax.jit(lambda W, state: tx.update(W - target, state, W))
    for _ in range(150):
        U, state = step(W, state)
        W = optax.apply_updates(W, U)
    assert float(jnp.linalg.norm(W - target)) < 0.3 * float(jnp.linalg.norm(target))


BAD = {
    "scale_type='row' is unknown; choose one of": {"scale_type": "row"},
    "growth=0.9": {"growth": 0.9},
    "growth=inf: give gamma": {"growth": float("inf")},
    "rank=0": {"rank": 0},
    "update_interval=0": {"update_interval": 0},
    "scale=-1": {"scale": -1},
    "seed=-1: give an integer": {"seed": -1},
    "seed=4294967296: give an integer": {"seed": 2**32},
}


@pytest.mark.parametrize("message", BAD)
def test_arguments_out_of_range_are_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apollo(0.1, **{"rank": 2, **BAD[message]})


def test_what_does_not_fit_a_tree_is_refused() -> None:
    with pytest.raises(ValueError, match="rank=7 is out of range for 'kernel', a 6 x 9"):
        apollo(0.1, rank=7).init({"kernel": jnp.ones((6, 9))})
    with pytest.raises(ValueError, match="matches no parameter"):
        apollo(0.1, rank=2, targets="kernle").init({"kernel": jnp.ones((6, 9))})
    with pytest.raises(ValueError, match="is no gradient transformation: call it"):
        scale_by_apollo(rank=2, inner=raw_adam)
    with pytest.raises(ValueError, match="are ambiguous"):
        apollo(0.1, rank=2).init({"kernel": jnp.ones((2, 6, 9))})
