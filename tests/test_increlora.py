"""IncreLoRA beyond the table: the official growth, what is held still, the score's bound."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pefts
from pefts.methods.increlora import prune, ranks, scores, update_from_dense
from pefts.rank_growth import FACTORS, active, below, plan_of

GOLDEN = Path(__file__).parents[2] / "shared/golden/official/increlora/golden.npz"
AXES = {"layers": "lio"}
WIDE = {"target_rank": 2, "max_rank": 4, "growth": (2, 1), "schedule": (2, 2, 0)}


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.exists():
        pytest.skip("the official IncreLoRA vectors (../shared/golden/official/increlora) are away")
    return dict(np.load(GOLDEN))


def with_update(state: pefts.PeftState, deltas: dict) -> pefts.PeftState:
    """The state whose factors multiply to the given updates, (d_in, d_out) by path."""
    trainable, frozen = {}, dict(state.frozen)
    for path, delta in deltas.items():
        p, r = frozen[path], state.trainable[path]["e"].shape[-1]
        U, s, V = np.linalg.svd(delta / (6.0 / (int(p["rank"]) + 1e-5)), full_matrices=False)
        group = {"A": jnp.asarray(U[:, :r]), "B": jnp.asarray(V[:r]), "e": jnp.asarray(s[:r])}
        trainable[path] = group
        frozen[path] = {**p, **{f"held_{name}": group[name] for name in FACTORS}}
    return pefts.PeftState(trainable, frozen)


def test_the_official_growth(golden, x64):
    """Scores, averages, thresholds and ranks, step by step, from the gradients of whole kernels."""
    sides = golden["dims"]
    params = {f"m{n}": {"kernel": jnp.zeros((sides[n], sides[n + 1]))} for n in range(3)}
    peft = pefts.increlora(
        target_rank=float(golden["target_total_rank"]) / 3,
        max_rank=5,
        alpha=float(golden["lora_alpha"]),
        growth=(int(golden["top_h"]), int(golden["add"])),
        schedule=(int(golden["init_warmup"]), int(golden["interval"]), 0),
        betas=(float(golden["beta1"]), float(golden["beta2"])),
    )
    state = peft.init(jax.random.key(0), params)
    averages = ("sensitivity", "uncertainty")
    double = {
        path: {**p, "alpha": jnp.float64(6.0), **{name: jnp.float64(0) for name in averages}}
        for path, p in state.frozen.items()
        if path != "shared"
    }
    state = state._replace(frozen={**state.frozen, **double})
    update = jax.jit(functools.partial(update_from_dense, peft.config))
    for t in range(int(golden["steps"])):
        state = with_update(state, {f"m{n}/kernel": golden[f"deltaW_{n}"][t].T for n in range(3)})
        grads = {f"m{n}/kernel": jnp.asarray(golden[f"grad_deltaW_{n}"][t].T) for n in range(3)}
        before, state = state, update(state, grads, jnp.int32(t))
        check_step(golden, before, state, t)
    for n in range(3):
        assert int(state.frozen[f"m{n}/kernel"]["reach"]) == int(golden[f"final_ncomp_{n}"])


def check_step(golden: dict, before: pefts.PeftState, after: pefts.PeftState, t: int) -> None:
    found = []
    for n in range(3):
        p = after.frozen[f"m{n}/kernel"]
        np.testing.assert_allclose(p["sensitivity"], golden[f"ipt_{n}"][t], rtol=1e-9)
        np.testing.assert_allclose(p["uncertainty"], golden[f"unc_{n}"][t], rtol=1e-9)
        found.append(float(p["sensitivity"] * p["uncertainty"]))
        reserve = after.trainable[f"m{n}/kernel"]["e"][int(p["reach"]) - 1]
        if int(p["reach"]) > int(before.frozen[f"m{n}/kernel"]["reach"]):
            assert float(reserve) == golden[f"reserve_e_{n}"][t]
    assert list(ranks(after).values()) == golden["ranks"][t].tolist()
    if golden["threshold"][t] >= 0:
        np.testing.assert_allclose(sorted(found)[-2], golden["threshold"][t], rtol=1e-9)
        grew = [a > b for a, b in zip(ranks(after).values(), ranks(before).values(), strict=True)]
        assert grew == [score >= golden["threshold"][t] * (1 - 1e-9) for score in found]


def test_the_official_update(golden, x64):
    """alpha / (R + 1e-5) B (A * E) of all components, with R that of the active ones."""
    peft = pefts.increlora(max_rank=4, alpha=6.0, target_rank=3, targets="kernel")
    params = {"kernel": jnp.zeros((5, 7))}
    state = peft.init(jax.random.key(0), params)
    trainable = {
        "A": jnp.asarray(golden["last_A"].T),
        "B": jnp.asarray(golden["last_B"].T),
        "e": jnp.asarray(golden["last_E"]),
    }
    frozen = {**state.frozen["kernel"], "rank": jnp.int32(golden["ranks"][-1][2])}
    state = pefts.PeftState({"kernel": trainable}, {**state.frozen, "kernel": frozen})
    dense = peft.merge(params, state)["kernel"]
    np.testing.assert_allclose(dense, golden["last_delta"].T, rtol=1e-9, atol=1e-14)


def problem(**kwargs) -> tuple:
    """Three scanned layers of 8 x 5 and one kernel of 5 x 6."""
    params = {
        "layers": {"kernel": jax.random.normal(jax.random.key(1), (3, 8, 5))},
        "last": {"kernel": jax.random.normal(jax.random.key(2), (5, 6))},
    }
    peft = pefts.increlora(**{**WIDE, **kwargs}, axes=AXES)
    return params, peft, jax.jit(peft.init)(jax.random.key(0), params)


def run(peft, state, steps: int, tx=None, ties: bool = False) -> list:
    """States after each update, on random gradients."""
    tx = optax.adamw(1e-2, weight_decay=0.1) if tx is None else tx

    @jax.jit
    def one(state, moments, step):
        key = jax.random.fold_in(jax.random.key(3), step)
        grads = pefts.randomize(key, state, 1.0).trainable
        if ties:
            grads = jax.tree.map(jnp.zeros_like, grads)
        for path, group in grads.items():  # as the product's own: none where nothing is trained
            p = state.frozen[path]
            exists = below(p, p["reach"])
            group["A"] = jnp.where(exists[..., None, :], group["A"], 0.0)
            group["B"] = jnp.where(exists[..., None], group["B"], 0.0)
            group["e"] = jnp.where(active(p), group["e"], 0.0)
        with jax.numpy_dtype_promotion("standard"):  # optax counts its steps in mixed types
            updates, moments = tx.update(grads, moments, state.trainable)
        moved = state._replace(trainable=optax.apply_updates(state.trainable, updates))
        return peft.update(moved, grads, step), moments

    states, moments = [], tx.init(state.trainable)
    for step in range(steps):
        state, moments = one(state, moments, jnp.int32(step))
        states.append(state)
    assert one._cache_size() == 1
    return states


def total(state: pefts.PeftState) -> int:
    return sum(int(np.sum(found)) for found in ranks(state).values())


@pytest.mark.parametrize(
    ("kwargs", "wanted"),
    [
        ({}, [4, 4, 4, 4, 6, 6, 8, 8, 8, 8]),
        ({"growth": (3, 1)}, [4, 4, 4, 4, 7, 7, 8, 8, 8, 8]),
        (
            {"growth": (2, 2), "target_rank": 2.75, "max_rank": 5},
            [4, 4, 4, 4, 8, 8, 11, 11, 11, 11],
        ),
        ({"growth": (1, 3), "schedule": (0, 3, 0)}, [4, 4, 4, 7, 7, 7, 8, 8, 8, 8]),
        ({"target_rank": 1}, [4] * 10),
        ({"target_rank": 4, "growth": (4, 2)}, [4, 4, 4, 4, 12, 12, 16, 16, 16, 16]),
    ],
)
def test_the_sum_of_ranks_grows_to_the_target_and_never_past_it(kwargs, wanted):
    """Also where top_h * add does not divide what is missing, and where kernels are full."""
    _, peft, state = problem(**kwargs)
    states = run(peft, state, 10)
    assert [total(state) for state in states] == wanted
    for before, after in zip(states, states[1:], strict=False):
        for path, group in after.frozen.items():
            if path != "shared":
                assert np.all(group["rank"] >= before.frozen[path]["rank"])


def test_equal_scores_go_by_path_and_layer():
    _, peft, state = problem(growth=(3, 1), schedule=(0, 1, 0), gamma=0.0)
    states = run(peft, state, 3, ties=True)
    assert ranks(states[1]) == {"last/kernel": 2, "layers/kernel": [2, 2, 1]}
    assert ranks(states[2]) == {"last/kernel": 3, "layers/kernel": [2, 2, 1]}


def test_reserves_wait_with_a_small_e_and_vanish_at_the_target():
    """Weight decay and momentum move no e that is not active; A and B in reserve learn."""
    _, peft, state = problem(growth=(2, 2), target_rank=2.5)
    for path, group in state.trainable.items():
        np.testing.assert_array_equal(group["A"][..., 1:], 0)
        np.testing.assert_array_equal(state.frozen[path]["reach"], 1)
    states = run(peft, state, 8)
    finished = [total(state) == 10 for state in states]
    assert finished == [False] * 6 + [True] * 2
    for end, (before, after) in zip(
        finished[1:], zip(states, states[1:], strict=False), strict=True
    ):
        for path, group in after.trainable.items():
            p = {name: np.asarray(leaf) for name, leaf in after.frozen[path].items()}
            r = np.arange(p["born"].shape[-1])
            waits = (r >= p["rank"][..., None]) & (r < p["reach"][..., None])
            beyond = r >= p["reach"][..., None]
            assert np.all(group["e"][waits] == np.float32(0 if end else 1e-5))
            assert np.all(group["e"][beyond] == 0)
            A, old = (
                np.moveaxis(group["A"], -2, -1),
                np.moveaxis(before.trainable[path]["A"], -2, -1),
            )
            assert np.all(A[beyond] == 0) and np.all(A[waits] != old[waits])
            B = np.asarray(group["B"])
            assert np.all(B[beyond] == 0)
            assert np.all(B[waits] != np.asarray(before.trainable[path]["B"])[waits])


def test_new_components_are_drawn_as_the_first_ones_were():
    params = {"kernel": jnp.ones((400, 300))}
    peft = pefts.increlora(2, 3, growth=(1, 2), targets="kernel")
    state = peft.init(jax.random.key(0), params)
    A, B = (state.trainable["kernel"][name] for name in "AB")
    assert abs(float(A[:, 0].std()) - 0.02) < 2e-3 and not A[:, 1:].any()
    grads = jax.tree.map(jnp.zeros_like, state.trainable)
    update = jax.jit(peft.update)
    state = update(state, grads, jnp.int32(0))
    A, B = (state.trainable["kernel"][name] for name in "AB")
    np.testing.assert_allclose(A.std(0), 0.02, rtol=0.15)
    np.testing.assert_allclose(B.std(1), 0.02, rtol=0.15)
    assert abs(np.corrcoef(A.T)[1, 2]) < 0.2
    np.testing.assert_array_equal(state.trainable["kernel"]["e"], np.float32([0, 1e-5, 1e-5]))
    other = peft.init(jax.random.key(1), params)
    other = update(other, grads, jnp.int32(0))
    assert not np.array_equal(other.trainable["kernel"]["A"][:, 1], A[:, 1])


def test_a_new_component_comes_to_its_full_steps_over_the_ramp():
    """Steps of plain descent on a constant gradient: 1/3, 2/3, 1, 1 after birth; the first none."""
    params = {"kernel": jnp.ones((6, 4))}
    peft = pefts.increlora(3, 3, growth=(1, 1), schedule=(1, 4, 3), gamma=0.0, targets="kernel")
    state, update = peft.init(jax.random.key(0), params), jax.jit(peft.update)
    grads = jax.tree.map(jnp.ones_like, state.trainable)
    grads["kernel"]["e"] = jnp.zeros(3).at[0].set(1)
    moves = {name: [] for name in FACTORS}
    for step in range(10):
        old = state.trainable["kernel"]
        new = {"kernel": {name: old[name] - 0.25 * grads["kernel"][name] for name in FACTORS}}
        if step == 5:
            grads["kernel"]["e"] = jnp.zeros(3).at[:2].set(1)
            new["kernel"]["e"] = old["e"] - 0.25 * grads["kernel"]["e"]
        state = update(pefts.PeftState(new, state.frozen), grads, jnp.int32(step))
        for name in FACTORS:
            moves[name].append(np.asarray(old[name] - state.trainable["kernel"][name]))
    third = np.float32(0.25 / 3)
    for step, wanted in ((1, third), (2, 2 * third), (3, 0.25), (6, 0.25)):
        np.testing.assert_allclose(moves["A"][step][:, 0], 0.25, rtol=1e-5)
        np.testing.assert_allclose(moves["A"][step][:, 1], wanted, rtol=1e-5)
        np.testing.assert_allclose(moves["B"][step][1], wanted, rtol=1e-5)
    np.testing.assert_allclose(moves["A"][5][:, 2], third, rtol=1e-5)
    e = np.stack(moves["e"])
    np.testing.assert_allclose(e[5:9, 1], np.array([third, 2 * third, 0.25, 0.25]), rtol=1e-4)
    np.testing.assert_allclose(e[:, 0], 0.25, rtol=1e-5)


@pytest.mark.parametrize("larger", ["rows", "columns"])
def test_the_score_is_the_least_that_the_margins_allow(x64, larger):
    """From factor gradients with the penalty in them, against the whole kernel's gradient.

    Its entries mostly agree in sign along a row, and not down a column; or the other way round.
    """
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(8, 5)))}
    peft = pefts.increlora(**{**WIDE, "gamma": 0.7, "target_rank": 3}, targets="kernel")
    state = peft.init(jax.random.key(0), params)
    group = {
        "A": jnp.asarray(rng.normal(size=(8, 4))),
        "B": jnp.asarray(rng.normal(size=(4, 5))),
        "e": jnp.asarray([0.8, -0.4, 1e-5, 0.0]),
    }
    p = {**state.frozen["kernel"], "rank": jnp.int32(2), "reach": jnp.int32(3)}
    p |= {name: jnp.float64(0) for name in ("sensitivity", "uncertainty")}
    p |= {"alpha": jnp.float64(16), **{f"held_{name}": group[name] for name in FACTORS}}
    state = pefts.PeftState({"kernel": group}, {**state.frozen, "kernel": p})
    signs = np.sign((group["A"] * group["e"][None]) @ group["B"]) * rng.uniform(-0.2, 1, (8, 5))
    signs *= (-1.0) ** (np.arange(8)[:, None] if larger == "rows" else np.arange(5))

    def loss(params):
        return jnp.sum(params["kernel"] * signs) + 0.01 * jnp.sum(params["kernel"] ** 2)

    def whole(trainable):
        full = state._replace(trainable=trainable)
        return loss(peft.merge(params, full)) + peft.penalty(full)

    merged = peft.merge(params, state)
    entries = np.asarray((merged["kernel"] - params["kernel"]) * jax.grad(loss)(merged)["kernel"])
    rows, columns = np.abs(entries.sum(1)).sum(), np.abs(entries.sum(0)).sum()
    assert (rows > columns) == (larger == "rows")
    grads = jax.grad(whole)(state.trainable)
    assert [value != 0 for value in grads["kernel"]["e"]] == [True, True, False, False]
    moved = state._replace(trainable=jax.tree.map(lambda leaf: leaf - 0.1, state.trainable))
    for score, size in (("sqrt", 40**0.5), ("mean", 40.0)):
        plan = plan_of(3, (2, 1), (2, 2, 0), (0.85, 0.85), 0.7, score)
        found = scores(moved, grads, plan)["kernel"]
        np.testing.assert_allclose(found, max(rows, columns) / size, rtol=1e-9)
        assert found < np.abs(entries).sum() / size
        full = update_from_dense(
            {**peft.config, "score": score, "betas": (0.0, 0.0)},
            moved,
            {"kernel": jax.grad(loss)(merged)["kernel"]},
            jnp.int32(1),
        )
        sensitivity = full.frozen["kernel"]["sensitivity"]
        np.testing.assert_allclose(sensitivity, np.abs(entries).sum() / size, rtol=1e-9)


def test_growing_changes_the_update_by_the_scale_alone():
    """R to R + add divides by (R + add) / R; the fresh reserves add 1e-5 of themselves at most."""
    params, peft, state = problem(growth=(4, 1))
    states = run(peft, state, 5)
    before, after = states[3], states[4]
    assert (total(before), total(after)) == (4, 8)
    moved = after._replace(frozen=before.frozen)
    for path in ("last", "layers"):
        W = params[path]["kernel"]
        old, new = (peft.merge(params, s)[path]["kernel"] - W for s in (moved, after))
        assert float(jnp.abs(old).max()) > 1e-4
        np.testing.assert_allclose(new, old / 2, atol=2e-5 * float(jnp.abs(old).max()) + 3e-7)


def test_step_zero_has_no_reserves_and_no_change():
    params, peft, state = problem()
    merged = peft.merge(params, state)
    jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_the_penalty_is_the_mean_over_what_exists():
    _, peft, state = problem(gamma=3.0)
    late = run(peft, state, 6)[-1]
    found = []
    for path, group in late.trainable.items():
        reach = np.ravel(late.frozen[path]["reach"])
        As = np.asarray(group["A"]).reshape(-1, *group["A"].shape[-2:])
        Bs = np.asarray(group["B"]).reshape(-1, *group["B"].shape[-2:])
        for A, B, n in zip(As, Bs, reach, strict=True):
            for k in range(n):
                found += [abs(A[:, k] @ A[:, k] - 1), abs(B[k] @ B[k] - 1)]
    assert len(found) == 2 * (6 + 4)
    np.testing.assert_allclose(peft.penalty(late), 3 * np.mean(found), rtol=1e-5)


def test_pruning_changes_shapes_and_nothing_else():
    params, peft, state = problem(growth=(1, 2), target_rank=1.75)
    final = run(peft, state, 8)[-1]
    small, kept = prune(final), ranks(final)
    assert (total(final), ranks(small)) == (7, kept)
    assert small.trainable["last/kernel"]["A"].shape == (5, kept["last/kernel"])
    assert small.trainable["layers/kernel"]["B"].shape == (3, max(kept["layers/kernel"]), 5)
    assert small.frozen["layers/kernel"]["held_A"].shape == (3, 8, max(kept["layers/kernel"]))
    assert pefts.count(small.trainable) < pefts.count(final.trainable)
    for path in ("last", "layers"):
        before, after = (peft.merge(params, s)[path]["kernel"] for s in (final, small))
        np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-7)
        assert not np.allclose(after, params[path]["kernel"], atol=1e-5)


def test_training_gives_the_rank_to_the_kernel_that_needs_it(key):
    """`up` is off by a matrix of rank 4, `down` by a much smaller one."""
    x = jax.random.normal(key, (64, 8))
    params = {name: {"kernel": jnp.zeros((8, 6))} for name in ("down", "up")}
    low = jax.random.normal(jax.random.fold_in(key, 1), (8, 4))
    change = 0.5 * low @ jax.random.normal(jax.random.fold_in(key, 2), (4, 6))
    peft = pefts.increlora(2.5, 4, growth=(1, 1), schedule=(20, 10, 5), alpha=4.0)
    tx = optax.adam(2e-2)

    def loss(trainable, frozen):
        state = pefts.PeftState(trainable, frozen)
        merged = peft.merge(params, state)
        errors = (
            x @ (merged["up"]["kernel"] - change),
            x @ (merged["down"]["kernel"] - 0.02 * change),
        )
        return sum(jnp.mean(error**2) for error in errors) + peft.penalty(state)

    def train(carry, step):
        state, moments = carry
        value, grads = jax.value_and_grad(loss)(*state)
        updates, moments = tx.update(grads, moments, state.trainable)
        state = state._replace(trainable=optax.apply_updates(state.trainable, updates))
        return (peft.update(state, grads, step), moments), value

    state = peft.init(key, params)
    with jax.numpy_dtype_promotion("standard"):  # optax counts its steps in mixed types
        (state, _), values = jax.jit(
            lambda carry: jax.lax.scan(train, carry, jnp.arange(150, dtype=jnp.int32))
        )((state, tx.init(state.trainable)))
    assert ranks(state) == {"down/kernel": 1, "up/kernel": 4}
    assert float(values[-1]) < 0.2 * float(values[0])


def test_pairs_come_as_tuples_or_as_json_lists():
    _, peft, state = problem()
    config = json.loads(json.dumps(peft.config))
    again = pefts.from_config(config)
    assert again.config == peft.config == config
    jax.tree.map(np.testing.assert_array_equal, run(again, state, 5)[-1], run(peft, state, 5)[-1])
    grads = {
        path: jnp.ones((*g["A"].shape[:-1], g["B"].shape[-1]))
        for path, g in state.trainable.items()
    }
    assert total(update_from_dense(config, state, grads, jnp.int32(4))) == 6


def test_rank_patterns_are_the_largest_ranks():
    params, _, _ = problem()
    peft = pefts.increlora(**{**WIDE, "growth": (4, 4)}, axes=AXES, rank_pattern={"last": 1})
    state = run(peft, peft.init(jax.random.key(0), params), 8)[-1]
    assert ranks(state)["last/kernel"] == 1 and total(state) == 8
    with pytest.raises(ValueError, match="ranks of 8 in sum, but the 4 kernels cannot.* beyond 4"):
        patterns = {"last": 1, "layers": 1}
        pefts.increlora(**WIDE, axes=AXES, rank_pattern=patterns).init(jax.random.key(0), params)
