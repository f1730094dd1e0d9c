"""Compacter beyond the table: the product without H, published counts, official golden vectors."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import pefts
from pefts.bound import Call
from pefts.methods.compacter import product

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "official" / "compacter" / "golden.npz"


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def dense(R: Any, S: Any, T: Any) -> np.ndarray:
    """sum_i R_i (x) (S_i T_i)."""
    R, S, T = (np.asarray(leaf, np.float64) for leaf in (R, S, T))
    return np.sum([np.kron(R[i], S[i] @ T[i]) for i in range(len(R))], axis=0)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
@pytest.mark.parametrize(("n", "k", "p", "rho"), [(4, 24, 8, 1), (2, 6, 10, 3), (1, 5, 7, 2)])
def test_the_product_is_that_with_kronecker_products(x64, lead, n, k, p, rho):
    x, R = normal(0, *lead, k), normal(1, n, n, n)
    S, T = normal(2, n, k // n, rho), normal(3, n, rho, p // n)
    y = product(x, R, S, T)
    assert y.shape == (*lead, p)
    np.testing.assert_allclose(y, np.asarray(x) @ dense(R, S, T), rtol=1e-12, atol=1e-12)


def test_no_dense_matrix_is_built():
    """Nothing in the product is as large as H, nor holds n times the numbers of x."""
    n, k, p, rho, tokens = 4, 256, 128, 1, 8
    shapes = [(tokens, k), (n, n, n), (n, k // n, rho), (n, rho, p // n)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = jax.make_jaxpr(product)(*arrays)
    sizes = [v.aval.size for eqn in program.eqns for v in eqn.outvars]
    assert max(sizes) == tokens * k < k * p


# --- what a state starts as ---


def adapter(key: jax.Array, **kwargs: Any) -> tuple[dict, pefts.Peft, pefts.PeftState]:
    params = {name: {"output": {"kernel": jnp.ones((6, 24))}} for name in ("attention", "mlp")}
    peft = pefts.compacter(**{"width": 8, **kwargs})
    return params, peft, peft.init(key, params)


def test_all_sites_share_one_leaf_of_rules(key):
    _, _, state = adapter(key)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    rules = [path for path, leaf in leaves if leaf.shape == (4, 4, 4)]
    assert len(rules) == 1 and state.trainable["shared"]["R"].shape == (4, 4, 4)
    assert not state.frozen


@pytest.mark.parametrize("init", ["zero", "paper"])
def test_factors_start_as_in_the_paper(key, init):
    """Xavier-uniform with gain sqrt(2) in each slice; rules tiny; biases zero."""
    params = {"mlp": {"output": {"kernel": jnp.ones((6, 384))}}}
    peft = pefts.compacter(96, slice_rank=3, init=init)
    assert peft.traits.identity_at_init == (init == "zero")
    state = peft.init(key, params)
    p = state.trainable["mlp/output/kernel"]
    for name, shape in (("S_D", (96, 3)), ("T_D", (3, 24)), ("S_U", (24, 3)), ("T_U", (3, 96))):
        bound = np.sqrt(2) * np.sqrt(6 / sum(shape))
        largest = float(jnp.abs(p[name]).max())
        assert p[name].shape == (4, *shape)
        if name == "T_U" and init == "zero":
            assert largest == 0
        else:
            assert 0.9 * bound < largest <= bound
    assert not np.any(p["b_D"]) and not np.any(p["b_U"])
    assert abs(np.std(state.trainable["shared"]["R"]) / 1e-4 - 1) < 0.3


def test_the_papers_start_is_nearly_the_identity(key):
    model, x = nn.Dense(24), normal(1, 5, 6)
    params = model.init(key, x)["params"]
    changes = []
    for init in ("zero", "paper"):
        peft = pefts.compacter(8, init=init, placement=None)
        bound = peft.bind(params, peft.init(key, params))
        y, base = pefts.apply(model.apply)({"params": bound}, x), model.apply({"params": params}, x)
        changes.append(float(jnp.abs(y - base).max()))
    assert changes[0] == 0 and changes[1] < 1e-6


def test_every_rule_is_trained_from_all_sites(key):
    """The one leaf's gradient is the sum over sites of those with rules of their own."""
    params, peft, state = adapter(key, std=0.1)
    state = pefts.randomize(key, state, 0.3)
    rule = peft.bind(params, state)["mlp"]["output"]["kernel"].rule
    y = normal(3, 5, 24)

    def out(R_of: Any) -> jax.Array:
        outs = [
            rule.output(y, state.trainable[path], Call(shared={"R": R})) for path, R in R_of.items()
        ]
        return jnp.sum(jnp.stack(outs) ** 3)

    R = state.trainable["shared"]["R"]
    shared = {path: R for path in state.trainable if path != "shared"}
    apart = jax.grad(out)(shared)
    together = jax.grad(lambda R: out(dict.fromkeys(shared, R)))(R)
    assert all(float(jnp.abs(g).max()) > 1e-3 for g in apart.values())
    np.testing.assert_allclose(together, sum(apart.values()), rtol=1e-4, atol=1e-4)


