"""8-bit moments against numpy in float64 and Adam, and as a citizen of optax."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from blockwise_oracle import almost_the_codes, coded, in_numpy, nbytes, normal
from gradients import close, full_tree, gradients, jitted, near, run, scan_is_the_loop, tree_of
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pefts.optimizers.adam8bit import adam8bit, scale_by_adam8bit
from pefts.optimizers.blockwise import codebook, dequantize, quantize, quantize_state
from pefts.optimizers.fira import fira, scale_by_fira
from pefts.optimizers.galore import galore, scale_by_galore
from pefts.optimizers.raw_adam import raw_adam

SMALL = {"min_size": 0, "block_size": 16}
B1, B2 = 0.9, 0.999
Array = np.ndarray

pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")


def decoded(state: Any) -> Any:
    return jax.tree.map(
        lambda node: dequantize(node) if coded(node) else node, state, is_leaf=coded
    )


def cosine(a: Any, b: Any) -> float:
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(t)]) for t in (a, b))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


# --- steps ---


def adam_from(state: Any, g: Array) -> tuple[Array, Array, Array]:
    """One step of Adam in float64 from the codes in the state: update, m, v."""

    def moment(node: Any, signed: bool) -> Array:
        size = math.prod(g.shape[1:])
        scales = np.repeat(np.asarray(node.absmax, np.float64), 16, axis=-1)[:, :size]
        return codebook(signed)[node.codes].astype(np.float64) * scales.reshape(g.shape)

    m, v = (moment(tree["layers"]["kernel"], tree is state.mu) for tree in state[1:])
    c = int(state.count) + 1
    m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
    return (m / (1 - B1**c)) / (np.sqrt(v / (1 - B2**c)) + 1e-8), m, v


def test_every_step_is_adams_from_the_codes() -> None:
    """Layers of 35 numbers in blocks of 16: the last block of each is short."""
    params = {"layers": {"kernel": jnp.zeros((2, 5, 7))}}
    tx = scale_by_adam8bit(**SMALL)
    state, step = tx.init(params), jax.jit(tx.update)
    for t in range(5):
        g = normal(2, 5, 7, seed=t)
        expected, m, v = adam_from(state, g)
        updates, state = step({"layers": {"kernel": jnp.asarray(g)}}, state)
        np.testing.assert_allclose(updates["layers"]["kernel"], expected, rtol=1e-4, atol=1e-6)
        for moment, tree in ((m, state.mu), (v, state.nu)):
            node = tree["layers"]["kernel"]
            for layer in range(2):
                codes, _, scales = in_numpy(moment[layer], tree is state.mu, 16)
                almost_the_codes(node.codes[layer], codes)
                np.testing.assert_allclose(node.absmax[layer], scales, rtol=1e-5)
    assert int(state.count) == 5


def test_one_step_from_the_same_moments_is_nearly_adams() -> None:
    params = {"kernel": jnp.zeros((64, 128))}
    grads = [{"kernel": jnp.asarray(G, jnp.float32)} for G in gradients(6, 64, 128)]
    exact, ours = optax.scale_by_adam(), scale_by_adam8bit()
    first = [jitted(tx.update)(grads[0], tx.init(params))[0] for tx in (exact, ours)]
    close(*first, 1e-6, 1e-7)
    _, state, _ = run(exact, params, grads[:5])
    encoded = jax.tree.map(
        lambda old, new: quantize(new, signed=old.signed) if coded(old) else new,
        ours.init(params), state, is_leaf=coded,
    )  # fmt: skip
    assert (
        cosine(jitted(exact.update)(grads[5], state)[0], jitted(ours.update)(grads[5], encoded)[0])
        > 0.999
    )
    ends = [run(optax.chain(tx, optax.scale(-1.0)), params, grads)[0] for tx in (exact, ours)]
    assert 0.99 < cosine(*ends) < 1 - 1e-6


def test_galore_and_fira_in_8_bits_stay_close_and_decay_whole_weights() -> None:
    params, grads = tree_of(2, 24, 40, steps=4)
    params = jax.tree.map(jnp.ones_like, params)
    for method, adam in ((galore, optax.scale_by_adam()), (fira, raw_adam())):
        make = {galore: scale_by_galore, fira: scale_by_fira}[method]
        exact, ours = (make(rank=8, inner=inner) for inner in (adam, quantize_state(adam, **SMALL)))
        first = [jitted(tx.update)(grads[0], tx.init(params))[0] for tx in (exact, ours)]
        close(*first, 1e-6, 1e-7)
        ends = [
            jax.tree.map(jnp.subtract, run(tx, params, grads)[0], params) for tx in (exact, ours)
        ]
        assert 0.99 < cosine(*ends) < 1 - 1e-6
    tx = galore(0.5, rank=8, inner=scale_by_adam8bit(**SMALL))
    decayed = galore(0.5, rank=8, inner=scale_by_adam8bit(**SMALL), weight_decay=0.25)
    steps = [jitted(t.update)(grads[0], t.init(params), params)[0] for t in (decayed, tx)]
    difference = jax.tree.map(jnp.subtract, *steps)
    close(difference, jax.tree.map(lambda leaf: -0.125 * leaf, params), 1e-5, 1e-6)


def test_a_vanished_second_moment_makes_leaps_that_eps_or_clipping_stop() -> None:
    """What the docstring of `quantize_state` warns of, number by number."""
    g = jnp.full((16,), 1.0).at[1].set(1e-4)
    cases = {"again": [g, g, g], "gone": [g, g.at[1].set(0.0)]}

    def last(tx: Any, grads: list) -> Array:
        params, state = jnp.zeros(16), tx.init(jnp.zeros(16))
        for grad in grads:
            updates, state = jitted(tx.update)(grad, state, params)
        return np.asarray(updates)

    adam, ours = optax.scale_by_adam(), scale_by_adam8bit(**SMALL)
    for grads in cases.values():
        close(last(adam, grads)[[0, 2]], last(ours, grads)[[0, 2]], 2e-2)
    state = run(ours, jnp.zeros(16), [g])[1]
    assert int(state.nu.codes[1]) == 0 and int(state.mu.codes[1]) > 127
    # v^ = (1 - b2) g^2 / (1 - b2^3) and m^ near g, as near as the map is there: a factor that ends
    # at 1 / sqrt(1 - b2).
    near(last(ours, cases["again"])[1], np.sqrt((1 - B2**3) / (1 - B2)), 0.2)
    # m^ = 0.9 (0.1 g) / (1 - 0.9^2), over eps alone.
    leap = last(ours, cases["gone"])[1]
    np.testing.assert_allclose(leap, 0.09e-4 / 0.19 / 1e-8, rtol=0.15)
    assert np.abs(last(adam, cases["gone"])).max() < 1
    wide = scale_by_adam8bit(eps=1e-3, **SMALL)
    assert np.abs(last(wide, cases["gone"])).max() < 1
    clipped = optax.chain(scale_by_adam8bit(**SMALL), optax.clip(1.0))
    assert np.abs(last(clipped, cases["gone"])).max() <= 1
    # Once 0 it stays so up to a gradient of sqrt(1.6e-7 / (1 - b2)) of the root of the largest v.
    for size, code in ((0.012, 0), (0.0135, 1)):
        grad = g.at[0].set(0.0).at[1].set(size)
        full = quantize(jnp.ones(16).at[1].set(0.0), signed=False, block_size=16)
        state = ours.init(jnp.zeros(16))._replace(nu=full)
        assert int(jitted(ours.update)(grad, state)[1].nu.codes[1]) == code


# --- which leaves, and how large they are ---


def test_the_state_has_the_bytes_of_the_formula() -> None:
    params = {
        "layers": {"kernel": jnp.zeros((2, 64, 96)), "bias": jnp.zeros((2, 4000))},
        "head": {"kernel": jnp.zeros((64, 67)), "bias": jnp.zeros(4096)},
        "embed": {"embedding": jnp.zeros((80, 64))},
    }
    state = jax.eval_shape(scale_by_adam8bit().init, params)
    assert nbytes((state.mu["layers"]["kernel"], state.nu["layers"]["kernel"])) == 2 * (
        2 * 64 * 96 + 4 * 2 * 64 * 96 // 256
    )
    assert nbytes(state.mu["head"]) == (64 * 67 + 4 * 17) + (4096 + 4 * 16)
    for tree in (state.mu, state.nu):
        assert {
            node.dtype.name for node in (tree["layers"]["bias"], tree["embed"]["embedding"])
        } == {"float32"}
    kept = nbytes((params["layers"]["bias"], params["embed"]))
    assert nbytes(state) == 4 + 2 * (kept + 2 * 6144 + 4 * 48 + 4288 + 4 * 17 + 4096 + 4 * 16)
    after = jax.eval_shape(scale_by_adam8bit().update, params, state)[1]
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )


def test_galore_in_8_bits_has_the_bytes_of_the_formula() -> None:
    params = {"layers": {"kernel": jnp.zeros((2, 48, 512))}}
    moments = 2 * (2 * 8 * 512 + 4 * 2 * 8 * 512 // 256)  # 2 (1 + 4/256) bytes for each of r large
    projectors = 4 * 2 * 48 * 8
    for tx, norms in (
        (scale_by_galore(rank=8, inner=scale_by_adam8bit()), 0),
        (scale_by_fira(rank=8, inner=quantize_state(raw_adam())), 4 * 2),
    ):
        state = jax.eval_shape(tx.init, params)
        assert nbytes(state.inner_state.mu) + nbytes(state.inner_state.nu) == moments
        scalars = nbytes((state.count, state.skipped, getattr(state.inner_state, "count", ())))
        assert nbytes(state) == moments + projectors + norms + scalars
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state.projectors)} == {"float32"}


def test_a_stacked_leaf_is_its_layers_one_by_one() -> None:
    """Layers of 5 x 7, which blocks of 16 do not divide."""
    params, grads = {"layers": {"kernel": jnp.zeros((3, 5, 7))}}, []
    grads = [{"layers": {"kernel": jnp.asarray(normal(3, 5, 7, seed=t))}} for t in range(3)]
    tx = optax.chain(scale_by_adam8bit(min_size=35, block_size=16), optax.scale(-1.0))
    end, state, _ = run(tx, params, grads)
    assert coded(state[0].mu["layers"]["kernel"])
    for n in range(3):
        alone = [{"kernel": grad["layers"]["kernel"][n]} for grad in grads]
        one, _, _ = run(tx, {"kernel": jnp.zeros((5, 7))}, alone)
        close(one["kernel"], end["layers"]["kernel"][n], 1e-5)
    state = scale_by_adam8bit(min_size=36, block_size=16).init(params)
    assert not coded(state.mu["layers"]["kernel"])


@pytest.mark.parametrize(
    ("exact", "kept"),
    [
        (None, {"embed/embedding"}),
        ((), set()),
        (r"query/(kernel|bias)", {"layers/query/kernel", "layers/query/bias"}),
        (["classifier", "embed"], {"classifier/kernel", "embed/embedding"}),
    ],
)
def test_leaves_that_are_exact(exact: Any, kept: set) -> None:
    trainable = full_tree()
    state = adam8bit(0.1, exact=exact, **SMALL).init(trainable)[0]
    found = {path for path, node in state.mu.items() if not coded(node["value"])}
    assert found == kept
    without = {"dense": {"kernel": jnp.ones((4, 4))}}
    assert coded(scale_by_adam8bit(**SMALL).init(without).nu["dense"]["kernel"])


def test_names_that_end_alike_are_not_confused() -> None:
    params = {"b": jnp.zeros((4, 16)), "a": {"b": jnp.zeros((4, 16))}}
    for exact in ("^b$", "a/b"):
        mu = scale_by_adam8bit(exact=exact, **SMALL).init(params).mu
        assert [coded(mu["b"]), coded(mu["a"]["b"])] == [exact == "a/b", exact == "^b$"]


def test_the_zeros_of_init_are_not_encoded_by_the_compiler() -> None:
    init = jax.make_jaxpr(scale_by_adam8bit(**SMALL).init)(jnp.zeros((4, 16)))
    assert str(init).count("optimization_barrier") == 2


def test_an_untouched_leaf_and_element_zero_stay_zero() -> None:
    params = {"a": jnp.zeros((3, 16)), "b": jnp.zeros((2, 16))}
    grad = {"a": jnp.asarray(normal(3, 16)).at[1].set(0).at[0, 0].set(0), "b": jnp.zeros((2, 16))}
    end, state, _ = run(scale_by_adam8bit(**SMALL), params, [grad] * 4)
    np.testing.assert_array_equal(end["b"], 0)
    np.testing.assert_array_equal(end["a"][1], 0)
    assert float(end["a"][0, 0]) == 0 and np.all(end["a"][2] != 0)
    moments = decoded(state)
    for tree in (moments.mu, moments.nu):
        np.testing.assert_array_equal(tree["a"][1], 0)
        assert float(tree["a"][0, 0]) == 0


# --- any transformation inside ---


def test_the_fields_that_are_never_negative_are_named() -> None:
    params = {"mu": jnp.zeros((4, 16)), "nu": {"mu": jnp.zeros((2, 16))}}
    tx = quantize_state(optax.scale_by_amsgrad(), unsigned=("nu", "nu_max"), **SMALL)
    state = tx.init(params)
    for field, signed in (("mu", True), ("nu", False), ("nu_max", False)):
        nodes = jax.tree.leaves(getattr(state, field), is_leaf=coded)
        assert [node.signed for node in nodes] == [signed, signed]
    assert (
        quantize_state(optax.trace(0.9), unsigned="trace", **SMALL).init(params)[0]["mu"].signed
        is False
    )
    assert quantize_state(optax.trace(0.9), **SMALL).init(params)[0]["mu"].signed


@pytest.mark.parametrize(
    "inner",
    [
        optax.lion(0.1, weight_decay=0.1),
        optax.adamw(0.1, weight_decay=0.1),
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)),
        optax.masked(optax.adam(0.1), {"layers": {"kernel": True, "bias": False}}),
    ],
    ids=["lion", "adamw", "chain", "masked"],
)
def test_other_optimizers_keep_their_state_in_8_bits(inner: Any) -> None:
    params, grads = tree_of(2, 6, 16, steps=3)
    params = jax.tree.map(lambda leaf: leaf + 1, params)
    tx = quantize_state(inner, **SMALL)
    end, state, _ = run(tx, params, grads)
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim > 1}
    assert kinds == {"uint8", "float32"}
    floats = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.float32 and leaf.ndim]
    assert max(leaf.size for leaf in floats) <= 2 * 6
    expected, _, _ = run(inner, params, grads)
    changes = [jax.tree.map(jnp.subtract, tree, params) for tree in (end, expected)]
    assert cosine(*changes) > 0.97
    first = [jitted(t.update)(grads[0], t.init(params), params)[0] for t in (tx, inner)]
    close(*first, 1e-5, 1e-6)


def test_what_is_no_moment_of_a_parameter_stays_as_it_is() -> None:
    params = {"a": jnp.zeros((4, 16)), "n": jnp.zeros((4, 16), jnp.int32), "s": jnp.zeros(())}
    tx = quantize_state(optax.inject_hyperparams(optax.trace)(decay=0.5), **SMALL)
    state = tx.init(params)
    assert state.hyperparams["decay"].dtype == jnp.float32
    trace = state.inner_state.trace
    assert coded(trace["a"]) and trace["n"].dtype == jnp.int32 and trace["s"].shape == ()
    grads = {"a": jnp.ones((4, 16)), "n": jnp.ones((4, 16), jnp.int32), "s": jnp.ones(())}
    updates, state = tx.update(grads, state)
    assert updates["n"].dtype == jnp.int32 and coded(state.inner_state.trace["a"])


# --- a citizen of optax ---


def test_bfloat16_leaves_have_float32_steps_and_bfloat16_updates() -> None:
    params, grads = tree_of(2, 6, 16, steps=2)
    half = functools.partial(jax.tree.map, lambda leaf: leaf.astype(jnp.bfloat16))
    whole = functools.partial(jax.tree.map, lambda leaf: leaf.astype(jnp.float32))
    tx = quantize_state(optax.adamw(0.1, weight_decay=0.1), exact="bias", **SMALL)
    state, full = tx.init(half(params)), tx.init(params)
    same = functools.partial(jax.tree.map, lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype))
    assert all(jax.tree.leaves(same(state, full)))
    for grad in map(half, grads):
        updates, state = jitted(tx.update)(grad, state, half(params))
        expected, full = jitted(tx.update)(whole(grad), full, whole(half(params)))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(updates)} == {"bfloat16"}
        close(whole(updates), whole(half(expected)), 1e-2)
        close(state, full)


def test_what_is_inside_sees_one_precision() -> None:
    inner = optax.chain(optax.add_decayed_weights(0.5), optax.trace(0.9))
    tx, W = quantize_state(inner, **SMALL), jnp.ones((4, 16), jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        updates, _ = jitted(tx.update)(W, tx.init(W), W)
    assert updates.dtype == jnp.bfloat16
    np.testing.assert_array_equal(updates, 1.5)


def test_float64_leaves_are_decoded_to_float64(x64: None) -> None:
    G = jnp.asarray(normal(4, 16), jnp.float64)
    tx = scale_by_adam8bit(**SMALL)
    updates, state = jitted(tx.update)(G, tx.init(G))
    assert updates.dtype == jnp.float64 and decoded(state).mu.dtype == jnp.float64
    near(updates, G / (jnp.abs(G) + 1e-8), 1e-12)


def test_the_step_compiles_once_and_scans() -> None:
    params, grads = tree_of(2, 6, 16, steps=4)
    tx = scale_by_adam8bit(**SMALL)
    step, state, end = jax.jit(tx.update, donate_argnums=1), jax.jit(tx.init)(params), params
    with jax.numpy_dtype_promotion("standard"):
        for grad in grads:
            updates, state = step(grad, state)
            end = optax.apply_updates(end, updates)
    assert step._cache_size() == 1

    scan_is_the_loop(tx, params, grads, end)


def test_inside_multi_steps_moments_are_encoded_at_updates_only() -> None:
    params, grads = tree_of(2, 6, 16, steps=4)
    tx = adam8bit(0.1, **SMALL)
    multi = optax.MultiSteps(tx, 2).gradient_transformation()
    end, _, states = run(multi, params, grads)
    means = [jax.tree.map(lambda a, b: (a + b) / 2, *grads[t : t + 2]) for t in (0, 2)]
    close(end, run(tx, params, means)[0], 1e-4, 1e-5)
    inside = [state.inner_opt_state for state in states]
    jax.tree.map(np.testing.assert_array_equal, inside[1], inside[2])
    assert not np.array_equal(
        inside[2][0].mu["layers"]["kernel"].codes, inside[3][0].mu["layers"]["kernel"].codes
    )


def test_a_gradient_that_is_not_finite_reaches_its_block_unless_it_is_skipped() -> None:
    params, grads = {"a": jnp.zeros((3, 16))}, [{"a": jnp.asarray(normal(3, 16))}] * 3
    grads[1] = {"a": grads[1]["a"].at[1, 5].set(jnp.nan)}
    tx = scale_by_adam8bit(**SMALL)
    state = run(tx, params, grads[:1])[1]
    updates, state = jitted(tx.update)(grads[1], state)
    assert np.isnan(updates["a"]).sum() == 1
    updates, _ = jitted(tx.update)(grads[2], state)
    assert np.isnan(updates["a"]).sum() == 16 and np.all(np.isnan(updates["a"][1]))
    guarded = optax.apply_if_finite(tx, max_consecutive_errors=5)
    end, _, _ = run(guarded, params, grads)
    close(end, run(tx, params, [grads[0], grads[2]])[0])


def test_hyperparameters_can_be_injected() -> None:
    params, grads = tree_of(2, 6, 16, steps=2)
    schedule, static = optax.linear_schedule(1.0, 0.0, 4), ("block_size", "min_size")
    tx = optax.inject_hyperparams(adam8bit, static_args=static)(
        schedule, b1=0.8, weight_decay=0.1, **SMALL
    )
    assert set(tx.init(params).hyperparams) >= {"learning_rate", "b1", "weight_decay"}
    end, _, _ = run(tx, params, grads)
    expected, _, _ = run(adam8bit(schedule, b1=0.8, weight_decay=0.1, **SMALL), params, grads)
    close(end, expected, 1e-5, 1e-6)
    with pytest.raises(ValueError, match="name it in the static_args of optax.inject_hyperparams"):
        optax.inject_hyperparams(adam8bit)(0.1).init(params)


def test_the_alias_is_adamw_but_for_the_codes() -> None:
    params, grads = tree_of(2, 6, 16, steps=3)
    params, schedule = jax.tree.map(jnp.ones_like, params), optax.linear_schedule(0.1, 0.0, 4)
    moments = {"b1": 0.8, "b2": 0.95, "eps": 1e-3}
    ours = adam8bit(schedule, weight_decay=0.3, min_size=10**6, **moments)
    theirs = optax.adamw(schedule, weight_decay=0.3, **moments)
    close(run(ours, params, grads)[0], run(theirs, params, grads)[0])
    coarse = adam8bit(schedule, weight_decay=0.3, **moments, **SMALL)
    change = [
        jax.tree.map(jnp.subtract, run(t, params, grads)[0], params) for t in (coarse, theirs)
    ]
    assert 0.999 < cosine(*change) < 1 - 1e-8


def test_it_takes_a_part_of_a_tree_and_optax_finds_the_moments() -> None:
    trainable = full_tree()
    grads = jax.tree.map(lambda leaf: jnp.asarray(np.sin(leaf)), trainable)
    labels = {path: {"value": "ours" if "query" in path else "rest"} for path in trainable}
    tx = optax.partition({"ours": adam8bit(0.1, **SMALL), "rest": optax.sgd(0.5)}, labels)
    end, _, _ = run(tx, trainable, [grads] * 2)
    part = {path: leaf for path, leaf in trainable.items() if "query" in path}
    expected, _, _ = run(adam8bit(0.1, **SMALL), part, [{path: grads[path] for path in part}] * 2)
    close({path: end[path] for path in part}, expected)
    near(
        end["output/bias"]["value"],
        trainable["output/bias"]["value"] - grads["output/bias"]["value"],
        1e-6,
    )
    alone = scale_by_adam8bit(exact="classifier", **SMALL)
    state = optax.tree.map_params(
        alone, lambda leaf: leaf + leaf.dtype.type(1), alone.init(trainable)
    )
    assert np.all(state.nu["output/kernel"]["value"].codes == 1) and int(state.count) == 0


def test_extra_arguments_reach_the_transformation_inside() -> None:
    def update(updates, state, params=None, *, factor, **extra):
        return jax.tree.map(lambda leaf: factor * leaf, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx, G = quantize_state(inner), jnp.ones((2, 3))
    near(jitted(tx.update)(G, tx.init(G), factor=3.0)[0], 3 * G, 1e-7)


# --- sharded ---


def placed(mesh: Mesh, spec: Any, tree: Any) -> Any:
    return jax.tree.map(
        lambda spec, leaf: jax.device_put(leaf, NamedSharding(mesh, spec)), spec, tree
    )


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((2, 24, 32), P(None, "fsdp", "data")),  # shards of 16 columns: whole blocks
        ((2, 6, 40), P(None, "data", "fsdp")),  # shards of 10 columns: blocks straddle them
        ((2, 8, 9), P(None, ("data", "fsdp"), None)),  # shards of 9, and layers of 4.5 blocks
    ],
    ids=str,
)
def test_eight_devices_give_what_one_gives(shape: tuple, spec: P) -> None:
    params, grads = tree_of(*shape, steps=4)
    tx = adam8bit(0.1, weight_decay=0.1, **SMALL)
    expected, expected_state, _ = run(tx, params, grads)
    specs = {"layers": {"kernel": spec, "bias": P(None, None)}}

    def step(grad: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    donating, end = jax.jit(step, donate_argnums=(1, 2)), placed(mesh(), specs, params)
    state = jax.jit(tx.init)(end)
    for grad in grads:
        end, state = donating(placed(mesh(), specs, grad), state, end)
    close(end, expected, 0, 1e-5)
    assert len(end["layers"]["kernel"].sharding.device_set) == 8
    near(
        decoded(state)[0].mu["layers"]["kernel"],
        decoded(expected_state)[0].mu["layers"]["kernel"],
        1e-5,
    )


@pytest.mark.parametrize(("columns", "talks"), [(32, False), (40, True)])
def test_whole_blocks_in_every_shard_need_no_communication(columns: int, talks: bool) -> None:
    params, grads = tree_of(2, 24, columns)
    params, grad = ({"layers": {"kernel": tree["layers"]["kernel"]}} for tree in (params, grads[0]))
    tx, spec = scale_by_adam8bit(**SMALL), P(None, "fsdp", "data")
    state = jax.tree.map(
        lambda leaf: jax.device_put(
            leaf, NamedSharding(mesh(), spec if leaf.ndim == 3 else P(*[None] * leaf.ndim))
        ),
        tx.init(params),
    )
    assert state.mu["layers"]["kernel"].absmax.ndim == (2 if talks else 3)
    grad = placed(mesh(), {"layers": {"kernel": spec}}, grad)
    out = jax.tree.map(lambda leaf: leaf.sharding, (grad, state))
    program = jax.jit(tx.update, out_shardings=out).lower(grad, state).compile().as_text()
    words = ("all-gather", "all-to-all", "all-reduce", "collective-permute", "reduce-scatter")
    assert any(word in program for word in words) is talks


# --- refusals ---

BAD = {
    "b1=1: give a number from 0 to below 1": {"b1": 1},
    "b1=-0.1": {"b1": -0.1},
    "b2=1.5": {"b2": 1.5},
    "b2=nan": {"b2": float("nan")},
    "eps=0: give a number above 0": {"eps": 0},
    "eps=-1e-08": {"eps": -1e-8},
    "block_size=0: give the number of elements, from 1": {"block_size": 0},
    "block_size=True": {"block_size": True},
    "min_size=-1: give the number of elements, from 0": {"min_size": -1},
    "min_size=4096.0": {"min_size": 4096.0},
}


@pytest.mark.parametrize("message", BAD)
def test_arguments_out_of_range_are_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adam8bit(0.1, **BAD[message])


def test_what_does_not_fit_is_refused() -> None:
    params = {"dense": {"kernel": jnp.ones((4, 16))}}
    with pytest.raises(ValueError, match="exact: 'embedding' matches no parameter"):
        scale_by_adam8bit(exact="embedding").init(params)
    with pytest.raises(ValueError, match=r"exact='\(' is not a regular expression"):
        scale_by_adam8bit(exact="(").init(params)
    with pytest.raises(ValueError, match=r"unsigned: 'v' names no moments .* \['mu', 'nu'\]"):
        quantize_state(optax.scale_by_adam(), unsigned=("nu", "v")).init(params)
    with pytest.raises(ValueError, match="is no gradient transformation: call it"):
        quantize_state(optax.scale_by_adam)
