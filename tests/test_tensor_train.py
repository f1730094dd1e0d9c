"""Tensor-train adapters: official vectors, sizes, start, cost, placements, what they refuse."""

import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

import pefts
from pefts.methods.tensor_train import balanced, halves, product
from pefts.zeroth_order import adazeta
from pefts.zeroth_order.mezo import NO_DECAY

GOLDEN = Path(__file__).parents[1] / "../shared/golden/official/adazeta_tt/golden.npz"
OFFICIAL = (16, 16, 16, 4, 4, 4)
PLACEMENTS = ("input", "output")


def dense(p: Mapping[str, Any], name: str) -> np.ndarray:
    """W (d_in, d_out) in float64, from the whole tensor."""
    count = sum(leaf.startswith(f"{name}_G") for leaf in p)
    cores = [np.asarray(p[f"{name}_G{k + 1}"], np.float64) for k in range(count)]
    tensor = functools.reduce(lambda T, G: np.tensordot(T, G, 1), cores)
    return tensor.reshape(-1, p[f"{name}_bias"].size)


def adapted(h: Any, p: Mapping[str, Any], scale: float = 1.0) -> np.ndarray:
    """h + s Up(relu(Down(h))) in float64."""
    h = np.asarray(h, np.float64)
    z = np.maximum(h @ dense(p, "down") + np.asarray(p["down_bias"], np.float64), 0)
    return h + scale * (z @ dense(p, "up") + np.asarray(p["up_bias"], np.float64))


def started(d_in: int, d_out: int, **kwargs: Any) -> dict[str, jax.Array]:
    """The trainable leaves of one kernel."""
    peft = pefts.tensor_train(targets="kernel", **kwargs)
    params = {"kernel": jnp.zeros((d_in, d_out))}
    return jax.jit(peft.init)(jax.random.key(0), params).trainable["kernel"]


def shapes(d_in: int, d_out: int, **kwargs: Any) -> dict[str, tuple[int, ...]]:
    """Of the same leaves."""
    abstract = jax.eval_shape(functools.partial(started, d_in, d_out, **kwargs))
    return {name: leaf.shape for name, leaf in abstract.items()}


def sizes(of: Mapping[str, tuple[int, ...]], name: str) -> list[int]:
    """n_1 ... n_2m of one matrix."""
    count = sum(leaf.startswith(f"{name}_G") for leaf in of)
    return [of[f"{name}_G{k + 1}"][1] for k in range(count)]


def outputs(model: nn.Module, peft: pefts.Peft, params: Any, state: Any, x: jax.Array) -> jax.Array:
    """Of the adapted model."""
    run = jax.jit(lambda s: pefts.apply(model.apply)({"params": peft.bind(params, s)}, x))
    return run(state)


# --- the paper's own code ---


@pytest.fixture(scope="module")
def official() -> dict[str, np.ndarray]:
    if not GOLDEN.exists():
        pytest.skip("no golden file of the official code")
    with np.load(GOLDEN) as file:
        return dict(file)


def of_side(official: Mapping[str, np.ndarray], prefix: str, grads: bool = False) -> dict:
    """The official cores and biases, or their gradients, under our names."""
    mark = "grad_" if grads else ""
    return {
        **{f"{name}_bias": official[f"{prefix}_{name}_{mark}bias"] for name in ("down", "up")},
        **{
            f"{name}_G{k + 1}": official[f"{prefix}_{name}_{mark}core{k}"]
            for name, k in itertools.product(("down", "up"), range(6))
        },
    }


