"""The factored product inside every kind of module, and the ways it refuses to be misused."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts
from pefts import core, paths
from pefts.bound import Rule
from pefts.core import Declaration
from pefts.targets import Select, Site, selection


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def dense_only(**select: Any) -> pefts.Peft:
    """A method without a product of its own: W' = W (1 + a)."""

    def init(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del key, W, stats
        return {"a": jnp.zeros((site.d_in, 1))}, {}

    rule = Rule(init, effective=lambda W, p, call: W * (1 + p["a"].astype(W.dtype)))
    return core.lift(Declaration(rule, selection(**select)), {"method": "dense_only"})


def low_rank(**select: Any) -> pefts.Peft:
    return pefts.lora(rank=2, alpha=4, **select)


METHODS = (low_rank, dense_only)


class Unit(nn.Module):
    """A module as a model of its own, so that its parameters have a path."""

    make: Callable[[], nn.Module]
    times: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *args: Any) -> jax.Array:
        inner = self.make()
        out = inner(x, *args)
        for n in range(1, self.times):
            out = out + inner(x * (n + 1), *args)
        return out


class Tied(nn.Module):
    """One table for words and for the output head."""

    def setup(self) -> None:
        self.table = nn.Embed(11, 6)
        self.hidden = nn.Dense(6)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.table.attend(nn.tanh(self.hidden(self.table(ids))))


class SetupStyle(nn.Module):
    """Modules made in setup, called from two methods."""

    def setup(self) -> None:
        self.encoder = [nn.Dense(7), nn.Dense(5)]
        self.decoder = nn.Dense(3, use_bias=False)

    def encode(self, x: jax.Array) -> jax.Array:
        for layer in self.encoder:
            x = nn.relu(layer(x))
        return x

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decoder(self.encode(x))


