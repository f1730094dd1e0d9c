"""LaMDA beyond the table: the schedule, frozen rows, the spectral start, LaMDA++'s ranks."""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import pefts
from pefts.methods.lamda import allocate, frozen_after, ranks

D_IN, D_OUT, RANK, TOTAL = 12, 7, 4, 20
PATH = "kernel"


def problem(key: jax.Array, dtype=jnp.float32, **kwargs) -> tuple:
    model = nn.Dense(D_OUT, param_dtype=dtype, dtype=dtype)
    x = jax.random.normal(jax.random.fold_in(key, 1), (5, D_IN), dtype)
    params = model.init(key, x)["params"]
    arguments = {"total_steps": TOTAL, "rank": RANK, "alpha": 6.0, "freezing": 0.5, **kwargs}
    peft = pefts.lamda(targets=PATH, **arguments)
    return model, x, params, peft, peft.init(key, params)


def stacked(key: jax.Array, **kwargs) -> tuple:
    """Three scanned layers with spectra from flat to steep, and one kernel by itself."""
    U, _, Vt = jnp.linalg.svd(jax.random.normal(key, (4, D_IN, D_OUT)), full_matrices=False)
    decay = jnp.asarray([0.95, 0.6, 0.2, 0.8])[:, None] ** jnp.arange(7.0)[None]
    W = jnp.einsum("lik,lk,lko->lio", U, decay, Vt)
    params = {"layers": {PATH: W[:3]}, "last": {PATH: W[3]}}
    arguments = {"total_steps": TOTAL, "rank": RANK, "freezing": 0.5, **kwargs}
    peft = pefts.lamda(axes={"layers": "lio"}, **arguments)
    return params, peft, peft.init(key, params)


def trained(peft: pefts.Peft, state: pefts.PeftState, steps: int, decay: float = 0.5) -> list:
    """The state before the first and after each update of AdamW on random gradients.

    Gradients are zero where the product's are: `update` alone has to hold what is frozen.
    """
    tx = optax.adamw(0.05, weight_decay=decay)
    moments, states = tx.init(state.trainable), [state]

    @jax.jit
    def step(state, moments, grads, index):
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            updates, moments = tx.update(grads, moments, state.trainable)
        state = state._replace(trainable=optax.apply_updates(state.trainable, updates))
        return peft.update(state, grads, index), moments

    for index in range(steps):
        noise = pefts.randomize(jax.random.key(index), state, 1.0).trainable
        grads = jax.tree.map(jnp.subtract, noise, state.trainable)
        state, moments = step(state, moments, grads, jnp.int32(index))
        states.append(state)
    assert step._cache_size() == 1
    return states


# ---------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize(
    ("rank", "total", "share"), [(1, 1, 1.0), (4, 20, 0.5), (64, 326, 0.3), (7, 3, 0.3), (8, 8, 1)]
)
def test_rows_freeze_in_equal_steps_until_t_i(rank, total, share):
    """n_frozen(t) = min(r, floor(r t / t_i)): 0 at first, r from t_i on."""
    t_i = share * total
    until = frozen_after(rank, t_i)
    for t in range(total + 2):
        wanted = min(rank, math.floor(rank * t / t_i))
        assert int((t >= until).sum()) == wanted
        assert list(t >= until) == [row < wanted for row in range(rank)]
    assert (until > 0).all() and (until <= math.ceil(t_i)).all()


