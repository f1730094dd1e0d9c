"""(IA)3 beyond the table: which sites, which side, and the bias beside a merged kernel."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import pefts
from pefts import paths, views
from pefts.bound import Call, Rule
from pefts.core import Declaration, lift
from pefts.targets import selection

ENCODER = ("encoder/layers/attention/{}/kernel", "encoder/layers/mlp/{}/kernel")
NAMES = (
    (ENCODER, ("key", "value"), "output", ("query", "output"), ("intermediate",)),
    (
        ("layers/self_attn/{}/kernel", "layers/mlp/{}/kernel"),
        ("k_proj", "v_proj"),
        "down_proj",
        ("q_proj", "o_proj"),
        ("gate_proj", "up_proj"),
    ),
    (
        ("layer/0/attention/self/{}/kernel", "layer/0/{}/dense/kernel"),
        ("key", "value"),
        "output",
        ("query",),
        ("intermediate",),
    ),
    (
        ("block_0/SelfAttention_0/{}/kernel", "block_0/MlpBlock_0/{}/kernel"),
        ("key", "value"),
        "Dense_1",
        ("query", "out"),
        ("Dense_0",),
    ),
)


def tree(*found: str) -> dict:
    return paths.unflatten({path: jnp.ones((8, 6)) for path in found})


@pytest.mark.parametrize(("where", "outputs", "ff", "others", "wide"), NAMES)
def test_usual_names_are_found(
    where: tuple, outputs: tuple, ff: str, others: tuple, wide: tuple, key: jax.Array
) -> None:
    attention, mlp = where
    params = tree(
        *map(attention.format, (*outputs, *others)), *map(mlp.format, (ff, *wide)), "head/kernel"
    )
    state = pefts.ia3().init(key, params)
    sizes = {path: {n: leaf.shape for n, leaf in g.items()} for path, g in state.trainable.items()}
    assert sizes == {
        **{attention.format(name): {"l_out": (6,)} for name in outputs},
        mlp.format(ff): {"l_in": (8,)},
    }
    assert not state.frozen
    assert all(bool(jnp.all(leaf == 1)) for leaf in jax.tree.leaves(state))


def test_feedforward_chooses_among_the_targets(key: jax.Array) -> None:
    params = tree("a/key/kernel", "a/down/kernel", "a/up/kernel")

    def inputs(**kwargs: Any) -> set[str]:
        trainable = pefts.ia3(**kwargs).init(key, params).trainable
        return {path for path, group in trainable.items() if "l_in" in group}

    assert inputs(targets="kernel") == {"a/down/kernel"}
    assert inputs(targets="kernel", feedforward=[]) == set()
    assert inputs(targets="kernel", feedforward=["up", "key"]) == {"a/up/kernel", "a/key/kernel"}
    assert inputs(targets="kernel", feedforward="up|down") == {"a/up/kernel", "a/down/kernel"}
    assert inputs(targets="key") == set()
    with pytest.raises(ValueError, match="feedforward, among the targeted kernels: 'down' matches"):
        inputs(targets="key", feedforward="down")


def in_float64(params: Any, state: Any) -> tuple[Any, Any]:
    return tiny.cast(params, jnp.float64), tiny.cast(state, jnp.float64)


class Biased(nn.Module):
    """Head axes, a bias and none, and a second feed-forward layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        heads = nn.DenseGeneral((2, 3), name="key")(x)
        value = nn.Dense(5, use_bias=False, name="value")(x)
        hidden = jnp.concatenate([heads.reshape(*x.shape[:-1], 6), value], -1)
        return nn.Dense(4, name="down")(jnp.sin(hidden))


def test_merging_is_exact_with_and_without_a_bias(key: jax.Array) -> None:
    """y = (x W + b) * l, with b in (heads, head size); the input's scale leaves b alone."""
    model, x = Biased(), jax.random.normal(key, (3, 7))
    params = pefts.randomize(key, pefts.PeftState(model.init(key, x)["params"], {})).trainable
    peft = pefts.ia3(axes=pefts.infer_axes(model.apply, params, x))
    state = pefts.randomize(key, peft.init(key, params), 0.5)
    with jax.enable_x64(True):
        params, state = in_float64(params, state)
        x = x.astype(jnp.float64)
        merged = peft.merge(params, state)
        ours = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
        theirs = np.asarray(model.apply({"params": merged}, x))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-14)
    scale = np.asarray(state.trainable["key/kernel"]["l_out"]).reshape(2, 3)
    expected = np.asarray(params["key"]["bias"]) * scale
    np.testing.assert_allclose(merged["key"]["bias"], expected, rtol=1e-15)
    np.testing.assert_array_equal(merged["down"]["bias"], params["down"]["bias"])
    assert set(merged["value"]) == {"kernel"}
    assert jax.tree.structure(merged) == jax.tree.structure(params)