# --- placement and counts ---


def t5(width: int = 768, layers: int = 12) -> dict:
    """The leaves of T5-base that adapters and layer norms are about, the layers stacked."""

    def leaf(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def stack(*attentions: str) -> dict:
        square = {name: {"kernel": leaf(layers, width, width)} for name in "qo"}
        block = dict.fromkeys(attentions, square) | {
            "DenseReluDense": {
                "wi": {"kernel": leaf(layers, width, 4 * width)},
                "wo": {"kernel": leaf(layers, 4 * width, width)},
            }
        }
        norm = {"layer_norm": {"scale": leaf(layers, width)}}
        sublayers = {str(n): {name: block[name], **norm} for n, name in enumerate(block)}
        return {"block": sublayers, "final_layer_norm": {"scale": leaf(width)}}

    return {"encoder": stack("SelfAttention"), "decoder": stack("SelfAttention", "EncDecAttention")}


@pytest.mark.parametrize(
    ("placement", "sites", "published"), [("houlsby", 4, 161_728), ("pfeiffer", 2, 104_704)]
)
def test_published_counts_of_t5_base(placement, sites, published):
    """With the layer norms, which the paper's configs train: 0.073% and 0.047% of 222.9 million."""
    params = t5()
    peft = pefts.compacter(placement=placement, axes={"kernel": "lio"})
    adapters = jax.eval_shape(peft.init, jax.random.key(0), params)
    assert len(adapters.trainable) == sites + 1
    assert not any("EncDecAttention" in path for path in adapters.trainable)
    both = pefts.chain(pefts.ln_tuning(targets=r"norm/scale$"), peft)
    state = jax.eval_shape(both.init, jax.random.key(0), params)
    assert pefts.count(state.trainable) == published
    assert round(100 * published / 222_903_552, 3) == {4: 0.073, 2: 0.047}[sites]


@pytest.mark.parametrize(
    "path",
    [
        "decoder/block/0/layer/1/EncDecAttention/o/kernel",
        "decoder/layers/cross_attention/out/kernel",
        "model/decoder/layers/0/encoder_attn/out_proj/kernel",
        "layer/0/crossattention/output/dense/kernel",
        "decoder/encoder_attention/out/kernel",
    ],
)
def test_cross_attention_has_no_adapter(key, path):
    own = path.replace("EncDecAttention", "SelfAttention").replace("cross_", "self_")
    own = own.replace("encoder_att", "encoder_self_att").replace("crossattention", "attention")
    params = pefts.paths.unflatten({p: jnp.ones((6, 8)) for p in (path, own)})
    assert set(pefts.bottleneck(2).init(key, params).trainable) == {path, own}
    assert set(pefts.compacter(4).init(key, params).trainable) == {own, "shared"}


def test_head_axes_are_taken_together(key):
    model, x = nn.DenseGeneral((2, 4)), normal(1, 3, 9)
    params = model.init(key, x)["params"]
    peft = pefts.compacter(4, division=2, placement=None, axes={"kernel": "ioo"})
    state = pefts.randomize(key, peft.init(key, params), 0.5)
    y = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    assert y.shape == (3, 2, 4)
    plain = np.asarray(model.apply({"params": params}, x)).reshape(3, 8)
    p, R = state.trainable["kernel"], np.asarray(state.trainable["shared"]["R"])
    p = {name: np.asarray(leaf) for name, leaf in p.items()}
    expected = oracles.compacter(plain, p, R, oracles.gelu_tanh)
    np.testing.assert_allclose(y.reshape(3, 8), expected, rtol=1e-5, atol=1e-5)


def test_an_output_whose_features_do_not_come_last_is_refused(key):
    model = nn.Einsum((9, 2, 3), "bti,inh->bnth", use_bias=False)
    x = normal(1, 4, 5, 9)
    params = model.init(key, x)["params"]
    peft = pefts.compacter(2, division=2, placement=None, axes={"kernel": "ioo"})
    bound = peft.bind(params, peft.init(key, params))
    with pytest.raises(ValueError, match="does not end in axes of 6 numbers"):
        pefts.apply(model.apply)({"params": bound}, x)


def test_it_cannot_be_merged(key):
    params, peft, state = adapter(key)
    with pytest.raises(ValueError, match="compacter cannot be merged"):
        peft.merge(params, state)


# --- official golden vectors: H is (in, out) as here ---


@pytest.fixture
def golden(x64: None) -> dict[str, np.ndarray]:
    if not GOLDEN.exists():
        pytest.skip("../shared/golden/official/compacter is not on this machine")
    return dict(np.load(GOLDEN))


def golden_state(golden: dict) -> tuple[dict[str, jax.Array], jax.Array]:
    names = {"S": "left", "T": "right", "b": "b"}
    leaves = {
        f"{ours}_{side[0].upper()}": jnp.asarray(golden[f"{side}_{theirs}"])
        for side in ("down", "up")
        for ours, theirs in names.items()
    }
    return leaves, jnp.asarray(golden["rule"])


def test_golden_dense_matrices(golden):
    p, R = golden_state(golden)
    for side, name in (("down", "D"), ("up", "U")):
        S, T, H = p[f"S_{name}"], p[f"T_{name}"], golden[f"{side}_H"]
        np.testing.assert_allclose(product(jnp.eye(len(H)), R, S, T), H, rtol=1e-9, atol=1e-12)


def test_golden_output_and_gradients(golden):
    p, R = golden_state(golden)
    width = int(golden["bottleneck"])
    peft = pefts.compacter(width, division=int(golden["n"]), placement=None)
    params = {"kernel": jnp.zeros((1, golden["x"].shape[-1]))}
    rule = peft.bind(params, peft.init(jax.random.key(0), params))["kernel"].rule
    x, cot = jnp.asarray(golden["x"]), jnp.asarray(golden["cot"])

    def loss(p: Any, R: jax.Array) -> jax.Array:
        return jnp.sum(rule.output(x, p, Call(shared={"R": R})) * cot)

    y = rule.output(x, p, Call(shared={"R": R}))
    np.testing.assert_allclose(y, golden["y"], rtol=1e-9, atol=1e-12)
    grads, grad_R = jax.grad(loss, argnums=(0, 1))(p, R)
    np.testing.assert_allclose(grad_R, golden["grad_rule"], rtol=1e-9, atol=1e-12)
    expected, _ = golden_state(
        golden
        | {
            f"{side}_{leaf}": golden[f"{side}_grad_{leaf}"]
            for side in ("down", "up")
            for leaf in ("left", "right", "b")
        }
    )
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, expected[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_golden_linear_layer_of_dense_slices(golden):
    """Slices of full rank: S = W, T = I."""
    W, R = jnp.asarray(golden["phm_W"]), jnp.asarray(golden["phm_rule"])
    eye = jnp.broadcast_to(jnp.eye(W.shape[-1]), (len(W), *(W.shape[-1],) * 2))
    y = np.asarray(product(jnp.asarray(golden["phm_x"]), R, W, eye)) + golden["phm_b"]
    np.testing.assert_allclose(y, golden["phm_y"], rtol=1e-9, atol=1e-12)
