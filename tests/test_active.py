"""LISA against numpy in float64, what all optimizers of some units share, and these in optax."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients import close, jitted, near, run
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import models
import pefts
from pefts.optimizers import active
from pefts.optimizers.active import EMBEDDINGS, HEAD, NORM, Policy, arrange, scale_by_units
from pefts.optimizers.lisa import draw, lisa

B1, B2, EPS = 0.9, 0.999, 1e-8
L = 4
SHAPES = {
    "embed": {"embedding": (7, 3)},
    "layers": {"query": {"kernel": (L, 3, 5), "bias": (L, 5)}, "norm": {"scale": (L, 3)}},
    "norm": {"scale": (3,)},
    "lm_head": {"kernel": (3, 7)},
}
Array = np.ndarray

pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")


def tree_of(seed: int, dtype: Any = jnp.float32, shapes: Any = None) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
        SHAPES if shapes is None else shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def grads_of(steps: int, dtype: Any = jnp.float32) -> list:
    return [tree_of(100 + t, dtype) for t in range(steps)]


def unroll(tree: Any, name: str = "layers_{}") -> Any:
    """The tree with a subtree for each layer."""
    layers = {
        name.format(i): jax.tree.map(lambda leaf, i=i: leaf[i], tree["layers"]) for i in range(L)
    }
    return {**{key: tree[key] for key in tree if key != "layers"}, **layers}


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def layer(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[i], tree["layers"])


def drawn(seed: int, windows: int, gamma: int, p: tuple[float, ...] = (1 / L,) * L) -> Array:
    """The layers of each interval."""
    one = functools.partial(draw, seed, probabilities=p, gamma=gamma)
    return np.asarray(jax.jit(jax.vmap(lambda w: one(w)))(jnp.arange(windows)))


def inclusion(p: tuple[float, ...], gamma: int) -> Array:
    """How likely each number is among gamma that are drawn one after the other."""
    found = np.zeros(len(p))
    for order in itertools.permutations(range(len(p)), gamma):
        left, chance = 1.0, 1.0
        for number in order:
            chance *= p[number] / left if left > 0 else 0.0
            left -= p[number]
        found[list(order)] += chance
    return found


# --- the draws ---


@pytest.mark.parametrize(("p", "gamma"), [((0.25,) * 4, 2), ((0.1, 0.2, 0.0, 0.3, 0.4), 3)])
def test_layers_are_drawn_as_often_as_they_should(p: tuple, gamma: int) -> None:
    windows = 20_000
    draws = drawn(3, windows, gamma, p)
    assert draws.shape == (windows, gamma) and draws.min() >= 0 and draws.max() < len(p)
    assert np.all(np.diff(draws, axis=1) > 0)  # none twice
    expected = inclusion(p, gamma)
    assert expected.sum() == pytest.approx(gamma)
    counts = np.bincount(draws.ravel(), minlength=len(p))
    sigma = np.sqrt(windows * expected * (1 - expected))
    assert np.all(np.abs(counts - windows * expected) <= 4 * sigma)


def test_draws_depend_on_the_seed_alone() -> None:
    np.testing.assert_array_equal(drawn(7, 50, 2), drawn(7, 50, 2))
    assert not np.array_equal(drawn(7, 50, 2), drawn(8, 50, 2))
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(np.asarray(draw(7, 5, (0.25,) * 4, 2)), drawn(7, 6, 2)[5])
    params, grads = tree_of(0), grads_of(5)
    make = functools.partial(lisa, 0.1, gamma=2, interval=2)
    first = run(make(seed=7), params, grads)[0]
    assert bits(first) == bits(run(make(seed=7), params, grads)[0])
    assert bits(first) != bits(run(make(seed=8), params, grads)[0])


# --- LISA's steps ---


def oracle(params: Any, grads: list, draws: Array, *, interval: int, lr: float, wd: float) -> Any:
    """AdamW in numpy: for drawn layers, with moments from zero if they were not drawn before."""
    W = jax.tree.map(lambda leaf: np.array(leaf, np.float64), params)
    M, V = (jax.tree.map(np.zeros_like, W) for _ in range(2))
    counts = np.zeros(L)
    for t, G in enumerate(grads):
        now, before = draws[t // interval], draws[t // interval - 1] if t >= interval else ()
        for i in now if t % interval == 0 else ():
            counts[i] *= i in before
            for leaf in jax.tree.leaves((M["layers"], V["layers"])):
                leaf[i] *= i in before
        counts[now] += 1
        for name in W:
            for w, m, v, g in zip(
                *map(jax.tree.leaves, (W[name], M[name], V[name], G[name])), strict=True
            ):
                at = now if name == "layers" else ...
                c = counts[now].reshape(-1, *[1] * (w.ndim - 1)) if name == "layers" else t + 1
                g = np.asarray(g, np.float64)[at]
                m[at], v[at] = B1 * m[at] + (1 - B1) * g, B2 * v[at] + (1 - B2) * g**2
                step = m[at] / (1 - B1**c) / (np.sqrt(v[at] / (1 - B2**c)) + EPS)
                w[at] -= lr * (step + wd * w[at])
    return W


@pytest.mark.parametrize("unrolled", [False, True])
def test_steps_are_the_papers(unrolled: bool, x64: None) -> None:
    params, grads = tree_of(0, jnp.float64), grads_of(11, jnp.float64)
    draws = drawn(5, 6, 2)
    overlaps = [len(set(a) & set(b)) for a, b in itertools.pairwise(draws)]
    assert {0, 1} <= set(overlaps)  # layers that stay, and windows in which none does
    expected = oracle(params, grads, draws, interval=2, lr=0.01, wd=0.1)
    if unrolled:
        params, grads, expected = unroll(params), [unroll(g) for g in grads], unroll(expected)
    tx = lisa(0.01, gamma=2, interval=2, weight_decay=0.1, seed=5)
    end, state, states = run(tx, params, grads)
    close(end, expected, 1e-12, 1e-14)
    np.testing.assert_array_equal([s[0].active for s in states], draws[np.arange(1, 12) // 2])
    assert int(state[0].count) == 11


def test_with_all_layers_at_work_it_is_adamw(x64: None) -> None:
    params, grads = tree_of(0, jnp.float64), grads_of(7, jnp.float64)
    expected, _, _ = run(optax.adamw(0.01, weight_decay=0.1), params, grads)
    for shape in (lambda tree: tree, unroll):
        tx = lisa(0.01, gamma=L, interval=2, weight_decay=0.1)
        end, _, _ = run(tx, shape(params), [shape(grad) for grad in grads])
        close(end, shape(expected), 1e-12, 1e-14)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("unrolled", [False, True])
def test_layers_at_rest_keep_every_bit(unrolled: bool, dtype: Any) -> None:
    """Of their weights, minus zero among them, and decay does not reach them either."""
    params = tree_of(0, dtype)
    params["layers"]["query"]["bias"] = -jnp.zeros((L, 5), dtype)
    grads = grads_of(6, dtype)
    if unrolled:
        params, grads = unroll(params), [unroll(grad) for grad in grads]
    tx = lisa(0.1, gamma=1, interval=3, weight_decay=0.5, seed=1)
    state = tx.init(params)
    for t, grad in enumerate(grads):
        at = int(drawn(1, 2, 1)[t // 3, 0])
        updates, state = jitted(tx.update)(grad, state, params)
        new = optax.apply_updates(params, updates)
        for i in range(L):
            old_i, new_i = (
                tree[f"layers_{i}"] if unrolled else layer(tree, i) for tree in (params, new)
            )
            same = [a == b for a, b in zip(bits(old_i), bits(new_i), strict=True)]
            assert not any(same) if i == at else all(same)
        assert bits(new["lm_head"]) != bits(params["lm_head"])
        params = new


def test_the_moments_of_unrolled_layers_at_rest_do_not_move() -> None:
    params, grads = unroll(tree_of(0)), [unroll(grad) for grad in grads_of(4)]
    _, _, states = run(lisa(0.1, gamma=1, interval=4), params, grads)
    at, moved = int(drawn(0, 1, 1)[0, 0]), [bits(s[0].whole) for s in (states[0], states[3])]
    assert moved[0] != moved[1]
    for i, state in enumerate(states[3][0].whole[:L]):
        assert (int(state.count) == 4) if i == at else not any(map(np.any, jax.tree.leaves(state)))


# --- what the state holds ---


@pytest.mark.parametrize("gamma", [1, 3])
def test_the_state_has_the_size_of_the_formula(gamma: int) -> None:
    params = tree_of(0)
    per_layer, rest = 3 * 5 + 5 + 3, 7 * 3 + 3 + 3 * 7
    state = jax.eval_shape(lisa(0.1, gamma=gamma).init, params)
    # Adam counts for each slot and for the rest; ours; the numbers of the layers at work.
    assert pefts.count(state) == 2 * gamma * per_layer + 2 * rest + gamma + 1 + 1 + gamma
    assert state[0].layers.mu["layers"]["query"]["kernel"].shape == (gamma, 1, 3, 5)
    assert state[0].layers.mu["lm_head"]["kernel"] == optax.MaskedNode()
    unrolled = jax.eval_shape(lisa(0.1, gamma=gamma).init, unroll(params))
    assert pefts.count(unrolled) == 2 * L * per_layer + 2 * rest + L + 1 + 1 + gamma


def shapes_within(jaxpr: Any) -> set[tuple]:
    """(shape, dtype) of every value that is computed."""
    found = {(v.aval.shape, str(v.aval.dtype)) for eqn in jaxpr.eqns for v in eqn.outvars}
    for value in jax.tree.leaves([list(eqn.params.values()) for eqn in jaxpr.eqns]):
        inner = getattr(value, "jaxpr", value)
        found |= shapes_within(inner) if hasattr(inner, "eqns") else set()
    return found


def test_no_step_holds_a_stack_in_float32() -> None:
    """The updates, in the gradients' dtype, are the only other stack."""
    params = {"layers": {"kernel": jnp.zeros((16, 6, 7), jnp.bfloat16)}}
    tx = lisa(0.1, gamma=3, weight_decay=0.1)
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr
    found = shapes_within(jaxpr)
    assert {((16, 6, 7), "bfloat16"), ((3, 1, 6, 7), "float32"), ((1, 6, 7), "float32")} <= found
    assert not {((16, 6, 7), "float32"), ((16, 1, 6, 7), "float32"), ((3, 6, 7), "float32")} & found