def test_biases_of_stacked_layers_follow_their_own_layer(key: jax.Array) -> None:
    params = tiny.parameters()
    axes = pefts.infer_axes(tiny.Classifier().apply, params, *tiny.inputs())
    peft = pefts.ia3(targets="query|up|down", axes=axes)
    state = pefts.randomize(key, peft.init(key, params), 0.5)
    half = tiny.cast(params, jnp.bfloat16)
    merged = peft.merge(half, state)["layers"]
    base, vectors = half["layers"], state.trainable
    for layer in range(tiny.LAYERS):
        for name, group in (("query", base["attention"]), ("up", base)):
            found = merged["attention"] if name == "query" else merged
            bias = np.asarray(group[name]["bias"][layer], np.float64)
            path = next(path for path in vectors if f"/{name}/" in path)
            expected = bias * np.asarray(vectors[path]["l_out"][layer]).reshape(bias.shape)
            assert found[name]["bias"].dtype == jnp.bfloat16
            np.testing.assert_allclose(
                np.asarray(found[name]["bias"][layer], np.float64), expected, rtol=2**-8
            )
    np.testing.assert_array_equal(merged["down"]["bias"], base["down"]["bias"])


def shifted(needs_bias: bool) -> pefts.Peft:
    """y = x W + W[0] s + b: a method whose product brings a constant of its own."""

    def start(key: jax.Array, W: jax.Array, *, site: Any, stats: Any) -> tuple[dict, dict]:
        del key, W, site, stats
        return {"s": jnp.float32(2.0)}, {}

    rule = Rule(
        start,
        effective=lambda W, p, call: W,
        linear=lambda x, W, p, call: call.dot(x, W) + (p["s"] * W[0])[None],
        bias=lambda W, b, p, call: b + p["s"] * W[0],
        needs_bias=needs_bias,
    )
    return lift(Declaration(rule, selection(targets="kernel$")), {"method": "shifted"})


def test_a_rule_that_needs_a_bias_says_where_there_is_none(key: jax.Array) -> None:
    params = {"a": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}, "b": {"kernel": jnp.eye(3)}}
    needs, optional = shifted(True), shifted(False)
    state = needs.init(key, params)
    with pytest.raises(ValueError, match="on 'b/kernel' moves .* into the bias 'b/bias', which"):
        needs.merge(params, state)
    merged = optional.merge(params, state)
    assert set(merged["b"]) == {"kernel"}
    np.testing.assert_array_equal(merged["a"]["bias"], [2.0, 2.0])
    whole = {"a": params["a"]}
    np.testing.assert_array_equal(
        needs.merge(whole, needs.init(key, whole))["a"]["bias"], merged["a"]["bias"]
    )
    x = jax.random.normal(key, (4, 3))
    bound = {"params": needs.bind(whole, needs.init(key, whole))["a"]}
    bound["params"] |= {paths.RESERVED: needs.bind(whole, needs.init(key, whole))[paths.RESERVED]}
    ours = pefts.apply(nn.Dense(2).apply)(bound, x)
    theirs = np.asarray(nn.Dense(2).apply({"params": merged["a"]}, x))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_kernel_at_the_root_finds_its_bias(key: jax.Array) -> None:
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    peft = pefts.ia3(targets="kernel")
    state = pefts.randomize(key, peft.init(key, params))
    np.testing.assert_array_equal(
        peft.merge(params, state)["bias"], state.trainable["kernel"]["l_out"]
    )


