"""pefts.nnx: factored equals merged for NNX modules that know nothing of adapters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pefts
from pefts.bound import Rule
from pefts.core import Declaration, PeftState, Traits, lift
from pefts.targets import selection

WIDTH, HEADS, VOCABULARY = 12, 2, 9


def rngs() -> nnx.Rngs:
    return nnx.Rngs(0)


class Own(nnx.Module):
    """A module that no library knows, with a kernel of its own and two methods that read it."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.matrix = nnx.Param(jax.random.normal(rngs.params(), (WIDTH, 5)))
        self.calls = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        return self.project(x) + jnp.sum(self.matrix[...])

    def project(self, x: jax.Array) -> jax.Array:
        return x @ self.matrix[...]


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(
            HEADS, WIDTH, qkv_features=16, decode=False, rngs=rngs
        )
        self.up = nnx.Linear(WIDTH, 20, rngs=rngs)
        self.down = nnx.Linear(20, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(x)
        return x + self.down(nnx.gelu(self.up(x)))


class Classifier(nnx.Module):
    """Three blocks, in an nnx.List or stacked under nnx.scan (and nnx.remat)."""

    def __init__(self, rngs: nnx.Rngs, scanned: bool) -> None:
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.scanned = scanned
        if scanned:
            self.blocks = nnx.vmap(Block)(rngs.split(3))
        else:
            self.blocks = nnx.List([Block(rngs) for _ in range(3)])
        self.head = nnx.Linear(WIDTH, 4, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        if self.scanned:

            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            @nnx.remat
            def run(x: jax.Array, block: Block) -> jax.Array:
                return block(x)

            x = run(x, self.blocks)
        else:
            for block in self.blocks:
                x = block(x)
        return self.head(x.mean(1))


IDS = jnp.arange(10).reshape(2, 5) % VOCABULARY
ROWS = jax.random.normal(jax.random.key(7), (2, 5, WIDTH))
IMAGES = jax.random.normal(jax.random.key(8), (2, 6, 5, 3))

MODULES: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nnx.Linear(WIDTH, 5, rngs=rngs()), ROWS),
    "no_bias": (lambda: nnx.Linear(WIDTH, 5, use_bias=False, rngs=rngs()), ROWS),
    "bfloat16": (lambda: nnx.Linear(WIDTH, 5, dtype=jnp.float32, param_dtype=jnp.bfloat16,
                                    rngs=rngs()), ROWS),
    "general": (lambda: nnx.LinearGeneral((5, WIDTH), (2, 3), axis=(1, 2), rngs=rngs()), ROWS),
    "einsum": (lambda: nnx.Einsum("btd,dnh->btnh", (WIDTH, 2, 4), (2, 4), rngs=rngs()), ROWS),
    "conv": (lambda: nnx.Conv(3, 4, (3, 2), strides=2, rngs=rngs()), IMAGES),
    "grouped_conv": (lambda: nnx.Conv(3, 6, (3, 2), feature_group_count=3, rngs=rngs()), IMAGES),
    "embed": (lambda: nnx.Embed(VOCABULARY, 5, rngs=rngs()), IDS),
    "attention": (lambda: nnx.MultiHeadAttention(HEADS, WIDTH, qkv_features=16, decode=False,
                                                 rngs=rngs()), ROWS),
    "own": (lambda: Own(rngs()), ROWS),
    "list": (lambda: Classifier(rngs(), scanned=False), IDS),
    "scan": (lambda: Classifier(rngs(), scanned=True), IDS),
}  # fmt: skip
METHODS = {
    "lora": lambda axes: pefts.lora(rank=2, targets=r"kernel|embedding|matrix", axes=axes),
    "full": lambda axes: pefts.full(),
    "chain": lambda axes: pefts.chain(
        pefts.full(targets=r"kernel|embedding|matrix"),
        pefts.lora(rank=1, targets=r"kernel|embedding|matrix", axes=axes),
    ),
}


