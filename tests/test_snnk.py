"""SNNK adapters: the official arrays, kernels by Monte Carlo, counts, what is frozen and saved."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts
from pefts.bound import Call
from pefts.methods.snnk import exponential_features, projection, relu_features

GOLDEN = Path(__file__).parents[1] / "../shared/golden/official/snnk/golden.npz"


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.is_file():
        pytest.skip("needs ../shared/golden/official/snnk")
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


# ---------------------------------------------------------------------------- official arrays


def state_of(golden, kind):
    p = {"G": golden[f"{kind}_G"], "P": golden[f"{kind}_P_init"].T}
    if kind == "gate":
        p["v"] = golden["gate_v"]
    else:
        p |= {"U": golden["bottleneck_up_W"].T, "b_U": golden["bottleneck_up_b"]}
    return {name: jnp.asarray(leaf) for name, leaf in p.items()}


@pytest.mark.parametrize("kind", ["gate", "bottleneck"])
def test_outputs_and_gradients_are_the_official_ones(golden, x64, kind):
    p, x = state_of(golden, kind), jnp.asarray(golden[f"{kind}_x"])
    width = None if kind == "gate" else golden["bottleneck_P_init"].shape[0]
    clip = float(golden[f"{kind}_c"])
    rule = pefts.snnk.__wrapped__(len(p["G"]), width=width, clip=clip).rule
    y, pull = jax.vjp(
        lambda q: rule.output(x, {**p, **q}, Call()), {k: p[k] for k in p if k != "G"}
    )
    np.testing.assert_allclose(y, golden[f"{kind}_y"], atol=1e-9, rtol=1e-9)
    (grads,) = pull(jnp.asarray(golden[f"{kind}_cot"]))
    np.testing.assert_allclose(grads["P"].T, golden[f"{kind}_grad_P"], atol=1e-9, rtol=1e-9)
    if kind == "gate":
        np.testing.assert_allclose(grads["v"], golden["gate_grad_v"], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", ["gate", "bottleneck"])
def test_the_start_is_the_official_one_of_the_same_weights(golden, x64, kind):
    weights = jnp.asarray(golden[f"{kind}_seed_weights"], jnp.float64)
    clip = float(golden[f"{kind}_c"])
    P = relu_features(weights, jnp.asarray(golden[f"{kind}_G"]), clip)
    np.testing.assert_allclose(P, golden[f"{kind}_P_init"], atol=1e-6)


def test_exponential_features_are_the_official_ones(golden, x64):
    G, a, A = (jnp.asarray(golden[f"urf_{name}"]) for name in ("G", "a", "A"))
    for x, expected in (("x2", "feat2"), ("x3", "feat3_correct")):
        found = exponential_features(jnp.asarray(golden[f"urf_{x}"]), G, a, A)
        np.testing.assert_allclose(found, golden[f"urf_{expected}"], rtol=1e-9)
    found = exponential_features(jnp.asarray(golden["urf_x3"]), G, a, A)
    assert np.abs(found / golden["urf_feat3_code"] - 1).max() > 1e-3  # without the half


# ---------------------------------------------------------------------------- kernels


def arc_cosine(x, w):
    norms = np.linalg.norm(x) * np.linalg.norm(w)
    angle = np.arccos(x @ w / norms)
    return norms * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)


def pair():
    rng = np.random.default_rng(0)
    return rng.normal(size=12), rng.normal(size=12)


def estimates(orthogonal, features, draws=400):
    """phi(x) . phi(w) for so many projections."""
    x, w = map(jnp.asarray, pair())

    def one(key):
        G = projection(key, features, 12, orthogonal)
        return relu_features(x.astype(G.dtype), G) @ relu_features(w.astype(G.dtype), G)

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), draws)))


@pytest.mark.parametrize("orthogonal", [True, False])
def test_features_estimate_the_arc_cosine_kernel(orthogonal):
    expected = arc_cosine(*pair())
    spread = {}
    for features in (12, 48, 192):
        found = estimates(orthogonal, features)
        spread[features] = found.std()
        assert abs(found.mean() - expected) < 4 * found.std() / np.sqrt(len(found))
    for few, many in ((12, 48), (48, 192)):  # the error falls as 1 / sqrt(m)
        assert 1.6 < spread[few] / spread[many] < 2.5


def test_exponential_features_estimate_their_kernel(x64):
    x, w = (0.3 * v for v in pair())
    G = jnp.asarray(np.random.default_rng(1).normal(size=(40_000, 12)))
    one = jnp.ones(len(G))
    found = exponential_features(jnp.asarray(x), G, one, one) @ exponential_features(
        jnp.asarray(w), G, one, one
    )
    np.testing.assert_allclose(found, np.exp(x @ w), rtol=0.05)
    imaginary = one.astype(jnp.complex128) * jnp.complex128(1j)
    waves = exponential_features(jnp.asarray(x), G, imaginary, one) * jnp.conj(
        exponential_features(jnp.asarray(w), G, imaginary, one)
    )
    scale = np.exp((x @ x + w @ w) / 2)  # a^2 = -1 turns the exponent's sign
    np.testing.assert_allclose(
        np.asarray(waves).sum() / scale, np.exp(-((x - w) @ (x - w)) / 2), atol=0.05
    )


# ---------------------------------------------------------------------------- the projection


def test_rows_are_orthogonal_in_blocks_and_long_as_gaussian_ones():
    G = np.asarray(projection(jax.random.key(0), 20, 8, True))
    assert G.shape == (20, 8)
    for block in (G[:8], G[8:16], G[16:]):
        gram = block @ block.T
        np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-4)
    assert np.abs(G[:8] @ G[8:16].T).max() > 0.1
    lengths = np.linalg.norm(np.asarray(projection(jax.random.key(1), 4000, 8, True)), axis=1)
    np.testing.assert_allclose(np.mean(lengths**2), 8, rtol=0.05)
    np.testing.assert_allclose(np.mean(lengths), 2.742, rtol=0.02)  # of a chi with 8 degrees
    plain = np.asarray(projection(jax.random.key(0), 20, 8, False))
    gram = plain[:8] @ plain[:8].T
    assert np.abs(gram - np.diag(np.diag(gram))).max() > 0.1


def test_directions_are_uniform():
    """No axis is preferred: what a decomposition's choice of signs would do."""
    keys = jax.random.split(jax.random.key(0), 500)
    G = np.asarray(jax.jit(jax.vmap(lambda k: projection(k, 6, 6, True)))(keys))
    assert np.abs(G.mean(0)).max() < 5 / np.sqrt(500)
    np.testing.assert_allclose((G**2).mean(0), 1, atol=0.35)