def test_last_in_a_chain_it_scales_what_the_others_add(key: jax.Array) -> None:
    model, x = nn.Dense(4), jax.random.normal(key, (5, 6))
    params = {"kernel": jax.random.normal(key, (6, 4)), "bias": jnp.arange(4.0)}
    peft = pefts.chain(
        pefts.bitfit(), pefts.lora(rank=2, targets="kernel"), pefts.ia3(targets="kernel")
    )
    state = pefts.randomize(key, peft.init(key, params), 0.5)
    ours = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    dense = np.asarray(model.apply({"params": peft.merge(params, state)}, x))
    np.testing.assert_allclose(ours, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("feedforward", [[], ["kernel"]])
def test_convolutions_scale_channels(feedforward: list[str], key: jax.Array) -> None:
    """A window's positions share the vector of their channels."""
    model, x = nn.Conv(4, (2, 3)), jax.random.normal(key, (2, 5, 6, 3))
    params = pefts.randomize(key, pefts.PeftState(model.init(key, x)["params"], {})).trainable
    peft = pefts.ia3(feedforward, targets="kernel", axes={"kernel": "kkio"})
    state = pefts.randomize(key, peft.init(key, params), 0.5)
    assert jax.tree.leaves(state)[0].shape == ((3,) if feedforward else (4,))
    ours = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    dense = np.asarray(model.apply({"params": peft.merge(params, state)}, x))
    np.testing.assert_allclose(ours, dense, rtol=1e-5, atol=1e-6)
    assert np.abs(ours - model.apply({"params": params}, x)).max() > 0.1


def test_an_embedding_scales_what_it_looks_up(key: jax.Array) -> None:
    model, ids = nn.Embed(7, 4), jnp.arange(6)
    params = model.init(key, ids)["params"]
    peft = pefts.ia3(targets="embedding")
    state = pefts.randomize(key, peft.init(key, params), 0.5)
    merged = {"params": peft.merge(params, state)}
    bound = {"params": peft.bind(params, state)}
    h = jax.random.normal(key, (2, 4))
    for arguments, method in (((ids,), "__call__"), ((h,), "attend")):
        ours = pefts.apply(model.apply)(bound, *arguments, method=method)
        theirs = np.asarray(model.apply(merged, *arguments, method=method))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_outputs_that_do_not_end_in_the_kernels_are_refused(key: jax.Array) -> None:
    model, x = nn.Einsum((4, 2, 3), "btd,dnh->bnth", use_bias=False), jnp.ones((2, 5, 4))
    params = model.init(key, x)["params"]
    peft = pefts.ia3(targets="kernel", axes={"kernel": "ioo"})
    with pytest.raises(ValueError, match=r"an output of shape \(2, 2, 5, 3\): it does not end"):
        pefts.apply(model.apply)({"params": peft.bind(params, peft.init(key, params))}, x)


def test_no_kernel_is_scaled_in_training(key: jax.Array) -> None:
    """Neither product builds an array of the kernel's size."""
    W, x, rule = jnp.ones((64, 48)), jnp.ones((2, 64)), pefts.ia3.__wrapped__().rule
    for name, size in (("l_in", 64), ("l_out", 48)):

        def product(vector: jax.Array, name: str = name) -> jax.Array:
            p = {name: vector}
            return rule.output(rule.linear(x, W, p, Call()), p, Call()).sum()

        jaxpr = jax.make_jaxpr(jax.grad(product))(jnp.ones(size))
        made = {var.aval.shape for eqn in jaxpr.jaxpr.eqns for var in eqn.outvars}
        assert (64, 48) not in made


def test_views_agree_with_numpy() -> None:
    """What the bias hook gets: the kernel as a matrix, the bias as one row of its columns."""
    kernel = jnp.arange(24.0).reshape(4, 2, 3)
    seen = {}

    def note(W: jax.Array, b: jax.Array, p: Any, call: Any) -> jax.Array:
        seen.update(W=W, b=b, s=p["s"])
        return b

    def start(key: jax.Array, W: jax.Array, *, site: Any, stats: Any) -> tuple[dict, dict]:
        return {"s": jnp.zeros(3)}, {}

    rule = Rule(start, effective=lambda W, p, call: W, bias=note)
    chosen = selection(targets="kernel", axes={"kernel": "ioo"})
    peft = lift(Declaration(rule, chosen), {"method": "noting"})
    params = {"kernel": kernel, "bias": jnp.arange(6.0).reshape(2, 3)}
    peft.merge(params, peft.init(jax.random.key(0), params))
    np.testing.assert_array_equal(seen["W"], views.to_matrix(kernel, "ioo"))
    np.testing.assert_array_equal(seen["b"], np.arange(6.0))


def test_what_follows_it_in_a_chain_is_refused() -> None:
    model, params = nn.Dense(4), {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}
    scaled = pefts.ia3(targets="kernel", feedforward=[])
    for pefts_ in ((scaled, pefts.lora(rank=2, targets="kernel")), (scaled, scaled)):
        both = pefts.chain(*pefts_)
        bound = both.bind(params, both.init(jax.random.key(0), params))
        with pytest.raises(ValueError, match="put it last"):
            pefts.apply(model.apply)({"params": bound}, jnp.ones((2, 6)))


def test_a_partition_of_kernels_alone_merges_their_biases() -> None:
    model, x = nn.Dense(4), jnp.ones((2, 6))
    params = {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}
    peft = pefts.partition({"a": pefts.ia3(targets="kernel", feedforward=[])}, {"kernel": "a"})
    state = pefts.randomize(jax.random.key(1), peft.init(jax.random.key(0), params))
    merged = peft.merge(params, state)
    y = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    np.testing.assert_allclose(model.apply({"params": merged}, x), y, rtol=1e-6)
    assert float(jnp.abs(merged["bias"] - params["bias"]).max()) > 0


def test_a_module_that_is_not_known_is_refused() -> None:
    model = nn.Conv(4, (3,), feature_group_count=2)
    x = jnp.ones((1, 5, 6))
    params = model.init(jax.random.key(0), x)["params"]
    peft = pefts.ia3(targets="kernel", feedforward=[], axes={"kernel": "kio"})
    bound = peft.bind(params, peft.init(jax.random.key(0), params))
    with pytest.raises(ValueError, match="works on the output"):
        pefts.apply(model.apply)({"params": bound}, x)
