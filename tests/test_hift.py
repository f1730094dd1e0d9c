"""HiFT against the official schedule and numpy in float64."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients import close, jitted, run
from test_active import L, bits, grads_of, layer, sharded_run, tree_of, unroll

import pefts
from pefts.optimizers.active import EMBEDDINGS, HEAD, NORM
from pefts.optimizers.hift import cycle_length, groups, hift

GOLDEN = Path(__file__).parents[1] / "../shared/golden/official/hift/golden.npz"
B1, B2, EPS = 0.9, 0.999, 1e-8
N = L + 3  # embedding, layers, norm, head

pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")


def units(tree: Any) -> list:
    """The parts of a tree in forward order."""
    return [tree["embed"], *(layer(tree, i) for i in range(L)), tree["norm"], tree["lm_head"]]


def moves(tx: Any, params: Any, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Which units move in each step, (steps, units), and how far, for gradients of one."""
    ones, state, found = jax.tree.map(jnp.ones_like, params), tx.init(params), []
    for _ in range(steps):
        updates, state = jitted(tx.update)(ones, state, params)
        sizes = [
            {float(x) for leaf in jax.tree.leaves(unit) for x in np.unique(leaf)}
            for unit in units(updates)
        ]
        assert all(len(size) == 1 for size in sizes)  # a unit moves as a whole
        found.append([-size.pop() for size in sizes])
    sizes = np.asarray(found)
    return sizes != 0, np.max(sizes, axis=1)


def linear(rate: float, steps: int) -> Any:
    """optax.linear_schedule to 0, in the precision of the test."""
    return lambda count: rate * (1 - count.astype(jnp.result_type(float)) / steps)


# --- the official code ---


@pytest.fixture(scope="module")
def golden() -> Any:
    if not GOLDEN.exists():
        pytest.skip("the golden vectors of the official code are not beside this repository")
    return np.load(GOLDEN)