def prepared(name: str, method: str = "lora") -> tuple[Any, ...]:
    model, x = MODULES[name][0](), MODULES[name][1]
    graphdef, params, rest = pefts.nnx.split(model)
    peft = METHODS[method](pefts.nnx.infer_axes(model))
    state = pefts.randomize(jax.random.key(2), peft.init(jax.random.key(1), params))
    return graphdef, params, rest, peft, state, x


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODULES)
def test_factored_equals_merged_in_value_and_gradient(name: str, method: str) -> None:
    graphdef, params, rest, peft, state, x = prepared(name, method)

    def factored(trainable: Any) -> jax.Array:
        bound = peft.bind(params, PeftState(trainable, state.frozen))
        return pefts.nnx.apply(graphdef)(bound, rest, x)

    def merged(trainable: Any) -> jax.Array:
        dense = peft.merge(params, PeftState(trainable, state.frozen))
        return pefts.nnx.merge(graphdef, dense, rest)(x)

    got, want = jax.jit(factored)(state.trainable), merged(state.trainable)
    base = pefts.nnx.merge(graphdef, params, rest)(x)
    tolerance = 2e-2 if name == "bfloat16" else 1e-5  # the merged kernel is rounded to bfloat16
    scale = float(jnp.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale)
    assert float(jnp.abs(want - base).max()) > 0.01 * scale
    grads = [
        jax.grad(lambda t, f=f: jnp.mean(jnp.square(f(t))))(state.trainable)
        for f in (factored, merged)
    ]
    for ours, theirs in zip(*map(jax.tree.leaves, grads), strict=True):
        bound = (2e-2 if name == "bfloat16" else 1e-4) * float(jnp.abs(theirs).max()) + 1e-6
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound)


def test_a_fresh_state_changes_nothing() -> None:
    graphdef, params, rest, peft, _, x = prepared("scan")
    state = peft.init(jax.random.key(1), params)
    got = pefts.nnx.apply(graphdef)(peft.bind(params, state), rest, x)
    np.testing.assert_allclose(got, pefts.nnx.merge(graphdef, params, rest)(x), atol=1e-6)


