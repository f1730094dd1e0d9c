"""Hooks around attention: which modules they find, in which order they go, and what is refused."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from subject import base_inputs, base_params, model_axes

import pefts
from pefts.core import Declaration, Traits, lift
from pefts.targets import selection

WIDTH, HEADS, TOKENS = 12, 3, 5


class Attend(nn.Module):
    """Causal without a mask; refuses to know of anything but its arguments."""

    @nn.compact
    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None):
        if mask is None:
            mask = nn.make_causal_mask(jnp.ones(q.shape[:2]), dtype=bool)
        return nn.dot_product_attention(q, k, v, mask=mask)


def heads(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:2], HEADS, -1)


class Layer(nn.Module):
    """Self-attention, with what the tests vary."""

    attends: int = 1
    keyword: bool = False
    mask: Any = None
    value: str = "value"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (heads(nn.Dense(WIDTH, name=n)(x)) for n in ("query", "key", self.value))
        for _ in range(self.attends):
            attend = Attend()
            out = attend(q, v=v, k=k, mask=self.mask) if self.keyword else attend(q, k, v)
        return out.reshape(x.shape)


@pytest.fixture
def x(key: jax.Array) -> jax.Array:
    return jax.random.normal(key, (2, TOKENS, WIDTH))


def shifting(amount: float, targets: str = "value", factor: float = 1.0) -> pefts.Peft:
    """A method whose hook computes factor * attention + amount, and keeps no state."""

    def attend(inner: Any, q: Any, k: Any, v: Any, mask: Any, p: Any, call: Any) -> jax.Array:
        del call
        return factor * inner(q, k, v, mask) + p["amount"]

    def start(key: jax.Array, W: jax.Array, *, site: Any, stats: Any) -> tuple[dict, dict]:
        del key, W, site, stats
        return {"amount": jnp.float32(amount)}, {}

    rule = pefts.core.Rule(start, attend=attend)
    declared = Declaration(rule, selection(targets=targets), Traits(mergeable=False))
    return lift(declared, {"method": "shifting"})


def run(peft: pefts.Peft, model: nn.Module, x: jax.Array, **kwargs: Any) -> tuple[Any, Any]:
    """Outputs with the adapter and without."""
    params = model.init(jax.random.key(1), x)["params"]
    state = peft.init(jax.random.key(2), params)
    bound = {"params": peft.bind(params, state)}
    return pefts.apply(model.apply, **kwargs)(bound, x), model.apply({"params": params}, x)


@pytest.mark.parametrize("keyword", [False, True])
def test_a_hook_goes_around_the_attention(keyword: bool, x: jax.Array) -> None:
    ours, base = run(shifting(3.0), Layer(keyword=keyword), x)
    np.testing.assert_allclose(ours, base + 3, rtol=1e-6, atol=1e-6)


def test_hooks_of_a_chain_nest_in_its_order(x: jax.Array) -> None:
    chain = pefts.chain(shifting(3.0), shifting(1.0, factor=2.0))
    ours, base = run(chain, Layer(), x)
    np.testing.assert_allclose(ours, 2 * (base + 3) + 1, rtol=1e-6, atol=1e-5)


def test_every_layer_has_its_own(x: jax.Array) -> None:
    model = nn.Sequential([Layer(), Layer()])
    params = model.init(jax.random.key(1), x)["params"]
    peft = shifting(0.0)
    state = peft.init(jax.random.key(2), params)
    second = state.trainable["layers_1/value/kernel"]
    state.trainable["layers_1/value/kernel"] = {"amount": second["amount"] + 5}
    ours = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    np.testing.assert_allclose(ours, model.apply({"params": params}, x) + 5, rtol=1e-6, atol=1e-5)


def test_one_attention_called_twice_is_one(x: jax.Array) -> None:
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            layer = Layer()
            return layer(layer(x))

    model = Twice()
    params = model.init(jax.random.key(1), x)["params"]
    peft = shifting(3.0)
    bound = {"params": peft.bind(params, peft.init(jax.random.key(2), params))}
    layer = Layer()
    once = layer.apply({"params": params["Layer_0"]}, x) + 3
    expected = layer.apply({"params": params["Layer_0"]}, once) + 3
    np.testing.assert_allclose(pefts.apply(model.apply)(bound, x), expected, rtol=1e-5, atol=1e-5)


def test_an_attention_that_no_module_offers_is_an_error(x: jax.Array) -> None:
    model = nn.MultiHeadDotProductAttention(num_heads=HEADS)
    params = model.init(jax.random.key(0), x)["params"]
    axes = pefts.infer_axes(model.apply, params, x)
    peft = pefts.prefix(length=2, axes=axes)
    bound = {"params": peft.bind(params, peft.init(jax.random.key(0), params))}
    with pytest.raises(ValueError, match="'value/kernel' acts on the attention beside it.* none"):
        pefts.apply(model.apply)(bound, x)
    plain = model.apply({"params": params}, x)
    np.testing.assert_array_equal(pefts.apply(model.apply, strict=False)(bound, x), plain)


def test_one_reached_attention_does_not_stand_for_another(x: jax.Array) -> None:
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = Layer(name="seen")(x)
            return nn.Dense(WIDTH, name="value")(x)

    with pytest.raises(ValueError, match="method on 'value/kernel' acts on the attention"):
        run(shifting(1.0), Both(), x)


def test_two_attentions_beside_one_projection_are_refused(x: jax.Array) -> None:
    with pytest.raises(ValueError, match="beside two, 'Attend_0' and 'Attend_1'"):
        run(shifting(1.0), Layer(attends=2), x)


def test_two_projections_of_one_attention_are_refused(x: jax.Array) -> None:
    with pytest.raises(ValueError, match=r"stands at \['key/kernel', 'value/kernel'\]"):
        run(shifting(1.0, targets="key|value"), Layer(), x)


@pytest.mark.parametrize("mask", [np.ones((1, 1, TOKENS, TOKENS)), np.ones((TOKENS, TOKENS), bool)])
def test_masks_of_another_kind_are_refused(mask: np.ndarray, x: jax.Array) -> None:
    with pytest.raises(ValueError, match="mask of shape .* need a boolean"):
        run(shifting(1.0), Layer(keyword=True, mask=mask), x)


def test_heads_are_needed(x: jax.Array) -> None:
    class Single(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            v = nn.Dense(WIDTH, name="value")(x)
            return Attend()(x, x, v)

    model = Single()
    peft = shifting(1.0)
    params = {"value": {"kernel": jnp.ones((WIDTH, WIDTH)), "bias": jnp.ones(WIDTH)}}
    bound = {"params": peft.bind(params, peft.init(jax.random.key(0), params))}
    with pytest.raises(ValueError, match=r"shapes \[\(2, 5, 12\).*need \(batch, tokens, heads"):
        pefts.apply(model.apply)(bound, x)


def test_modules_with_parameters_are_no_attention(x: jax.Array) -> None:
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Any = None):
            return self.param("scale", nn.initializers.ones, ()) * (q + k + v)

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            v = heads(nn.Dense(WIDTH, name="value")(x))
            return Scaled()(v, v, v)

    with pytest.raises(ValueError, match="acts on the attention beside it"):
        run(shifting(1.0), Own(), x)


def test_inputs_are_changed_once_whatever_the_sites(x: jax.Array) -> None:
    def doubled(args: tuple, kwargs: dict, p: Any) -> tuple[tuple, dict]:
        del p
        return (2 * args[0],), kwargs

    inner = shifting(0.0)
    params = nn.Sequential([Layer(), Layer()]).init(jax.random.key(1), x)["params"]
    bound = inner.bind(params, inner.init(jax.random.key(0), params))
    for layer in bound["layers_0"], bound["layers_1"]:
        kernel = layer["value"]["kernel"]
        rule = kernel.rule._replace(inputs=doubled)
        layer["value"]["kernel"] = pefts.bound.BoundKernel(
            kernel.base, kernel.state, rule, kernel.axes, kernel.path, kernel.owner
        )
    model = nn.Sequential([Layer(), Layer()])
    expected = model.apply({"params": params}, 2 * x)
    np.testing.assert_allclose(pefts.apply(model.apply)({"params": bound}, x), expected, rtol=1e-5)


def test_nnx_says_that_it_cannot(key: jax.Array) -> None:
    class Values(nnx.Module):
        def __init__(self) -> None:
            self.value = nnx.Linear(6, 4, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.value(x)

    graphdef, params, rest = pefts.nnx.split(Values())
    peft = pefts.prefix(length=2)
    bound = peft.bind(params, peft.init(key, params))
    with pytest.raises(
        ValueError, match="'value/kernel' acts on the attention itself, and pefts.nnx"
    ):
        pefts.nnx.apply(graphdef)(bound, rest, jnp.ones((2, 6)))


@pytest.mark.parametrize("scanned", [True, False])
def test_the_gradient_is_that_of_the_written_out_model(scanned: bool) -> None:
    """Through scan and remat, against finite differences along one direction."""
    params = base_params() if scanned else tiny.unroll(base_params())
    peft = pefts.prefix(length=2, std=0.5, axes=model_axes(scanned))
    model = tiny.Classifier(scanned)
    with jax.enable_x64(True):
        params = tiny.cast(params, jnp.float64)
        state = tiny.cast(peft.init(jax.random.key(3), params), jnp.float64)

        @jax.jit
        def loss(trainable: Any) -> jax.Array:
            bound = peft.bind(params, state._replace(trainable=trainable))
            return jnp.sum(pefts.apply(model.apply)({"params": bound}, *base_inputs()) ** 2)

        step = tiny.cast(peft.init(jax.random.key(4), params).trainable, jnp.float64)
        ends = [
            loss(jax.tree.map(lambda t, d, s=s: t + s * d, state.trainable, step))
            for s in (1e-5, -1e-5)
        ]
        grads = jax.grad(loss)(state.trainable)
        along = sum(
            jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (grads, step)), strict=True)
        )
        assert abs(float(along)) > 1e-3
        np.testing.assert_allclose(along, (ends[0] - ends[1]) / 2e-5, rtol=1e-6)
