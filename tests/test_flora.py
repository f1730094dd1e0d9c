"""FLoRA beyond the table: convolutions, ranks of the unfoldings, official golden vectors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts
from pefts.bound import Call
from pefts.methods.flora import factors

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "official" / "flora" / "golden.npz"
AXES = {"kernel": "kkio"}
SIZES = (4, 5, 3, 2)  # channels in and out, height and width of the window
NAMES = ("U_in", "U_out", "U_window_1", "U_window_2")


def convolution(key: jax.Array, ranks: tuple[int, ...], **kwargs: Any) -> tuple:
    model = nn.Conv(SIZES[1], SIZES[2:], strides=(1, 2), padding=((1, 1), (0, 1)))
    x = jax.random.normal(jax.random.fold_in(key, 1), (2, 6, 7, SIZES[0]))
    params = model.init(key, x)["params"]
    peft = pefts.flora(ranks, targets="kernel", axes=AXES, **kwargs)
    state = pefts.randomize(key, peft.init(key, params), scale=0.5)
    return model, x, params, peft, state


def update(peft: pefts.Peft, params: Any, state: pefts.PeftState) -> np.ndarray:
    return np.asarray(peft.merge(params, state)["kernel"] - params["kernel"], np.float64)


@pytest.mark.parametrize(
    ("ranks", "m"), [((2, 3, 1, 1), 2), ((3, 2, 2, 1), 2), ((4, 5, 3, 2), 5), ((1, 5, 2, 2), 4)]
)
def test_a_convolution_is_updated_by_the_tucker_product(key, ranks, m):
    """And computed through the smaller of r_out and the product of the other ranks."""
    model, x, params, peft, state = convolution(key, ranks, scale=0.7)
    p = state.trainable["kernel"]
    assert {name: p[name].shape for name in NAMES} == {
        name: (size, rank) for name, size, rank in zip(NAMES, SIZES, ranks, strict=True)
    }
    expected = 0.7 * np.einsum("xypq,ix,oy,ap,bq->abio", p["G"], *(p[name] for name in NAMES))
    np.testing.assert_allclose(update(peft, params, state), expected, rtol=1e-3, atol=1e-5)
    A, B = factors({**p, **state.frozen["kernel"]}, Call())
    assert A.shape == (24, m) and B.shape == (m, 5)
    factored = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    merged = model.apply({"params": peft.merge(params, state)}, x)
    np.testing.assert_allclose(factored, merged, rtol=1e-4, atol=1e-4)


def test_every_unfolding_has_the_rank_of_its_axis(key):
    ranks = (2, 3, 2, 1)
    delta = update(*convolution(key, ranks)[3:1:-1], convolution(key, ranks)[4])
    for axis, rank in ((2, 2), (3, 3), (0, 2), (1, 1)):
        unfolded = np.moveaxis(delta, axis, 0).reshape(delta.shape[axis], -1)
        assert np.linalg.matrix_rank(unfolded, tol=1e-5 * np.linalg.norm(delta)) == rank


def test_it_is_the_chain_of_three_convolutions(key):
    """1x1 by U_in, a small convolution by the core and the window's factors, 1x1 by U_out."""
    model, x, params, peft, state = convolution(key, (2, 3, 2, 1), scale=1.5)
    p = state.trainable["kernel"]
    base = model.apply({"params": params}, x)
    whole = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x) - base
    small = model.clone(features=3, use_bias=False, parent=None)
    core = jnp.einsum("xypq,ap,bq->abxy", p["G"], p["U_window_1"], p["U_window_2"])
    # the padding of x U_in is zero like that of x
    chain = small.apply({"params": {"kernel": core}}, x @ p["U_in"]) @ p["U_out"].T
    np.testing.assert_allclose(whole, 1.5 * chain, rtol=1e-4, atol=1e-4)


def test_the_example_of_the_card_has_its_count(key):
    params = {"kernel": jax.ShapeDtypeStruct((3, 3, 512, 512), jnp.float32)}
    peft = pefts.flora((16, 16, 2, 2), targets="kernel", axes=AXES)
    assert pefts.count(jax.eval_shape(peft.init, key, params).trainable) == 17_420


def test_starts_normal_with_a_core_of_zeros(key):
    params = {"kernel": jnp.ones((7, 7, 300, 200))}
    peft = pefts.flora((16, 8, 2, 2), targets="kernel", axes=AXES)
    state = peft.init(key, params)
    p = state.trainable["kernel"]
    assert not p["G"].any()
    for name, rank in (("U_in", 16), ("U_out", 8)):
        np.testing.assert_allclose(float(p[name].std()), np.sqrt(0.5 / rank), rtol=0.05)
    windows = np.concatenate([np.ravel(p[f"U_window_{n}"]) for n in (1, 2)])
    assert 0.3 < windows.std() < 0.75 and len(set(windows)) == 28
    assert float(state.frozen["kernel"]["scale"]) == 4.0


def test_dropout_takes_inputs_of_the_adapter_alone(key):
    model, _, params, peft, state = convolution(key, (2, 3, 1, 1), dropout=0.5)
    variables, seen = {"params": peft.bind(params, state)}, set()
    x = jnp.zeros((1, 4, 4, 4)).at[0, 2, 2, 1].set(1.0)
    base = model.apply({"params": params}, x)
    whole = pefts.apply(model.apply)(variables, x) - base
    for seed in range(10):
        part = pefts.apply(model.apply)(variables, x, rngs={"dropout": jax.random.key(seed)}) - base
        is_kept = bool(np.abs(part).max() > 1e-6)
        np.testing.assert_allclose(part, whole * (2.0 if is_kept else 0.0), rtol=1e-4, atol=1e-5)
        seen.add(is_kept)
    assert seen == {True, False}