def test_scanned_layers_equal_the_same_layers_in_a_list() -> None:
    graphdef, params, rest, peft, state, x = prepared("scan")
    got = pefts.nnx.apply(graphdef)(peft.bind(params, state), rest, x)
    listed = Classifier(rngs(), scanned=False)
    graphdef, _, rest = pefts.nnx.split(listed)
    dense = peft.merge(params, state)
    blocks = {str(n): jax.tree.map(lambda a, n=n: a[n], dense["blocks"]) for n in range(3)}
    want = pefts.nnx.merge(graphdef, {**dense, "blocks": blocks}, rest)(x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_indices_of_a_list_are_names_and_axes_follow_the_modules() -> None:
    listed, scanned = Classifier(rngs(), False), Classifier(rngs(), True)
    _, params, _ = pefts.nnx.split(listed)
    assert sorted(params["blocks"]) == ["0", "1", "2"]
    axes = pefts.nnx.infer_axes(listed)
    assert axes[r"^blocks/2/attention/query/kernel$"] == "ioo"
    assert axes[r"^blocks/2/attention/out/kernel$"] == "iio"
    axes = pefts.nnx.infer_axes(scanned)
    assert axes[r"^blocks/attention/query/kernel$"] == "lioo"
    assert axes[r"^blocks/up/kernel$"] == "lio"
    peft = pefts.lora(rank=2, targets=r"blocks/[02]/up/kernel")
    state = peft.init(jax.random.key(0), params)
    assert sorted(state.trainable) == ["blocks/0/up/kernel", "blocks/2/up/kernel"]


def test_head_only_trains_the_head() -> None:
    graphdef, params, rest = pefts.nnx.split(MODULES["list"][0]())
    peft = pefts.head_only()
    state = peft.init(jax.random.key(0), params)
    assert sorted(state.trainable) == ["head/bias", "head/kernel"]
    moved = pefts.randomize(jax.random.key(1), state)
    got = pefts.nnx.apply(graphdef)(peft.bind(params, moved), rest, IDS)
    want = pefts.nnx.merge(graphdef, peft.merge(params, moved), rest)(IDS)
    np.testing.assert_array_equal(got, want)


def test_other_methods_of_a_module_use_the_adapted_kernel() -> None:
    graphdef, params, rest, peft, state, _ = prepared("embed")
    bound, merged = peft.bind(params, state), peft.merge(params, state)
    query = jax.random.normal(jax.random.key(3), (2, 5))
    got = pefts.nnx.apply(graphdef, method="attend")(bound, rest, query)
    np.testing.assert_allclose(got, query @ merged["embedding"].T, rtol=1e-5, atol=1e-5)


class Tied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embed.attend(self.embed(ids))


def test_a_tied_head_sees_the_adapted_embedding() -> None:
    graphdef, params, rest = pefts.nnx.split(Tied(rngs()))
    peft = pefts.lora(rank=2, targets="embedding")
    state = pefts.randomize(jax.random.key(1), peft.init(jax.random.key(0), params), 1.0)
    got = pefts.nnx.apply(graphdef)(peft.bind(params, state), rest, IDS)
    table = np.asarray(peft.merge(params, state)["embed"]["embedding"], np.float64)
    np.testing.assert_allclose(got, table[IDS] @ table.T, rtol=1e-4, atol=1e-4)


def test_mutable_returns_what_the_call_changed() -> None:
    graphdef, params, rest, peft, state, x = prepared("own")
    bound = peft.bind(params, state)
    out, changed = pefts.nnx.apply(graphdef, mutable=True)(bound, rest, x)
    _, again = pefts.nnx.apply(graphdef, mutable=True)(bound, changed, x)
    assert [float(nnx.to_pure_dict(r)["calls"]) for r in (rest, changed, again)] == [0, 1, 2]
    np.testing.assert_array_equal(out, pefts.nnx.apply(graphdef)(bound, rest, x))


def test_dropout_differs_between_keys() -> None:
    model = MODULES["scan"][0]()
    graphdef, params, rest = pefts.nnx.split(model)
    peft = pefts.lora(rank=2, dropout=0.5, targets="up/kernel", axes=pefts.nnx.infer_axes(model))
    state = pefts.randomize(jax.random.key(2), peft.init(jax.random.key(1), params))
    bound = peft.bind(params, state)

    @jax.jit
    def run(key: jax.Array) -> jax.Array:
        return pefts.nnx.apply(graphdef, key=key)(bound, rest, IDS)

    first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert not np.allclose(first, pefts.nnx.apply(graphdef)(bound, rest, IDS))


class Side(nnx.Module):
    """Stacked linear layers, all of one input."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.vmap(lambda r: nnx.Linear(WIDTH, 5, rngs=r))(rngs.split(3))

    def __call__(self, x: jax.Array) -> jax.Array:
        run = nnx.scan(lambda x, layer: (x, layer(x)), in_axes=(nnx.Carry, 0))
        return run(x, self.layers)[1]


def test_dropout_differs_between_scanned_layers() -> None:
    model = Side(rngs())
    graphdef, params, rest = pefts.nnx.split(model)
    peft = pefts.lora(rank=2, dropout=0.5, axes=pefts.nnx.infer_axes(model))
    state = pefts.randomize(jax.random.key(2), peft.init(jax.random.key(1), params))
    state = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), state)
    bound, base = peft.bind(params, state), model(ROWS)
    still = pefts.nnx.apply(graphdef)(bound, rest, ROWS) - base
    np.testing.assert_allclose(still[0], still[1], atol=1e-5)
    dropped = pefts.nnx.apply(graphdef, key=jax.random.key(3))(bound, rest, ROWS) - base
    assert not np.allclose(dropped[0], dropped[1], atol=1e-3)


def scaled_output(targets: str, axes: Any) -> Any:
    """y' = y (1 + scale), a method on outputs, which also shifts the model's input."""

    def start(key: Any, W: Any, *, site: Any, stats: Any) -> tuple[dict, dict]:
        return {"scale": jnp.zeros((site.d_out,)), "shift": jnp.zeros(())}, {}

    def output(y: Any, p: Any, call: Any) -> Any:
        return y * (1 + p["scale"]).astype(y.dtype).reshape(1, 1, *y.shape[2:])

    def inputs(args: Any, kwargs: Any, p: Any) -> Any:
        return (args[0] + p["shift"], *args[1:]), kwargs

    rule = Rule(start, output=output, inputs=inputs)
    chosen = selection(targets=targets, axes=axes)
    return lift(Declaration(rule, chosen, Traits(mergeable=False)), {"method": "scaled_output"})


@pytest.mark.parametrize("name", ["linear", "general", "einsum"])
def test_output_and_input_hooks_run_once(name: str) -> None:
    model, x = MODULES[name][0](), MODULES[name][1]
    if name == "general":
        model = nnx.LinearGeneral(WIDTH, (2, 3), rngs=rngs())
    graphdef, params, rest = pefts.nnx.split(model)
    peft = scaled_output("kernel", pefts.nnx.infer_axes(model))
    state = pefts.randomize(jax.random.key(3), peft.init(jax.random.key(1), params))
    group = state.trainable["kernel"]
    got = pefts.nnx.apply(graphdef)(peft.bind(params, state), rest, x)
    want = model(x + group["shift"])
    want = want * (1 + group["scale"]).reshape(1, 1, *want.shape[2:])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "general", "einsum", "conv", "embed"])
def test_linear_modules_never_build_the_adapted_kernel(name: str) -> None:
    def start(key: Any, W: Any, *, site: Any, stats: Any) -> tuple[dict, dict]:
        A, B = (jax.random.normal(key, (n, 2)) for n in (site.d_in, site.d_out))
        return {"A": A, "B": B.T}, {}

    def linear(x: Any, W: Any, p: Any, call: Any) -> Any:
        return call.dot(x, W) + call.dot(x, p["A"]) @ p["B"]

    model, x = MODULES[name][0](), MODULES[name][1]
    graphdef, params, rest = pefts.nnx.split(model)
    leaf, axes = ("embedding" if name == "embed" else "kernel"), pefts.nnx.infer_axes(model)
    chosen = selection(targets=leaf, axes=axes)
    rule = Rule(start, linear=linear, through_dot=True)  # no `effective`: the fallback would raise
    peft = lift(Declaration(rule, chosen, Traits(mergeable=False)), {"method": "fake"})
    state = peft.init(jax.random.key(1), params)
    got = pefts.nnx.apply(graphdef)(peft.bind(params, state), rest, x)
    A, B = state.trainable[leaf]["A"], state.trainable[leaf]["B"]
    letters = next(iter(axes.values()))
    delta = pefts.views.from_matrix(A @ B, letters, params[leaf].shape)
    want = pefts.nnx.merge(graphdef, {**params, leaf: params[leaf] + delta}, rest)(x)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))


def test_calibrate_serves_nnx_models() -> None:
    model = Classifier(rngs(), scanned=True)
    graphdef, params, rest = pefts.nnx.split(model)

    def run(variables: Any, ids: jax.Array) -> jax.Array:
        return pefts.nnx.apply(graphdef)(variables["params"], rest, ids)

    stats = pefts.calibrate(run, params, [IDS], ["head", "up"], adapted=True,
                            axes=pefts.nnx.infer_axes(model))  # fmt: skip
    assert stats["blocks/up/kernel"]["second_moment"].shape == (3, WIDTH, WIDTH)
    np.testing.assert_array_equal(stats["blocks/up/kernel"]["count"], [10, 10, 10])
    x = model.embed(IDS)
    first = jax.tree.map(lambda leaf: leaf[0], nnx.split(model.blocks)[1])
    block = nnx.merge(nnx.split(model.blocks)[0], first)
    x = (x + block.attention(x)).reshape(-1, WIDTH)
    np.testing.assert_allclose(
        stats["blocks/up/kernel"]["second_moment"][0], x.T @ x / len(x), rtol=1e-4, atol=1e-5
    )


# Errors


def test_params_that_are_not_bound_are_refused() -> None:
    graphdef, params, rest, _, _, x = prepared("linear")
    with pytest.raises(ValueError, match="carry no adapter"):
        pefts.nnx.apply(graphdef)(params, rest, x)


class Spare(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.used = nnx.Linear(WIDTH, 5, rngs=rngs)
        self.spare = nnx.Linear(WIDTH, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.used(x)


class Peeks(Spare):
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.used(x) + x @ self.spare.kernel[...]


class Held(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.weights = nnx.List([nnx.Param(jnp.ones((WIDTH, 5)))])

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.weights[0][...]


def bound_call(model: nnx.Module, peft: Any, x: jax.Array, **kwargs: Any) -> Any:
    graphdef, params, rest = pefts.nnx.split(model)
    state = peft.init(jax.random.key(0), params)
    return pefts.nnx.apply(graphdef, **kwargs)(peft.bind(params, state), rest, x)


def test_no_kernel_is_skipped_silently() -> None:
    lora = pefts.lora(rank=2, targets="kernel")
    with pytest.raises(ValueError, match="1 adapted kernels were never read.*'spare/kernel'"):
        bound_call(Spare(rngs()), lora, ROWS)
    np.testing.assert_allclose(
        bound_call(Spare(rngs()), lora, ROWS, strict=False), Spare(rngs())(ROWS), atol=1e-6
    )
    with pytest.raises(TypeError, match="BoundKernel"):
        bound_call(Peeks(rngs()), lora, ROWS)
    with pytest.raises(ValueError, match="no module has 'weights/0' as an attribute"):
        bound_call(Held(rngs()), pefts.lora(rank=2, targets="weights"), ROWS)


def test_methods_on_outputs_need_a_linear_module() -> None:
    with pytest.raises(ValueError, match="'matrix' works on the output.*Own.__call__"):
        bound_call(Own(rngs()), scaled_output("matrix", {}), ROWS)


def test_names_that_paths_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="under the name '0'"):
        pefts.nnx.split(nnx.Dict({"0": nnx.Linear(2, 3, rngs=rngs())}))


def test_the_models_own_module_is_left_as_it_was() -> None:
    model = MODULES["linear"][0]()
    graphdef, params, rest = pefts.nnx.split(model)
    peft = pefts.lora(rank=2)
    state = pefts.randomize(jax.random.key(1), peft.init(jax.random.key(0), params))
    before = model(ROWS)
    pefts.nnx.apply(graphdef)(peft.bind(params, state), rest, ROWS)
    np.testing.assert_array_equal(model(ROWS), before)
    assert type(model) is nnx.Linear