def test_a_switch_compiles_nothing() -> None:
    params, grads = tree_of(0), grads_of(6)
    tx = lisa(0.1, gamma=2, interval=2)
    step, state, end = jax.jit(tx.update, donate_argnums=1), tx.init(params), params
    for grad in grads:
        updates, state = step(grad, state, end)
        end = optax.apply_updates(end, updates)
    assert step._cache_size() == 1
    assert len({tuple(row) for row in drawn(0, 3, 2)}) > 1

    def body(carry: Any, grad: Any) -> tuple[Any, None]:
        updates, state = tx.update(grad, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
    (scanned, _), _ = jax.lax.scan(body, (params, tx.init(params)), stacked)
    close(scanned, end, 1e-5, 1e-6)


# --- which leaves are units ---


def test_the_units_of_this_projects_models(base: Any, decoder_base: Any) -> None:
    everything = Policy(1, lambda t, n: t[None], "all", "refused", (EMBEDDINGS,), (NORM, HEAD))
    for folder, outside in [
        (base, [["embeddings"], ["classifier"]]),
        (decoder_base, [["embed_tokens"], ["norm"], ["lm_head"]]),
    ]:
        _, params, _ = models.load(str(folder), **({"num_labels": 2} if folder == base else {}))
        trainable = pefts.full().init(jax.random.key(0), params).trainable
        layout, paths = arrange(everything, trainable), sorted(trainable)
        assert (layout.layers, layout.first, layout.units) == (2, 1, 2 + len(outside))
        assert [paths[number] for number in layout.stacked] == [p for p in paths if "layers/" in p]
        assert [unit for unit, _ in layout.whole] == [0, *range(3, 2 + len(outside))]
        found = [sorted({paths[at].split("/")[0] for at in leaves}) for _, leaves in layout.whole]
        assert found == outside
    params["pooler"] = {"kernel": jnp.ones(2)}  # of a BERT, with its head
    assert arrange(everything, params).units == 5


@pytest.mark.parametrize("name", ["layers_{}", "layers/{}", "encoder/layers_{}"])
def test_layers_are_found_by_their_numbers(name: str) -> None:
    paths = [f"{name.format(i)}/kernel" for i in (10, 0, *range(1, 10))] + ["players_3/kernel"]
    layers, stacked, unrolled = active.find_layers(paths, [(2, 3)] * len(paths))
    assert (layers, stacked) == (11, ())
    assert unrolled == {10: (0,), 0: (1,), **{i: (i + 1,) for i in range(1, 10)}}


def test_stacked_and_unrolled_leaves_of_a_layer_are_one_unit() -> None:
    params = {
        "layers": {"kernel": jnp.ones((3, 2, 2))},
        **{f"layers_{i}": {"bias": jnp.ones(2)} for i in range(3)},
    }
    updates, _ = jitted(scale_by_units(optax.identity(), ONE_BY_ONE).update)(
        params, scale_by_units(optax.identity(), ONE_BY_ONE).init(params), params
    )
    assert [float(leaf[0, 0]) for leaf in updates["layers"]["kernel"]] == [1, 0, 0]
    assert [float(updates[f"layers_{i}"]["bias"][0]) for i in range(3)] == [1, 0, 0]


ONE_BY_ONE = Policy(1, lambda step, n: (step % n)[None], "all", "frozen")


# --- errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0}, "gamma=0: give an integer of at least 1"),
        ({"gamma": 2.0}, r"gamma=2\.0.*static_args"),
        ({"interval": 0}, "interval=0"),
        ({"interval": True}, "interval=True"),
        ({"inner": optax.scale_by_adam}, "no gradient transformation"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lisa(0.1, **options)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"layer": {"kernel": (4, 3, 5)}}, r"no layers.*layers/query/kernel.*\['layer/kernel'\]"),
        ({"layers": {"a": (2, 3), "b": (3, 3)}}, r"'layers/b' has 3 layers and 'layers/a' has 2"),
        ({"layers": {"a": (2, 3)}, "layers_0": {"a": (3,)}}, r"'layers/a' has 2.*'layers_\*' has"),
        ({"layers_0": {"a": (3,)}, "layers_2": {"a": (3,)}}, r"'layers_\*': layers \[1\] have no"),
        ({"layers": {"a": (1, 3)}}, "gamma=2: there are 1 units"),
        ({"layers": {"a": (2, 3), "b": ()}}, "'layers/b'.*a scalar"),
        ({}, "no layers"),
    ],
)
def test_trees_without_a_clear_number_of_layers_are_refused(shapes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lisa(0.1, gamma=2).init(tree_of(0, shapes=shapes))


def test_a_pattern_that_finds_nothing_and_a_leaf_in_no_unit_are_refused() -> None:
    params = tree_of(0)
    with pytest.raises(ValueError, match=r"before: 'embbed' matches no parameter.*'embed'"):
        arrange(ONE_BY_ONE._replace(before=("embbed",)), params)
    with pytest.raises(ValueError, match="'lm_head/kernel' is in no layer.*before=.*after="):
        arrange(ONE_BY_ONE._replace(outside="refused", before="embed", after=[NORM]), params)


def test_an_update_without_parameters_is_refused() -> None:
    params = tree_of(0)
    tx = lisa(0.1)
    with pytest.raises(ValueError, match=r"update\(grads, state, params\)"):
        tx.update(params, tx.init(params))


# --- a citizen of optax ---


def test_bfloat16_leaves_have_a_float32_state_and_bfloat16_updates() -> None:
    params, grads = tree_of(0, jnp.bfloat16), grads_of(3, jnp.bfloat16)
    tx = lisa(0.1, gamma=2, interval=2, weight_decay=0.1)
    state = tx.init(params)
    floats = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.dtype != jnp.int32]
    assert set(floats) == {jnp.dtype("float32")}
    with jax.numpy_dtype_promotion("strict"):  # of all that is ours
        own = scale_by_units(optax.trace(0.5), ONE_BY_ONE)
        updates, _ = jax.jit(own.update)(grads[0], own.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    _, after, _ = run(tx, params, grads)
    precise = [jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grad) for grad in grads]
    _, expected, _ = run(tx, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), precise)
    close(after, expected, 1e-6, 1e-7)  # the moments are of the gradients alone


