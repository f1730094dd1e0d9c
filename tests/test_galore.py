"""GaLore against numpy in float64 and the official code, and as a citizen of optax."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients import (
    aligned,
    close,
    decaying,
    full_tree,
    gradients,
    jitted,
    near,
    run,
    scan_is_the_loop,
    sides,
    stored,
    tree_of,
)
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import pefts
from pefts.optimizers.galore import GaloreState, galore, refresh, scale_by_galore
from pefts.optimizers.projection import PROJECTIONS, Projector

GOLDEN = Path(__file__).parents[1] / "../shared/golden/official/galore/golden.npz"
B1, B2 = 0.9, 0.999
SHAPES = [(7, 12), (12, 7), (8, 8)]
CASES = [
    *(("std", shape) for shape in SHAPES),
    *(("reverse_std", shape) for shape in SHAPES[1:]),
    *(("left", (7, 12)), ("right", (12, 7)), ("full", (7, 12))),
]
Array = np.ndarray

pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")


# --- the official code ---


def official_adam(eps: float) -> optax.GradientTransformation:
    """M / (sqrt(V) + eps) sqrt(1 - b2^c) / (1 - b1^c): eps before the correction of the bias."""

    def update(R, state, params=None):
        c, (M, V) = state[0] + 1, state[1:]
        M = jax.tree.map(lambda m, r: B1 * m + (1 - B1) * r, M, R)
        V = jax.tree.map(lambda v, r: B2 * v + (1 - B2) * r**2, V, R)
        k = jnp.sqrt(1 - B2**c) / (1 - B1**c)
        return jax.tree.map(lambda m, v: k * m / (jnp.sqrt(v) + eps), M, V), (c, M, V)

    return optax.GradientTransformation(
        lambda R: (jnp.zeros((), jnp.float64), R, jax.tree.map(jnp.zeros_like, R)), update
    )


@pytest.fixture(scope="module")
def golden() -> Any:
    if not GOLDEN.exists():
        pytest.skip("the golden vectors of the official code are not beside this repository")
    return np.load(GOLDEN)


def inject(state: GaloreState, official: Projector) -> GaloreState:
    """Our projectors, which must be the official ones, with the official signs."""

    def one(ours: Any, theirs: Any) -> Any:
        ours = aligned(ours, theirs)
        near(ours, theirs, 1e-9)
        return jnp.asarray(ours)

    return state._replace(projectors=Projector(*jax.tree.map(one, state.projectors, official)))


@pytest.mark.parametrize("shape", ["tall", "wide"])
@pytest.mark.parametrize("kind", ["std", "std_wd", "reverse_std", "left", "right", "full"])
def test_the_official_trajectory(kind: str, shape: str, golden: Any, x64: None) -> None:
    case, lr = f"{kind}_{shape}", float(golden["lr"])
    options = {"rank": int(golden["rank"]), "projection": kind.removesuffix("_wd")}
    options |= {"decomposition": "svd"}
    inner = official_adam(float(golden[f"{case}__eps"]))
    tx = scale_by_galore(update_interval=None, inner=inner, **options)
    assert float(golden["scale"]) == 0.25
    decay = 1 - lr * float(golden[f"{case}__weight_decay"])
    W, state = jnp.asarray(golden[f"{shape}__W0"].T), tx.init(jnp.asarray(golden[f"{shape}__W0"].T))
    step, again = jax.jit(tx.update), jax.jit(functools.partial(refresh, **options))
    for t, G in enumerate(golden[f"{shape}__G"]):
        if t % int(golden["update_gap"]) == 0:
            state = inject(again(state, jnp.asarray(G.T)), stored(golden, case, t // 4))
        U, state = step(jnp.asarray(G.T), state)
        W = (W - lr * U) * decay
        near(W, golden[f"{case}__W"][t].T, 1e-11)
        if f"{case}__M" in golden:
            near(state.inner_state[1], golden[f"{case}__M"][t].T, 1e-11)
            near(state.inner_state[2], golden[f"{case}__V"][t].T, 1e-11)
    if f"{case}__M_last" in golden:
        near(state.inner_state[1], golden[f"{case}__M_last"].T, 1e-11)
        near(state.inner_state[2], golden[f"{case}__V_last"].T, 1e-11)


@pytest.mark.parametrize("kind", ["std", "std_wd"])
def test_the_official_trajectory_in_float32_with_the_eps_and_decay_of_optax(kind, golden) -> None:
    case, lr = f"{kind}_wide", float(golden["lr"])
    inner = optax.scale_by_adam(eps=float(golden[f"{case}__eps"]))
    decay = float(golden[f"{case}__weight_decay"])
    tx = galore(lr, rank=3, update_interval=None, inner=inner, weight_decay=decay)
    W = jnp.asarray(golden["wide__W0"].T, jnp.float32)
    state, step = tx.init(W), jax.jit(tx.update)
    for t, G in enumerate(golden["wide__G"].astype(np.float32)):
        if t % 4 == 0:
            official = jax.tree.map(
                lambda columns: jnp.asarray(columns, jnp.float32), stored(golden, case, t // 4)
            )
            state = (state[0]._replace(projectors=official), *state[1:])
        U, state = step(jnp.asarray(G.T), state, W)
        W = W + U
        near(W, golden[f"{case}__W"][t].T, 3e-5)


# --- the equations ---


def oracle(
    W: Array, grads: Array, projectors: list[Projector], *, lr: float, scale: float
) -> tuple[list[Array], Array, Array]:
    """Every W, and the last moments; the projectors give no more than the signs."""
    M = V = 0.0
    Ws = []
    for t, G in enumerate(grads):
        signs = projectors[t]
        if t % 3 == 0:
            U, _, Vt = np.linalg.svd(G)
            left = aligned(U[:, :4], signs.P) if signs.P is not None else np.eye(len(G))
            right = aligned(Vt.T[:, :4], signs.Q) if signs.Q is not None else np.eye(len(G.T))
        R = left.T @ G @ right
        M, V = B1 * M + (1 - B1) * R, B2 * V + (1 - B2) * R**2
        N = (M / (1 - B1 ** (t + 1))) / (np.sqrt(V / (1 - B2 ** (t + 1))) + 1e-8)
        W = W - lr * scale * left @ N @ right.T
        Ws.append(W)
    return Ws, M, V


@pytest.mark.parametrize(("projection", "shape"), CASES, ids=str)
def test_full_steps_are_the_papers(projection: str, shape: tuple, x64: None) -> None:
    W, grads = np.random.default_rng(9).normal(size=shape), gradients(8, *shape)
    tx = scale_by_galore(
        rank=4, update_interval=3, scale=0.5, projection=projection, decomposition="svd"
    )
    params, Ws, states = jnp.asarray(W), [], []
    state, step = tx.init(params), jax.jit(tx.update)
    for G in grads:
        U, state = step(jnp.asarray(G), state)
        params = params - 0.1 * U
        Ws.append(params)
        states.append(state)
    projectors = [state.projectors for state in states]
    left, right = sides(projection, *shape)
    assert [projectors[0].P is not None, projectors[0].Q is not None] == [left, right]
    for columns in jax.tree.leaves(projectors):
        near(columns.T @ columns, np.eye(4), 1e-5)
    expected, M, V = oracle(W, grads, projectors, lr=0.1, scale=0.5)
    if projection != "full":  # whose zeros beside the diagonal of R are rounding, over rounding
        near(Ws, expected, 1e-10)
    near(state.inner_state.mu, M, 1e-12)
    near(state.inner_state.nu, V, 1e-12)
    for t in (1, 2, 4, 5, 7):  # between refreshes, the same columns to the bit
        jax.tree.map(np.testing.assert_array_equal, projectors[t], projectors[t - 1])
    assert not np.allclose(*(jax.tree.leaves(projectors[t])[0] for t in (2, 3)), atol=1e-3)


def test_full_projection_steps_are_the_papers_where_eps_hides_rounding(x64: None) -> None:
    """At a refresh R is diagonal: a large eps keeps Adam from scaling up the zeros beside it."""
    grads = gradients(3, 6, 9)
    inner = optax.scale_by_adam(eps=1.0)
    tx = scale_by_galore(rank=2, projection="full", decomposition="svd", inner=inner, scale=1.0)
    U, state = jitted(tx.update)(jnp.asarray(grads[0]), tx.init(jnp.zeros((6, 9))))
    left, S, right = np.linalg.svd(grads[0])
    near(U, (left[:, :2] * (S / (S + 1))[:2]) @ right[:2], 1e-12)
    U, _ = jitted(tx.update)(jnp.asarray(grads[1]), state)
    R = [left[:, :2].T @ G @ right[:2].T for G in grads[:2]]
    M = (B1 * R[0] + R[1]) * (1 - B1) / (1 - B1**2)
    V = (B2 * R[0] ** 2 + R[1] ** 2) * (1 - B2) / (1 - B2**2)
    near(U, left[:, :2] @ (M / (np.sqrt(V) + 1)) @ right[:2], 1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_at_full_rank_around_sgd_it_is_sgd_but_around_adam_not_adam(shape: tuple) -> None:
    G = jnp.asarray(decaying(*shape), jnp.float32)
    options = {"rank": min(shape), "scale": 1.0}
    tx, zeros = scale_by_galore(inner=optax.identity(), **options), jnp.zeros(shape)
    with jax.numpy_dtype_promotion("strict"):
        updates, state = jitted(tx.update)(G, tx.init(G))
    near(updates, G, 2e-6)
    assert int(state.count) == 1
    updates, _, _ = run(scale_by_galore(**options), zeros, [G])
    assert not np.allclose(updates, run(optax.scale_by_adam(), zeros, [G])[0], atol=0.1)


def test_the_rank_of_the_change_grows_by_r_with_each_refresh() -> None:
    grads = [jnp.asarray(G, jnp.float32) for G in gradients(9, 10, 14)]
    tx = optax.chain(scale_by_galore(rank=2, update_interval=3), optax.scale(-1.0))
    ranks, W0 = [], jnp.zeros((10, 14))
    for steps in range(1, 10):
        W, _, _ = run(tx, W0, grads[:steps])
        ranks.append(int(np.linalg.matrix_rank(np.asarray(W, np.float64), tol=1e-5)))
    assert ranks == [2, 2, 2, 4, 4, 4, 6, 6, 6]


def test_signs_do_not_matter_inside_the_first_window(x64: None) -> None:
    grads = [jnp.asarray(G) for G in gradients(4, 6, 9)]
    tx = scale_by_galore(rank=3, update_interval=None)
    params, options = jnp.zeros((6, 9)), {"rank": 3, "decomposition": "svd"}
    state = refresh(tx.init(params), grads[0], **options)
    flipped = state._replace(
        projectors=jax.tree.map(
            lambda P: P * jnp.asarray([1.0, -1.0, -1.0])[None], state.projectors
        )
    )
    W, end, _ = run(tx, params, grads, state)
    W_flipped, end_flipped, _ = run(tx, params, grads, flipped)
    near(W, W_flipped, 1e-13)
    assert not np.allclose(end.inner_state.mu, end_flipped.inner_state.mu)
    # The moments are carried over as they are: after a refresh that gives both the same columns
    # they disagree.
    ends = [run(tx, params, grads, refresh(s, grads[1], **options))[0] for s in (end, end_flipped)]
    assert not np.allclose(*ends, atol=1e-3)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_the_state_has_the_size_of_the_formula(shape, stack, projection) -> None:
    module = "layers" if stack else "layer"
    params = {module: {"kernel": jax.ShapeDtypeStruct((*stack, *shape), jnp.float32)}}
    tx = scale_by_galore(rank=3, projection=projection)
    state = jax.eval_shape(tx.init, params)
    per_kernel = {
        "std": 8 * 3 + 2 * 20 * 3,
        "reverse_std": 20 * 3 + 2 * 8 * 3,
        "left": shape[1] * 3 + 2 * shape[0] * 3,
        "right": shape[0] * 3 + 2 * shape[1] * 3,
        "full": (8 + 20) * 3 + 2 * 3 * 3,
    }[projection]
    scalars = 3  # our count, Adam's, and what was skipped
    assert pefts.count(state) == per_kernel * (stack or (1,))[0] + scalars
    d_in, d_out = (
        3 if is_low else side for is_low, side in zip(sides(projection, *shape), shape, strict=True)
    )
    assert state.inner_state.mu[module]["kernel"].shape == (*stack, d_in, d_out)


def test_the_transposed_gradient_gives_the_transposed_update(x64: None) -> None:
    grads = [jnp.asarray(G) for G in gradients(4, 6, 9)]
    for projection, mirrored in [("std", "std"), ("reverse_std",) * 2, ("left", "right")]:
        make = functools.partial(scale_by_galore, rank=3, decomposition="svd")
        W, _, _ = run(make(projection=projection), jnp.zeros((6, 9)), grads)
        turned, _, _ = run(make(projection=mirrored), jnp.zeros((9, 6)), [G.T for G in grads])
        near(turned.T, W, 1e-12)


# --- gradients that are none ---


@pytest.mark.parametrize(
    ("at", "decomposition", "poison"),
    [(0, "subspace", jnp.nan), (2, "subspace", jnp.inf), (2, "svd", jnp.nan)],
)
def test_a_gradient_that_is_not_finite_at_a_refresh_skips_its_layer(at, decomposition, poison):
    params, grads = tree_of(2, 21, 24, steps=4)
    tx = scale_by_galore(rank=3, update_interval=2, decomposition=decomposition)
    clean, clean_state, _ = run(tx, params, grads)
    grads[at]["layers"]["kernel"] = grads[at]["layers"]["kernel"].at[1, 2, 3].set(poison)
    before, state, _ = run(tx, params, grads[:at])
    updates, after = jitted(tx.update)(grads[at], state, before)
    assert (int(clean_state.skipped), int(state.skipped), int(after.skipped)) == (0, 0, 1)
    np.testing.assert_array_equal(updates["layers"]["kernel"][1], 0)
    assert np.all(updates["layers"]["kernel"][0] != 0)
    kept, old = (s.projectors["layers"]["kernel"].P[1] for s in (after, state))
    np.testing.assert_array_equal(kept, old)
    near(kept.T @ kept, np.eye(3), 1e-5)
    end, state, _ = run(tx, params, grads)
    assert int(state.skipped) == 1
    close(end["layers"]["kernel"][0], clean["layers"]["kernel"][0])  # the other layer
    close(end["layers"]["bias"], clean["layers"]["bias"])
    assert np.all(np.isfinite(end["layers"]["kernel"]))
    assert not np.allclose(end["layers"]["kernel"][1], clean["layers"]["kernel"][1], atol=1e-3)


def test_a_gradient_whose_decomposition_overflows_is_skipped_too() -> None:
    params, grads = tree_of(2, 21, 24)
    grads[0]["layers"]["kernel"] = grads[0]["layers"]["kernel"].at[1].set(3e38)
    end, state, _ = run(scale_by_galore(rank=3), params, grads)
    assert int(state.skipped) == 1
    np.testing.assert_array_equal(end["layers"]["kernel"][1], 0)
    assert np.all(np.isfinite(jax.tree.leaves(state.projectors)[0]))


def test_between_refreshes_such_a_gradient_is_not_hidden() -> None:
    params, grads = tree_of(2, 6, 9, steps=2)
    grads[1]["layers"]["kernel"] = grads[1]["layers"]["kernel"].at[1, 2, 3].set(jnp.nan)
    end, state, _ = run(scale_by_galore(rank=3, update_interval=2), params, grads)
    assert np.isnan(end["layers"]["kernel"][1]).any() and int(state.skipped) == 0
    assert np.isfinite(end["layers"]["kernel"][0]).all()


@pytest.mark.parametrize("decomposition", ["subspace", "svd"])
def test_a_zero_gradient_keeps_the_projector_and_is_no_fault(decomposition: str) -> None:
    params, grads = tree_of(2, 6, 9, steps=2)
    grads[1] = jax.tree.map(jnp.zeros_like, grads[1])
    tx = scale_by_galore(rank=3, update_interval=1, decomposition=decomposition)
    _, state, states = run(tx, params, grads)
    jax.tree.map(np.testing.assert_array_equal, states[0].projectors, states[1].projectors)
    assert int(state.skipped) == 0
    assert np.all(state.inner_state.mu["layers"]["kernel"] != 0)  # Adam goes on


# --- a citizen of optax ---


def test_bfloat16_leaves_have_a_float32_state_and_bfloat16_updates() -> None:
    params, grads = tree_of(2, 6, 9, steps=3)
    halves = [jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), grad) for grad in grads]
    tx = scale_by_galore(rank=3, update_interval=2)
    state = tx.init(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    floats = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.dtype != jnp.int32]
    assert set(floats) == {jnp.dtype("float32")}
    updates, after = jitted(tx.update)(halves[0], state)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    expected, _ = jitted(tx.update)(
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), halves[0]), state
    )
    close(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), updates), expected, 1e-2, 1e-3)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


def test_inside_multi_steps_it_sees_the_mean_gradient() -> None:
    params, grads = tree_of(2, 6, 9, steps=6)
    tx = galore(0.1, rank=3, update_interval=2, decomposition="svd")
    multi = optax.MultiSteps(tx, 2)
    end, _, _ = run(multi.gradient_transformation(), params, grads)
    means = [
        jax.tree.map(lambda a, b: (a + b) / 2, *pair)
        for pair in zip(grads[::2], grads[1::2], strict=True)
    ]
    expected, _, _ = run(tx, params, means)
    close(end, expected, 1e-4, 1e-5)


def test_hyperparameters_can_be_injected() -> None:
    params, grads = tree_of(2, 6, 9, steps=2)
    static = ("rank", "update_interval")
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    tx = optax.inject_hyperparams(galore, static_args=static)(
        schedule, rank=3, scale=0.5, weight_decay=0.1, targets="kernel"
    )
    state = tx.init(params)
    assert set(state.hyperparams) == {"learning_rate", "scale", "weight_decay"}
    end, state, _ = run(tx, params, grads)
    expected, _, _ = run(galore(schedule, rank=3, scale=0.5, weight_decay=0.1), params, grads)
    close(end, expected)
    state.hyperparams["scale"] = jnp.asarray(1.0)
    doubled, _ = jitted(tx.update)(grads[0], state, params)
    state.hyperparams["scale"] = jnp.asarray(0.5)
    updates, _ = jitted(tx.update)(grads[0], state, params)
    close(doubled["layers"]["kernel"], 2 * updates["layers"]["kernel"])
    close(doubled["layers"]["bias"], updates["layers"]["bias"])


def test_the_alias_is_the_chain_of_its_parts() -> None:
    params, grads = tree_of(2, 6, 9, steps=3)
    params = jax.tree.map(jnp.ones_like, params)
    schedule = optax.linear_schedule(0.1, 0.0, 4)
    make = functools.partial(scale_by_galore, rank=3, scale=0.5, update_interval=2)
    chain = optax.chain(
        make(), optax.add_decayed_weights(0.3), optax.scale_by_learning_rate(schedule)
    )
    alias = galore(schedule, rank=3, scale=0.5, update_interval=2, weight_decay=0.3)
    close(run(alias, params, grads)[0], run(chain, params, grads)[0])


def test_it_takes_a_part_of_a_tree_and_a_clipped_gradient() -> None:
    trainable = full_tree()
    grads = jax.tree.map(lambda leaf: jnp.asarray(7 * np.sin(leaf)), trainable)
    labels = {path: {"value": "low" if "query" in path else "rest"} for path in trainable}
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition({"low": galore(0.1, rank=3), "rest": optax.sgd(0.5)}, labels),
    )
    end, _, _ = run(tx, trainable, [grads] * 2)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(grads)))
    clipped = jax.tree.map(lambda leaf: jnp.asarray(leaf / norm), grads)
    path = "layers/query/kernel"
    expected, _, _ = run(galore(0.1, rank=3), {path: trainable[path]}, [{path: clipped[path]}] * 2)
    close(end[path], expected[path], 1e-5, 1e-6)
    bias = {"value": trainable["output/bias"]["value"] - clipped["output/bias"]["value"]}
    close(end["output/bias"], bias, 1e-5, 1e-6)


def test_optax_finds_the_moments_in_the_state() -> None:
    trainable = full_tree()
    tx = scale_by_galore(rank=3, targets="query")
    state = optax.tree.map_params(tx, lambda leaf: leaf + 1, tx.init(trainable))
    np.testing.assert_array_equal(state.inner_state.mu["embed/embedding"]["value"], 1)
    assert int(state.count) == 0


def test_extra_arguments_reach_the_transformation_inside() -> None:
    def update(updates, state, params=None, *, factor, **extra):
        return jax.tree.map(lambda leaf: factor * leaf, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = scale_by_galore(rank=2, scale=1.0, inner=inner)
    G = jnp.asarray(decaying(6, 2), jnp.float32)
    near(jitted(tx.update)(G, tx.init(G), factor=3.0)[0], 3 * G, 1e-5)


def test_refreshing_by_hand_is_refreshing_in_the_step() -> None:
    params, grads = tree_of(2, 6, 9, steps=5)
    inside, state, _ = run(scale_by_galore(rank=3, update_interval=2), params, grads)
    tx = scale_by_galore(rank=3, update_interval=None)
    by_hand = tx.init(params)
    again, W = jax.jit(functools.partial(refresh, rank=3)), params
    for t, grad in enumerate(grads):
        by_hand = again(by_hand, grad) if t % 2 == 0 else by_hand
        W, by_hand, _ = run(tx, W, [grad], by_hand)
    close(W, inside, 1e-5, 1e-6)
    close(by_hand, state, 1e-5, 1e-6)
    bad = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), grads[0])
    after = again(by_hand, bad)
    assert int(after.skipped) == 1
    old, new = (s.projectors["layers"]["kernel"].P for s in (by_hand, after))
    np.testing.assert_array_equal(old[0], new[0])
    assert not np.allclose(old[1], new[1], atol=1e-3)


def test_the_step_compiles_once_and_scans() -> None:
    params, grads = tree_of(2, 6, 9, steps=5)
    tx = scale_by_galore(rank=3, update_interval=2)
    step, state, end = jax.jit(tx.update, donate_argnums=1), tx.init(params), params
    for grad in grads:
        updates, state = step(grad, state)
        end = optax.apply_updates(end, updates)
    assert step._cache_size() == 1

    scan_is_the_loop(tx, params, grads, end)


def primitives(jaxpr: Any, inside: tuple = ()) -> Iterator[tuple[str, tuple]]:
    """(name, names of the equations around it) of every equation."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        yield name, inside
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner, (*inside, name))


