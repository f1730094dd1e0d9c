"""EVA beyond the table: how ranks are shared out, the official golden vectors, padding, scales."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from subject import model_axes

import pefts
from pefts.linalg import projector_distance
from pefts.methods.eva import ranks
from pefts.principal import merge

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "official" / "eva" / "golden.npz"
RANK = 3
Stats = dict[str, dict[str, jax.Array]]


def stats_of(ratios: Mapping[str, Any], d_in: int = 8, seed: int = 0, count: float = 9.0) -> Stats:
    """Components at random with these ratios (*stack, k), each of a total variance of 4."""
    found = {}
    for path, values in ratios.items():
        values = np.asarray(values, np.float32)
        normal = np.random.default_rng(seed).normal(size=(*values.shape[:-1], d_in, d_in))
        rows = np.swapaxes(np.linalg.qr(normal)[0], -1, -2)[..., : values.shape[-1], :]
        found[path] = {
            "components": jnp.asarray(rows, jnp.float32),
            "explained_variance_ratio": jnp.asarray(values),
            "explained_variance": 4 * jnp.asarray(values),
            "count": jnp.full(values.shape[:-1], count, jnp.float32),
        }
    return found


def params_of(stats: Stats, d_out: int = 5) -> dict[str, Any]:
    leaves = {}
    for path, found in stats.items():
        shape = found["components"].shape
        leaves[path] = jnp.ones((*shape[:-2], shape[-1], d_out))
    return pefts.paths.unflatten(leaves)


def started(stats: Stats, **kwargs: Any) -> pefts.PeftState:
    axes = {f"^{path}$": "l" * (leaf["components"].ndim - 2) + "io" for path, leaf in stats.items()}
    peft = pefts.eva(**{"rank": RANK, "axes": axes, **kwargs})
    return peft.init(jax.random.key(0), params_of(stats), stats)


def shared_out(ratios: Mapping[str, Any], **kwargs: Any) -> dict[str, Any]:
    return {path: r.tolist() for path, r in ranks(started(stats_of(ratios), **kwargs)).items()}


# --- the official program ---


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    if not GOLDEN.exists():
        pytest.skip("the official EVA vectors (../shared/golden/official/eva) are absent")
    return dict(np.load(GOLDEN))


LAYERS = ("q", "k", "o", "down")  # in the order in which the official program meets them
PATHS = {name: f"{index}_{name}/kernel" for index, name in enumerate(LAYERS)}


def inputs_of(golden: dict[str, np.ndarray], x: np.ndarray) -> dict[str, np.ndarray]:
    """y = down(tanh(o(tanh(q x)) + k x))."""
    q, k, o = (golden[f"net_{name}"].T for name in ("q", "k", "o"))
    after_q = np.tanh(x @ q)
    return {"q": x, "k": x, "o": after_q, "down": np.tanh(after_q @ o + x @ k)}


def by_batch_pca(golden: dict[str, np.ndarray]) -> Stats:
    """Exact components of all rows of all batches, by numpy."""
    x = np.concatenate(list(golden["batches"])).astype(np.float32).astype(np.float64)
    k, found = int(golden["n_components"]), {}
    for name, rows in inputs_of(golden, x).items():
        centred = rows - rows.mean(0)
        _, S, Vt = np.linalg.svd(centred, full_matrices=False)
        found[PATHS[name]] = {
            "components": jnp.asarray(Vt[:k], jnp.float32),
            "explained_variance_ratio": jnp.asarray((S**2)[:k] / np.sum(S**2), jnp.float32),
        }
    return found


def by_incremental_pca(golden: dict[str, np.ndarray]) -> tuple[Stats, int]:
    """What the official loop has seen when it stops, and how many forward passes it took.

    It goes on through the batches until, at every input, the components that get a rank are all
    converged; an input that is converged takes no further batch.
    """
    k, tau = int(golden["n_components"]), float(golden["tau"])
    seen = {name: empty(k, golden[f"net_{name}"].shape[1]) for name in LAYERS}
    cosines = {name: np.zeros(k) for name in LAYERS}
    given, passes = dict.fromkeys(LAYERS, k), 0
    while True:
        # q and k share an input, and q, which comes first, decides for both.
        waiting = {n for n in LAYERS if n != "k" and (cosines[n][: given[n]] < tau).any()}
        if not waiting:
            break
        batch = golden["batches"][passes % len(golden["batches"])]
        rows = inputs_of(golden, batch.astype(np.float32))
        for name in waiting:
            before, weights = seen[name], jnp.ones(len(batch))
            after = merge(before, jnp.asarray(rows[name]), weights)
            cosines[name] = np.sum(np.asarray(after["components"] * before["components"]), 1)
            seen[name] = {**after, "count": before["count"] + len(batch)}
        seen["k"], passes = seen["q"], passes + 1
        given = official_ranks(
            {n: np.asarray(seen[n]["singular"] ** 2 / seen[n]["scatter"]) for n in LAYERS},
            int(golden["rank"]) * len(LAYERS),
            {"k": "q"},
        )
    return {
        PATHS[name]: {
            "components": state["components"],
            "explained_variance_ratio": state["singular"] ** 2 / state["scatter"],
        }
        for name, state in seen.items()
    }, passes


def empty(k: int, d_in: int) -> dict[str, jax.Array]:
    shapes = {"components": (k, d_in), "singular": (k,), "cosine": (k,), "center": (d_in,)}
    zeros = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    return {**zeros, "scatter": jnp.zeros(()), "count": jnp.zeros(())}


def official_ranks(
    ratios: Mapping[str, np.ndarray], budget: int, equal: Mapping[str, str]
) -> dict[str, int]:
    """Count the layers of the largest entries; then the owner of a shared input gets the most."""
    entries = [(name, value) for name, values in ratios.items() for value in values]
    best = sorted(entries, key=lambda entry: -entry[1])[:budget]
    counted = Counter(name for name, _ in best)
    found = {name: counted[name] for name in ratios}
    for name, owner in equal.items():
        if found[name] > found[owner]:
            found[name], found[owner] = found[owner], found[name]
    return found


def golden_state(golden: dict[str, np.ndarray], stats: Stats) -> pefts.PeftState:
    params = pefts.paths.unflatten(
        {PATHS[name]: jnp.asarray(golden[f"net_{name}"].T) for name in LAYERS}
    )
    peft = pefts.eva(
        rank=int(golden["rank"]), alpha=float(golden["lora_alpha"]), rho=float(golden["rho"])
    )
    assert peft.traits.components == int(golden["n_components"])
    return peft.init(jax.random.key(0), params, stats)


def test_official_ranks_and_scales(golden: dict[str, np.ndarray]) -> None:
    state = golden_state(golden, by_batch_pca(golden))
    assert {n: int(ranks(state)[PATHS[n]]) for n in LAYERS} == {
        n: int(golden[f"rank_{n}"]) for n in LAYERS
    }
    for name in LAYERS:
        scale = state.frozen[PATHS[name]]["scale"]
        assert float(scale) == float(golden[f"scale_{name}"])


def test_official_factors_after_the_official_loop(golden: dict[str, np.ndarray]) -> None:
    stats, passes = by_incremental_pca(golden)
    assert passes == int(golden["forward_passes"])
    state = golden_state(golden, stats)
    for name in LAYERS:
        A = state.trainable[PATHS[name]]["A"]
        assert A.shape == golden[f"A_{name}"].T.shape
        assert projector_distance(A, jnp.asarray(golden[f"A_{name}"].T, jnp.float32)) < 1e-3


def test_calibration_gives_the_same_ranks(golden: dict[str, np.ndarray]) -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            def dense(name: str, x: jax.Array) -> jax.Array:
                width = golden[f"net_{name}"].shape[0]
                return nn.Dense(width, use_bias=False, name=PATHS[name].split("/")[0])(x)

            mixed = dense("o", jnp.tanh(dense("q", x))) + dense("k", x)
            return dense("down", jnp.tanh(mixed))

    params = {
        PATHS[name].split("/")[0]: {"kernel": jnp.asarray(golden[f"net_{name}"].T)}
        for name in LAYERS
    }
    batches = [jnp.asarray(batch, jnp.float32) for batch in golden["batches"]]

    def run(variables: Any, batch: jax.Array) -> Any:
        return Net().apply(variables, batch)

    peft = pefts.eva(rank=int(golden["rank"]), rho=float(golden["rho"]))
    stats = pefts.calibrate(run, params, batches, peft)
    state = peft.init(jax.random.key(0), params, stats)
    assert {n: int(ranks(state)[PATHS[n]]) for n in LAYERS} == {
        n: int(golden[f"rank_{n}"]) for n in LAYERS
    }
    q, k = (np.asarray(state.trainable[PATHS[name]]["A"]) for name in ("q", "k"))
    np.testing.assert_array_equal(q[:, : k.shape[1]], k)


# --- how ranks are shared out ---


@pytest.mark.parametrize("seed", range(6))
def test_ranks_are_those_of_the_official_rule(seed: int) -> None:
    """Random spectra, some of them of a shared input; the first path of a group is its owner."""
    rng, k = np.random.default_rng(seed), 2 * RANK
    spectra = np.sort(rng.dirichlet(np.full(8, 0.4), size=5), axis=1)[:, ::-1][:, :k]
    source = {"a/kernel": 0, "b/kernel": 1, "c/kernel": 0, "d/kernel": 2, "e/kernel": 0}
    ratios = {path: spectra[n].astype(np.float32) for path, n in source.items()}
    equal = {"c/kernel": "a/kernel", "e/kernel": "a/kernel"}
    wanted = official_ranks(ratios, RANK * len(ratios), equal)
    assert shared_out(ratios) == {path: r for path, r in wanted.items() if r}


def test_the_budget_is_spent_and_no_layer_gets_more_than_rho_allows() -> None:
    rng = np.random.default_rng(1)
    ratios = {
        "plain/kernel": np.sort(rng.random(6))[::-1],
        "stacked/kernel": np.sort(rng.random((4, 6)), axis=1)[:, ::-1] * 0.7,
        "twice/kernel": np.sort(rng.random((2, 3, 6)), axis=2)[..., ::-1],
    }
    found = ranks(started(stats_of(ratios)))
    together = np.concatenate([r.reshape(-1) for r in found.values()])
    assert together.sum() == RANK * 11 and together.max() <= 2 * RANK
    assert len(set(together.tolist())) > 2
    for path, r in found.items():
        assert r.shape == np.shape(ratios[path])[:-1]


def test_more_variance_gets_more_rank() -> None:
    flat, steep = [0.16] * 6, [0.9, 0.05, 0.02, 0.01, 0.005, 0.001]
    assert shared_out({"flat/kernel": flat, "steep/kernel": steep}) == {
        "flat/kernel": 5,
        "steep/kernel": 1,
    }


def test_rho_1_keeps_every_rank() -> None:
    stats = stats_of({"a/kernel": [0.5, 0.3, 0.1], "b/kernel": [[0.1, 0.0, 0.0], [0.4, 0.3, 0.2]]})
    found = ranks(started(stats, rho=1.0))
    assert {path: r.tolist() for path, r in found.items()} == {"a/kernel": 3, "b/kernel": [3, 3]}
    assert not pefts.eva(rank=3, rho=1.1).traits.shapes_from_values  # round(3.3) is 3
    assert pefts.eva(rank=3, rho=1.2).traits.shapes_from_values


def test_equal_inputs_differ_by_one_at_most_and_the_first_path_has_the_most() -> None:
    """18 entries for three layers of one input and 12 ranks, 5 of which are best elsewhere."""
    same = [0.3, 0.2, 0.1, 0.05, 0.04, 0.03]
    ratios = {"z/kernel": same, "a/kernel": same, "m/kernel": same}
    ratios["other/kernel"] = [0.9, 0.8, 0.7, 0.6, 0.5, 0.001]
    found = shared_out(ratios)
    assert found == {"a/kernel": 3, "m/kernel": 2, "z/kernel": 2, "other/kernel": 5}


@pytest.mark.parametrize("metric", ["ratio", "raw", "sum", "max"])
def test_metrics(metric: str) -> None:
    """Two inputs for which every metric decides differently."""
    stats = stats_of({"a/kernel": [0.3, 0.2, 0.1, 0.1], "b/kernel": [0.35, 0.08, 0.07, 0.01]})
    for path, variance in (("a/kernel", 1.0), ("b/kernel", 5.0)):
        ratio = stats[path]["explained_variance_ratio"]
        stats[path]["explained_variance"] = variance * ratio
    v = {path: np.asarray(found["explained_variance"]) for path, found in stats.items()}
    compared = {
        "ratio": {path: np.asarray(s["explained_variance_ratio"]) for path, s in stats.items()},
        "raw": v,
        "sum": {path: values / values.sum() for path, values in v.items()},
        "max": {path: values / values.max() for path, values in v.items()},
    }
    found = ranks(started(stats, rank=2, metric=metric))
    assert {path: int(r) for path, r in found.items()} == official_ranks(compared[metric], 4, {})
    assert {"ratio": 3, "raw": 1, "sum": 2, "max": 3}[metric] == found["a/kernel"]


def test_patterns_make_the_budget_and_the_limits() -> None:
    """3 + 1 + 3 ranks; where inputs are the same, so is the largest rank that is possible."""
    same, other = [0.3, 0.2, 0.15, 0.1, 0.05, 0.04], [0.02, 0.01, 0.005, 0.001, 0.0, 0.0]
    given = {"rank": 1, "rank_pattern": {"a|c": 3}}
    ratios = {"a/kernel": same, "b/kernel": same, "c/kernel": other}
    assert shared_out(ratios, **given) == {"a/kernel": 4, "b/kernel": 3}
    ratios["b/kernel"] = 0.999 * np.array(same)
    assert shared_out(ratios, **given) == {"a/kernel": 5, "b/kernel": 2}


# --- the state ---


@pytest.fixture
def uneven() -> Stats:
    """Ranks [6, 0], 0 and 6: a layer without an adapter, and a kernel that loses its own."""
    return stats_of(
        {
            "layers/kernel": [[0.4, 0.3, 0.2, 0.01, 0.01, 0.01], [0.001] * 6],
            "none/kernel": [0.0005] * 6,
            "wide/kernel": [0.3, 0.2, 0.15, 0.1, 0.09, 0.08],
        }
    )


def test_stacked_layers_have_ranks_of_their_own(uneven: Stats) -> None:
    uneven["layers/kernel"]["explained_variance_ratio"] = jnp.asarray(
        [[0.4, 0.3, 0.2, 0.1, 0.01, 0.0], [0.02, 0.001, 0.0, 0.0, 0.0, 0.0]]
    )
    state = started(uneven, alpha=6.0)
    assert {path: r.tolist() for path, r in ranks(state).items()} == {
        "layers/kernel": [5, 1],
        "wide/kernel": 6,
    }
    A = np.asarray(state.trainable["layers/kernel"]["A"])
    assert A.shape == (2, 8, 5)
    for layer, r in enumerate((5, 1)):
        np.testing.assert_allclose(A[layer, :, :r].T @ A[layer, :, :r], np.eye(r), atol=1e-6)
        np.testing.assert_array_equal(A[layer, :, r:], 0)
        components = uneven["layers/kernel"]["components"][layer, :r]
        np.testing.assert_array_equal(A[layer, :, :r].T, components)
    np.testing.assert_array_equal(state.frozen["layers/kernel"]["scale"], [2, 2])


def test_layers_without_a_rank_have_no_adapter(uneven: Stats) -> None:
    state = started(uneven, alpha=6.0)
    assert ranks(state)["layers/kernel"].tolist() == [6, 0]
    assert set(state.trainable) == {"layers/kernel", "wide/kernel"}
    np.testing.assert_array_equal(state.trainable["layers/kernel"]["A"][1], 0)
    np.testing.assert_array_equal(state.frozen["layers/kernel"]["scale"], [2, 0])


def test_the_released_code_divides_alpha_by_the_new_rank(uneven: Stats) -> None:
    state = started(uneven, alpha=6.0, adjust_scaling=False, alpha_pattern={"wide": 3.0})
    np.testing.assert_array_equal(state.frozen["layers/kernel"]["scale"], [1, 0])
    assert float(state.frozen["wide/kernel"]["scale"]) == 0.5
    state = started(uneven, alpha=6.0, alpha_pattern={"wide": 3.0})
    assert float(state.frozen["wide/kernel"]["scale"]) == 1.0


def test_whitening_divides_by_the_root_of_the_singular_values() -> None:
    stats = stats_of({"a/kernel": [0.5, 0.3, 0.1]}, count=11.0)
    plain, white = (
        np.asarray(started(stats, rho=1.0, whiten=w).trainable["a/kernel"]["A"])
        for w in (False, True)
    )
    singular = np.sqrt(np.array([0.5, 0.3, 0.1]) * 4 * 10)
    np.testing.assert_allclose(white, plain / np.sqrt(singular), rtol=1e-6)


def test_a_component_without_variance_cannot_be_whitened() -> None:
    stats = stats_of({"a/kernel": [0.5, 0.3, 0.0]})
    with pytest.raises(ValueError, match="'a/kernel' is not finite: whiten divides by"):
        started(stats, rho=1.0, whiten=True)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_padding_stays_zero_under_any_optimizer(uneven: Stats, name: str) -> None:
    uneven["layers/kernel"]["explained_variance_ratio"] = jnp.asarray(
        [[0.4, 0.3, 0.2, 0.1, 0.01, 0.0], [0.02, 0.001, 0.0, 0.0, 0.0, 0.0]]
    )
    params = params_of(uneven)
    axes = {"layers": "lio", "none|wide": "io"}
    peft = pefts.eva(rank=RANK, alpha=6.0, axes=axes)
    state = peft.init(jax.random.key(0), params, uneven)
    tx = {
        "adamw": optax.adamw(0.1, weight_decay=0.1),
        "sgd": optax.sgd(0.1, momentum=0.9),
        "muon": optax.contrib.muon(0.1),
    }[name]
    target = jax.random.normal(jax.random.key(1), (2, 8, 5))

    def loss(trainable: Any) -> jax.Array:
        dense = peft.merge(params, state._replace(trainable=trainable))
        return jnp.sum((dense["layers"]["kernel"] - target) ** 2)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        moments = tx.init(state.trainable)
        for _ in range(3):
            grads = jax.grad(loss)(state.trainable)
            updates, moments = tx.update(grads, moments, state.trainable)
            state = state._replace(trainable=optax.apply_updates(state.trainable, updates))
    group = state.trainable["layers/kernel"]
    np.testing.assert_array_equal(group["A"][1, :, 1:], 0)
    np.testing.assert_array_equal(group["B"][1, 1:], 0)
    assert (np.abs(group["B"][0]) > 0).any() and (np.abs(group["B"][1, :1]) > 0).any()


def test_a_lora_does_the_same(uneven: Stats) -> None:
    params = params_of(uneven)
    peft = pefts.eva(rank=RANK, alpha=6.0, axes={"layers": "lio", "none|wide": "io"})
    state = pefts.randomize(jax.random.key(1), peft.init(jax.random.key(0), params, uneven))
    lora, converted = pefts.to_lora(peft, state, params)
    found = pefts.paths.flatten(lora.merge(params, converted))
    for path, leaf in pefts.paths.flatten(params).items():
        wanted = np.asarray(leaf)
        if path in state.trainable:
            A, B = (np.asarray(state.trainable[path][name]) for name in "AB")
            wanted = wanted + np.asarray(state.frozen[path]["scale"])[..., None, None] * (A @ B)
        np.testing.assert_allclose(found[path], wanted, atol=1e-5)


# --- refusals ---


def test_ranks_are_not_decided_inside_jit(uneven: Stats) -> None:
    params, axes = params_of(uneven), {"layers": "lio", "none|wide": "io"}
    peft = pefts.eva(rank=RANK, axes=axes)
    with pytest.raises(ValueError, match="'layers/kernel' gets is unknown inside jit"):
        jax.jit(peft.init)(jax.random.key(0), params, uneven)
    even = pefts.eva(rank=RANK, rho=1.0, axes=axes)
    state = jax.jit(even.init)(jax.random.key(0), params, uneven)
    assert ranks(state)["layers/kernel"].tolist() == [3, 3]


def test_statistics_that_lack_variances_are_refused(uneven: Stats) -> None:
    del uneven["wide/kernel"]["explained_variance_ratio"]
    with pytest.raises(ValueError, match="'wide/kernel' hold no 'explained_variance_ratio'"):
        started(uneven)


def test_scanned_and_unrolled_layers_get_the_same_ranks() -> None:
    batches = [tiny.inputs(seed) for seed in (5, 6)]
    found = {}
    for scanned in (True, False):
        params = tiny.parameters() if scanned else tiny.unroll(tiny.parameters())
        peft = pefts.eva(rank=RANK, axes=model_axes(scanned))

        def run(variables: Any, batch: Any, scanned: bool = scanned) -> Any:
            return tiny.Classifier(scanned).apply(variables, *batch)

        stats = pefts.calibrate(run, params, batches, peft)
        found[scanned] = ranks(peft.init(jax.random.key(0), params, stats))
    assert sum(int(r.sum()) for r in found[True].values()) == RANK * 12
    for path, r in found[True].items():
        for layer in range(tiny.LAYERS):
            one = found[False].get(path.replace("layers/", f"layers_{layer}/"), np.zeros((), int))
            assert r[layer] == one, path