def test_integer_leaves_and_vectors_reach_the_transformation_inside() -> None:
    params = {
        "layers": {"codes": jnp.arange(6, dtype=jnp.int32).reshape(3, 2), "bias": jnp.ones((3, 2))},
        "steps": jnp.arange(4, dtype=jnp.int8),
    }
    tx = scale_by_units(optax.identity(), ONE_BY_ONE._replace(outside="active"))
    updates, _ = jitted(tx.update)(params, tx.init(params), params)
    assert updates["layers"]["codes"].tolist() == [[0, 1], [0, 0], [0, 0]]
    assert updates["layers"]["bias"].tolist() == [[1, 1], [0, 0], [0, 0]]
    assert updates["steps"].tolist() == [0, 1, 2, 3] and updates["steps"].dtype == jnp.int8


def test_inside_multi_steps_an_interval_is_of_updates() -> None:
    params, grads = tree_of(0), grads_of(8)
    tx = lisa(0.1, gamma=1, interval=2)
    end, _, _ = run(optax.MultiSteps(tx, 2).gradient_transformation(), params, grads)
    means = [
        jax.tree.map(lambda a, b: (a + b) / 2, *pair)
        for pair in zip(grads[::2], grads[1::2], strict=True)
    ]
    expected, _, _ = run(tx, params, means)
    close(end, expected, 1e-4, 1e-5)