# ---------------------------------------------------------------------------- adapters


def test_counts_as_published():
    """24 adapters of 8 features on BERT-base."""
    shapes = {"output": (768, 768), "mlp/output": (3072, 768)}
    layer = {
        f"attention/{k}/kernel" if k == "output" else f"{k}/kernel": v for k, v in shapes.items()
    }
    params = pefts.paths.unflatten(
        {
            f"layers_{n}/{path}": jax.ShapeDtypeStruct(shape, jnp.float32)
            for n in range(12)
            for path, shape in layer.items()
        }
    )
    state = jax.eval_shape(pefts.snnk().init, jax.random.key(0), params)
    assert pefts.count(state.trainable) == 24 * 768 * 9 == 165_888
    assert pefts.count(state.frozen) == 24 * 8 * 768


def test_the_start_is_of_ordinary_weights(key):
    params = {"mlp": {"output": {"kernel": jnp.ones((6, 300))}}}
    state = pefts.snnk(16, std=0.05).init(key, params)
    group, G = state.trainable["mlp/output/kernel"], state.frozen["mlp/output/kernel"]["G"]
    P = np.asarray(group["P"])
    assert P.shape == (16, 300) and not np.any(group["v"])
    assert (P >= 0).all() and 0.4 < (P == 0).mean() < 0.6  # features of weights about zero
    # E max(w g, 0)^2 = std^2 |g|^2 / 2
    expected = 0.05**2 * np.mean(np.sum(np.asarray(G) ** 2, axis=1)) / 2 / 16
    np.testing.assert_allclose(np.mean(P**2), expected, rtol=0.1)


def test_head_axes_are_taken_together(key):
    model, x = nn.DenseGeneral((2, 3)), jax.random.normal(key, (4, 9))
    params = model.init(key, x)["params"]
    peft = pefts.snnk(5, placement=None, axes={"kernel": "ioo"})
    state = pefts.randomize(key, peft.init(key, params), 0.5)
    y = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    plain = np.asarray(model.apply({"params": params}, x)).reshape(4, 6)
    p = {**state.trainable["kernel"], **state.frozen["kernel"]}
    G, P, v = (np.asarray(p[name]) for name in "GPv")
    expected = plain + v * (np.maximum(plain @ G.T, 0) / np.sqrt(5) @ P)
    np.testing.assert_allclose(y.reshape(4, 6), expected, atol=1e-5)


def test_an_output_whose_features_do_not_come_last_is_refused(key):
    model = nn.Einsum((9, 2, 3), "bti,inh->bnth", use_bias=False)
    x = jax.random.normal(key, (4, 5, 9))
    params = model.init(key, x)["params"]
    peft = pefts.snnk(2, placement=None, axes={"kernel": "ioo"})
    bound = peft.bind(params, peft.init(key, params))
    with pytest.raises(ValueError, match="an output .* does not end in axes of 6 numbers"):
        pefts.apply(model.apply)({"params": bound}, x)


def test_it_cannot_be_merged(key):
    params = {"mlp": {"output": {"kernel": jnp.ones((6, 4))}}}
    peft = pefts.snnk()
    with pytest.raises(ValueError, match="snnk cannot be merged"):
        peft.merge(params, peft.init(key, params))


def test_the_projection_is_saved(key, tmp_path):
    params = {"mlp": {"output": {"kernel": jnp.ones((6, 4))}}}
    peft = pefts.snnk()
    state = peft.init(key, params)
    pefts.save(tmp_path / "adapter.safetensors", peft, state, params)
    _, loaded = pefts.load(tmp_path / "adapter.safetensors", params)
    G = "mlp/output/kernel"
    np.testing.assert_array_equal(loaded.frozen[G]["G"], state.frozen[G]["G"])