def test_grouped_convolutions_have_the_inputs_of_one_group(key):
    model, x = nn.Conv(6, (3,), feature_group_count=2), jax.random.normal(key, (2, 7, 8))
    params = model.init(key, x)["params"]
    with pytest.raises(ValueError, match="whose axes are in 4, out 6, window 1 3"):
        pefts.flora((5, 2, 1), targets="kernel", axes={"kernel": "kio"}).init(key, params)
    peft = pefts.flora((4, 2, 1), targets="kernel", axes={"kernel": "kio"})
    state = pefts.randomize(key, peft.init(key, params), scale=0.5)
    factored = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    merged = model.apply({"params": peft.merge(params, state)}, x)
    np.testing.assert_allclose(factored, merged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [(2, 3), (2, 3, 1, 1, 1)])
def test_a_convolution_wants_a_rank_for_every_axis(key, ranks):
    params = {"kernel": jnp.ones((3, 2, 4, 5))}
    peft = pefts.flora(ranks, targets="kernel", axes=AXES)
    with pytest.raises(ValueError, match=f"are {len(ranks)}, and 'kernel' .* has 4 axes"):
        peft.init(key, params)


def test_embeddings_are_looked_up_through_a_factor(key):
    model, ids = nn.Embed(12, 8), jnp.arange(8).reshape(2, 4)
    params = model.init(key, ids)["params"]
    peft = pefts.flora((2, 3), targets="embedding")
    state = pefts.randomize(key, peft.init(key, params), scale=0.5)
    factored = pefts.apply(model.apply)({"params": peft.bind(params, state)}, ids)
    merged = model.apply({"params": peft.merge(params, state)}, ids)
    np.testing.assert_allclose(factored, merged, rtol=1e-5, atol=1e-5)
    assert not np.allclose(merged, model.apply({"params": params}, ids), atol=1e-2)


@pytest.mark.parametrize("ranks", [(1, 3, 2, 1), (3, 2, 1, 1)])
def test_nothing_of_the_kernels_size_is_built(key, ranks):
    _, x, params, peft, state = convolution(key, ranks)
    p = {**state.trainable["kernel"], **state.frozen["kernel"]}

    def weights(p: Any) -> jax.Array:
        return sum(jnp.sum(factor) for factor in factors(p, Call()))

    program = jax.make_jaxpr(jax.grad(weights))(p)
    sizes = [v.aval.size for equation in program.jaxpr.eqns for v in equation.outvars]
    assert max(sizes) < params["kernel"].size


# --- official golden vectors: torch's (out, in, h, w), its core (r_in, r_out, r_h, r_w) ---


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    if not GOLDEN.exists():
        pytest.skip("../shared/golden/official/flora is not on this machine")
    return dict(np.load(GOLDEN))


def official(golden: Mapping[str, np.ndarray], prefix: str, count: int) -> dict[str, jax.Array]:
    theirs = ("in", "out", "kh", "kw")[:count]
    pairs = zip(NAMES, theirs, strict=False)
    return {
        "G": jnp.asarray(golden[f"{prefix}_G"]),
        **{ours: jnp.asarray(golden[f"{prefix}_U_{name}"]) for ours, name in pairs},
    }


def check(golden: Mapping[str, np.ndarray], kind: str, model: nn.Module, last: Any) -> None:
    """Output, update and gradients; `last` moves the channels of activations last."""
    W, delta = (golden[f"{kind}_{name}"] for name in ("W", "delta"))
    to_flax = np.transpose if kind == "lin" else lambda k: np.transpose(k, (2, 3, 1, 0))
    ranks = tuple(int(r) for r in golden[f"{kind}_ranks"])
    peft = pefts.flora(
        ranks, float(golden["scale"]), targets="kernel", axes={"kernel": "kkio"[-W.ndim :]}
    )
    params = {"kernel": jnp.asarray(to_flax(W)), "bias": jnp.asarray(golden[f"{kind}_b"])}
    start = peft.init(jax.random.key(0), params)
    group = official(golden, kind, W.ndim)
    state = start._replace(trainable={"kernel": group})
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, start)
    x, cot, y = (jnp.asarray(last(golden[f"{kind}_{name}"])) for name in ("x", "cot", "y"))

    def run(trainable: Any) -> jax.Array:
        bound = peft.bind(params, state._replace(trainable=trainable))
        return pefts.apply(model.apply)({"params": bound}, x)

    out, pull = jax.vjp(run, state.trainable)
    np.testing.assert_allclose(out, y, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(update(peft, params, state), to_flax(delta), rtol=1e-9, atol=1e-9)
    grads = {
        name.removeprefix(f"{kind}_grad_"): g for name, g in golden.items() if "_grad_" in name
    }
    own = official({f"{kind}_{name}": g for name, g in grads.items()}, kind, W.ndim)
    for name, expected in own.items():
        np.testing.assert_allclose(pull(cot)[0]["kernel"][name], expected, rtol=1e-9, atol=1e-9)


def test_golden_linear(golden):
    with jax.enable_x64(True):
        check(golden, "lin", nn.Dense(20, param_dtype=jnp.float64), lambda x: x)


def test_golden_convolution(golden):
    with jax.enable_x64(True):
        pad = int(golden["conv_padding"])
        strides = tuple(int(n) for n in golden["conv_stride"])
        model = nn.Conv(9, (3, 2), strides, padding=((pad, pad),) * 2, param_dtype=jnp.float64)
        check(golden, "conv", model, lambda x: np.moveaxis(x, 1, -1))
