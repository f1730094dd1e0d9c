"""FRUGAL against numpy in float64 and the official code, and as a citizen of optax."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients import (
    close,
    decaying,
    full_tree,
    gradients,
    jitted,
    multi_steps_see_the_mean,
    near,
    run,
    tree_of,
)
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import pefts
from pefts.optimizers import frugal_spaces
from pefts.optimizers.frugal import frugal, scale_by_frugal
from pefts.optimizers.frugal_spaces import BASES, BLOCKS, INDEXED
from pefts.optimizers.galore import scale_by_galore
from pefts.optimizers.projection import Projector
from pefts.optimizers.restart import restart_at
from pefts.targets import ALL_LINEAR

GOLDEN = Path(__file__).parents[1] / "../shared/golden/official/frugal/golden.npz"
B1, B2, EPS = 0.9, 0.999, 1e-8
SHAPES = [(7, 12), (12, 7), (8, 8)]
RULES = {"sign_sgd": "sign", "sgd": "sgd", "no": "none"}
Array = np.ndarray

pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")


@pytest.fixture(scope="module")
def golden() -> Any:
    if not GOLDEN.exists():
        pytest.skip("the golden vectors of the official code are not beside this repository")
    return np.load(GOLDEN)


def settings(golden: Any, case: str) -> dict:
    assert (float(golden["beta1"]), float(golden["beta2"]), float(golden["eps"])) == (B1, B2, EPS)
    return {
        "density": float(golden["density"]),
        "projection": case.split("_")[0],
        "state_free": RULES[str(golden[f"{case}__inactive_rule"])],
        "scales": tuple(
            float(golden[f"{case}__{name}_lr_scale"]) for name in ("proj_params", "inactive")
        ),
        "weight_decay": float(golden[f"{case}__weight_decay"]),
        "reset": bool(golden[f"{case}__reset_statistics"]),
    }


def official_space(golden: Any, case: str, window: int) -> Any:
    """The official choice in Flax's terms."""
    kind, (d_out, d_in) = case.split("_")[0], golden[f"{case}__W"].shape[1:]
    if kind in ("columns", "rows"):
        return jnp.asarray(golden[f"{case}__indices"][window], jnp.int32)
    if kind == "randk":
        rows, columns = np.divmod(golden[f"{case}__indices"][window], d_in)
        return jnp.asarray(columns * d_out + rows, jnp.int32)
    raw = golden[f"{case}__ortho"][window]
    columns = raw.T if d_out >= d_in else raw
    if kind == "randperm":
        np.testing.assert_array_equal(columns.sum(0), 1)
        return jnp.asarray(columns.argmax(0), jnp.int32)
    columns = jnp.asarray(columns)
    return Projector(columns, None) if d_out >= d_in else Projector(None, columns)


CASES = (
    *("columns_tall", "columns_wide", "columns_noreset_wide", "rows_tall", "randk_wide"),
    *("svd_tall", "svd_wide", "random_tall", "randperm_wide"),
)