class HandWritten(nn.Module):
    """No module of flax's: a parameter that the author multiplies by himself."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        w = self.param("w", nn.initializers.lecun_normal(), (x.shape[-1], 7))
        return nn.LayerNorm()(jnp.tanh(x @ w))


class Stacked(nn.Module):
    """A Dense and its children under one of flax's lifted transforms."""

    lift: Callable[[Any], Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.lift(SetupStyle)(name="inner")(x)


class Layer(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return x + nn.Dense(x.shape[-1])(nn.tanh(nn.Dense(self.hidden)(x))), None


class Scanned(nn.Module):
    length: int = 3
    hidden: int = 9
    remat: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inner = nn.remat(Layer) if self.remat else Layer
        scan = nn.scan(
            inner,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.length,
        )
        return scan(self.hidden, name="layers")(x, None)[0]


def experts(module: type[nn.Module]) -> Any:
    return nn.vmap(
        module,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=3,
    )


def unit(make: Callable[[], nn.Module], *shape: int, times: int = 1) -> tuple[nn.Module, jax.Array]:
    return Unit(make, times), draw(*shape)


IDS = jnp.asarray([[1, 5, 5], [10, 0, 2]])
EINSUMS = {
    "matrix": ("bd,dm->bm", (6, 5), (4, 6)),
    "output_first": ("bd,md->bm", (5, 6), (4, 6)),
    "heads_out": ("btd,dnh->btnh", (6, 2, 5), (4, 3, 6)),
    "heads_between": ("btd,ndh->bnth", (2, 6, 5), (4, 3, 6)),
    "heads_in": ("btnh,nhd->btd", (2, 3, 5), (4, 3, 2, 3)),
    "ellipsis": ("...d,dm->...m", (6, 5), (4, 3, 6)),
    "ellipsis_behind": ("d...,dm->m...", (6, 5), (6, 4, 3)),
    "contracted_first": ("dbt,dm->tbm", (6, 5), (6, 4, 3)),
}
UNITS: dict[str, tuple[nn.Module, jax.Array]] = {
    "dense": unit(lambda: nn.Dense(5), 4, 6),
    "dense_vector": unit(lambda: nn.Dense(5), 6),
    "dense_no_bias": unit(lambda: nn.Dense(5, use_bias=False), 4, 3, 6),
    "dense_twice": unit(lambda: nn.Dense(5), 4, 6, times=2),
    "general": unit(lambda: nn.DenseGeneral(5), 4, 6),
    "general_heads_out": unit(lambda: nn.DenseGeneral((2, 5)), 4, 3, 6),
    "general_heads_in": unit(lambda: nn.DenseGeneral(5, axis=(-2, -1)), 4, 3, 2, 7),
    "general_both": unit(lambda: nn.DenseGeneral((3, 5), axis=(-2, -1)), 4, 2, 7),
    "general_first_axis": unit(lambda: nn.DenseGeneral(5, axis=1), 4, 6, 3),
    "general_axes_apart": unit(lambda: nn.DenseGeneral((2, 5), axis=(1, -1)), 4, 6, 3, 7),
    "general_axes_turned": unit(lambda: nn.DenseGeneral(5, axis=(-1, -2)), 4, 3, 2, 7),
    "general_no_bias": unit(lambda: nn.DenseGeneral((2, 5), use_bias=False), 4, 6),
    "attention": unit(lambda: nn.MultiHeadDotProductAttention(2, qkv_features=8), 4, 3, 6),
    "conv_1d": unit(lambda: nn.Conv(5, (3,)), 2, 7, 4),
    "conv_2d": unit(lambda: nn.Conv(5, (3, 2)), 2, 7, 6, 4),
    "conv_strides": unit(lambda: nn.Conv(5, (3, 2), strides=(2, 1)), 2, 7, 6, 4),
    "conv_valid": unit(lambda: nn.Conv(5, (3, 3), padding="VALID"), 2, 7, 6, 4),
    "conv_circular": unit(lambda: nn.Conv(5, (3, 3), padding="CIRCULAR"), 2, 7, 6, 4),
    "conv_explicit_padding": unit(lambda: nn.Conv(5, (3,), padding=((2, 0),)), 2, 7, 4),
    "conv_dilated": unit(lambda: nn.Conv(5, (3, 3), kernel_dilation=(2, 1)), 2, 7, 6, 4),
    "conv_input_dilated": unit(
        lambda: nn.Conv(5, (3,), padding=((1, 2),), input_dilation=(2,)), 2, 7, 4
    ),
    "conv_no_batch": unit(lambda: nn.Conv(5, (3, 3)), 7, 6, 4),
    "conv_no_bias": unit(lambda: nn.Conv(5, (1, 1), use_bias=False), 2, 7, 6, 4),
    "conv_groups": unit(lambda: nn.Conv(6, (3,), feature_group_count=2), 2, 7, 4),
    "embed": (Unit(lambda: nn.Embed(11, 6)), IDS),
    "tied": (Tied(), IDS),
    "setup": (SetupStyle(), draw(4, 6)),
    "hand_written": (HandWritten(), draw(4, 6)),
    "jit": (Stacked(nn.jit), draw(4, 6)),
    "remat": (Stacked(nn.remat), draw(4, 6)),
    "vmap": (Stacked(experts), draw(4, 6)),
    "scan": (Scanned(remat=False), draw(4, 6)),
    "scan_remat": (Scanned(), draw(4, 6)),
}
for _name, (_equation, _kernel, _input) in EINSUMS.items():
    for _bias in (True, False):
        UNITS[f"einsum_{_name}{'' if _bias else '_no_bias'}"] = unit(
            lambda shape=_kernel, eq=_equation, bias=_bias: nn.Einsum(shape, eq, use_bias=bias),
            *_input,
        )
EXTRA_AXES = {r"(^|/)w$": "io", r"LayerNorm": "o"}  # of the parameters that no module explains


def prepared(name: str, make: Callable[..., pefts.Peft]) -> tuple[nn.Module, Any, Any, Any, Any]:
    """(model, x, params, method, a state away from the identity)."""
    model, x = UNITS[name]
    params = model.init(jax.random.key(0), x)["params"]
    flat = paths.flatten(params)
    params = paths.unflatten({p: v + 0.1 * draw(*v.shape, seed=9) for p, v in flat.items()})
    axes = {**pefts.infer_axes(model.apply, params, x), **EXTRA_AXES}
    peft = make(targets=r"(kernel|embedding|/w|^w)$", axes=axes)
    state = pefts.randomize(jax.random.key(2), peft.init(jax.random.key(1), params), 0.3)
    return model, x, params, peft, state


@pytest.mark.parametrize("make", METHODS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", UNITS)
def test_factored_equals_merged(name: str, make: Callable[..., pefts.Peft]) -> None:
    model, x, params, peft, state = prepared(name, make)

    def factored(trainable: Any) -> jax.Array:
        bound = peft.bind(params, state._replace(trainable=trainable))
        return pefts.apply(model.apply)({"params": bound}, x)

    def merged(trainable: Any) -> jax.Array:
        dense = peft.merge(params, state._replace(trainable=trainable))
        return model.apply({"params": dense}, x)

    def both(run: Callable[[Any], jax.Array]) -> tuple[jax.Array, Any]:
        out, pull = jax.vjp(run, state.trainable)
        return out, pull(draw(*out.shape, seed=3))[0]

    (out, grads), (expected, expected_grads) = (
        jax.jit(lambda r=r: both(r))() for r in (factored, merged)
    )
    base = model.apply({"params": params}, x)
    assert out.shape == base.shape and out.dtype == base.dtype
    assert np.abs(out - base).max() > 1e-2, "the adapter does nothing"
    assert np.abs(out - expected).max() <= 2e-5 * np.abs(expected).max()
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_grads))
    for found, wanted in zip(*map(jax.tree.leaves, (grads, expected_grads)), strict=True):
        assert np.abs(found).max() > 0
        assert np.abs(found - wanted).max() <= 2e-5 * largest


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dense", {"Dense_0/kernel": "io"}),
        ("general_both", {"DenseGeneral_0/kernel": "iioo"}),
        ("conv_2d", {"Conv_0/kernel": "kkio"}),
        ("embed", {"Embed_0/embedding": "io"}),
        ("einsum_heads_between", {"Einsum_0/kernel": "oio"}),
        ("vmap", {f"inner/{n}/kernel": "lio" for n in ("decoder", "encoder_0", "encoder_1")}),
        ("scan_remat", {f"layers/Dense_{n}/kernel": "lio" for n in (0, 1)}),
        ("tied", {"hidden/kernel": "io", "table/embedding": "io"}),
        ("hand_written", {}),
    ],
)
def test_axes_are_inferred(name: str, expected: dict[str, str]) -> None:
    model, x = UNITS[name]
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    found = pefts.infer_axes(model.apply, params, x)
    assert {k.strip("^$").replace("\\", ""): v for k, v in found.items()} == expected