def test_hyperparameters_can_be_injected() -> None:
    params, grads = tree_of(0), grads_of(3)
    static, schedule = ("gamma", "interval"), optax.linear_schedule(1.0, 0.0, 4)
    options = {"gamma": 2, "interval": 2, "weight_decay": 0.1, "seed": 3}
    tx = optax.inject_hyperparams(lisa, static_args=static)(schedule, **options)
    assert set(tx.init(params).hyperparams) == {"learning_rate", "seed", "weight_decay"}
    close(run(tx, params, grads)[0], run(lisa(schedule, **options), params, grads)[0])


def test_it_takes_a_part_of_a_tree_and_the_leaves_of_full_fine_tuning() -> None:
    params, grads = tree_of(0), grads_of(3)
    tx = lisa(0.1, gamma=2, interval=2, seed=2)
    labels = {"layers": "some", "norm": "some", "embed": "rest", "lm_head": "rest"}
    apart = optax.partition({"some": tx, "rest": optax.sgd(0.5)}, labels)
    end, _, _ = run(apart, params, grads)
    part = ("layers", "norm")
    expected, _, _ = run(
        tx, {name: params[name] for name in part}, [{n: g[n] for n in part} for g in grads]
    )
    close({name: end[name] for name in part}, expected)
    close(
        end["embed"]["embedding"],
        params["embed"]["embedding"] - 0.5 * sum(g["embed"]["embedding"] for g in grads),
    )
    peft = pefts.full()
    trainable, *flat = (peft.init(jax.random.key(0), tree).trainable for tree in (params, *grads))
    ours, _, _ = run(tx, trainable, flat)
    whole, _, _ = run(tx, params, grads)
    close(ours["layers/query/kernel"]["value"], whole["layers"]["query"]["kernel"])


