"""DeepZero: its scores and masks against the official code, and training without a gradient."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients import close, near
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import pefts
from pefts import linalg
from pefts.zeroth_order.coordinates import random_coordinates, value_and_cge
from pefts.zeroth_order.deepzero import (
    Staged,
    deepzero,
    layer_sparsity,
    prune,
    random_gradient,
    scale_by_coordinates,
    value_and_cge_by_stage,
    zo_grasp,
)

GOLDEN = Path(__file__).parents[1] / "../shared/golden/official/deepzero/golden.npz"
NAMES, WEIGHTS = ("W1", "b1", "W2", "b2"), ("W1", "W2")
Array = np.ndarray


@pytest.fixture(scope="module")
def golden() -> Any:
    if not GOLDEN.exists():
        pytest.skip("the golden vectors of the official code are not beside this repository")
    return np.load(GOLDEN)


def official_params(golden: Any) -> dict[str, jax.Array]:
    return {name: jnp.asarray(golden[name].T) for name in NAMES}


def official_loss(golden: Any) -> Any:
    def loss(params: dict) -> jax.Array:
        hidden = jnp.tanh(golden["x"] @ params["W1"] + params["b1"][None])
        logs = jax.nn.log_softmax(hidden @ params["W2"] + params["b2"][None])
        return -jnp.mean(logs[np.arange(6), golden["y"]])

    return loss


def stored_noise(golden: Any, case: str) -> Any:
    noise = {name: jnp.asarray(golden[f"{case}__noise_{name}"]).mT for name in WEIGHTS}
    return lambda number: jax.tree.map(lambda n: n[number], noise)


# --- random gradients and scores ---


@pytest.mark.parametrize("unbiased", [False, True])
def test_random_gradients_with_and_without_the_official_factors(unbiased, golden, x64) -> None:
    params, mu = official_params(golden), float(golden["mu"])
    loss, weights = official_loss(golden), {name: params[name] for name in WEIGHTS}
    ghat = random_gradient(
        lambda W: loss({**params, **W}),
        weights,
        stored_noise(golden, "rge"),
        queries=int(golden["rge_queries"]),
        mu=mu,
        unbiased=unbiased,
    )
    for name in WEIGHTS:
        factor = weights[name].size / mu if unbiased else 1.0
        near(np.asarray(ghat[name]) / factor, golden[f"rge__{name}"].T, 1e-15)


def test_the_unbiased_random_gradient_is_on_average_the_gradient(x64: None) -> None:
    """Every layer of a stack is a tensor of its own, and two tensors do not disturb each other."""
    random = np.random.default_rng(0)
    params = {"layers": {"kernel": jnp.asarray(random.normal(size=(2, 2, 3)))}, "b": jnp.ones(4)}
    slope = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape)), params)
    loss = lambda p: sum(jnp.vdot(c, w) for c, w in zip(*map(jax.tree.leaves, (slope, p))))  # noqa: E731, B905
    one = functools.partial(random_gradient, loss, params, queries=2, unbiased=True)
    samples = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 4000))
    mean, deviation = (
        jax.tree.map(lambda s, fn=fn: np.asarray(fn(s, axis=0)), samples)
        for fn in (np.mean, np.std)
    )
    jax.tree.map(
        lambda m, s, c: np.testing.assert_array_less(np.abs(m - c), 4 * s / np.sqrt(4000)),
        mean, deviation, slope,
    )  # fmt: skip
    scale = np.mean([np.abs(c).mean() for c in jax.tree.leaves(slope)])
    assert max(s.max() for s in jax.tree.leaves(deviation)) / np.sqrt(4000) < 0.1 * scale


def test_scores_are_the_official_ones_of_a_network_that_stays_where_it_is(golden, x64) -> None:
    score = functools.partial(
        zo_grasp,
        official_loss(golden),
        official_params(golden),
        stored_noise(golden, "zo_grasp_clean"),
        queries=int(golden["rge_queries"]),
        mu=float(golden["mu"]),
    )
    scores = score()
    assert set(scores) == set(WEIGHTS)
    for name in WEIGHTS:
        near(scores[name], golden[f"zo_grasp_clean__score_{name}"].T, 1e-12)
    masks = {amount: prune(scores, amount / 100) for amount in (30, 60, 90)}
    for amount, mask in masks.items():
        for name in WEIGHTS:
            np.testing.assert_array_equal(mask[name], golden[f"prune_{amount}__mask_{name}"].T)
        found = layer_sparsity(mask)
        near(
            [found[name] for name in WEIGHTS],
            golden[f"prune_{amount}__layer_sparsity"][:, None],
            1e-15,
        )


def test_the_smallest_scores_of_all_leaves_together_are_removed_whatever_their_sign() -> None:
    scores = {
        "layers/kernel": np.asarray([[[5.0, -1.0]], [[0.1, -0.2]]]),
        "head": np.asarray([[-9.0], [0.3]]),
    }
    masks = prune(scores, 0.5)
    assert masks["layers/kernel"].tolist() == [[[True, True]], [[False, False]]]
    assert masks["head"].tolist() == [[True], [False]]
    assert layer_sparsity(masks) == {"layers/kernel": (0.0, 1.0), "head": (0.5,)}
    for n, amount in [(5, 0.5), (7, 0.5), (10, 0.25), (10, 0.26), (4, 0.0)]:
        mask = prune({"w": np.ones((1, n))}, amount)["w"]  # of equal scores the first go first
        assert mask.tolist() == [[i >= round(amount * n) for i in range(n)]]


def test_scores_from_a_key_are_those_of_the_matrices_alone() -> None:
    params, loss = problem()
    score = jax.jit(lambda p, key: zo_grasp(loss, p, key, queries=3))
    scores = score(params, jax.random.key(0))
    shapes = {path: score.shape for path, score in scores.items()}
    assert shapes == {"layers/kernel": (2, 4, 4), "head/kernel": (4, 3)}
    again, other = score(params, jax.random.key(0)), score(params, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, scores, again)
    assert not np.allclose(scores["head/kernel"], other["head/kernel"])
    head = zo_grasp(loss, params, jax.random.key(0), queries=3, targets="head")
    assert set(head) == {"head/kernel"}
    with pytest.raises(ValueError, match="targets: 'bias' matches no parameter"):
        zo_grasp(loss, params, jax.random.key(0), targets="bias")


# --- feature reuse ---

BOTH = (value_and_cge_by_stage, value_and_cge)


def stages(calls: list | None = None) -> dict:
    def counted(name: str, stage: Any) -> Any:
        def run(params: Any, x: Any) -> Any:
            if calls is not None:
                jax.debug.callback(lambda: calls.append(name))
            return stage(params, x)

        return run

    def dense(p: dict, x: Any) -> jax.Array:
        return jnp.tanh(x @ p["kernel"] + p["bias"][None])

    def head(p: dict, x: Any) -> jax.Array:
        return jnp.mean(jnp.square(x @ p["kernel"]))

    return {"stem": counted("stem", dense), "body": counted("body", dense), "a": counted("a", head)}


def staged_params(dtype: Any = jnp.float64) -> tuple[dict, jax.Array]:
    random = np.random.default_rng(4)
    shapes = {
        "a": {"kernel": (4, 2)},
        "body": {"kernel": (5, 4), "bias": (4,)},
        "stem": {"kernel": (3, 5), "bias": (5,)},
    }
    params = jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    return params, jnp.asarray(random.normal(size=(6, 3)), dtype)


@pytest.mark.parametrize("sparsity", [0.0, {"stem/kernel": 1.0, "stem/bias": 1.0}])
def test_feature_reuse_on_and_off_are_identical(sparsity: Any, x64: None) -> None:
    params, x = staged_params()
    S = random_coordinates(jax.random.key(0), params, sparsity)
    loss = Staged(stages(), x)
    off = jax.jit(lambda p: value_and_cge(loss, p, S, chunk=2))(params)
    on = jax.jit(lambda p: value_and_cge_by_stage(loss, p, S, chunk=2))(params)
    assert jax.tree.structure(on) == jax.tree.structure(off)
    jax.tree.map(np.testing.assert_array_equal, on, off)
    grid = NamedSharding(Mesh(np.asarray(jax.devices()), ("data",)), P("data"))
    split = jax.jit(lambda p: value_and_cge_by_stage(loss, p, S, chunk=2, sharding=grid))(params)
    close(split, off, 1e-10, 1e-12)


def test_a_list_of_stages_is_keyed_by_number(x64: None) -> None:
    params, x = staged_params()
    listed = [params[name] for name in stages()]
    loss = Staged(dict(enumerate(stages().values())), x)
    near(loss(listed), Staged(stages(), x)(params), 0)
    on, off = (jax.jit(lambda p, f=f: f(loss, p)[1])(listed) for f in BOTH)
    assert isinstance(on, list)
    close(on, off, 1e-12, 1e-12)
    with pytest.raises(ValueError, match=r"stages: \[0, 1, 2\] are given and params have \[0, 1\]"):
        value_and_cge_by_stage(loss, listed[:2])


def test_what_stands_before_a_perturbed_stage_is_computed_once() -> None:
    params, x = staged_params(jnp.float32)
    calls: list[str] = []
    S = {
        "stem": {"kernel": jnp.arange(2), "bias": None},
        "body": {"kernel": None, "bias": jnp.arange(4)},
        "a": {"kernel": jnp.arange(8)},
    }
    value_and_cge_by_stage(Staged(stages(calls), x), params, S)
    jax.effects_barrier()
    counts = {name: calls.count(name) for name in stages()}
    assert counts == {"stem": 1 + 2, "body": 1 + 2 + 4, "a": 1 + 2 + 4 + 8}


# --- the transformation ---


def problem(dtype: Any = jnp.float32) -> tuple[dict, Any]:
    random = np.random.default_rng(2)
    params = {
        "layers": {"kernel": random.normal(size=(2, 4, 4)), "bias": random.normal(size=(2, 4))},
        "head": {"kernel": random.normal(size=(4, 3))},
    }
    x = random.normal(size=(8, 4))

    def loss(p: dict) -> jax.Array:
        h = jnp.asarray(x, p["head"]["kernel"].dtype)
        for layer in range(2):
            h = jnp.tanh(h @ p["layers"]["kernel"][layer] + p["layers"]["bias"][layer][None])
        return jnp.mean(jnp.square(linalg.precise(h @ p["head"]["kernel"])))

    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params), loss


def train(tx: Any, params: Any, loss: Any, steps: int = 3, programs: int = 1) -> tuple:
    """Parameters and state after the steps, and the parameters before each."""
    state, seen = tx.init(params), []
    step = jax.jit(lambda p, s: tx.update(p, s, p, value_fn=loss))
    for _ in range(steps):
        seen.append(params)
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert step._cache_size() == programs
    return params, state, seen


def test_it_is_sgd_with_momentum_and_decay_on_sparse_differences(x64: None) -> None:
    params, loss = problem(jnp.float64)
    schedule = optax.linear_schedule(0.1, 0.0, 4)
    tx = deepzero(
        schedule, sparsity=0.5, mu=0.01, shuffle_interval=2, weight_decay=0.1, seed=3, chunk=3
    )
    end, state, seen = train(tx, params, loss, 4)
    theta, m = params, jax.tree.map(jnp.zeros_like, params)
    estimate = jax.jit(lambda p, S: value_and_cge(loss, p, S, mu=0.01))
    key, drawn = jax.random.key(3, impl="threefry2x32"), []
    for t in range(4):
        drawn.append(random_coordinates(jax.random.fold_in(key, t // 2), theta, 0.5))
        jax.tree.map(functools.partial(near, tolerance=1e-12), theta, seen[t])
        value, ghat = estimate(theta, drawn[t])
        m = jax.tree.map(lambda m, g, w: 0.9 * m + g + 0.1 * w, m, ghat, theta)
        theta = jax.tree.map(lambda w, m, t=t: w - float(schedule(jnp.int32(t))) * m, theta, m)
    jax.tree.map(functools.partial(near, tolerance=1e-12), end, theta)
    near(state.value, value, 1e-12)
    assert (int(state.count), int(state.skipped)) == (4, 0)
    same = jax.tree.map(np.array_equal, drawn[0], drawn[1])
    other = jax.tree.map(np.array_equal, drawn[1], drawn[2])
    assert all(jax.tree.leaves(same)) and not other["layers"]["kernel"]
    assert other["layers"]["bias"]  # all of it, always


def test_the_network_is_dense_although_the_mask_is_sparse() -> None:
    params, loss = problem()
    tx = deepzero(0.1, sparsity=0.5, shuffle_interval=1, momentum=0.0)
    end, _, seen = train(tx, params, loss, 12)
    moved = jax.tree.map(lambda a, b: a != b, seen[1], params)
    assert [int(moved["layers"]["kernel"][layer].sum()) for layer in range(2)] == [8, 8]
    assert moved["head"]["kernel"].sum() == 6 and moved["layers"]["bias"].all()
    assert all(np.all(w != 0) for w in jax.tree.leaves(end))  # nothing is pruned
    every = jax.tree.map(lambda a, b: np.mean(a != b), end, params)
    assert min(jax.tree.leaves(every)) > 0.95  # and everything is trained, in turn


def test_ratios_by_layer_and_a_staged_loss_are_taken() -> None:
    params, x = staged_params(jnp.float32)
    sparsity = {"stem/kernel": 0.4, "body/kernel": 1.0}
    tx = scale_by_coordinates(sparsity=sparsity)
    ghat, state = jax.jit(lambda p, x: tx.update(p, tx.init(p), p, value_fn=Staged(stages(), x)))(
        params, x
    )
    nonzero = {k: {n: int((g != 0).sum()) for n, g in v.items()} for k, v in ghat.items()}
    assert nonzero["stem"] == {"kernel": 15 - 6, "bias": 5}
    assert nonzero["body"] == {"kernel": 0, "bias": 4}
    near(state.value, Staged(stages(), x)(params), 1e-6)


def test_mu_may_be_the_learning_rates_schedule(x64: None) -> None:
    params, loss = problem(jnp.float64)
    mu = optax.linear_schedule(0.1, 0.0, 2)
    tx = scale_by_coordinates(mu=mu)
    step = jax.jit(lambda state: tx.update(params, state, params, value_fn=loss))
    ghat, _ = step(step(tx.init(params))[1])
    expected = jax.jit(lambda p: value_and_cge(loss, p, mu=0.05)[1])(params)
    close(ghat, expected, 1e-6, 1e-9)


def test_the_state_is_the_momentum_and_three_numbers() -> None:
    params, _ = problem(jnp.bfloat16)
    state = jax.eval_shape(deepzero(0.1, sparsity=0.9).init, params)
    assert pefts.count(state) == pefts.count(params) + 3
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {
        jnp.dtype("int32"), jnp.dtype("float32"),
    }  # fmt: skip
    assert pefts.count(jax.eval_shape(scale_by_coordinates().init, params)) == 3


def test_bfloat16_and_integer_leaves() -> None:
    params, loss = problem(jnp.bfloat16)
    params = {**params, "steps": 100 * jnp.arange(3)}
    updates, _ = jax.jit(
        lambda p: (tx := deepzero(0.1, weight_decay=0.5, mu=0.05)).update(
            p, tx.init(p), p, value_fn=loss
        )
    )(params)
    assert updates["layers"]["kernel"].dtype == jnp.bfloat16
    assert updates["steps"].dtype == params["steps"].dtype and not updates["steps"].any()
    exact, loss32 = problem()
    expected = jax.tree.map(lambda g, w: -0.1 * (g + 0.5 * w), jax.grad(loss32)(exact), exact)
    found = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), updates)
    alike = np.corrcoef(found["layers"]["kernel"].ravel(), expected["layers"]["kernel"].ravel())
    assert alike[0, 1] > 0.95


# --- losses that are none ---


@pytest.mark.parametrize("at", ["theta", "one coordinate"])
def test_a_loss_that_is_not_finite_keeps_parameters_and_momentum(at: str) -> None:
    params = {"w": jnp.asarray([1.0, 2.0]), "bad": jnp.asarray(0.0)}
    threshold = -1.0 if at == "theta" else 0.001

    def loss(p: dict) -> jax.Array:
        fine = jnp.sum(jnp.square(p["w"])) + p["bad"]
        return jnp.where(p["bad"] > threshold, jnp.inf if at == "theta" else jnp.nan, fine)

    tx = deepzero(0.1, weight_decay=0.1)
    good = lambda p: jnp.sum(jnp.square(p["w"]))  # noqa: E731
    first, state = jax.jit(functools.partial(tx.update, value_fn=good))(
        params, tx.init(params), params
    )
    updates, after = jax.jit(functools.partial(tx.update, value_fn=loss))(params, state, params)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)
    assert (int(state.skipped), int(after.skipped), int(after.count)) == (0, 1, 2)
    assert np.isfinite(after.value) == (at != "theta")
    assert np.all(first["w"] != 0)
    again, _ = jax.jit(functools.partial(tx.update, value_fn=good))(params, after, params)
    assert np.all(np.abs(again["w"]) > np.abs(first["w"]))  # the momentum goes on


# --- a citizen of optax ---


def test_hyperparameters_can_be_injected() -> None:
    params, loss = problem()
    static = ("sparsity", "shuffle_interval", "seed", "chunk")
    tx = optax.inject_hyperparams(deepzero, static_args=static)(0.1, sparsity=0.5, mu=0.01)
    state = tx.init(params)
    assert set(state.hyperparams) == {"learning_rate", "mu", "momentum", "weight_decay"}
    end, _, _ = train(tx, params, loss, 2)
    expected, _, _ = train(deepzero(0.1, sparsity=0.5, mu=0.01), params, loss, 2)
    close(end, expected, 1e-3, 1e-4)


def test_a_part_of_a_tree_is_trained_by_a_loss_of_that_part() -> None:
    params, loss = problem()

    def part(masked: Any) -> jax.Array:
        missing = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
        return loss(
            jax.tree.map(lambda m, p: p if missing(m) else m, masked, params, is_leaf=missing)
        )

    labels = {"layers": "zo", "head": "frozen"}
    tx = optax.partition({"zo": deepzero(0.1), "frozen": optax.set_to_zero()}, labels)
    updates, _ = jax.jit(functools.partial(tx.update, value_fn=part))(
        params, tx.init(params), params
    )
    np.testing.assert_array_equal(updates["head"]["kernel"], 0)
    rest = {"layers": params["layers"]}
    expected = jax.jit(lambda p: value_and_cge(lambda p: loss({**params, **p}), p)[1])(rest)
    close(updates["layers"], jax.tree.map(lambda g: -0.1 * g, expected["layers"]), 1e-2, 1e-4)


def test_inside_a_chain_and_multi_steps() -> None:
    params, loss = problem()
    chained = optax.chain(scale_by_coordinates(), optax.clip(0.01), optax.scale(-1.0))
    end, _, _ = train(chained, params, loss, 1)
    change = np.concatenate([
        np.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, (end, params)), strict=True)
    ])  # fmt: skip
    near(np.abs(change).max(), 0.01, 1e-6)
    multi = optax.MultiSteps(deepzero(0.1), 2).gradient_transformation()
    once, _, _ = train(deepzero(0.1), params, loss, 1)
    with jax.numpy_dtype_promotion("standard"):
        held, _, _ = train(multi, params, loss, 1)
        end, _, _ = train(multi, params, loss, 2)
    close(held, params, 0, 0)
    close(end, once, 1e-3, 1e-4)


def test_extra_arguments_reach_the_transformation_inside_and_optax_finds_the_momentum() -> None:
    def update(updates, state, params=None, *, factor, **extra):
        return jax.tree.map(lambda g: factor * g, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    params = {"w": jnp.ones(3)}
    tx = scale_by_coordinates(inner=inner)
    updates, _ = tx.update(
        params, tx.init(params), params, value_fn=lambda p: jnp.sum(p["w"]), factor=3.0
    )
    near(updates["w"], 3, 1e-3)
    momentum = deepzero(0.1)
    state = optax.tree.map_params(momentum, lambda leaf: leaf + 1, momentum.init(params))
    assert [leaf.tolist() for leaf in jax.tree.leaves(state.inner_state) if leaf.ndim] == [
        [1, 1, 1]
    ]


@pytest.mark.parametrize("divided", ["coordinates", "parameters"])
def test_8_devices_train_as_one(divided: str, x64: None) -> None:
    params, loss = problem(jnp.float64)
    params["wide"] = jnp.asarray(np.random.default_rng(7).normal(size=(8, 3)))
    both = lambda p: loss(p) + jnp.sum(jnp.sin(p["wide"]))  # noqa: E731
    grid = Mesh(np.asarray(jax.devices()), ("data",))
    sharding = NamedSharding(grid, P("data")) if divided == "coordinates" else None
    placed = jax.device_put(params, NamedSharding(grid, P()))
    if divided == "parameters":
        placed["wide"] = jax.device_put(params["wide"], NamedSharding(grid, P("data")))
    options = {"sparsity": 0.5, "shuffle_interval": 1}
    expected, _, _ = train(deepzero(0.1, **options), params, both)
    tx = deepzero(0.1, **options, sharding=sharding)
    end, state, _ = train(tx, placed, both, programs=2)  # the state's place is XLA's choice
    close(end, expected, 1e-9, 1e-9)
    assert int(state.count) == 3


# --- a use ---


def test_a_small_network_learns_digits_without_a_gradient() -> None:
    images, labels = load_digits(return_X_y=True)
    first = labels < 4
    x = jnp.asarray(images[first][:64].reshape(64, 4, 2, 4, 2).mean((2, 4)).reshape(64, 16) / 8 - 1)
    y = labels[first][:64]
    x, random = x.astype(jnp.float32), np.random.default_rng(0)
    params = {
        "0": {"kernel": jnp.asarray(random.normal(size=(16, 8)) / 4, jnp.float32)},
        "1": {"kernel": jnp.asarray(random.normal(size=(8, 4)) / 3, jnp.float32)},
    }

    def head(p: dict, h: Any) -> jax.Array:
        logits = h @ p["kernel"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    loss = Staged({"0": lambda p, x: jnp.tanh(x @ p["kernel"]), "1": head}, x)
    scores = zo_grasp(loss, params, jax.random.key(0), queries=48)
    sparsity = layer_sparsity(prune(scores, 0.6))
    assert 0 < sum(s for (s,) in sparsity.values()) < 2
    tx = deepzero(0.2, sparsity=sparsity, shuffle_interval=5, chunk=8)
    end, state, _ = train(tx, params, loss, 30)
    assert float(loss(params)) > 1.2
    assert float(loss(end)) < 0.5
    assert int(state.skipped) == 0


# --- errors ---

BAD = {
    "mu=0: give the step": {"mu": 0},
    "chunk=0": {"chunk": 0},
    "shuffle_interval=0: give after how many": {"shuffle_interval": 0},
    "momentum=1.0": {"momentum": 1.0},
    "momentum=nan": {"momentum": float("nan")},
    "weight_decay=-1": {"weight_decay": -1},
}


@pytest.mark.parametrize("message", BAD)
def test_arguments_out_of_range_are_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deepzero(0.1, **BAD[message])


def test_what_does_not_fit_is_refused() -> None:
    params = {"kernel": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match="'head/kernel' is no floating leaf of params"):
        deepzero(0.1, sparsity={"head/kernel": 0.5}).init(params)
    with pytest.raises(ValueError, match="is no gradient transformation"):
        scale_by_coordinates(inner=optax.sgd)
    tx = deepzero(0.1)
    state = tx.init(params)
    with pytest.raises(ValueError, match="value_fn=None, params=given: the update needs both"):
        tx.update(params, state, params)
    with pytest.raises(ValueError, match="params=None: the update needs both"):
        tx.update(params, state, value_fn=lambda p: 0.0)
    with pytest.raises(ValueError, match="must return one floating-point number"):
        jax.jit(functools.partial(tx.update, value_fn=lambda p: p["kernel"])).lower(
            params, state, params
        )
    empty = deepzero(0.1, sparsity=1.0)
    with pytest.raises(ValueError, match="none of .'kernel'. has an entry to estimate"):
        empty.update(params, empty.init(params), params, value_fn=lambda p: jnp.sum(p["kernel"]))


def test_scores_that_cannot_be_had_are_refused() -> None:
    params, key = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, jax.random.key(0)
    loss = lambda p: jnp.sum(p["kernel"])  # noqa: E731
    with pytest.raises(ValueError, match="queries=0: give q"):
        zo_grasp(loss, params, key, queries=0)
    with pytest.raises(ValueError, match="mu=0"):
        random_gradient(loss, params, key, mu=0)
    with pytest.raises(ValueError, match="must return one floating-point number"):
        zo_grasp(lambda p: p["kernel"], params, key)
    with pytest.raises(ValueError, match="none of .'bias'. is a matrix"):
        zo_grasp(loss, {"bias": jnp.ones(3)}, key)
    half = {"kernel": jnp.ones((2, 3), jnp.bfloat16)}
    with pytest.raises(ValueError, match="'kernel' is bfloat16, in which steps of norm mu"):
        zo_grasp(lambda p: jnp.float32(0), half, key)
    with pytest.raises(ValueError, match="amount=1: give the fraction"):
        prune({"w": [1.0]}, 1)
    with pytest.raises(ValueError, match="scores of 'w' are not finite"):
        prune({"w": [1.0, np.nan]}, 0.5)