def test_another_method_of_the_model() -> None:
    model, x, params, _, _ = prepared("setup", low_rank)
    peft = low_rank(targets="encoder")
    state = pefts.randomize(jax.random.key(2), peft.init(jax.random.key(1), params))
    out = pefts.apply(model.apply)(
        {"params": peft.bind(params, state)}, x, method=SetupStyle.encode
    )
    dense = peft.merge(params, state)
    expected = model.apply({"params": dense}, x, method=SetupStyle.encode)
    assert np.allclose(out, expected, atol=1e-5)


def test_wrong_einsum_axes_are_refused() -> None:
    model, x, params, _, _ = prepared("einsum_output_first", low_rank)
    peft = low_rank(axes={"kernel": "io"})
    bound = peft.bind(params, peft.init(jax.random.key(0), params))
    with pytest.raises(ValueError, match="axes='io' of 'Einsum_0/kernel' disagree.*'oi'"):
        pefts.apply(model.apply)({"params": bound}, x)


# --- misuse ---


class Forgetful(nn.Module):
    """Has a Dense that the call does not reach unless it is asked to."""

    def setup(self) -> None:
        self.used, self.unused = nn.Dense(5), nn.Dense(5)

    def __call__(self, x: jax.Array, both: bool = True) -> jax.Array:
        return self.used(x) + self.unused(x) if both else self.used(x)


def bound_of(model: nn.Module, x: jax.Array, **select: Any) -> tuple[Any, Any]:
    params = model.init(jax.random.key(0), x)["params"]
    peft = low_rank(**select)
    return params, peft.bind(params, peft.init(jax.random.key(1), params))


def test_unread_kernel_is_an_error() -> None:
    model, x = Forgetful(), draw(4, 6)
    _, bound = bound_of(model, x)
    with pytest.raises(ValueError, match="1 adapted kernels were never read.*'unused/kernel'"):
        pefts.apply(model.apply)({"params": bound}, x, both=False)
    pefts.apply(model.apply)({"params": bound}, x)
    out = pefts.apply(model.apply, strict=False)({"params": bound}, x, both=False)
    assert out.shape == (4, 5)


def test_function_that_is_jitted_by_itself_is_an_error() -> None:
    """Its trace is cached: another adapter would meet the product of the first."""
    model, x = Forgetful(), draw(4, 6)
    _, bound = bound_of(model, x)
    wrapped = pefts.apply(jax.jit(model.apply))
    wrapped({"params": bound}, x)
    with pytest.raises(ValueError, match="never read.*inside the jitted function"):
        wrapped({"params": bound}, x)


@pytest.mark.parametrize("name", ["dense", "general_heads_out", "conv_2d", "embed", "hand_written"])
def test_bound_params_without_apply_are_an_error(name: str) -> None:
    model, x, params, peft, state = prepared(name, low_rank)
    with pytest.raises(
        TypeError, match=r"is adapted, and a BoundKernel is no array: .*pefts\.apply"
    ):
        model.apply({"params": peft.bind(params, state)}, x)