def test_extra_arguments_reach_the_transformation_inside() -> None:
    def update(updates: Any, state: Any, params: Any = None, *, factor: Any, **extra: Any) -> Any:
        return jax.tree.map(lambda leaf: factor * leaf, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = scale_by_units(inner, ONE_BY_ONE._replace(outside="active"))
    params = tree_of(0)
    updates, _ = jitted(tx.update)(params, tx.init(params), params, factor=3.0)
    near(updates["layers"]["query"]["kernel"][0], 3 * params["layers"]["query"]["kernel"][0], 1e-6)
    near(updates["norm"]["scale"], 3 * params["norm"]["scale"], 1e-6)


SHARDED = {
    "embed": {"embedding": P("fsdp", None)},
    "layers": {
        "query": {"kernel": P(None, "fsdp", "data"), "bias": P(None, "data")},
        "norm": {"scale": P(None, "fsdp")},
    },
    "norm": {"scale": P()},
    "lm_head": {"kernel": P("fsdp", "data")},
}


def sharded_run(tx: optax.GradientTransformation, steps: int) -> tuple[Any, Any]:
    """Parameters after some steps on one device, and on eight."""
    wide = jax.tree.map(
        lambda shape: tuple(
            8 if side in (3, 5) else side * 8 if side == 7 else side for side in shape
        ),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    params, grads = tree_of(0, shapes=wide), [tree_of(9 + t, shapes=wide) for t in range(steps)]
    expected, _, _ = run(tx, params, grads)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    place = functools.partial(
        jax.tree.map, lambda spec, leaf: jax.device_put(leaf, NamedSharding(mesh, spec)), SHARDED
    )

    def step(grad: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    donating, placed = jax.jit(step, donate_argnums=(1, 2)), place(params)
    state = jax.jit(tx.init)(placed)
    for grad in grads:
        placed, state = donating(place(grad), state, placed)
    assert len(placed["layers"]["query"]["kernel"].sharding.device_set) == 8
    return expected, placed


def test_eight_devices_give_what_one_gives() -> None:
    expected, placed = sharded_run(lisa(0.1, gamma=2, interval=2, weight_decay=0.1), 5)
    close(placed, expected, 0, 1e-5)
