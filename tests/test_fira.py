"""Fira against numpy in float64 and the official code, and the properties of its residual."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients import aligned, close, decaying, gradients, jitted, near, run, stored, tree_of

import pefts
from pefts.optimizers.fira import fira, scale_by_fira
from pefts.optimizers.galore import refresh, scale_by_galore
from pefts.optimizers.projection import restore
from pefts.optimizers.raw_adam import correct_bias, raw_adam

GOLDEN = Path(__file__).parents[1] / "../shared/golden/official/fira/golden.npz"
B1, B2 = 0.9, 0.999
Array = np.ndarray

pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")


@pytest.fixture(scope="module")
def golden() -> Any:
    if not GOLDEN.exists():
        pytest.skip("the golden vectors of the official code are not beside this repository")
    return np.load(GOLDEN)


# --- the official code ---


@pytest.mark.parametrize("shape", ["tall", "wide"])
@pytest.mark.parametrize(
    ("kind", "residual"),
    [("std", "code"), ("reverse_std", "code"), ("std_alpha1", "code"), ("std_alpha1", "paper")],
)
def test_the_official_trajectory(kind, residual, shape, golden, x64) -> None:
    case, lr = f"{kind}_{shape}", float(golden["lr"])
    tx = optax.chain(
        scale_by_fira(
            rank=int(golden["rank"]),
            update_interval=None,
            scale=float(golden[f"{case}__alpha"]),
            projection=kind.removesuffix("_alpha1"),
            growth=float(golden["gamma"]),
            residual=residual,
            inner=raw_adam(eps=float(golden[f"{case}__eps"])),
        ),
        correct_bias(),
    )
    decay = 1 - lr * float(golden[f"{case}__weight_decay"])
    W = jnp.asarray(golden[f"{shape}__W0"].T)
    (state, correction), step = tx.init(W), jax.jit(tx.update)
    for t, G in enumerate(golden[f"{shape}__G"]):
        if t % int(golden["update_gap"]) == 0:
            official = jax.tree.map(jnp.asarray, stored(golden, case, t // 4))
            state = state._replace(projectors=official)
        U, (state, correction) = step(jnp.asarray(G.T), (state, correction))
        W = (W - lr * U) * decay
        near(W, golden[f"{case}__W"][t].T, 1e-11)
        np.testing.assert_allclose(state.norms, golden[f"{case}__p_prev_norm"][t], rtol=1e-9)
        if f"{case}__S" in golden:
            N = state.inner_state.mu / (jnp.sqrt(state.inner_state.nu) + golden[f"{case}__eps"])
            k = np.sqrt(1 - B2 ** (t + 1)) / (1 - B1 ** (t + 1))
            S = U / k - golden[f"{case}__alpha"] * restore(state.projectors, N)
            near(S, golden[f"{case}__S"][t].T, 1e-9)


def test_the_residual_of_the_paper_is_another_where_alpha_is_not_one(golden: Any) -> None:
    G = jnp.asarray(golden["tall__G"][0].T, jnp.float32)
    updates = [run(scale_by_fira(rank=3, residual=r), G, [G])[0] for r in ("code", "paper")]
    assert not np.allclose(*updates, atol=1e-2)


# --- the equations ---


def oracle(W: Array, grads: Array, columns: list[Array], *, lr: float, scale: float) -> Array:
    """W after the last step, d_in compressed; the columns give no more than the signs."""
    M = V = norm = 0.0
    for t, G in enumerate(grads):
        if t % 2 == 0:
            P = aligned(np.linalg.svd(G)[0][:, : columns[t].shape[-1]], columns[t])
        R = P.T @ G
        M, V = B1 * M + (1 - B1) * R, B2 * V + (1 - B2) * R**2
        N = M / (np.sqrt(V) + 1e-8)
        phi = np.linalg.norm(N, axis=0) / (np.linalg.norm(R, axis=0) + 1e-8)
        S = (G - P @ R) * phi
        if t:
            S = S / (max(np.linalg.norm(S) / (norm + 1e-8), 1.01) / 1.01)
        norm = np.linalg.norm(S)
        k = np.sqrt(1 - B2 ** (t + 1)) / (1 - B1 ** (t + 1))
        W = W - lr * (k * (scale * P @ N + S) + 0.2 * W)
    return W


@pytest.mark.parametrize("projection", ["right", "left"])
def test_full_steps_of_each_layer_are_the_papers(projection: str, x64: None) -> None:
    W = np.random.default_rng(9).normal(size=(2, 7, 12))
    scales = np.array([1.0, 3.0, 0.5, 2.0, 4.0])  # so that the limit is met in some steps
    grads = np.stack([gradients(5, 7, 12, seed=5 * n) * scales[:, None, None] for n in range(2)], 1)
    tx = fira(
        0.1, rank=3, update_interval=2, scale=0.5, projection=projection, weight_decay=0.2,
        decomposition="svd",
    )  # fmt: skip
    turn = (lambda x: np.swapaxes(x, -1, -2)) if projection == "left" else (lambda x: x)
    params = {"layers": {"kernel": jnp.asarray(turn(W))}}
    end, _, states = run(
        tx, params, [{"layers": {"kernel": jnp.asarray(turn(grad))}} for grad in grads]
    )
    side = "Q" if projection == "left" else "P"
    columns = [getattr(state[0].projectors["layers"]["kernel"], side) for state in states]
    for n in range(2):
        expected = oracle(W[n], grads[:, n], [c[n] for c in columns], lr=0.1, scale=0.5)
        near(turn(end["layers"]["kernel"][n]), expected, 1e-11)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)], ids=str)
def test_what_it_adds_is_orthogonal_and_grows_slowly(shape: tuple, x64: None) -> None:
    grads = [jnp.asarray(G) * (1 + t) ** 2 for t, G in enumerate(gradients(6, *shape))]
    tx = scale_by_fira(rank=2, update_interval=2, scale=0.5)
    state, step, norms = tx.init(grads[0]), jax.jit(tx.update), []
    for grad in grads:
        U, state = step(grad, state)
        N = state.inner_state.mu / (jnp.sqrt(state.inner_state.nu) + 1e-8)
        S = U - 0.5 * restore(state.projectors, N)
        P = state.projectors
        near(S.T @ P.P if P.Q is None else S @ P.Q, 0, 1e-12)
        np.testing.assert_allclose(np.linalg.norm(S), state.norms, rtol=1e-10)
        norms.append(float(state.norms))
    growth = np.array(norms[1:]) / np.array(norms[:-1])
    assert growth.max() <= 1.01 + 1e-6 and np.isclose(growth, 1.01).any()
    free = scale_by_fira(rank=2, update_interval=2, scale=0.5, growth=1e9)
    _, _, states = run(free, jnp.zeros(shape), grads)
    assert float(states[-1].norms) > norms[-1]


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=str)
def test_at_full_rank_it_is_galore(shape: tuple) -> None:
    grads = [jnp.asarray(G, jnp.float32) for G in gradients(3, *shape)]
    ours, _, _ = run(scale_by_fira(rank=6), jnp.zeros(shape), grads)
    theirs, _, _ = run(scale_by_galore(rank=6, inner=raw_adam()), jnp.zeros(shape), grads)
    close(ours, theirs, 1e-4, 1e-4)


def test_without_memory_the_scale_of_a_column_is_known(x64: None) -> None:
    """b1 = b2 = eps = 0: N is the sign of R, phi_j = sqrt(r) / ||R_:j||."""
    G = decaying(6, 9)
    tx = scale_by_fira(rank=3, inner=raw_adam(0.0, 0.0, 0.0), decomposition="svd")
    U, state = tx.update(jnp.asarray(G), tx.init(jnp.asarray(G)))
    P = np.asarray(state.projectors.P)
    R = P.T @ G
    near(U, 0.25 * P @ np.sign(R) + (G - P @ R) * np.sqrt(3) / np.linalg.norm(R, axis=0), 1e-6)


def test_nothing_is_limited_after_a_step_without_gradient() -> None:
    """Else the residual of a factor of LoRA, whose first gradient is zero, would stay near zero."""
    G = jnp.asarray(decaying(6, 9), jnp.float32)
    tx = scale_by_fira(rank=2, update_interval=1)
    _, _, states = run(tx, jnp.zeros((6, 9)), [jnp.zeros((6, 9)), G])
    _, first, _ = run(tx, jnp.zeros((6, 9)), [G])
    assert float(states[0].norms) == 0 and float(first.norms) > 0.1
    np.testing.assert_allclose(states[1].norms, first.norms, rtol=1e-5)


def test_correct_bias_completes_adam() -> None:
    grads = [jnp.asarray(G, jnp.float32) for G in gradients(4, 6, 9)]
    raw = optax.chain(raw_adam(eps=0.0), correct_bias())
    ours, _, _ = run(raw, jnp.zeros((6, 9)), grads)
    theirs, _, _ = run(optax.scale_by_adam(eps=0.0), jnp.zeros((6, 9)), grads)
    close(ours, theirs, 1e-5, 1e-5)


# --- the state ---


def test_the_state_is_galores_and_one_norm_per_kernel() -> None:
    params = {"layers": {"kernel": jax.ShapeDtypeStruct((3, 8, 20), jnp.float32)}}
    state = jax.eval_shape(scale_by_fira(rank=4).init, params)
    scalars = 3  # our count, Adam's, and what was skipped
    assert pefts.count(state) == 3 * (8 * 4 + 2 * 20 * 4 + 1) + scalars


def test_a_gradient_that_is_not_finite_at_a_refresh_skips_its_layer() -> None:
    params, grads = tree_of(2, 6, 9, steps=4)
    tx = scale_by_fira(rank=3, update_interval=2)
    clean, _, _ = run(tx, params, grads)
    before, state, _ = run(tx, params, grads[:2])
    grads[2]["layers"]["kernel"] = grads[2]["layers"]["kernel"].at[1, 2, 3].set(jnp.nan)
    updates, after = jitted(tx.update)(grads[2], state, before)
    assert int(after.skipped) == 1
    np.testing.assert_array_equal(updates["layers"]["kernel"][1], 0)
    assert float(after.norms["layers"]["kernel"][1]) == float(state.norms["layers"]["kernel"][1])
    end, _, _ = run(tx, params, grads)
    close(end["layers"]["kernel"][0], clean["layers"]["kernel"][0])
    close(end["layers"]["bias"], clean["layers"]["bias"])
    assert np.all(np.isfinite(end["layers"]["kernel"]))


def test_refreshing_by_hand_and_compiling_once() -> None:
    params, grads = tree_of(2, 6, 9, steps=4)
    expected, _, _ = run(scale_by_fira(rank=3, update_interval=2), params, grads)
    tx = scale_by_fira(rank=3, update_interval=None)
    state, step, W = tx.init(params), jax.jit(tx.update, donate_argnums=1), params
    again = jax.jit(functools.partial(refresh, rank=3))
    for t, grad in enumerate(grads):
        state = again(state, grad) if t % 2 == 0 else state
        updates, state = step(grad, state)
        W = optax.apply_updates(W, updates)
    close(W, expected, 1e-5, 1e-5)
    assert step._cache_size() == 1


def test_other_leaves_are_adams_and_bfloat16_keeps_a_float32_state() -> None:
    params, grads = tree_of(2, 6, 9, steps=3)
    end, _, _ = run(fira(0.1, rank=3), params, grads)
    adam, _, _ = run(optax.adam(0.1), params, grads)
    close(end["layers"]["bias"], adam["layers"]["bias"], 1e-5, 1e-6)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), grads[0])
    tx = scale_by_fira(rank=3)
    updates, state = jitted(tx.update)(half, tx.init(half))
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    kinds = {leaf.dtype for leaf in jax.tree.leaves(state)}
    assert kinds == {jnp.dtype("float32"), jnp.dtype("int32")}


BAD = {
    "projection='full' leaves no side": {"projection": "full"},
    "projection='both' is unknown": {"projection": "both"},
    "residual='exact' is unknown; choose one of": {"residual": "exact"},
    "growth=0.9": {"growth": 0.9},
    "growth=nan": {"growth": float("nan")},
    "rank=0": {"rank": 0},
    "update_interval=0": {"update_interval": 0},
    "scale=-1": {"scale": -1},
    "decomposition='qr' is unknown": {"decomposition": "qr"},
}


@pytest.mark.parametrize("message", BAD)
def test_arguments_out_of_range_are_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fira(0.1, **{"rank": 2, **BAD[message]})


def test_what_does_not_fit_a_tree_is_refused_as_by_galore() -> None:
    with pytest.raises(ValueError, match="rank=7 is out of range for 'kernel', a 6 x 9"):
        fira(0.1, rank=7).init({"kernel": jnp.ones((6, 9))})
    with pytest.raises(ValueError, match="is no gradient transformation: call it"):
        scale_by_fira(rank=2, inner=raw_adam)