@pytest.mark.parametrize(
    "use",
    [
        jnp.asarray,
        jnp.sum,
        np.asarray,
        np.float32,
        lambda kernel: draw(4, 6) @ kernel,
        lambda kernel: kernel @ draw(5, 4),
        lambda kernel: np.ones((4, 6)) @ kernel,
        lambda kernel: jnp.einsum("bd,dm->bm", draw(4, 6), kernel),
        jax.jit(lambda kernel: jnp.tanh(kernel)),
    ],
)
def test_bound_kernel_is_no_array(use: Callable[[Any], Any]) -> None:
    _, bound = bound_of(Unit(lambda: nn.Dense(5)), draw(4, 6))
    kernel = bound["Dense_0"]["kernel"]
    assert kernel.shape == (6, 5)
    with pytest.raises(TypeError, match=r"^'Dense_0/kernel' is adapted, .* pefts\.apply"):
        use(kernel)


@pytest.mark.parametrize("use", [lambda k: k + 1, lambda k: jax.lax.add(k, k), float, list])
def test_bound_kernel_never_computes(use: Callable[[Any], Any]) -> None:
    """Where Python or jax.lax asks no object for its array, they refuse it themselves."""
    _, bound = bound_of(Unit(lambda: nn.Dense(5)), draw(4, 6))
    with pytest.raises((TypeError, ValueError)):
        use(bound["Dense_0"]["kernel"])


def test_bound_kernel_is_a_pytree() -> None:
    """jit, vmap and scan take it apart and put it together, slice by slice."""
    _, bound = bound_of(Scanned(), draw(4, 6), axes={"kernel": "lio"})
    kernel = bound["layers"]["Dense_0"]["kernel"]
    leaves, treedef = jax.tree.flatten(kernel)
    again = jax.tree.unflatten(treedef, leaves)
    assert type(again) is type(kernel) and again.path == kernel.path
    assert all(a is b for a, b in zip(leaves, jax.tree.leaves(again), strict=True))

    def read(one: Any) -> jax.Array:
        assert one.shape == (9, 6) and one.local_axes == "io"
        return one.base + one.state["A"] @ one.state["B"]

    wanted = jnp.stack([read(jax.tree.map(lambda leaf, n=n: leaf[n], kernel)) for n in range(3)])
    assert np.allclose(jax.jit(jax.vmap(read))(kernel), wanted, atol=1e-6)
    _, scanned = jax.lax.scan(lambda carry, one: (carry, read(one)), None, kernel)
    assert np.allclose(scanned, wanted, atol=1e-6)


def test_params_without_adapter_are_an_error() -> None:
    model, x = Forgetful(), draw(4, 6)
    params, _ = bound_of(model, x)
    with pytest.raises(ValueError, match="carry no adapter.*peft.bind"):
        pefts.apply(model.apply)({"params": params}, x)


def test_method_on_outputs_refuses_foreign_modules() -> None:
    def init(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del key, W, stats
        return {"b": jnp.zeros(site.d_out)}, {}

    rule = Rule(init, output=lambda y, p, call: y + p["b"][None])
    declared = Declaration(rule, selection(targets="w$"), core.Traits(mergeable=False))
    peft = core.lift(declared, {"method": "outputs"})
    model, x, params, _, _ = prepared("hand_written", low_rank)
    bound = peft.bind(params, peft.init(jax.random.key(0), params))
    with pytest.raises(ValueError, match="'w' works on the output of a linear module"):
        pefts.apply(model.apply)({"params": bound}, x)


def test_float_ids_are_refused() -> None:
    model, _, params, peft, state = prepared("embed", low_rank)
    bound = peft.bind(params, state)
    with pytest.raises(ValueError, match="'Embed_0/embedding' is looked up with float32 ids"):
        pefts.apply(model.apply)({"params": bound}, draw(2, 3))


# --- dropout ---


class Twins(nn.Module):
    """Two equal layers on one input, side by side."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.stack([nn.Dense(5, name=name)(x) for name in ("left", "right")])


class ScannedTwins(nn.Module):
    """The same, as two steps of nn.scan."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scan = nn.scan(
            lambda module, carry, _: (carry, nn.Dense(5, name="dense")(carry)),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=2,
        )
        return scan(self, x, None)[1]


