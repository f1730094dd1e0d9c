"""Bottleneck adapters: placement, width, the equation, DenseGeneral outputs, bad inputs."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import pefts

KERNEL = r"(^|/)kernel$"


def erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf)(x)


NUMPY = {
    "gelu": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
    "swish": lambda x: x / (1 + np.exp(-x)),
}


def adapted(y: np.ndarray, p: dict, activation: str) -> np.ndarray:
    p = {name: np.asarray(value, np.float64) for name, value in p.items()}
    return y + p["scale"] * (NUMPY[activation](y @ p["D"] + p["b_D"]) @ p["U"] + p["b_U"])


@pytest.mark.parametrize("activation", sorted(NUMPY))
def test_the_output_follows_the_equation(activation: str, key: jax.Array) -> None:
    model, x = nn.Dense(7), jax.random.normal(key, (3, 5, 9))
    params = model.init(key, x)["params"]
    peft = pefts.bottleneck(4, placement=None, activation=activation, scale=0.5)
    state = pefts.randomize(key, peft.init(key, params), 0.5)
    with jax.enable_x64(True):
        params, state = (tiny.cast(tree, jnp.float64) for tree in (params, state))
        x = x.astype(jnp.float64)
        y = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
        plain = np.asarray(x @ params["kernel"]) + np.asarray(params["bias"])
    p = {**state.trainable["kernel"], **state.frozen["kernel"]}
    np.testing.assert_allclose(y, adapted(plain, p, activation), rtol=1e-12, atol=1e-12)


def test_head_axes_are_taken_together(key: jax.Array) -> None:
    model, x = nn.DenseGeneral((2, 3)), jax.random.normal(key, (4, 9))
    params = model.init(key, x)["params"]
    peft = pefts.bottleneck(2, placement=None, axes={"kernel": "ioo"})
    state = pefts.randomize(key, peft.init(key, params), 0.5)
    y = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    assert y.shape == (4, 2, 3)
    plain = np.asarray(model.apply({"params": params}, x)).reshape(4, 6)
    p = {**state.trainable["kernel"], **state.frozen["kernel"]}
    np.testing.assert_allclose(y.reshape(4, 6), adapted(plain, p, "gelu"), rtol=1e-5, atol=1e-6)


def test_each_scanned_layer_has_its_own_adapter(key: jax.Array) -> None:
    params, inputs = tiny.parameters(), tiny.inputs()
    model = tiny.Classifier()
    axes = pefts.infer_axes(model.apply, params, *inputs)
    peft = pefts.bottleneck(3, axes=axes)
    state = pefts.randomize(key, peft.init(key, params), 0.5)
    assert sorted(state.trainable) == ["layers/attention/out/kernel", "layers/down/kernel"]
    scanned = pefts.apply(model.apply)({"params": peft.bind(params, state)}, *inputs)

    flat = tiny.Classifier(scanned=False)
    flat_params = tiny.unroll(params)
    flat_peft = pefts.bottleneck(3, axes=pefts.infer_axes(flat.apply, flat_params, *inputs))
    unrolled = [
        {
            path.replace("layers/", f"layers_{n}/"): jax.tree.map(lambda leaf, n=n: leaf[n], group)
            for n in range(tiny.LAYERS)
            for path, group in part.items()
        }
        for part in state
    ]
    bound = flat_peft.bind(flat_params, pefts.PeftState(*unrolled))
    np.testing.assert_allclose(
        pefts.apply(flat.apply)({"params": bound}, *inputs), scanned, rtol=1e-4, atol=1e-5
    )
    base = model.apply({"params": params}, *inputs)
    assert np.abs(np.asarray(scanned) - np.asarray(base)).max() > 1e-2


def names(*paths: str) -> dict:
    return pefts.paths.unflatten({path: jnp.ones((8, 6)) for path in paths})


ENCODER = ("encoder/layers/attention/output/kernel", "encoder/layers/mlp/output/kernel")
OTHERS = ("encoder/layers/attention/query/kernel", "encoder/layers/mlp/intermediate/kernel")


@pytest.mark.parametrize(
    "attention, feed_forward, others",
    [
        (*ENCODER, OTHERS),
        (
            "layer/0/attention/output/dense/kernel",
            "layer/0/output/dense/kernel",
            ("layer/0/attention/self/query/kernel", "layer/0/intermediate/dense/kernel"),
        ),
        (
            "layers/self_attn/o_proj/kernel",
            "layers/mlp/down_proj/kernel",
            ("layers/self_attn/q_proj/kernel", "layers/mlp/up_proj/kernel"),
        ),
        (
            "block/MultiHeadDotProductAttention_0/out/kernel",
            "block/MlpBlock_0/Dense_1/kernel",
            ("block/MlpBlock_0/Dense_0/kernel", "out/kernel"),
        ),
    ],
)
def test_placements(attention: str, feed_forward: str, others: tuple, key: jax.Array) -> None:
    params = names(attention, feed_forward, *others)
    houlsby = pefts.bottleneck(2).init(key, params)
    pfeiffer = pefts.bottleneck(2, placement="pfeiffer").init(key, params)
    everywhere = pefts.bottleneck(2, placement=None).init(key, params)
    assert set(houlsby.trainable) == {attention, feed_forward}
    assert set(pfeiffer.trainable) == {feed_forward}
    assert set(everywhere.trainable) == {attention, feed_forward, *others}


def test_targets_overrule_the_placement(key: jax.Array) -> None:
    state = pefts.bottleneck(2, placement="pfeiffer", targets="query").init(
        key, names(*ENCODER, *OTHERS)
    )
    assert set(state.trainable) == {OTHERS[0]}


def test_widths(key: jax.Array) -> None:
    params = names(*ENCODER)
    reduced = pefts.bottleneck(reduction=3).init(key, params).trainable
    assert {group["D"].shape for group in reduced.values()} == {(6, 2)}
    mixed = pefts.bottleneck(4, rank_pattern={"mlp": 2}, alpha_pattern={"mlp": 3.0})
    state = mixed.init(key, params)
    assert {path: group["U"].shape for path, group in state.trainable.items()} == {
        ENCODER[0]: (4, 6),
        ENCODER[1]: (2, 6),
    }
    assert {path: float(group["scale"]) for path, group in state.frozen.items()} == {
        ENCODER[0]: 1.0,
        ENCODER[1]: 3.0,
    }


def test_the_down_matrix_is_drawn_within_two_deviations(key: jax.Array) -> None:
    params = {"mlp": {"output": {"kernel": jnp.ones((600, 500))}}}
    group = pefts.bottleneck(64).init(key, params).trainable["mlp/output/kernel"]
    D = np.asarray(group["D"])
    assert 0.0195 < np.abs(D).max() <= 0.02
    # a normal cut at two deviations keeps 0.8796 of its deviation
    assert abs(D.std() - 0.8796e-2) < 1e-4
    assert not any(np.any(group[name]) for name in ("b_D", "U", "b_U"))


def test_an_output_whose_features_do_not_come_last_is_refused(key: jax.Array) -> None:
    model = nn.Einsum((9, 2, 3), "bti,inh->bnth", use_bias=False)
    x = jax.random.normal(key, (4, 5, 9))
    params = model.init(key, x)["params"]
    peft = pefts.bottleneck(2, placement=None, axes={"kernel": "ioo"})
    bound = peft.bind(params, peft.init(key, params))
    with pytest.raises(ValueError, match="does not end in axes of 6 numbers"):
        pefts.apply(model.apply)({"params": bound}, x)


def test_it_cannot_be_merged(key: jax.Array) -> None:
    params = names(*ENCODER)
    peft = pefts.bottleneck(2)
    with pytest.raises(ValueError, match="bottleneck cannot be merged"):
        peft.merge(params, peft.init(key, params))


def test_a_reduction_that_leaves_no_width_is_refused(key: jax.Array) -> None:
    with pytest.raises(ValueError, match="reduction=7 leaves no width for 'encoder"):
        pefts.bottleneck(reduction=7).init(key, names(*ENCODER))


def test_a_tied_output_head_is_left_alone(key: jax.Array) -> None:
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids: jax.Array) -> jax.Array:
            table = nn.Embed(11, 6, name="embed")
            return table.attend(table(ids))

    ids = jnp.arange(5)[None]
    params = Tied().init(key, ids)["params"]
    peft = pefts.bottleneck(2, targets="embedding$")
    state = pefts.randomize(key, peft.init(key, params), 0.5)
    logits = pefts.apply(Tied().apply)({"params": peft.bind(params, state)}, ids)
    E = np.asarray(params["embed"]["embedding"])
    p = {**state.trainable["embed/embedding"], **state.frozen["embed/embedding"]}
    expected = adapted(E[:5], p, "gelu") @ E.T
    np.testing.assert_allclose(logits[0], expected, rtol=1e-5, atol=1e-5)