def test_update_follows_the_schedule(key):
    *_, peft, state = problem(key)
    for t, now in enumerate(trained(peft, state, 12)):
        active = np.asarray(now.frozen[PATH]["active"])
        assert RANK - active.sum() == min(RANK, RANK * t // 10)


@pytest.mark.parametrize("kwargs", [{}, {"init": "code"}, {"ranks": [2, 4, 6]}], ids=str)
def test_frozen_rows_keep_every_bit(key, kwargs):
    """Momentum and weight decay included, layer by layer; the core and the other rows move."""
    _, peft, state = stacked(key, **kwargs)
    states = trained(peft, state, 12)
    for path in state.trainable:
        for before, after in itertools.pairwise(states):
            frozen = ~np.asarray(before.frozen[path]["active"])
            old, new = (np.asarray(s.trainable[path]["B"]) for s in (before, after))
            np.testing.assert_array_equal(new[frozen], old[frozen])
            assert (new[~frozen] != old[~frozen]).all()
            assert not np.array_equal(before.trainable[path]["Sg"], after.trainable[path]["Sg"])
        assert not np.asarray(states[-1].frozen[path]["active"]).any()
        moved = np.asarray(states[-1].trainable[path]["B"] != state.trainable[path]["B"])
        assert moved[np.asarray(state.frozen[path]["until"]) > 0].all()


@pytest.mark.parametrize("init", ["spectral", "code"])
def test_gradients_are_those_of_the_product_without_frozen_rows(key, init):
    """In float64, half of the rows frozen, against the derivatives written out."""
    with jax.enable_x64(True):
        model, x, params, peft, state = problem(key, jnp.float64, init=init)
        state = trained(peft, state, 5)[-1]
        state = pefts.randomize(key, state, 0.3)
        state = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, state
        )
        cotangent = jax.random.normal(jax.random.fold_in(key, 2), (5, D_OUT), jnp.float64)

        def loss(trainable):
            bound = peft.bind(params, state._replace(trainable=trainable))
            return jnp.sum(cotangent * pefts.apply(model.apply)({"params": bound}, x))

        grads = jax.grad(loss)(state.trainable)[PATH]
        p = {name: np.asarray(leaf) for part in state for name, leaf in part[PATH].items()}
        active = p["active"]
        assert active.sum() == 2
        B = np.where(active[:, None], p["B"], p["held"])
        h, out = np.asarray(x) @ p["A"], np.asarray(cotangent)
        wanted = {
            "Sg": p["scale"] * h.T @ out @ B.T,
            "B": active[:, None] * (p["scale"] * (h @ p["Sg"]).T @ out),
        }
        for name, value in wanted.items():
            np.testing.assert_allclose(grads[name], value, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------- starts


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("init", ["spectral", "code"])
def test_the_first_change_is_exactly_zero(key, init, dtype):
    model, x, params, peft, state = problem(key, dtype, init=init)
    bound = peft.bind(params, state)
    kernel = bound[PATH]
    _, right = kernel.rule.factors(kernel.state, None)
    np.testing.assert_array_equal(right, 0)
    adapted = jax.jit(pefts.apply(model.apply))({"params": bound}, x)
    np.testing.assert_array_equal(adapted, jax.jit(model.apply)({"params": params}, x))
    np.testing.assert_array_equal(peft.merge(params, state)[PATH], params[PATH])


def test_the_spectral_start_is_the_leading_part_of_the_kernel(key):
    """s A Sg B is the best approximation of rank r, Sg is diagonal and falls."""
    _, _, params, _, state = problem(key)
    p = {**state.frozen[PATH], **state.trainable[PATH]}
    U, S, Vt = np.linalg.svd(np.asarray(params[PATH], np.float64))
    best = U[:, :RANK] @ np.diag(S[:RANK]) @ Vt[:RANK]
    part = p["scale"] * p["A"] @ p["Sg"] @ p["B"]
    np.testing.assert_allclose(part, best, atol=2e-6)
    np.testing.assert_allclose(p["scale"] * p["Sg"], np.diag(S[:RANK]), atol=2e-6)
    np.testing.assert_allclose(p["A"].T @ p["A"], np.eye(RANK), atol=2e-6)
    np.testing.assert_allclose(p["B"] @ p["B"].T, np.eye(RANK), atol=2e-6)
    assert float(p["scale"]) == 6.0 / RANK


def test_the_start_of_the_code_is_that_of_a_lora_with_a_linear_core(key):
    params = {PATH: jnp.ones((400, 60))}
    state = pefts.lamda(total_steps=5, rank=50, init="code", targets=PATH).init(key, params)
    A, Sg = np.asarray(state.frozen[PATH]["A"]), np.asarray(state.trainable[PATH]["Sg"])
    for leaf, bound in ((A, 400**-0.5), (Sg, 50**-0.5)):
        assert np.abs(leaf).max() <= bound
        np.testing.assert_allclose(leaf.std(), bound / 3**0.5, rtol=0.03)
        assert abs(leaf.mean()) < 0.05 * bound
    np.testing.assert_array_equal(state.trainable[PATH]["B"], 0)


def test_counts_before_and_after_freezing(key):
    *_, peft, state = problem(key)
    assert pefts.count(state.trainable) == RANK**2 + RANK * D_OUT
    last = trained(peft, state, 10)[-1]
    left = np.asarray(last.frozen[PATH]["active"]).sum() * D_OUT
    assert RANK**2 + left == RANK**2


def test_the_change_is_a_lora_of_the_same_rank(key):
    _, _, params, peft, state = problem(key)
    state = pefts.randomize(key, trained(peft, state, 6)[-1])
    lora, converted = pefts.to_lora(peft, state, params)
    assert lora.config["rank"] == RANK
    ours, theirs = peft.merge(params, state), lora.merge(params, converted)
    np.testing.assert_allclose(ours[PATH], theirs[PATH], rtol=1e-5, atol=1e-6)
    assert np.abs(ours[PATH] - params[PATH]).max() > 0.1


# ---------------------------------------------------------------------------- LaMDA++


def best_choice(energies, options, budget: int) -> float:
    """The most energy of all choices within the budget."""
    choices = [c for c in itertools.product(*options) if sum(c) <= budget]
    return max(energy(energies, options, choice) for choice in choices)


def energy(energies, options, choice) -> float:
    return sum(e[own.index(r)] for e, own, r in zip(energies, options, choice, strict=True))


def energies_of(S: np.ndarray, options) -> list:
    share = np.cumsum(S**2, axis=-1) / np.sum(S**2, axis=-1, keepdims=True)
    return [row[np.asarray(own) - 1] for row, own in zip(share, options, strict=True)]


def test_allocation_is_the_best_of_all_choices():
    """With steps of one size, for spectra of all kinds and every budget."""
    rng = np.random.default_rng(0)
    options = [[1, 3, 5], [1, 3], [2, 4], [1, 3, 5]]
    for _ in range(20):
        S = np.sort(rng.exponential(size=(4, 6)) ** 2)[:, ::-1]
        energies = energies_of(S, options)
        for budget in range(5, 18):
            chosen = allocate(energies, options, budget)
            assert sum(chosen) <= budget
            best = best_choice(energies, options, budget)
            assert energy(energies, options, chosen) == pytest.approx(best, abs=1e-12)


def test_allocation_passes_over_a_step_that_does_not_fit():
    energies = [np.asarray([0.1, 0.9]), np.asarray([0.5, 0.6])]
    assert allocate(energies, [[1, 8], [1, 2]], 4) == [1, 2]
    assert allocate(energies, [[1, 8], [1, 2]], 10) == [8, 2]
    assert allocate(energies, [[1, 8], [1, 2]], 2) == [1, 1]


def test_ranks_follow_the_spectra_within_the_budget(key):
    params, _, state = stacked(key, ranks=[2, 4, 6])
    found = ranks(state)
    every = [*found["layers/kernel"], found["last/kernel"]]
    assert len(set(every)) > 1 and sum(every) <= RANK * 4
    W = np.concatenate([params["layers"][PATH], params["last"][PATH][None]])
    options = [[2, 4, 6]] * 4
    energies = energies_of(np.linalg.svd(np.asarray(W, np.float64), compute_uv=False), options)
    best = best_choice(energies, options, RANK * 4)
    assert energy(energies, options, every) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("init", ["spectral", "code"])
def test_padding_stays_dead(key, init):
    """Beyond a layer's rank A, Sg and B are zero, and stay so in training."""
    params, peft, state = stacked(key, ranks=[2, 4, 6], init=init)
    inside = np.asarray(state.frozen["layers/kernel"]["until"]) > 0
    assert len(set(inside.sum(-1))) > 1
    x = jax.random.normal(key, (3, 5, D_IN))

    def loss(trainable):
        bound = peft.bind(params, state._replace(trainable=trainable))["layers"][PATH]
        run = jax.vmap(lambda x, W, p: bound.rule.linear(x, W, p, pefts.bound.Call()))
        return jnp.sum(run(x, bound.base, bound.state) ** 2)

    grads = jax.grad(loss)(state.trainable)
    for group in (state.trainable["layers/kernel"], grads["layers/kernel"]):
        assert not np.asarray(group["B"])[~inside].any()
        outside = ~(inside[:, :, None] & inside[:, None, :])
        assert not np.asarray(group["Sg"])[outside].any()
    assert not np.asarray(state.frozen["layers/kernel"]["A"]).swapaxes(1, 2)[~inside].any()
    last = trained(peft, state, 3)[-1].trainable["layers/kernel"]
    np.testing.assert_array_equal(np.asarray(last["B"])[~inside], 0)


def test_a_stack_of_ranks_is_each_layer_by_itself(key):
    params, peft, state = stacked(key, ranks=[2, 4, 6])
    merged = peft.merge(params, pefts.randomize(key, state))["layers"][PATH]
    moved = pefts.randomize(key, state).trainable["layers/kernel"]
    for layer, rank in enumerate(ranks(state)["layers/kernel"]):
        single = {PATH: params["layers"][PATH][layer]}
        alone = pefts.lamda(total_steps=TOTAL, rank=rank, freezing=0.5, targets=PATH)
        own = alone.init(key, single)
        np.testing.assert_array_equal(
            own.frozen[PATH]["until"], state.frozen["layers/kernel"]["until"][layer][:rank]
        )
        part = {"Sg": moved["Sg"][layer][:rank, :rank], "B": moved["B"][layer][:rank]}
        signs = jnp.sign(jnp.sum(own.frozen[PATH]["A"] * cut(state, "A", layer, rank), axis=0))
        part = {"Sg": signs[:, None] * part["Sg"] * signs[None], "B": signs[:, None] * part["B"]}
        dense = alone.merge(single, own._replace(trainable={PATH: part}))[PATH]
        np.testing.assert_allclose(dense, merged[layer], atol=2e-5)


def cut(state: pefts.PeftState, name: str, layer: int, rank: int) -> jax.Array:
    return state.frozen["layers/kernel"][name][layer][:, :rank]


def test_ranks_need_values_that_are_there(key):
    params, peft, _ = stacked(key, ranks=[2, 4])
    with pytest.raises(ValueError, match="lamda: the ranks depend .* inside jit"):
        jax.eval_shape(peft.init, key, params)
    broken = {**params, "last": {PATH: params["last"][PATH].at[0, 0].set(jnp.nan)}}
    with pytest.raises(ValueError, match="'last/kernel' has no singular values"):
        peft.init(key, broken)
    with pytest.raises(ValueError, match=r"ranks=\[8, 9\]: none is possible for 'last/kernel'"):
        stacked(key, ranks=[8, 9])


def test_trains_beside_a_head(key):
    """Inside a chain the schedule reaches its own member."""
    params, inputs = tiny.parameters(), tiny.inputs()
    axes = pefts.infer_axes(tiny.Classifier().apply, params, *inputs)
    peft = pefts.chain(
        pefts.full(targets="classifier"),
        pefts.lamda(total_steps=4, rank=2, freezing=0.5, axes=axes),
    )
    state = peft.init(key, params)
    for step in range(2):
        state = peft.update(state, state.trainable, jnp.int32(step))
    assert not any(bool(group["active"].any()) for group in state.frozen["1"].values())