@pytest.mark.parametrize(
    ("case", "dtype", "tolerance"),
    [
        *((case, jnp.float64, 1e-11) for case in CASES),
        *((case, jnp.float32, 1e-6) for case in ("columns_tall", "columns_wide")),
    ],
)
def test_the_official_trajectory(case, dtype, tolerance, golden: Any, x64: None) -> None:
    options, shape = settings(golden, case), case.split("_")[-1]
    tx = frugal(float(golden["lr"]), update_interval=None, **options)
    W = jnp.asarray(golden[f"{shape}__W0"].T, dtype)
    state, fresh = tx.init(W), tx.init(W)[0].inner_state
    for t, G in enumerate(golden[f"{shape}__G"]):
        if t % int(golden["update_gap"]) == 0:
            space = official_space(golden, case, t // 4)
            assert jax.tree.map(jnp.shape, space) == jax.tree.map(jnp.shape, state[0].spaces)
            inner = fresh if options["reset"] else state[0].inner_state
            state = (state[0]._replace(spaces=space, inner_state=inner), *state[1:])
        W, state, _ = run(tx, W, [jnp.asarray(G.T, dtype)], state)
        near(W, golden[f"{case}__W"][t].T, tolerance)
    near(state[0].inner_state.mu, golden[f"{case}__M_last"].T, tolerance)
    near(state[0].inner_state.nu, golden[f"{case}__V_last"].T, tolerance)
    assert W.dtype == dtype


@pytest.mark.parametrize("case", ["svd_tall", "svd_wide"])
def test_our_singular_vectors_give_the_official_trajectory(case, golden, x64) -> None:
    """With a reset at each choice their signs do not matter."""
    tx = frugal(float(golden["lr"]), update_interval=4, **settings(golden, case))
    shape = case.split("_")[-1]
    grads = [jnp.asarray(G.T) for G in golden[f"{shape}__G"]]
    W, state = jnp.asarray(golden[f"{shape}__W0"].T), None
    for t, G in enumerate(grads):
        W, state, _ = run(tx, W, [G], state)
        near(W, golden[f"{case}__W"][t].T, 1e-11)
        P = state[0].spaces
        columns = P.P if P.Q is None else P.Q
        near(columns @ columns.T, golden[f"{case}__ortho_proj"][t // 4], 1e-11)


def blocks(golden: Any) -> tuple[dict, list[dict]]:
    """Six kernels of six shapes, which come in their order."""
    params = {f"kernel_{n}": jnp.asarray(golden[f"block__W0_{n}"].T) for n in range(6)}
    grads = [
        {f"kernel_{n}": jnp.asarray(golden[f"block__G_{n}"][t].T) for n in range(6)}
        for t in range(12)
    ]
    return params, grads


@pytest.mark.parametrize("order", ["random", "descending", "ascending", "mirror"])
def test_the_official_blocks(order: str, golden: Any, x64: None) -> None:
    case, (W, grads) = f"block_{order}", blocks(golden)
    drawn = order == "random"
    tx = frugal(
        float(golden["lr"]),
        density=float(golden["block__density"]),
        projection=f"blocks_{order}",
        update_interval=None if drawn else 4,
        scales=(1.0, float(golden[f"{case}__inactive_lr_scale"])),
    )
    state = tx.init(W)
    fresh = state[0].inner_state
    for t, grad in enumerate(grads):
        active = golden[f"{case}__active"][t]
        if drawn and t % 4 == 0:
            spaces = {
                f"kernel_{n}": jnp.asarray([0 if on else 1], jnp.int32)
                for n, on in enumerate(active)
            }
            state = (state[0]._replace(spaces=spaces, inner_state=fresh), *state[1:])
        W, state, _ = run(tx, W, [grad], state)
        np.testing.assert_array_equal([slots[0] == 0 for slots in state[0].spaces.values()], active)
        for n in range(6 * drawn):
            near(W[f"kernel_{n}"], golden[f"{case}__W_{n}"][t].T, 1e-11)
    for n in range(6):
        near(W[f"kernel_{n}"], golden[f"{case}__W_last_{n}"].T, 1e-11)


# --- the equations ---


def maps(kind: str, space: Any, shape: tuple) -> tuple[Any, Any]:
    """down and up, dense."""
    if kind == "blocks":
        return lambda G: G * space, lambda R: R
    if kind == "randk":
        S = np.eye(shape[0] * shape[1])[np.asarray(space)]
        return lambda G: S @ G.ravel(), lambda R: (S.T @ R).reshape(shape)
    sides = [np.eye(n) for n in shape]
    if kind in BASES:
        chosen, side = jax.tree.leaves(space)[0], 0 if space.Q is None else 1
    else:
        side = {"columns": 0, "rows": 1, "randperm": int(shape[0] > shape[1])}[kind]
        chosen = sides[side][:, np.asarray(space)]
    sides[side] = np.asarray(chosen)
    P, Q = sides
    return lambda G: P.T @ G @ Q, lambda R: P @ R @ Q.T


def oracle(
    W: Array, grads: Array, spaces: list, *, kind: str, reset: bool, f: Any, scales: tuple
) -> tuple[Array, Array, Array]:
    """W, M and V after the last step with an interval of 3, a rate of 0.1 and a decay of 0.2."""
    M = V = count = 0.0
    for t, G in enumerate(grads):
        down, up = maps(kind, spaces[t], W.shape)
        if t % 3 == 0 and reset:
            M = V = count = 0.0
        R, count = down(G), count + 1
        M, V = B1 * M + (1 - B1) * R, B2 * V + (1 - B2) * R**2
        N = (M / (1 - B1**count)) / (np.sqrt(V / (1 - B2**count)) + EPS)
        E = G - up(R)
        E[abs(E) < 1e-12] = 0
        W = W * (1 - 0.1 * 0.2) - 0.1 * scales[0] * (up(N) + scales[1] * f(E))
    return W, M, V


@pytest.mark.parametrize(
    ("kind", "reset", "rule", "shape"),
    [
        *((kind, True, "sign", shape) for kind in (*INDEXED, *BASES) for shape in SHAPES[:2]),
        ("rows", False, "sgd", SHAPES[0]),
        ("randk", False, "none", SHAPES[1]),
        *((kind, True, "sgd", SHAPES[2]) for kind in ("randperm", "random")),
    ],
)
def test_full_steps_of_each_layer_are_the_papers(kind, reset, rule, shape, x64) -> None:
    W = np.random.default_rng(9).normal(size=(2, *shape))
    grads = np.stack([gradients(7, *shape, seed=7 * n) for n in range(2)], 1)
    scales = (0.5, 0.3)
    tx = frugal(
        0.1, density=0.4, projection=kind, update_interval=3, state_free=rule, scales=scales,
        reset=reset, weight_decay=0.2, seed=5,
    )  # fmt: skip
    trees = [{"layers": {"kernel": jnp.asarray(x)}} for x in (W, *grads)]
    end, (state, *_), states = run(tx, trees[0], trees[1:])
    f = {"sign": np.sign, "sgd": np.array, "none": np.zeros_like}[rule]
    every = [s[0].spaces["layers"]["kernel"] for s in states]
    given = {"kind": kind, "reset": reset, "f": f, "scales": scales}
    for n in range(2):
        spaces = [jax.tree.map(lambda leaf: leaf[n], space) for space in every]  # noqa: B023
        expected, M, V = oracle(W[n], grads[:, n], spaces, **given)
        near(end["layers"]["kernel"][n], expected, 1e-10)
        near(state.inner_state.mu["layers"]["kernel"][n], M, 1e-12)
        near(state.inner_state.nu["layers"]["kernel"][n], V, 1e-12)
    for t in (1, 2, 4, 5):  # between choices, the same to the bit
        jax.tree.map(np.testing.assert_array_equal, every[t], every[t - 1])
    assert not np.array_equal(*(jax.tree.leaves(every[t])[0] for t in (2, 3)))
    assert not np.array_equal(*jax.tree.leaves(every[0])[0])


def decoder(layers: int = 4) -> dict:
    """Stacked kernels of two shapes, and what is not targeted."""
    sides = {"gate": 6, "k": 4, "q": 4, "up": 6}
    kernels = {
        name: {"kernel": jnp.cos(jnp.arange(layers * 4.0 * side)).reshape(layers, 4, side)}
        for name, side in sides.items()
    }
    rest = {"embed": {"embedding": jnp.ones((9, 4))}, "norm": {"scale": jnp.ones(4)}}
    return {"layers": kernels, **rest}


def active_kernels(tx: Any, params: Any, steps: int) -> list[set]:
    """(leaf, layer) with a step, of every update of a gradient of ones."""
    grads, state, seen = jax.tree.map(jnp.ones_like, params), tx.init(params), []
    for _ in range(steps):
        updates, state = jitted(tx.update)(grads, state)
        moved = {name: leaf["kernel"][:, 0, 0] > 0 for name, leaf in updates["layers"].items()}
        seen.append({(name, int(n)) for name, on in moved.items() for n in np.flatnonzero(on)})
    return seen


def test_blocks_take_turns_layer_by_layer_in_pools() -> None:
    whole = [{(name, layer) for name in ("gate", "k", "q", "up")} for layer in range(4)]
    make = functools.partial(scale_by_frugal, density=0.25, state_free="none", update_interval=1)
    up = active_kernels(make(projection="blocks_ascending"), decoder(), 5)
    assert up == [*whole, whole[0]]
    down = active_kernels(make(projection="blocks_descending"), decoder(), 5)
    assert down == [*whole[::-1], whole[3]]
    mirror = active_kernels(make(projection="blocks_mirror", density=0.5), decoder(), 3)
    assert mirror == [whole[0] | whole[3], whole[1] | whole[2], whole[0] | whole[3]]
    params = {"layers": {"k": {"kernel": jnp.ones((5, 4, 4))}}}  # the middle one has no partner
    odd = active_kernels(make(projection="blocks_mirror", density=0.4), params, 3)
    assert odd == [{("k", 0), ("k", 4)}, {("k", 1), ("k", 3)}, {("k", 0), ("k", 4)}]


def test_blocks_drawn_at_random_are_as_many_as_there_should_be_and_all_have_turns() -> None:
    tx = scale_by_frugal(density=0.25, state_free="none", update_interval=1, projection=BLOCKS[0])
    seen = active_kernels(tx, decoder(), 60)
    assert {len(active) for active in seen} == {4}
    counts = [sum(kernel in active for active in seen) for kernel in set().union(*seen)]
    assert len(counts) == 16 and min(counts) >= 5 and max(counts) <= 30
    assert seen[0] != seen[1]


def test_layers_by_themselves_are_ordered_by_number_and_share_pools() -> None:
    params = {f"layer_{n}": {"kernel": jnp.ones((4, 6))} for n in (0, 1, 2, 10, 11, 3)}
    options = {"density": 1 / 3, "projection": "blocks_descending", "state_free": "none"}
    tx = scale_by_frugal(update_interval=1, **options)
    state = tx.init(params)
    assert pefts.count(state.inner_state.mu) == 2 * 4 * 6
    for expected in ({"layer_10", "layer_11"}, {"layer_2", "layer_3"}, {"layer_0", "layer_1"}):
        updates, state = jitted(tx.update)(params, state)
        assert {name for name, leaf in updates.items() if leaf["kernel"][0, 0] > 0} == expected


def test_blocks_of_layers_are_the_papers(x64: None) -> None:
    """Adam from zero in each window for those that have a turn, the sign for the others."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), decoder(2))
    grads = [jax.tree.map(lambda leaf, t=t: jnp.sin(leaf + t), params) for t in range(7)]
    options = {"density": 0.5, "projection": "blocks_ascending", "scales": (0.5, 0.3)}
    end, _, _ = run(frugal(0.1, update_interval=3, weight_decay=0.2, **options), params, grads)
    options = {"kind": "blocks", "reset": True, "f": np.sign, "scales": (0.5, 0.3)}
    for name in ("gate", "k", "q"):
        for n in range(2):
            W, *Gs = (np.asarray(tree["layers"][name]["kernel"][n]) for tree in (params, *grads))
            expected, _, _ = oracle(W, Gs, [t // 3 % 2 == n for t in range(7)], **options)
            near(end["layers"][name]["kernel"][n], expected, 1e-12)


@pytest.mark.parametrize("kind", [*INDEXED, "blocks_random", "blocks_mirror"])
def test_at_density_one_it_is_adamw_that_begins_anew(kind: str) -> None:
    params, grads = tree_of(2, 6, 9, steps=5)
    tx = frugal(0.1, density=1, projection=kind, update_interval=2, weight_decay=0.2)
    adamw = (optax.add_decayed_weights(0.2), optax.scale_by_learning_rate(0.1))
    restarting = optax.chain(restart_at(optax.scale_by_adam(), (2, 4)), *adamw)
    ours, ends = (run(t, params, grads)[0] for t in (tx, restarting))
    close(ours["layers"]["kernel"], ends["layers"]["kernel"], 1e-5, 1e-6)
    other, _, _ = run(optax.chain(optax.scale_by_adam(), *adamw), params, grads)
    close(ours["layers"]["bias"], other["layers"]["bias"], 1e-5, 1e-6)
    assert not np.allclose(ends["layers"]["bias"], other["layers"]["bias"], atol=1e-2)


@pytest.mark.parametrize("kind", BASES)
def test_a_whole_basis_around_sgd_is_sgd_and_around_adam_not_adam(kind: str) -> None:
    G = jnp.asarray(decaying(6, 9), jnp.float32)
    tx = scale_by_frugal(density=1, projection=kind, inner=optax.identity(), state_free="none")
    near(jitted(tx.update)(G, tx.init(G))[0], G, 2e-6)
    tx = scale_by_frugal(density=1, projection=kind, state_free="none")
    assert not np.allclose(jitted(tx.update)(G, tx.init(G))[0], np.sign(G), atol=0.1)


@pytest.mark.parametrize("kind", ["columns", "svd", "blocks_mirror"])
def test_at_density_zero_it_is_sign_descent(kind: str) -> None:
    params, grads = tree_of(2, 6, 9, steps=3)
    tx = frugal(0.1, density=0.0, projection=kind, update_interval=2)
    end, state, _ = run(tx, params, grads)
    expected, _, _ = run(optax.sign_sgd(0.1), params, grads)
    close(end["layers"]["kernel"], expected["layers"]["kernel"])
    assert pefts.count((state[0].spaces, state[0].inner_state.mu)) == 0


@pytest.mark.parametrize("kind", (*INDEXED, *BLOCKS))
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_the_two_parts_are_the_gradient_to_the_bit_and_do_not_meet(kind: str, shape) -> None:
    G = {"layers": {"kernel": jnp.asarray(gradients(4, *shape), jnp.float32)}}
    options = frugal_spaces.options(0.5, kind, ALL_LINEAR, None)
    plan = frugal_spaces.plan(options, G)
    spaces = frugal_spaces.choose(plan, 3, 2, jax.tree.leaves(G))
    low = frugal_spaces.down(plan, spaces, jax.tree.leaves(G))
    whole = frugal_spaces.up(plan, spaces, low, low, jax.tree.leaves(G), lambda E: E)
    np.testing.assert_array_equal(whole[0], G["layers"]["kernel"])
    parts = [
        frugal_spaces.up(plan, spaces, low, N, jax.tree.leaves(G), f)[0]
        for N, f in ((low, jnp.zeros_like), ([jnp.zeros_like(low[0])], lambda E: E))
    ]
    np.testing.assert_array_equal(parts[0] + parts[1], G["layers"]["kernel"])
    np.testing.assert_array_equal(parts[0] * parts[1], 0)


@pytest.mark.parametrize("kind", INDEXED)
def test_index_sets_have_no_duplicates_and_differ(kind: str) -> None:
    tree = {"a": jnp.ones((20, 30)), "b": jnp.ones((20, 30))}
    plan = frugal_spaces.plan(frugal_spaces.options(0.3, kind, ALL_LINEAR, None), tree)

    def draw(seed: int, window: int) -> list[Array]:
        return [np.asarray(s) for s in frugal_spaces.choose(plan, seed, window, [tree["a"]] * 2)]

    drawn = [leaf for seed in range(2) for window in range(4) for leaf in draw(seed, window)]
    total = {"columns": 20, "rows": 30, "randk": 600, "randperm": 20}[kind]
    for indices in drawn:
        assert len(set(indices.tolist())) == len(indices) == round(0.3 * total)
        assert indices.min() >= 0 and indices.max() < total
    assert len({tuple(sorted(indices)) for indices in drawn}) >= len(drawn) - 1
    assert len(set(np.concatenate(drawn).tolist())) > 0.8 * total
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(draw(1, 3)[-1], drawn[-1])


def test_columns_are_rows_of_a_flax_kernel() -> None:
    """Without a step for the rest, exactly d_in / 4 rows move."""
    G = jnp.ones((8, 12))
    for kind, axis in (("columns", 1), ("rows", 0)):
        tx = scale_by_frugal(projection=kind, state_free="none", scales=(1.0, 0.0))
        updates, _ = jitted(tx.update)(G, tx.init(G))
        moved = np.asarray(updates != 0)
        assert moved.all(axis).sum() == moved.any(axis).sum() == moved.shape[1 - axis] // 4


@pytest.mark.parametrize("kind", ["columns", "randk", "blocks_mirror"])
def test_after_a_choice_every_entry_moves_by_one_or_by_nothing(kind: str) -> None:
    """M / sqrt(V) is 1 in the first step after a reset, and so is a sign; sign(0) = 0."""
    params, grads = tree_of(4, 6, 9, steps=3)
    for grad in grads:
        grad["layers"]["kernel"] = grad["layers"]["kernel"].at[:, 2, 3].set(0)
    tx = scale_by_frugal(density=0.5, projection=kind, update_interval=2)
    _, state, _ = run(tx, params, grads[:2])
    updates, _ = jitted(tx.update)(grads[2], state)
    sizes = np.abs(updates["layers"]["kernel"])
    np.testing.assert_array_equal(sizes[:, 2, 3], 0)
    near(sizes[grads[2]["layers"]["kernel"] != 0], 1, 1e-4)


def test_with_the_settings_of_galore_it_is_galore(x64: None) -> None:
    grads = [jnp.asarray(G) for G in gradients(5, 6, 9)]
    tx = scale_by_frugal(
        density=0.5, projection="svd", update_interval=2, state_free="none", scales=(0.25, 1.0),
        reset=False,
    )  # fmt: skip
    ours, state, _ = run(tx, jnp.zeros((6, 9)), grads)
    galore = scale_by_galore(rank=3, update_interval=2, decomposition="svd")
    theirs, other, _ = run(galore, jnp.zeros((6, 9)), grads)
    near(ours, theirs, 1e-10)
    near(state.spaces.P, other.projectors.P, 1e-10)


SIZES = {
    "columns": 2 * 2 * 20 + 2,
    "rows": 2 * 5 * 8 + 5,
    "randk": 3 * 40,
    "randperm": 2 * 2 * 20 + 2,
    "random": 2 * 2 * 20 + 2 * 8,
    "svd": 2 * 2 * 20 + 2 * 8,
}


@pytest.mark.parametrize("kind", SIZES)
def test_the_state_has_the_size_of_the_formula(kind: str) -> None:
    params = {"layers": {"kernel": jax.ShapeDtypeStruct((3, 8, 20), jnp.float32)}}
    state = jax.eval_shape(scale_by_frugal(density=0.25, projection=kind).init, params)
    scalars = 4  # our count, the seed, and the counts of two Adams
    assert pefts.count(state) == 3 * SIZES[kind] + scalars


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_pools_of_blocks_have_the_size_of_those_that_take_part(kind: str) -> None:
    params, density = decoder(8), 0.5 if kind == "blocks_mirror" else 0.25
    state = jax.eval_shape(scale_by_frugal(density=density, projection=kind).init, params)
    kernels = 8 * (2 * 16 + 2 * 24)
    assert pefts.count((state.inner_state.mu, state.inner_state.nu)) == 2 * density * kernels
    assert pefts.count(state.spaces) == density * 8 * 4
    assert state.inner_state.mu["layers"]["gate"]["kernel"].shape == (density * 16, 4, 6)
    assert pefts.count(state.rest_state.mu) == 9 * 4 + 4


@pytest.mark.parametrize("kind", ["columns", "svd", "blocks_random"])
def test_bfloat16_leaves_have_a_float32_state_and_bfloat16_updates(kind: str) -> None:
    _, grads = tree_of(2, 6, 9)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), grads[0])
    tx = scale_by_frugal(density=0.5, projection=kind)
    updates, state = jitted(tx.update)(half, tx.init(half))
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    kinds = {leaf.dtype for leaf in jax.tree.leaves((state.inner_state, state.rest_state))}
    assert kinds == {jnp.dtype("float32"), jnp.dtype("int32")}


@pytest.mark.parametrize("kind", ["columns", "svd", "blocks_random"])
def test_strict_promotion_and_leaves_that_are_not_targeted(kind: str) -> None:
    _, grads = tree_of(2, 6, 9)
    mixed = grads[0] | {"steps": jnp.arange(3)}
    with jax.numpy_dtype_promotion("strict"):
        tx = scale_by_frugal(density=0.5, projection=kind, inner=optax.identity(), targets="kernel")
        updates, _ = jitted(tx.update)(mixed, tx.init(mixed))
    np.testing.assert_array_equal(updates["steps"], mixed["steps"])
    np.testing.assert_array_equal(updates["layers"]["bias"], grads[0]["layers"]["bias"])


@pytest.mark.parametrize("poison", [0.0, jnp.nan])
def test_singular_vectors_are_kept_where_the_gradient_has_none(poison: float) -> None:
    params, grads = tree_of(2, 21, 24, steps=2)
    tx = scale_by_frugal(density=0.15, projection="svd", update_interval=1)
    grads[1]["layers"]["kernel"] = grads[1]["layers"]["kernel"].at[1].set(poison)
    _, _, (before, after) = run(tx, params, grads)
    old, new = (s.spaces["layers"]["kernel"].P for s in (before, after))
    np.testing.assert_array_equal(old[1], new[1])
    assert not np.allclose(old[0], new[0], atol=1e-3)


# --- a citizen of optax ---


def test_inside_multi_steps_it_sees_the_mean_gradient() -> None:
    params, grads = tree_of(2, 6, 9, steps=4)
    tx = frugal(0.1, density=0.5, update_interval=1)
    multi_steps_see_the_mean(tx, params, grads)


def test_its_hyperparameters_can_be_injected_and_partitioned() -> None:
    params, grads = tree_of(2, 6, 9, steps=3)
    options = {"density": 0.5, "scales": (1.0, 0.1)}
    expected, _, _ = run(frugal(0.1, **options), params, grads)
    static = ("density", "update_interval", "seed")
    tx = optax.inject_hyperparams(frugal, static)(
        learning_rate=0.1, density=0.5, scales=jnp.asarray([1.0, 0.1])
    )
    close(run(tx, params, grads)[0], expected, 1e-5, 1e-6)
    assert tx.init(params).hyperparams["scales"].shape == (2,)
    with pytest.raises(ValueError, match=r"density=.* static_args"):
        optax.inject_hyperparams(frugal, static[1:])(0.1).init(params)
    labels = {"layers": {"kernel": "low", "bias": "rest"}}
    tx = optax.partition({"low": frugal(0.1, **options), "rest": optax.sgd(0.1)}, labels)
    end, _, _ = run(tx, params, grads)
    close(end["layers"]["kernel"], expected["layers"]["kernel"], 1e-5, 1e-6)


@pytest.mark.parametrize("kind", ["columns", "svd", "blocks_random", "blocks_ascending"])
def test_optax_finds_the_moments_and_leaves_of_pefts_full(kind: str) -> None:
    trainable = full_tree()
    tx = scale_by_frugal(density=0.5, projection=kind, targets="query")
    state = optax.tree.map_params(tx, lambda leaf: leaf + 1, tx.init(trainable))
    np.testing.assert_array_equal(state.rest_state.mu["embed/embedding"]["value"], 1)
    np.testing.assert_array_equal(state.inner_state.mu["layers/query/kernel"]["value"], 1)
    assert int(state.count) == 0


def test_extra_arguments_reach_the_transformation_inside() -> None:
    def update(updates, state, params=None, *, factor, **extra):
        return jax.tree.map(lambda leaf: factor * leaf, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = scale_by_frugal(density=1.0, inner=inner)
    G = jnp.asarray(decaying(6, 2), jnp.float32)
    near(jitted(tx.update)(G, tx.init(G), factor=3.0)[0], 3 * G, 1e-5)


@pytest.mark.parametrize("kind", ["columns", "svd", "blocks_random"])
def test_the_step_compiles_once_and_its_choices_are_in_a_branch(kind: str) -> None:
    params, grads = tree_of(4, 6, 9, steps=4)
    tx = scale_by_frugal(density=0.5, projection=kind, update_interval=2)
    step, state = jax.jit(tx.update, donate_argnums=1), tx.init(params)
    kinds = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    for grad in grads:
        _, state = step(grad, state)
    assert step._cache_size() == 1
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == kinds
    jaxpr = jax.make_jaxpr(tx.update)(grads[0], state).jaxpr
    names = {equation.primitive.name for equation in jaxpr.eqns}
    assert "cond" in names and not names & {"sort", "qr", "random_bits", "random_wrap"}


@pytest.mark.parametrize("kind", ["columns", "randk", "svd", "blocks_random"])
def test_eight_devices_give_what_one_gives(kind: str) -> None:
    params, grads = tree_of(4, 24, 32, steps=4)
    # With a basis the sign of a rounding error would be a step.
    rule = "sgd" if kind in BASES else "sign"
    tx = frugal(0.1, projection=kind, update_interval=2, state_free=rule, weight_decay=0.1)
    expected, _, _ = run(tx, params, grads)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    spec = {"layers": {"kernel": P(None, "fsdp", "data"), "bias": P(None, "data")}}
    place = functools.partial(
        jax.tree.map, lambda spec, leaf: jax.device_put(leaf, NamedSharding(mesh, spec)), spec
    )
    end, _, _ = run(tx, place(params), [place(grad) for grad in grads])
    close(end, expected, 0, 1e-5)
    assert len(end["layers"]["kernel"].sharding.device_set) == 8


BAD = {
    "density=1.5: give rho": {"density": 1.5},
    "density=nan: give rho": {"density": float("nan")},
    "projection='cols' is unknown; choose one of": {"projection": "cols"},
    "state_free='adam' is unknown; choose one of": {"state_free": "adam"},
    "scales=1.0: give two numbers": {"scales": 1.0},
    r"scales=\(1.0,\): give two numbers": {"scales": (1.0,)},
    r"scales=\(1.0, -0.1\): give s_p and s_i of at least 0": {"scales": (1.0, -0.1)},
    "update_interval=0": {"update_interval": 0},
    "reset=False does not go with": {"reset": False, "projection": "blocks_random"},
    "seed=-1: give an integer": {"seed": -1},
    "seed=0.5: give an integer": {"seed": 0.5},
}


@pytest.mark.parametrize("message", BAD)
def test_arguments_out_of_range_are_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frugal(0.1, **BAD[message])


UNFIT = {
    "projection='columns' nothing of 'kernel', a 6 x 9 kernel: choose at least 0.17, or 0": (0.1,),
    "density=0.05 gives projection='svd' nothing of 'kernel'": (0.05, "svd"),
    "density=0.4 gives none of 1 kernels a state: choose at least 1, or 0": (0.4, "blocks_random"),
    "takes kernels in pairs, but density=1.0 of 1 kernels are 1": (1.0, "blocks_mirror"),
    "matches no parameter": (0.5, "rows", "kernle"),
}


@pytest.mark.parametrize("message", UNFIT)
def test_what_does_not_fit_a_tree_is_refused(message: str) -> None:
    given = dict(zip(("density", "projection", "targets"), UNFIT[message], strict=False))
    with pytest.raises(ValueError, match=message):
        frugal(0.1, **given).init({"kernel": jnp.ones((6, 9))})


def test_the_density_of_one_of_many_gives_one() -> None:
    for total in (2, 3, 10, 49, 98, 103, 107, 161, 768):
        tx = scale_by_frugal(density=1 / total)
        state = jax.eval_shape(tx.init, {"kernel": jax.ShapeDtypeStruct((total, 3), jnp.float32)})
        assert state.spaces["kernel"].shape == (1,)