@pytest.mark.parametrize(("decomposition", "name"), [("svd", "svd"), ("subspace", "qr")])
def test_decompositions_run_in_a_branch_only_layer_by_layer(decomposition: str, name: str) -> None:
    params = {"layers": {"kernel": jnp.zeros((2, 40, 50))}}
    tx = scale_by_galore(rank=3, decomposition=decomposition)
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params)).jaxpr
    found = [around for primitive, around in primitives(jaxpr) if primitive == name]
    assert found and all("cond" in around and "scan" in around for around in found)
    alone = jax.make_jaxpr(scale_by_galore(rank=3, update_interval=None).update)
    assert "cond" not in {
        primitive for primitive, _ in primitives(alone(params, tx.init(params)).jaxpr)
    }


@pytest.mark.parametrize("decomposition", ["subspace", "svd"])
def test_eight_devices_give_what_one_gives(decomposition: str) -> None:
    params, grads = tree_of(2, 24, 32, steps=5)
    tx = galore(0.1, rank=3, update_interval=2, decomposition=decomposition, weight_decay=0.1)
    expected, _, _ = run(tx, params, grads)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    spec = {"layers": {"kernel": P(None, "fsdp", "data"), "bias": P(None, "data")}}
    place = functools.partial(
        jax.tree.map, lambda spec, leaf: jax.device_put(leaf, NamedSharding(mesh, spec)), spec
    )

    def step(grad: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    donating = jax.jit(step, donate_argnums=(1, 2))
    placed = place(params)
    state = jax.jit(tx.init)(placed)
    for grad in grads:
        placed, state = donating(place(grad), state, placed)
    close(placed, expected, 0, 1e-5)
    assert len(placed["layers"]["kernel"].sharding.device_set) == 8


def test_it_trains_lora_factors_and_takes_turns_with_other_optimizers(key: jax.Array) -> None:
    """A factor whose gradient is zero at first, as A's is while B = 0, learns later."""
    params = {"kernel": jnp.asarray(decaying(8, 6), jnp.float32)}
    peft = pefts.lora(rank=4, targets="kernel")
    state = peft.init(key, params)
    target = jnp.asarray(decaying(8, 6, seed=1), jnp.float32)

    def loss(trainable: Any) -> jax.Array:
        return jnp.sum(
            (peft.merge(params, state._replace(trainable=trainable))["kernel"] - target) ** 2
        )

    tx, trainable = galore(0.05, rank=2, update_interval=5, scale=1.0), state.trainable
    assert float(jnp.abs(jax.grad(loss)(trainable)["kernel"]["A"]).max()) == 0
    opt_state, step, first = tx.init(trainable), jax.jit(tx.update), loss(trainable)
    slope = jax.jit(jax.grad(loss))
    for _ in range(60):
        updates, opt_state = step(slope(trainable), opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    assert loss(trainable) < 0.3 * first
    assert not np.allclose(trainable["kernel"]["A"], state.trainable["kernel"]["A"], atol=1e-2)
