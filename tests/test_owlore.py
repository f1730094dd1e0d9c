"""OwLore against the official scores, exact probabilities, and GaLore."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients import close, decaying, jitted, near, run
from test_active import drawn, inclusion, sharded_run

import pefts
from pefts.optimizers.active import Policy, scale_by_units
from pefts.optimizers.galore import scale_by_galore
from pefts.optimizers.owlore import MODES, outlier_ratios, owlore, sampling_probabilities

GOLDEN = Path(__file__).parents[1] / "../shared/golden/official/owlore/golden.npz"
L = 3

pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")


def tree_of(seed: int, dtype: Any = jnp.float32) -> Any:
    """Kernels whose leading directions are far apart, and what is not projected."""
    kernels = np.stack([decaying(8, 6, seed=7 * seed + i, ratio=0.1) for i in range(L)])
    rng = np.random.default_rng(seed)
    tree = {
        "layers": {"query": {"kernel": kernels, "bias": rng.normal(size=(L, 6))}},
        "norm": {"scale": rng.normal(size=8)},
    }
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def grads_of(steps: int, dtype: Any = jnp.float32) -> list:
    return [tree_of(1 + t, dtype) for t in range(steps)]


# --- the official code ---


@pytest.fixture(scope="module")
def golden() -> Any:
    if not GOLDEN.exists():
        pytest.skip("the golden vectors of the official code are not beside this repository")
    return np.load(GOLDEN)


def official(golden: Any, *, stacked: bool) -> tuple[Any, Any]:
    """Its model, kernels a and b of five layers, and the second moments of their inputs."""
    params: dict[str, Any] = {}
    stats: dict[str, Any] = {}
    for j, name in enumerate("ab"):
        W = [golden[f"W_{i}_{j}"].T for i in range(5)]
        X = [golden[f"X_{i}_{j}"].reshape(-1, w.shape[0]) for i, w in enumerate(W)]
        seen = [{"second_moment": x.T @ x / len(x), "count": np.float32(len(x))} for x in X]
        if stacked:
            params.setdefault("layers", {})[name] = {"kernel": jnp.stack(W)}
            stats[f"layers/{name}/kernel"] = jax.tree.map(lambda *of: jnp.stack(of), *seen)
            continue
        for i in range(5):
            params.setdefault(f"layers_{i}", {})[name] = {"kernel": jnp.asarray(W[i])}
            stats[f"layers_{i}/{name}/kernel"] = jax.tree.map(jnp.asarray, seen[i])
    return params, stats


@pytest.mark.parametrize("stacked", [True, False])
def test_the_official_outlier_ratios(stacked: bool, golden: Any) -> None:
    params, stats = official(golden, stacked=stacked)
    ratios = outlier_ratios(params, stats, multiplier=float(golden["M"]))
    near(ratios, golden["outlier_ratio"], 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_the_official_probabilities_and_active_layers(mode: str, golden: Any) -> None:
    near(
        sampling_probabilities(golden["outlier_ratio"], mode),
        golden[f"{mode}__probabilities"],
        1e-15,
    )
    draws = jnp.asarray(golden[f"{mode}__draws"], jnp.int32)
    interval, steps = int(golden["interval_steps"]), int(golden["n_steps"])
    policy = Policy(interval, lambda window, layers: draws[window], "joining", "active")
    params = {"layers": {"kernel": jnp.ones((5, 2, 3))}}
    tx, found = scale_by_units(optax.identity(), policy), []
    state, step = tx.init(params), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = step(params, state, params)
        found.append(jnp.any(updates["layers"]["kernel"] != 0, axis=(1, 2)))
    np.testing.assert_array_equal(found, golden[f"{mode}__active"])


# --- scores ---


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        y = nn.DenseGeneral((2, 3), use_bias=False, name="heads")(x)
        y = nn.DenseGeneral(5, axis=(-2, -1), use_bias=False, name="output")(jnp.tanh(y))
        return x + jnp.tanh(y), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return nn.Dense(3, name="head")(scanned(name="layers")(x, None)[0])


def test_ratios_come_from_calibration() -> None:
    """With the norms of the features computed here from the inputs, layer by layer."""
    model = Model()
    x = jax.random.normal(jax.random.key(1), (6, 7, 5))
    params = model.init(jax.random.key(0), x)["params"]
    axes = {"heads/kernel": "lioo", "output/kernel": "liio"}
    stats = pefts.calibrate(
        lambda variables, batch: model.apply(variables, batch), params, [x[:2], x[2:]], axes=axes
    )
    expected, kernels = [], params["layers"]
    for i in range(4):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], kernels)
        y = jnp.tanh(nn.DenseGeneral((2, 3), use_bias=False).apply({"params": layer["heads"]}, x))
        A = [
            np.abs(np.asarray(W).reshape(h.shape[-1], -1)) * np.linalg.norm(h, axis=0)[:, None]
            for W, h in [
                (layer["heads"]["kernel"], np.asarray(x).reshape(-1, 5)),
                (layer["output"]["kernel"], np.asarray(y).reshape(-1, 6)),
            ]
        ]
        A = np.concatenate([a.ravel() for a in A])
        expected.append(100 * np.mean(A > 2.0 * A.mean()))
        x, _ = Block().apply({"params": layer}, x, None)
    near(outlier_ratios(params, stats, multiplier=2.0), expected, 1e-9)
    assert len(set(expected)) > 1
    assert "head/kernel" not in stats  # and one that is there is passed over
    stats["head/kernel"] = {"second_moment": jnp.eye(5), "count": jnp.ones(())}
    near(outlier_ratios(params, stats, multiplier=2.0), expected, 1e-9)


def test_norms_are_over_all_tokens_a_kernel_saw() -> None:
    """||X_i||^2 is count E[x_i^2]: a kernel that sees more tokens has the larger entries."""
    params = {"layers": {name: {"kernel": jnp.ones((1, 2, 3))} for name in "ab"}}
    seen = {"second_moment": jnp.eye(2)[None]}
    stats = {
        f"layers/{name}/kernel": seen | {"count": jnp.full(1, n)}
        for name, n in (("a", 1.0), ("b", 16.0))
    }
    assert outlier_ratios(params, stats, multiplier=1.5) == (50.0,)  # 4 against a mean of 2.5
    assert outlier_ratios(params, stats, multiplier=1.7) == (0.0,)


def test_layers_are_drawn_as_their_outliers_say() -> None:
    p = sampling_probabilities((1.0, 6.0, 0.0, 3.0))
    assert p == (0.1, 0.6, 0.0, 0.3)
    params = {"layers": {"kernel": jnp.ones((4, 3, 2))}}
    tx = owlore(0.1, probabilities=p, gamma=2, interval=1, rank=1)
    choices = np.stack([s[0].active for s in run(tx, params, [params] * 12)[2]])
    np.testing.assert_array_equal(choices, drawn(0, 13, 2, p)[1:])
    counts = np.bincount(drawn(0, 20_000, 2, p).ravel(), minlength=4)
    expected = inclusion(p, 2)
    sigma = np.sqrt(20_000 * expected * (1 - expected))
    assert counts[2] == 0 and np.all(np.abs(counts - 20_000 * expected) <= 4 * sigma)


# --- steps ---


def test_with_all_layers_at_work_it_is_galore_beside_adam(x64: None) -> None:
    params, grads = tree_of(0, jnp.float64), grads_of(7, jnp.float64)
    p = (1 / L,) * L
    tx = owlore(
        0.01, probabilities=p, gamma=L, interval=2, rank=2, update_interval=3, weight_decay=0.1
    )
    end, _, _ = run(tx, params, grads)
    plain = optax.chain(
        scale_by_galore(rank=2, update_interval=3, scale=1.0),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(0.01),
    )
    close(end, run(plain, params, grads)[0], 1e-6, 1e-7)
    adamw = optax.adamw(0.01, weight_decay=0.1)
    close(end["norm"], run(adamw, params, grads)[0]["norm"], 1e-12, 1e-14)
    assert not np.allclose(
        end["layers"]["query"]["kernel"],
        run(adamw, params, grads)[0]["layers"]["query"]["kernel"],
        atol=1e-3,
    )


@pytest.mark.parametrize("unrolled", [False, True])
def test_a_layer_that_joins_starts_anew(unrolled: bool) -> None:
    """Its moments, its count and its projector are those of a first step."""
    seed = next(s for s in range(99) if drawn(s, 3, 1, (1 / L,) * L).ravel().tolist() == [0, 1, 0])
    params, grads = tree_of(0), grads_of(6)
    if unrolled:
        flat = lambda tree: {  # noqa: E731
            "norm": tree["norm"],
            **{f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], tree["layers"]) for i in range(L)},
        }
        params, grads = flat(params), [flat(grad) for grad in grads]
    options = {"gamma": 1, "interval": 2, "rank": 2, "update_interval": 50, "seed": seed}
    tx = owlore(0.1, probabilities=(1 / L,) * L, **options)
    W, state, _ = run(tx, params, grads[:4])  # layer 0, then layer 1
    fresh, _ = jitted(tx.update)(grads[4], tx.init(W), W)
    again, after = jitted(tx.update)(grads[4], state, W)
    inner = (lambda s: s[0].whole[0]) if unrolled else (lambda s: s[0].layers)
    assert (
        np.ravel(inner(after).count).tolist() == np.ravel(inner(after).inner_state.count).tolist()
    )
    assert np.ravel(inner(after).count).tolist() == [1]
    name = "layers_0" if unrolled else "layers"
    close(again[name], fresh[name], 1e-6, 1e-7)
    assert np.any(again[name]["query"]["kernel"] != 0)


def test_a_layer_that_is_drawn_again_goes_on() -> None:
    p = (0.0, 0.0, 1.0)
    params, grads = tree_of(0), grads_of(6)
    tx = owlore(0.1, probabilities=p, gamma=1, interval=2, rank=2, update_interval=4)
    end, state, states = run(tx, params, grads)
    only = jax.tree.map(lambda leaf: leaf[2:], params["layers"])
    plain = optax.chain(scale_by_galore(rank=2, update_interval=4, scale=1.0), optax.scale(-0.1))
    expected, _, _ = run(
        plain,
        {"layers": only},
        [{"layers": jax.tree.map(lambda leaf: leaf[2:], grad["layers"])} for grad in grads],
    )
    close(jax.tree.map(lambda leaf: leaf[2:], end["layers"]), expected["layers"], 1e-5, 1e-5)
    assert state[0].layers.count.tolist() == [6]
    P = [s[0].layers.projectors["layers"]["query"]["kernel"].Q[0, 0] for s in states]
    np.testing.assert_array_equal(P[1], P[2])  # over a switch
    assert not np.allclose(P[3], P[4], atol=1e-2)  # its own fifth update


def test_the_state_has_the_size_of_the_formula() -> None:
    params = tree_of(0)
    tx = owlore(0.1, probabilities=(1 / L,) * L, gamma=2, rank=2)
    state = jax.eval_shape(tx.init, params)
    small, large = 6, 8
    per_layer = small * 2 + 2 * large * 2 + 2 * 6  # projector, moments, those of the bias
    counts = 3 * 2 + 1 + 1 + 2  # GaLore's, Adam's and skipped, Adam's outside, ours, the layers
    assert pefts.count(state) == 2 * per_layer + 2 * 8 + counts


def test_a_switch_compiles_nothing_and_hyperparameters_can_be_injected() -> None:
    params, grads = tree_of(0), grads_of(5)
    options = {"gamma": 2, "interval": 2, "rank": 2, "update_interval": 3, "weight_decay": 0.1}
    static = ("gamma", "interval", "rank", "update_interval")
    tx = optax.inject_hyperparams(owlore, static_args=static)(
        0.1, probabilities=(0.2, 0.3, 0.5), **options
    )
    step, state, end = jax.jit(tx.update), tx.init(params), params
    for grad in grads:
        updates, state = step(grad, state, end)
        end = optax.apply_updates(end, updates)
    assert step._cache_size() == 1
    close(end, run(owlore(0.1, probabilities=(0.2, 0.3, 0.5), **options), params, grads)[0])


def test_eight_devices_give_what_one_gives() -> None:
    tx = owlore(0.1, probabilities=(0.25,) * 4, gamma=2, interval=2, rank=2, update_interval=2)
    expected, placed = sharded_run(tx, 5)
    close(placed, expected, 0, 1e-5)


# --- errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0}, "gamma=0: give an integer of at least 1"),
        ({"gamma": 4}, r"gamma=4 layers cannot be drawn: 3 of"),
        ({"probabilities": (0.0, 0.0, 1.0)}, r"gamma=2 layers cannot be drawn: 1 of"),
        ({"interval": 0}, "interval=0"),
        ({"probabilities": (0.5, 0.5)}, r"are 2, for 3 layers"),
        ({"probabilities": (0.5, 0.5, 0.5)}, "are no distribution"),
        ({"probabilities": (1.5, -0.5, 0.0)}, "are no distribution"),
        ({"probabilities": (float("nan"), 0.5, 0.5)}, "are no distribution"),
        ({"probabilities": ((0.5, 0.5),)}, "are no distribution"),
        ({"rank": 7}, "rank=7 is out of range"),
        ({"rank": 0}, "rank=0"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict, message: str) -> None:
    given = {"probabilities": (1 / L,) * L, "gamma": 2, "rank": 2, **options}
    with pytest.raises(ValueError, match=message):
        owlore(0.1, **given).init(tree_of(0))


@pytest.mark.parametrize(
    ("ratios", "mode", "message"),
    [
        ((1.0, 2.0), "norm", r"mode='norm' is unknown; choose one of \('owl'"),
        ((), "owl", "give one number"),
        ((1.0, -1.0), "owl", "give one number from 0"),
        ((1.0, float("inf")), "uniform", "give one number"),
        ((0.0, 0.0), "owl", "no layer to draw with mode='owl'"),
        ((2.0, 2.0), "owl_reverse", "no layer to draw with mode='owl_reverse'"),
    ],
)
def test_ratios_that_give_no_probabilities_are_refused(ratios, mode, message) -> None:
    with pytest.raises(ValueError, match=message):
        sampling_probabilities(ratios, mode)


def test_statistics_of_something_else_are_refused() -> None:
    params = {"layers": {"kernel": jnp.ones((2, 4, 5))}, "head": {"kernel": jnp.ones((4, 3))}}
    seen = {"second_moment": jnp.stack([jnp.eye(4)] * 2), "count": jnp.ones(2)}
    for stats, message in [
        ({"layers/other": seen}, "'layers/other' has no such leaf in params"),
        ({"layers/kernel": {"gradient": jnp.ones(3)}}, "'layers/kernel' has no 'second_moment'"),
        ({"head/kernel": jax.tree.map(lambda x: x[0], seen)}, "no layers"),
        ({}, "no layers"),
    ]:
        with pytest.raises(ValueError, match=message):
            outlier_ratios(params, stats)
    with pytest.raises(ValueError, match=r"multiplier=0: give M"):
        outlier_ratios(params, {"layers/kernel": seen}, multiplier=0)
