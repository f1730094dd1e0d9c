"""PETALface beyond the table: the blend, windows, refusals, official golden vectors."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from subject import base_inputs, base_params, model_axes

import pefts
from pefts.bound import Call
from pefts.methods.petalface import blend

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "official" / "petalface" / "golden.npz"
D_IN, D_OUT = 9, 7
SCORES = jnp.asarray([0.0, 0.3, 1.0, 0.6])
FACTORS = ("down", "up")  # of the official code


@pytest.fixture
def W(key: jax.Array) -> jax.Array:
    return jax.random.normal(key, (D_IN, D_OUT))


@pytest.fixture
def x(key: jax.Array) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(key, 1), (len(SCORES), 5, D_IN))


def petalface(**kwargs: Any) -> pefts.Peft:
    return pefts.petalface(**{"rank": 3, "dropout": 0.0, "targets": "kernel", **kwargs})


def moved(peft: pefts.Peft, key: jax.Array, W: jax.Array) -> pefts.PeftState:
    return pefts.randomize(jax.random.fold_in(key, 2), peft.init(key, {"kernel": W}), 0.5)


def run(peft: pefts.Peft, state: pefts.PeftState, W: jax.Array, x: jax.Array, **given: Any):
    rngs = {"rngs": {"dropout": given.pop("stream")}} if "stream" in given else {}
    bound = peft.bind({"kernel": W}, state, **given)
    return pefts.apply(nn.Dense(D_OUT, use_bias=False).apply)({"params": bound}, x, **rngs)


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


# --- the blend ---


@pytest.mark.parametrize(
    ("score", "threshold", "higher", "wanted"),
    [
        (0.7, 0.5, True, 0.7),
        (0.7, 0.5, False, 0.3),
        (0.7, 0.9, True, 0.3),
        (0.9, 0.2, True, 1.0),  # 1.2 before it is clipped
        (0.9, 0.8, False, 0.0),  # -0.2
        (0.5, 0.5, False, 0.5),
        (7.0, 0.9, True, 0.6),  # a score out of range counts as the nearest in it
    ],
)
def test_the_blend_of_a_score(score, threshold, higher, wanted):
    a = blend(jnp.asarray([score]), threshold, higher)
    np.testing.assert_allclose(a, [wanted], rtol=1e-6, atol=1e-7)


def test_each_example_is_blended_by_its_own_quality(W, x, key):
    peft = petalface()
    state = moved(peft, key, W)
    y = run(peft, state, W, x, quality=SCORES)
    for n, q in enumerate(SCORES.tolist()):
        fixed = petalface(quality=q)
        close(y[n : n + 1], run(fixed, state, W, x[n : n + 1]))
        close(y[n], x[n] @ fixed.merge({"kernel": W}, state)["kernel"])
        close(y[n : n + 1], run(peft, state, W, x[n : n + 1], quality=SCORES[n : n + 1]))


def test_the_kernel_is_linear_in_the_quality(W, key):
    state = moved(petalface(), key, W)
    at = {q: petalface(quality=q).merge({"kernel": W}, state)["kernel"] for q in (0.0, 0.5, 1.0)}
    close(at[0.5], (at[0.0] + at[1.0]) / 2)
    p = state.trainable["kernel"]
    close(at[0.0] - W, p["A1"] @ p["B1"])
    close(at[1.0] - W, p["A2"] @ p["B2"])


@pytest.mark.parametrize(("q", "idle"), [(0.0, "2"), (1.0, "1")])
def test_a_branch_of_weight_zero_is_idle_and_without_gradient(W, x, key, q, idle):
    peft = petalface()
    state = moved(peft, key, W)

    def loss(trainable: Any) -> jax.Array:
        full = state._replace(trainable=trainable)
        return jnp.sum(run(peft, full, W, x, quality=jnp.full(len(x), q)) ** 2)

    for name, leaf in jax.grad(loss)(state.trainable)["kernel"].items():
        assert (float(jnp.abs(leaf).max()) == 0) == name.endswith(idle), name
    other = state.trainable["kernel"] | {f"B{idle}": jnp.ones((3, D_OUT))}
    changed = state._replace(trainable={"kernel": other})
    quality = jnp.full(len(x), q)
    np.testing.assert_array_equal(
        run(peft, changed, W, x, quality=quality), run(peft, state, W, x, quality=quality)
    )


def test_polarity_swaps_the_branches(W, x, key):
    state = moved(petalface(), key, W)
    best_is_one, best_is_zero = petalface(), petalface(higher_is_better=False)
    close(
        run(best_is_one, state, W, x, quality=SCORES),
        run(best_is_zero, state, W, x, quality=1 - SCORES),
    )


def test_it_starts_at_zero_whatever_the_quality(W, x, key):
    peft = petalface()
    assert peft.traits.identity_at_init
    state = peft.init(key, {"kernel": W})
    np.testing.assert_array_equal(run(peft, state, W, x, quality=SCORES), x @ W)
    p = state.trainable["kernel"]
    assert not np.any(p["B1"]) and not np.any(p["B2"])
    assert not np.allclose(p["A1"], p["A2"])


def test_the_down_factors_have_the_papers_deviation(key):
    state = pefts.petalface(rank=8).init(key, {"up": {"kernel": jnp.ones((2000, 20))}})
    for name in ("A1", "A2"):
        assert np.std(state.trainable["up/kernel"][name]) == pytest.approx(1 / 8, rel=0.03)


def test_each_branch_drops_outputs_of_its_own(W, x, key):
    """With zero kernel and equal halves an output is 0, one branch or both, each doubled."""
    peft = petalface(dropout=0.5)
    state = moved(peft, key, W)
    p, half = state.trainable["kernel"], jnp.full(len(x), 0.5)
    y = np.asarray(run(peft, state, 0 * W, x, quality=half, stream=key))
    one, two = (np.asarray(x @ p[f"A{n}"] @ p[f"B{n}"]) for n in "12")
    kept = np.stack([0 * one, one, two, one + two])
    nearest = np.abs(kept - y).argmin(0)
    np.testing.assert_allclose(np.abs(kept - y).min(0), 0, atol=1e-4)
    assert np.bincount(nearest.ravel(), minlength=4).min() > 0.1 * nearest.size


def test_a_fixed_quality_exports_as_a_lora_of_twice_the_rank(W, x, key):
    peft = petalface(quality=0.3, scale=2.0)
    state = moved(peft, key, W)
    lora, converted = pefts.to_lora(peft, state, {"kernel": W})
    assert lora.config["rank"] == 6
    close(run(lora, converted, W, x), run(peft, state, W, x))


# --- where the batch is ---


def test_quality_reaches_scanned_and_rematerialised_layers(key):
    options = {"rank": 2, "dropout": 0.0, "axes": model_axes(True)}
    peft, params, inputs = pefts.petalface(**options), base_params(), base_inputs()
    quality = jnp.arange(tiny.BATCH) % 3 / 2
    state = pefts.randomize(key, peft.init(key, params), 0.3)

    @jax.jit
    def outputs(quality: jax.Array) -> jax.Array:
        bound = peft.bind(params, state, quality=quality)
        return pefts.apply(tiny.Classifier().apply)({"params": bound}, *inputs)

    y = outputs(quality)
    for q in (0.0, 0.5, 1.0):
        dense = pefts.petalface(**options, quality=q).merge(params, state)
        wanted = tiny.Classifier().apply({"params": dense}, *inputs)
        close(y[quality == q], wanted[quality == q])


def test_windows_follow_their_example(W, x, key):
    """Windows of an example lie one after another: that is (batch, windows) flattened."""
    peft = petalface(windows=True)
    state = moved(peft, key, W)
    many = jax.random.normal(key, (len(SCORES), 3, 5, D_IN))
    y = run(peft, state, W, many.reshape(-1, 5, D_IN), quality=SCORES)
    alone = [run(peft, state, W, many[:, n], quality=SCORES) for n in range(3)]
    close(y.reshape(many.shape[:-1] + (D_OUT,)), np.stack(alone, axis=1))
    with pytest.raises(ValueError, match="4 entries, .* first axis has 12: .*windows=True"):
        run(petalface(), state, W, many.reshape(-1, 5, D_IN), quality=SCORES)
    with pytest.raises(ValueError, match="has 5: it must be the batch's or a multiple"):
        run(peft, state, W, many[0, 0], quality=SCORES)


@pytest.mark.parametrize("layer", ["conv", "embed"])
def test_quality_reaches_convolutions_and_embeddings(key, layer):
    if layer == "conv":
        model, x = nn.Conv(7, (3,)), jax.random.normal(key, (4, 9, 4))
    else:
        model, x = nn.Embed(11, 6), jnp.arange(16).reshape(4, 4) % 11
    params = model.init(key, x)["params"]
    options = {"axes": pefts.infer_axes(model.apply, params, x), "targets": "kernel|embedding"}
    peft = petalface(**options)
    state = pefts.randomize(key, peft.init(key, params))
    y = pefts.apply(model.apply)({"params": peft.bind(params, state, quality=SCORES)}, x)
    for n, q in enumerate(SCORES.tolist()):
        dense = petalface(quality=q, **options).merge(params, state)
        close(y[n : n + 1], model.apply({"params": dense}, x[n : n + 1]))


# --- refusals ---


@pytest.mark.parametrize(
    ("context", "match"),
    [
        ({}, r"was not told the batch's: .*quality=\.\.\."),
        ({"quality": jnp.ones(4, int)}, r"quality of shape \(4,\) and dtype int32"),
        ({"quality": jnp.ones((4, 1))}, r"quality of shape \(4, 1\)"),
        ({"quality": jnp.ones(3)}, r"3 entries, .* first axis has 4"),
        ({"quality": jnp.asarray([0.1, 0.2, 1.5, 0.3])}, r"holds 1.5: bring the scores to"),
        ({"quality": jnp.asarray([0.1, -0.25, 0.5, 0.3])}, r"holds -0.25"),
        ({"quality": jnp.asarray([0.1, jnp.nan, 0.5, 0.3])}, r"holds nan"),
    ],
)
def test_quality_is_checked(W, x, key, context, match):
    peft = petalface()
    with pytest.raises(ValueError, match=match):
        run(peft, peft.init(key, {"kernel": W}), W, x, **context)


def test_inside_jit_quality_is_clipped(W, x, key):
    peft = petalface()
    state = moved(peft, key, W)
    wild = jax.jit(lambda q: run(peft, state, W, x, quality=q))(jnp.asarray([-3.0, 0.3, 9.0, 0.6]))
    close(wild, run(peft, state, W, x, quality=SCORES))


def test_a_batch_of_qualities_has_no_kernel(W, key):
    peft = petalface()
    assert not peft.traits.mergeable and peft.traits.needs == ("context",)
    state = peft.init(key, {"kernel": W})
    with pytest.raises(ValueError, match="cannot be merged .*fix one by quality"):
        peft.merge({"kernel": W}, state)
    bound = peft.bind({"kernel": W}, state)["kernel"]
    with pytest.raises(ValueError, match="no dense kernel .*fix one by quality"):
        bound.rule.effective(W, bound.state, Call())


# --- official golden vectors: torch factors are ours transposed ---


@pytest.fixture
def golden(x64: None) -> dict[str, np.ndarray]:
    if not GOLDEN.exists():
        pytest.skip("../shared/golden/official/petalface is not on this machine")
    return dict(np.load(GOLDEN))


def test_golden_blend(golden):
    a = blend(jnp.asarray(golden["quality"]), float(golden["tau"]))
    np.testing.assert_allclose(a, golden["alpha"], rtol=1e-7, atol=1e-7)


def test_golden_outputs_and_gradients(golden):
    """Two windows an image; each image's blend is its quality here, as tau is a half."""
    names = {
        f"{ours}{n}": f"{theirs}{n}"
        for n in "12"
        for ours, theirs in zip("AB", FACTORS, strict=True)
    }
    params = {"kernel": jnp.asarray(golden["W"].T), "bias": jnp.asarray(golden["b"])}
    trainable = {"kernel": {ours: jnp.asarray(golden[name].T) for ours, name in names.items()}}
    state = pefts.PeftState(trainable, {"kernel": {"scale": jnp.asarray(golden["scale"])}})
    peft = petalface(rank=int(golden["rank"]), windows=True)
    assert float(golden["tau"]) == 0.5

    def outputs(trainable: Any) -> jax.Array:
        bound = peft.bind(params, state._replace(trainable=trainable), quality=golden["alpha"])
        return pefts.apply(nn.Dense(20).apply)({"params": bound}, jnp.asarray(golden["x"]))

    y, pull = jax.vjp(outputs, trainable)
    np.testing.assert_allclose(y, golden["y"], rtol=1e-9, atol=1e-12)
    for ours, grad in pull(jnp.asarray(golden["cot"]))[0]["kernel"].items():
        expected = golden[f"grad_{names[ours]}"].T
        np.testing.assert_allclose(grad, expected, rtol=1e-9, atol=1e-12, err_msg=ours)