def noisy(model: nn.Module, axes: Select) -> tuple[Callable[..., jax.Array], jax.Array]:
    """(key -> outputs) of two layers of the same parameters and state; and them without noise."""
    x = draw(4, 6)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    one = {"kernel": draw(6, 5, seed=1), "bias": draw(5, seed=2)}
    stacked = "dense" in shapes
    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), one)
    params = {"dense": twice} if stacked else {"left": one, "right": one}
    peft = pefts.lora(rank=2, alpha=4, dropout=0.4, **axes)
    state = peft.init(jax.random.key(1), params)
    factors = {"A": draw(6, 2, seed=3), "B": draw(2, 5, seed=4)}
    trainable = {
        path: {k: jnp.stack([v, v]) if stacked else v for k, v in factors.items()}
        for path in state.trainable
    }
    bound = peft.bind(params, state._replace(trainable=trainable))

    def run(key: jax.Array | None) -> jax.Array:
        rngs = {} if key is None else {"dropout": key}
        return pefts.apply(model.apply)({"params": bound}, x, rngs=rngs)

    return run, x @ (one["kernel"] + 2 * factors["A"] @ factors["B"]) + one["bias"][None]


DROPOUTS = {"modules": (Twins(), {}), "scan": (ScannedTwins(), {"axes": {"kernel": "lio"}})}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_needs_the_stream(name: str) -> None:
    run, expected = noisy(*DROPOUTS[name])
    assert np.allclose(run(None), jnp.stack([expected, expected]), atol=1e-5)


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_differs_by_layer_and_by_key(name: str) -> None:
    run, expected = noisy(*DROPOUTS[name])
    first = run(jax.random.key(0))
    assert np.abs(first[0] - first[1]).max() > 1e-2, "both layers drop the same inputs"
    assert np.array_equal(run(jax.random.key(0)), first)
    assert np.abs(run(jax.random.key(1)) - first).max() > 1e-2
    assert np.abs(first - expected[None]).max() > 1e-2


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_has_the_right_expectation(name: str) -> None:
    run, expected = noisy(*DROPOUTS[name])
    samples = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(5), 4000)))
    error = np.abs(samples.mean(0) - np.asarray(expected))
    deviation = samples.std(0) / np.sqrt(len(samples))
    assert deviation.min() > 0
    assert (error <= 5 * deviation + 1e-5).all(), (error / deviation).max()


def test_chained_methods_draw_apart() -> None:
    model, x = Unit(lambda: nn.Dense(5)), draw(4, 6)
    params = model.init(jax.random.key(0), x)["params"]
    member = pefts.lora(rank=2, dropout=0.5)
    peft = pefts.chain(member, pefts.lora(rank=2, dropout=0.5))
    state = peft.init(jax.random.key(1), params)
    one = {"Dense_0/kernel": {"A": draw(6, 2, seed=1), "B": draw(2, 5, seed=2)}}
    opposite = {"Dense_0/kernel": {"A": draw(6, 2, seed=1), "B": -draw(2, 5, seed=2)}}
    bound = peft.bind(params, state._replace(trainable={"0": one, "1": opposite}))
    run = pefts.apply(model.apply)
    base = model.apply({"params": params}, x)
    assert np.allclose(run({"params": bound}, x), base, atol=1e-5)
    noise = run({"params": bound}, x, rngs={"dropout": jax.random.key(0)})
    assert np.abs(noise - base).max() > 1e-2, "both members drop the same inputs"


# --- memory ---


def test_factored_gradients_need_less_memory_than_merged_ones() -> None:
    """On a scanned and rematerialised stack neither dense kernels nor their gradients are built."""
    width = 256
    model = Scanned(length=8, hidden=4 * width)
    x = jax.ShapeDtypeStruct((2, width), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    peft = low_rank(axes={"kernel": "lio"})
    state = jax.eval_shape(peft.init, jax.random.key(0), params)

    def temporary(run: Callable[..., jax.Array]) -> int:
        def loss(trainable: Any, frozen: Any, base: Any, x: jax.Array) -> jax.Array:
            return (run(base, core.PeftState(trainable, frozen), x) ** 2).sum()

        lowered = jax.jit(jax.grad(loss)).lower(state.trainable, state.frozen, params, x)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    factored = temporary(
        lambda base, s, x: pefts.apply(model.apply)({"params": peft.bind(base, s)}, x)
    )
    merged = temporary(lambda base, s, x: model.apply({"params": peft.merge(base, s)}, x))
    kernels = 4 * 8 * 2 * width * 4 * width
    assert merged > kernels, "the merged path is no measure: it built no dense kernels"
    assert factored < kernels / 4, f"{factored} bytes of temporaries beside {kernels} of kernels"