@pytest.mark.parametrize(("prefix", "placement"), [("before", "input"), ("after", "output")])
def test_it_is_the_official_adapter(prefix: str, placement: str, official: dict, x64: None) -> None:
    W, b = official[f"{prefix}_W"].T, official[f"{prefix}_b"]
    params = {"kernel": jnp.asarray(W), "bias": jnp.asarray(b)}
    peft = pefts.tensor_train(
        bottleneck=int(official["bottleneck"]),
        rank=int(official["rank"]),
        placement=placement,
        factors=official["shape_down"].tolist(),
        targets="kernel",
    )
    fresh = peft.init(jax.random.key(0), params)
    given = {"kernel": {k: jnp.asarray(v) for k, v in of_side(official, prefix).items()}}
    assert jax.tree.map(jnp.shape, fresh.trainable) == jax.tree.map(jnp.shape, given)
    model, x = nn.Dense(W.shape[1]), jnp.asarray(official[f"{prefix}_x"])

    def run(trainable: Any) -> jax.Array:
        state = fresh._replace(trainable=trainable)
        return outputs(model, peft, params, state, x)

    y, pull = jax.vjp(jax.jit(run), given)
    np.testing.assert_allclose(y, official[f"{prefix}_y"], rtol=1e-9, atol=1e-12)
    grads = pull(jnp.asarray(official[f"{prefix}_cot"]))[0]["kernel"]
    expected = of_side(official, prefix, grads=True)
    assert grads.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(grads[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("prefix", ["before", "after"])
@pytest.mark.parametrize("name", ["down", "up"])
def test_the_halves_make_the_official_matrix(
    prefix: str, name: str, official: dict, x64: None
) -> None:
    cores = [jnp.asarray(official[f"{prefix}_{name}_core{k}"]) for k in range(6)]
    L, R = halves(cores)
    W = official[f"{prefix}_{name}_dense"]
    assert L.shape == (W.shape[0], 3) and R.shape == (3, W.shape[1])
    np.testing.assert_allclose(L @ R, W, rtol=1e-9, atol=1e-12)
    x = jax.random.normal(jax.random.key(0), (2, 5, W.shape[0]), jnp.float64)
    np.testing.assert_allclose(product(x, cores), np.asarray(x) @ W, rtol=1e-9, atol=1e-12)


# --- sizes ---


def test_the_official_sizes() -> None:
    of = shapes(8, 4096)
    assert sizes(of, "down") == list(OFFICIAL) and sizes(of, "up") == list(OFFICIAL[::-1])
    assert [of[f"down_G{k}"][::2] for k in (1, 2, 6)] == [(1, 5), (5, 5), (5, 1)]
    for name, bias in (("down", 64), ("up", 4096)):
        cores = sum(math.prod(shape) for leaf, shape in of.items() if f"{name}_G" in leaf)
        assert (cores, of[f"{name}_bias"]) == (1100, (bias,))


def test_the_largest_factors_are_at_the_ends() -> None:
    """Where a core has one rank axis alone."""
    of = shapes(8, 768, bottleneck=24)
    assert sizes(of, "down") == [12, 8, 8, 2, 3, 4] and sizes(of, "up") == [4, 3, 2, 8, 8, 12]


def test_the_official_adapters_of_llama_2_7b() -> None:
    """Before gate and up, behind down, in 32 layers."""
    sides = {"gate_proj": (4096, 11008), "up_proj": (4096, 11008), "down_proj": (11008, 4096)}
    params = {
        "layers": {
            "mlp": {
                name: {"kernel": jax.ShapeDtypeStruct((32, *side), jnp.bfloat16)}
                for name, side in sides.items()
            }
        }
    }
    axes = {"kernel": "lio"}
    both = pefts.chain(*[pefts.tensor_train(placement=where, axes=axes) for where in PLACEMENTS])
    state = jax.eval_shape(both.init, jax.random.key(0), params)
    assert pefts.count(state.trainable) == 32 * 3 * (1100 + 64 + 1100 + 4096)


@pytest.mark.parametrize("size", [1, 2, 7, 12, 36, 64, 97, 360, 768, 1024])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_factors_have_the_smallest_sum(size: int, parts: int) -> None:
    found = balanced(size, parts)
    assert math.prod(found) == size and len(found) == parts
    assert list(found) == sorted(found, reverse=True)
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    every = itertools.combinations_with_replacement(divisors, parts)
    assert sum(found) == min(sum(split) for split in every if math.prod(split) == size)


@pytest.mark.parametrize("width", [50257, 4099, 5120, 11008, 151936])
def test_any_width_has_an_adapter(width: int) -> None:
    down = sizes(shapes(8, width), "down")
    assert down[:3] == sorted(down[:3], reverse=True) and math.prod(down[:3]) == width
    assert down[3:] == [4, 4, 4]


def test_given_factors_are_taken_as_they_are() -> None:
    of = shapes(5, 24, bottleneck=6, rank=2, factors=(2, 3, 4, 1, 3, 2))
    assert sizes(of, "down") == [2, 3, 4, 1, 3, 2] and sizes(of, "up") == [2, 3, 1, 4, 3, 2]


def test_patterns_give_sites_their_own_rank_and_scale() -> None:
    params = {"a": {"kernel": jnp.ones((8, 6))}, "b": {"kernel": jnp.ones((8, 6))}}
    peft = pefts.tensor_train(
        4, 3, targets="kernel", rank_pattern={"b/": 2}, alpha_pattern={"b/": 0.5}
    )
    state = jax.jit(peft.init)(jax.random.key(0), params)
    assert [state.trainable[f"{n}/kernel"]["up_G2"].shape[0] for n in "ab"] == [3, 2]
    assert [float(state.frozen[f"{n}/kernel"]["scale"]) for n in "ab"] == [1.0, 0.5]


# --- start ---


def many_starts() -> dict[str, np.ndarray]:
    peft = pefts.tensor_train(targets="kernel")
    params = {"kernel": jnp.zeros((8, 4096))}
    keys = jax.random.split(jax.random.key(0), 400)
    states = jax.jit(jax.vmap(lambda key: peft.init(key, params).trainable["kernel"]))(keys)
    return {name: np.asarray(leaf) for name, leaf in states.items()}


def test_the_start_has_the_official_deviations() -> None:
    """Cores as the code draws them; with that the entries of W have 1/sqrt(d_in + d_out)."""
    p, sigma = many_starts(), (4096 + 64) ** -0.5
    for name, k in itertools.product(("down", "up"), range(1, 7)):
        right = 5 if k < 6 else 1
        G = p[f"{name}_G{k}"]
        assert abs(G.std() * math.sqrt(right) / sigma ** (1 / 6) - 1) < 0.03, (name, k)
        assert abs(G.mean()) < 0.03 * G.std()
    for name, d_out in (("down", 64), ("up", 4096)):
        b = p[f"{name}_bias"] * math.sqrt(d_out)
        assert 0.99 < np.abs(b).max() <= 1 + 1e-6 and abs(b.std() - 3**-0.5) < 0.01
        L, R = jax.vmap(halves)([jnp.asarray(p[f"{name}_G{k}"]) for k in range(1, 7)])
        squared = np.einsum("bir,bis,brj,bsj->b", L, L, R, R, optimize=True)
        entry = math.sqrt(squared.mean() / (4096 * 64))
        assert abs(entry / sigma - 1) < 0.1


def test_sites_and_matrices_start_apart() -> None:
    params = {name: {"kernel": jnp.zeros((4, 8))} for name in "ab"}
    peft = pefts.tensor_train(8, 2, factors=2, targets="kernel")
    state = jax.jit(peft.init)(jax.random.key(0), params).trainable
    leaves = [np.asarray(g[f"{n}_G2"]) for g in state.values() for n in ("down", "up")]
    for one, other in itertools.combinations(leaves, 2):
        assert one.shape == other.shape and np.abs(one - other).max() > 1e-2


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_it_starts_at_the_identity_on_request_alone(placement: str, key: jax.Array) -> None:
    model, x = nn.Dense(8), jax.random.normal(key, (3, 12))
    params = model.init(key, x)["params"]
    base = model.apply({"params": params}, x)
    for zero in (True, False):
        peft = pefts.tensor_train(
            4, 2, placement=placement, factors=2, zero_init=zero, targets="kernel"
        )
        assert peft.traits.identity_at_init == zero
        state = jax.jit(peft.init)(key, params)
        y = outputs(model, peft, params, state, x)
        assert np.allclose(y, np.asarray(base), rtol=1e-6, atol=1e-6) == zero
        p = state.trainable["kernel"]
        zeros = {name for name, leaf in p.items() if not np.any(leaf)}
        assert zeros == ({"down_bias", "up_bias", "up_G4"} if zero else set())


# --- cost and precision ---


def equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_no_matrix_is_built(placement: str) -> None:
    """Neither forward nor backward holds d b numbers, and all its products are exact."""
    d, tokens = 4096, 2
    peft = pefts.tensor_train(placement=placement, targets="kernel")
    side = (d, 8) if placement == "input" else (8, d)
    params = {"kernel": jnp.zeros(side, jnp.bfloat16)}
    state = peft.init(jax.random.key(0), params)
    model, x = nn.Dense(side[1], use_bias=False), jnp.zeros((tokens, side[0]), jnp.bfloat16)

    def loss(trainable: Any) -> jax.Array:
        bound = peft.bind(params, state._replace(trainable=trainable))
        return jnp.sum(pefts.apply(model.apply)({"params": bound}, x)).astype(jnp.float32)

    jaxpr = jax.make_jaxpr(jax.grad(loss))(state.trainable).jaxpr
    products = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general"]
    sizes = [v.aval.size for eqn in equations(jaxpr) for v in eqn.outvars]
    # bfloat16 alone is the base's own
    exact = [eqn for eqn in products if eqn.invars[0].aval.dtype == jnp.float32]
    highest = jax.lax.Precision.HIGHEST
    assert max(sizes) < d * 64 / 2
    assert len(exact) > 16 and len(products) - len(exact) <= 2
    assert all(eqn.params["precision"] == (highest, highest) for eqn in exact)


@pytest.mark.parametrize("name", ["down", "up"])
def test_the_matrices_have_the_rank(name: str) -> None:
    p = started(4, 24, bottleneck=12, rank=3)
    assert np.linalg.matrix_rank(dense(p, name), tol=1e-7) == 3


def test_bfloat16_is_rounded_at_the_end_alone(key: jax.Array) -> None:
    model, x = nn.Dense(16, dtype=jnp.bfloat16), jax.random.normal(key, (64, 12), jnp.bfloat16)
    params = tiny.cast(model.init(key, x)["params"], jnp.bfloat16)
    peft = pefts.tensor_train(8, 3, factors=2, targets="kernel", scale=2.0)
    state = jax.jit(peft.init)(key, params)
    # not jitted: the compiler may leave out roundings
    y = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    base = jnp.asarray(model.apply({"params": params}, x))
    change = adapted(base, state.trainable["kernel"], 2.0) - np.asarray(base, np.float64)
    expected = base + jnp.asarray(change, jnp.float32).astype(jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    # float32 may round to the neighbour of what float64 rounds to
    assert np.mean(np.asarray(y) == np.asarray(expected)) > 0.99


# --- placements ---


def test_axes_of_heads_are_taken_together(key: jax.Array) -> None:
    params = {
        "query": nn.DenseGeneral((2, 3)).init(key, jnp.ones((1, 8)))["params"],
        "out": nn.DenseGeneral(8, axis=(-2, -1)).init(key, jnp.ones((1, 2, 3)))["params"],
    }

    class Heads(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            heads = nn.DenseGeneral((2, 3), name="query")(x)
            return nn.DenseGeneral(8, axis=(-2, -1), name="out")(heads)

    x = jax.random.normal(key, (4, 5, 8))
    axes = pefts.infer_axes(Heads().apply, params, x)
    plain = np.asarray(nn.DenseGeneral((2, 3)).apply({"params": params["query"]}, x))
    W, b = np.asarray(params["out"]["kernel"]).reshape(6, 8), np.asarray(params["out"]["bias"])
    for placement, target in (("output", "query"), ("input", "out")):
        peft = pefts.tensor_train(4, 2, placement=placement, factors=2, targets=[target], axes=axes)
        state = jax.jit(peft.init)(key, params)
        y = outputs(Heads(), peft, params, state, x)
        heads = adapted(plain.reshape(4, 5, 6), state.trainable[f"{target}/kernel"])
        np.testing.assert_allclose(y, heads @ W + b, rtol=1e-4, atol=1e-5)


def names(sides: Mapping[str, tuple[int, int]]) -> dict:
    return pefts.paths.unflatten({f"{n}/kernel": jnp.ones(s) for n, s in sides.items()})


@pytest.mark.parametrize(
    ("first", "second", "others"),
    [
        (
            ("layers/mlp/gate_proj", "layers/mlp/up_proj"),
            "layers/mlp/down_proj",
            ("layers/self_attn/q_proj", "layers/self_attn/o_proj"),
        ),
        (
            ("layers/mlp/intermediate",),
            "layers/mlp/output",
            ("layers/attention/query", "layers/attention/output"),
        ),
        (
            ("layer/0/intermediate/dense",),
            "layer/0/output/dense",
            ("layer/0/attention/output/dense", "pooler/dense"),
        ),
        (
            ("block/MlpBlock_0/Dense_0",),
            "block/MlpBlock_0/Dense_1",
            ("block/MultiHeadDotProductAttention_0/out", "Dense_0"),
        ),
        (("h/mlp/c_fc",), "h/mlp/c_proj", ("h/attn/c_attn", "h/attn/c_proj")),
    ],
)
def test_default_targets(first: tuple, second: str, others: tuple, key: jax.Array) -> None:
    params = names(dict.fromkeys((*first, second, *others), (8, 6)))
    found = {
        where: set(pefts.tensor_train(4, 2, placement=where).init(key, params).trainable)
        for where in PLACEMENTS
    }
    assert found == {"input": {f"{n}/kernel" for n in first}, "output": {f"{second}/kernel"}}


class FeedForward(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = nn.Dense(12, use_bias=False, name="gate_proj")(x)
        up = nn.Dense(12, use_bias=False, name="up_proj")(x)
        return nn.Dense(8, use_bias=False, name="down_proj")(gate * up)


def test_the_placements_of_the_paper_together(key: jax.Array) -> None:
    x = jax.random.normal(key, (3, 8))
    params = FeedForward().init(key, x)["params"]
    both = pefts.chain(*[pefts.tensor_train(4, 2, placement=where) for where in PLACEMENTS])
    state = jax.jit(both.init)(key, params)
    y = outputs(FeedForward(), both, params, state, x)
    p = {path: g for part in state.trainable.values() for path, g in part.items()}
    W = {name: np.asarray(leaf["kernel"], np.float64) for name, leaf in params.items()}
    gate, up = (adapted(x, p[f"{n}/kernel"]) @ W[n] for n in ("gate_proj", "up_proj"))
    expected = adapted((gate * up) @ W["down_proj"], p["down_proj/kernel"])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_both_sides_of_one_kernel(key: jax.Array) -> None:
    model, x = nn.Dense(8), jax.random.normal(key, (3, 12))
    params = model.init(key, x)["params"]
    both = pefts.chain(
        *[pefts.tensor_train(4, 2, placement=where, targets="kernel") for where in PLACEMENTS]
    )
    state = jax.jit(both.init)(key, params)
    y = outputs(model, both, params, state, x)
    before, behind = (state.trainable[label]["kernel"] for label in ("0", "1"))
    plain = adapted(x, before) @ np.asarray(params["kernel"], np.float64)
    expected = adapted(plain + np.asarray(params["bias"]), behind)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_nnx_runs_it_too(placement: str, key: jax.Array) -> None:
    x = jax.random.normal(key, (3, 12))
    graphdef, params, rest = pefts.nnx.split(nnx.Linear(12, 8, rngs=nnx.Rngs(0)))
    peft = pefts.tensor_train(4, 2, placement=placement, targets="kernel")
    state = jax.jit(peft.init)(key, params)
    y = pefts.nnx.apply(graphdef)(peft.bind(params, state), rest, x)
    linen = outputs(nn.Dense(8), peft, params, state, x)
    base = nn.Dense(8).apply({"params": params}, x)
    np.testing.assert_allclose(y, linen, rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(y) - np.asarray(base)).max() > 1e-2


# --- with AdaZeta's optimizer ---


def test_weight_decay_spares_biases_alone() -> None:
    spared = {name for name in started(8, 24, bottleneck=4) if re.search(NO_DECAY, name)}
    assert spared == {"down_bias", "up_bias"}


def test_zeroth_order_steps_train_it(key: jax.Array) -> None:
    model, x = nn.Dense(8), jax.random.normal(key, (16, 12))
    params = model.init(key, x)["params"]
    target = jnp.roll(jnp.asarray(model.apply({"params": params}, x)), 1, axis=-1)
    peft = pefts.tensor_train(4, 2, placement="input", factors=2, targets="kernel")
    state = jax.jit(peft.init)(key, params)

    def loss(trainable: Any) -> jax.Array:
        bound = peft.bind(params, state._replace(trainable=trainable))
        y = pefts.apply(model.apply)({"params": bound}, x)
        return jnp.mean(jnp.square(y - target))

    tx = adazeta(0.1, steps=60, epoch_steps=10, weight_decay=0.01)
    step = jax.jit(lambda theta, moments: tx.step(theta, moments, loss))
    theta, moments = state.trainable, tx.init(state.trainable)
    for _ in range(60):
        theta, moments = step(theta, moments)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), theta, state.trainable)
    assert all(jax.tree.leaves(moved))
    assert float(loss(theta)) < 0.8 * float(loss(state.trainable))


# --- refusals ---


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_it_cannot_be_merged(placement: str, key: jax.Array) -> None:
    params = {"kernel": jnp.ones((8, 6))}
    peft = pefts.tensor_train(4, 2, placement=placement, targets="kernel")
    with pytest.raises(ValueError, match="tensor_train cannot be merged"):
        peft.merge(params, peft.init(key, params))


def test_an_output_whose_features_do_not_come_last_is_refused(key: jax.Array) -> None:
    model, x = nn.Einsum((9, 2, 3), "bti,inh->bnth", use_bias=False), jnp.ones((4, 5, 9))
    params = model.init(key, x)["params"]
    peft = pefts.tensor_train(4, 2, axes={"kernel": "ioo"}, targets="kernel")
    bound = peft.bind(params, peft.init(key, params))
    with pytest.raises(ValueError, match=r"\(4, 2, 5, 3\): it does not end in axes of 6 numbers"):
        pefts.apply(model.apply)({"params": bound}, x)


def test_a_convolution_has_an_adapter_behind_it_alone(key: jax.Array) -> None:
    model, x = nn.Conv(8, (3,)), jax.random.normal(key, (2, 7, 6))
    params = model.init(key, x)["params"]
    axes = pefts.infer_axes(model.apply, params, x)
    with pytest.raises(ValueError, match="'kernel' belongs to an embedding or a convolution"):
        pefts.tensor_train(4, 2, placement="input", axes=axes, targets="kernel").init(key, params)
    peft = pefts.tensor_train(4, 2, axes=axes, targets="kernel")
    state = jax.jit(peft.init)(key, params)
    y = outputs(model, peft, params, state, x)
    expected = adapted(model.apply({"params": params}, x), state.trainable["kernel"])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_an_input_adapter_is_never_passed_over(key: jax.Array) -> None:
    """Where only a dense kernel would do, there is none."""

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return x @ self.param("kernel", nn.initializers.ones, (8, 6))

    x, params = jnp.ones((2, 8)), {"kernel": jnp.ones((8, 6))}
    peft = pefts.tensor_train(4, 2, placement="input", targets="kernel")
    dora = pefts.dora(rank=2, targets="kernel")
    behind = pefts.chain(peft, dora)
    for model, method in ((Own(), peft), (nn.Dense(6, use_bias=False), behind)):

        def run(state: Any, model: Any = model, method: Any = method) -> jax.Array:
            return pefts.apply(model.apply)({"params": method.bind(params, state)}, x)

        state = jax.eval_shape(method.init, key, params)
        with pytest.raises(ValueError, match="which no dense kernel can stand for"):
            jax.eval_shape(run, state)


def test_it_reads_before_what_it_follows(key: jax.Array) -> None:
    """On one kernel after DoRA: DoRA's product of the adapted input."""
    model, x = nn.Dense(6, use_bias=False), jax.random.normal(key, (2, 8))
    params = {"kernel": jnp.ones((8, 6))}
    dora = pefts.dora(rank=2, targets="kernel")
    both = pefts.chain(
        dora, pefts.tensor_train(4, 2, placement="input", factors=1, targets="kernel")
    )
    state = jax.jit(lambda k: pefts.randomize(k, both.init(k, params)))(key)
    y = outputs(model, both, params, state, x)
    W = jax.jit(dora.merge)(params, pefts.PeftState(state.trainable["0"], state.frozen["0"]))
    expected = adapted(x, state.trainable["1"]["kernel"]) @ np.asarray(W["kernel"])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