@pytest.mark.parametrize("case", range(6))
def test_the_official_schedule(case: int, golden: Any, x64: None) -> None:
    c = {name: golden[f"case{case}__{name}"] for name in ("active", "lr", "k", "order")}
    m, steps = int(golden[f"case{case}__group_element"]), int(golden["n_steps"])
    strategy = str(golden[f"case{case}__strategy"])
    frozen = golden[f"case{case}__freeze_layers"].tolist()
    order: Any = strategy
    if frozen or strategy == "random":
        order = c["order"].tolist()
        assert sorted(order + frozen) == list(range(N))
    schedule = linear(float(golden["lr"]), steps)
    tx = hift(schedule, group_size=m, order=order, inner=optax.identity())
    active, lr = moves(tx, tree_of(0, jnp.float64), steps)
    if len(c["order"]) % m == 0:
        np.testing.assert_array_equal(active, c["active"])
        np.testing.assert_allclose(lr, c["lr"], rtol=0, atol=1e-15)
        assert cycle_length(tree_of(0), group_size=m, order=order) == int(c["k"])
    else:  # its groups drift; ours do not
        assert not np.array_equal(active, c["active"])
        k = -(-N // m)
        assert k == int(c["k"]) + 1
        np.testing.assert_array_equal(active[:k].sum(0), 1)
        np.testing.assert_array_equal(active[k : 2 * k], active[:k])


# --- its steps ---


def oracle(params: Any, grads: list, queue: list[list[int]], *, rates: list, wd: float) -> Any:
    """AdamW in numpy, unit by unit, each with its own moments and count."""
    W = units(jax.tree.map(lambda leaf: np.array(leaf, np.float64), params))
    M, V = (jax.tree.map(np.zeros_like, W) for _ in range(2))
    counts = [0] * len(W)
    for t, G in enumerate(grads):
        for u in queue[t % len(queue)]:
            counts[u] += 1
            leaves = map(jax.tree.leaves, (W[u], M[u], V[u], units(G)[u]))
            for w, m, v, g in zip(*leaves, strict=True):
                g = np.asarray(g, np.float64)
                m[...], v[...] = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
                m_hat, v_hat = m / (1 - B1 ** counts[u]), v / (1 - B2 ** counts[u])
                w -= rates[t // len(queue)] * (m_hat / (np.sqrt(v_hat) + EPS) + wd * w)
    return W


@pytest.mark.parametrize(
    ("options", "queue"),
    [
        ({}, [[0], [1], [2], [3], [4], [5], [6]]),
        ({"group_size": 2, "order": "up2down"}, [[6, 5], [4, 3], [2, 1], [0]]),
        ({"group_size": 3}, [[0, 1, 2], [3, 4, 5], [6]]),
        ({"group_size": 2, "order": (4, 2, 0)}, [[4, 2], [0]]),
    ],
)
@pytest.mark.parametrize("unrolled", [False, True])
def test_steps_are_the_papers(options: dict, queue: list, unrolled: bool, x64: None) -> None:
    params, grads = tree_of(0, jnp.float64), grads_of(2 * len(queue) + 1, jnp.float64)
    rates = [0.03, 0.02, 0.01]
    expected = oracle(params, grads, queue, rates=rates, wd=0.1)
    tx = hift(linear(0.03, 3), weight_decay=0.1, **options)
    shape = unroll if unrolled else (lambda tree: tree)
    end, state, _ = run(tx, shape(params), [shape(grad) for grad in grads])
    if unrolled:
        found = [end["embed"], *(end[f"layers_{i}"] for i in range(L)), end["norm"], end["lm_head"]]
    else:
        found = units(end)
        counts = [sum(1 + i in queue[t % len(queue)] for t in range(len(grads))) for i in range(L)]
        np.testing.assert_array_equal(
            state[0].layers.count if "weight_decay" in options else state[0].layers[0].count, counts
        )
    close(found, expected, 1e-12, 1e-14)


def test_one_group_of_everything_is_the_optimizer_inside(x64: None) -> None:
    params, grads = tree_of(0, jnp.float64), grads_of(5, jnp.float64)
    schedule = optax.linear_schedule(0.1, 0.0, 6)
    expected, _, _ = run(optax.adamw(schedule, weight_decay=0.1), params, grads)
    for order in ("down2up", "up2down", "random"):
        tx = hift(schedule, group_size=N, order=order, weight_decay=0.1)
        close(run(tx, params, grads)[0], expected, 1e-12, 1e-14)
    assert cycle_length(params, group_size=N) == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_after_a_cycle_every_leaf_has_changed_once_and_kept_its_bits_before(dtype: Any) -> None:
    params, grads = tree_of(0, dtype), grads_of(2 * N, dtype)
    tx = hift(0.1, order="random", weight_decay=0.5, seed=3)
    state, changes = tx.init(params), np.zeros((2 * N, N), int)
    for t, grad in enumerate(grads):
        updates, state = jitted(tx.update)(grad, state, params)
        new = optax.apply_updates(params, updates)
        for u, (a, b) in enumerate(zip(units(params), units(new), strict=True)):
            differ = [x != y for x, y in zip(bits(a), bits(b), strict=True)]
            assert all(differ) or not any(differ)
            changes[t, u] = all(differ)
        params = new
    assert (changes.sum(1) == 1).all() and (changes[:N].sum(0) == 1).all()
    np.testing.assert_array_equal(changes[:N], changes[N:])  # shuffled once
    expected = groups("random", 1, N, 3)[:, 0]
    np.testing.assert_array_equal(np.argmax(changes[:N], axis=1), expected)
    assert sorted(expected.tolist()) == list(range(N)) != expected.tolist()
    assert expected.tolist() != groups("random", 1, N, 4)[:, 0].tolist()


def test_the_learning_rate_waits_for_the_cycle() -> None:
    tx = hift(optax.linear_schedule(1.0, 0.0, 4), group_size=2, inner=optax.identity())
    _, rates = moves(tx, tree_of(0), 9)
    np.testing.assert_allclose(rates, [1, 1, 1, 1, 0.75, 0.75, 0.75, 0.75, 0.5])


def test_a_schedule_of_all_updates_waits_too() -> None:
    """Asked for update 0, k, 2k, ...: here k = 4."""
    schedule = optax.linear_schedule(1.0, 0.0, 16)
    tx = hift(schedule, group_size=2, inner=optax.identity(), ticks="updates")
    _, rates = moves(tx, tree_of(0), 9)
    np.testing.assert_allclose(rates, [1, 1, 1, 1, 0.75, 0.75, 0.75, 0.75, 0.5])


def test_the_state_has_the_size_of_the_formula() -> None:
    params = tree_of(0)
    state = jax.eval_shape(hift(0.1, group_size=2).init, params)
    # Adam's moments of all, a count for each unit, our count, and the units at work.
    assert pefts.count(state) == 2 * pefts.count(params) + N + 1 + 2
    assert state[0].layers.mu["layers"]["query"]["kernel"].shape == (L, 1, 3, 5)
    assert state[0].layers.count.shape == (L,)
    state = jax.eval_shape(hift(0.1).init, unroll(params))
    assert pefts.count(state) == 2 * pefts.count(params) + N + 1 + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 0}, "group_size=0: give an integer of at least 1"),
        ({"group_size": N + 1}, "group_size=8: there are 7 units"),
        ({"order": "upwards"}, r"order='upwards' is unknown; choose one of \('down2up'"),
        ({"order": (0, 7)}, r"order=\(0, 7\) must.*0 to 6"),
        ({"order": (0, 1, 0)}, "names a unit twice"),
        ({"after": (NORM,)}, "'lm_head/kernel' is in no layer"),
        ({"before": ("wte",)}, "before: 'wte' matches no parameter"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hift(0.1, **options).init(tree_of(0))
    with pytest.raises(ValueError, match=message):
        cycle_length(tree_of(0), **options)


def test_ticks_are_known() -> None:
    with pytest.raises(ValueError, match="ticks='epochs' is unknown"):
        hift(0.1, ticks="epochs")


def test_usual_units_may_be_missing_and_others_are_named() -> None:
    params = tree_of(0)
    del params["norm"], params["embed"]
    assert cycle_length(params) == L + 1
    params["extra"] = jnp.ones(2)
    assert cycle_length(params, after=(HEAD, "^extra$")) == L + 2
    assert cycle_length(jax.eval_shape(lambda: tree_of(0)), before=EMBEDDINGS) == N


def test_hyperparameters_can_be_injected_and_a_switch_compiles_nothing() -> None:
    params, grads = tree_of(0), grads_of(N + 1)
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    make = functools.partial(hift, schedule, weight_decay=0.1, order="random", seed=2)
    static = ("group_size", "learning_rate")
    tx = optax.inject_hyperparams(hift, static_args=static)(
        schedule, weight_decay=0.1, order="random", seed=2
    )
    step, state, end = jax.jit(tx.update, donate_argnums=1), tx.init(params), params
    for grad in grads:
        updates, state = step(grad, state, end)
        end = optax.apply_updates(end, updates)
    assert step._cache_size() == 1
    close(end, run(make(), params, grads)[0], 1e-5, 1e-6)


@pytest.mark.parametrize("order", ["down2up", "random"])
def test_eight_devices_give_what_one_gives(order: str) -> None:
    tx = hift(optax.linear_schedule(0.1, 0.0, 4), group_size=3, order=order, weight_decay=0.1)
    expected, placed = sharded_run(tx, 5)
    close(placed, expected, 0, 1e-5)
