"""PELA beyond the table: the official factors, published ranks, the penalty."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import pefts
from pefts import paths, views
from pefts.methods.pela import largest_change, rank_of

GOLDEN = Path(__file__).parents[2] / "shared/golden/official/pela/golden.npz"


class Mlp(nn.Module):
    """y = tanh(x W + b) W_head + b_head."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = jnp.tanh(nn.Dense(20, param_dtype=x.dtype, name="first")(x))
        return nn.Dense(7, param_dtype=x.dtype, name="second")(hidden)


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.exists():
        pytest.skip("the official PELA vectors (../shared/golden/official/pela) are absent")
    return dict(np.load(GOLDEN))


# ---------------------------------------------------------------------------- the factors


@pytest.mark.parametrize("case", ["c15", "c20", "c30"])
def test_factors_and_outputs_are_the_official_ones(golden, x64, key, case):
    params = {
        "first": {"kernel": jnp.asarray(golden["W"].T), "bias": jnp.asarray(golden["bias"])},
        "second": {
            "kernel": jnp.asarray(golden["W_head"].T),
            "bias": jnp.asarray(golden["bias_head"]),
        },
    }
    peft = pefts.pela(compression=float(golden[f"{case}_ratio"]))
    state = peft.init(key, params)
    assert set(state.trainable) == {"first/kernel"}, "a head of 7 outputs stays"
    A, B = (np.asarray(state.trainable["first/kernel"][name]) for name in "AB")
    wanted_A, wanted_B = golden[f"{case}_A"], golden[f"{case}_B"]
    assert A.shape == wanted_A.shape and A.shape[1] == int(golden[f"{case}_rank"])
    np.testing.assert_allclose(A @ B, wanted_A @ wanted_B, atol=1e-12)
    S = np.linalg.svd(golden["W"], compute_uv=False)[: A.shape[1]]
    for gram in (A.T @ A, B @ B.T):
        np.testing.assert_allclose(gram, np.diag(S), atol=1e-12)
    x = jnp.asarray(golden[f"{case}_X"])
    y = pefts.apply(Mlp().apply)({"params": peft.bind(params, state)}, x)
    np.testing.assert_allclose(y, golden[f"{case}_y"], atol=1e-12)


@pytest.mark.parametrize(
    ("d_out", "compression", "rank"),
    [
        (768, 1.5, 256),
        (768, 2.0, 192),
        (768, 3.0, 128),
        (3072, 1.5, 409),
        (3072, 2.0, 307),
        (3072, 3.0, 204),
    ],
)
def test_published_ranks_from_shapes_alone(d_out, compression, rank):
    params = {
        "up": {"kernel": jax.ShapeDtypeStruct((768, d_out), jnp.bfloat16)},
        "down": {"kernel": jax.ShapeDtypeStruct((d_out, 768), jnp.bfloat16)},
    }
    state = jax.eval_shape(pefts.pela(compression).init, jax.random.key(0), params)
    for path, (d_in, d_o) in (("up/kernel", (768, d_out)), ("down/kernel", (d_out, 768))):
        assert state.trainable[path]["A"].shape == (d_in, rank)
        assert state.trainable[path]["B"].shape == (rank, d_o)
    assert pefts.count(state.trainable) == 2 * rank * (768 + d_out)
    share = rank * (768 + d_out) / (768 * d_out)
    assert share <= 1 / compression and share > 0.99 / compression


def test_the_start_is_the_best_approximation_of_its_rank(key):
    W = jax.random.normal(key, (3, 20, 12))
    params = {"layers": {"kernel": W}}
    peft = pefts.pela(axes={"layers": "lio"})
    state = peft.init(key, params)
    merged = np.asarray(peft.merge(params, state)["layers"]["kernel"], np.float64)
    rank = rank_of(20, 12, 2.0)
    assert state.trainable["layers/kernel"]["A"].shape == (3, 20, rank) and rank == 3
    for layer in range(3):
        S = np.linalg.svd(np.asarray(W[layer], np.float64), compute_uv=False)
        error = np.linalg.norm(merged[layer] - W[layer])
        np.testing.assert_allclose(error, np.sqrt(np.sum(S[rank:] ** 2)), rtol=1e-5)
        assert np.linalg.matrix_rank(merged[layer], tol=1e-4) == rank


def test_no_kernel_is_read_where_it_is_replaced(key):
    """The product with NaN in place of the kernel is finite, and a dense W is nowhere."""
    model, x = nn.Dense(20), jnp.ones((5, 12))
    params = model.init(key, x)["params"]
    peft = pefts.pela(targets="kernel")
    state = peft.init(key, params)
    gone = {**params, "kernel": jnp.full_like(params["kernel"], jnp.nan)}
    run = lambda p: pefts.apply(model.apply)({"params": peft.bind(p, state)}, x)  # noqa: E731
    np.testing.assert_array_equal(run(gone), run(params))


def test_what_is_not_factored_can_train_too(key):
    params = {
        "dense": {"kernel": jnp.eye(12, 20), "bias": jnp.ones(20)},
        "norm": {"scale": jnp.ones(12)},
    }
    factors = 3 * (12 + 20)
    for beside, more in ((pefts.bitfit(), 20), (pefts.full(exclude="kernel"), 32)):
        state = pefts.chain(beside, pefts.pela()).init(key, params)
        assert pefts.count(state.trainable) == factors + more


def test_a_kernel_too_small_for_a_rank_is_named(key):
    params = {"dense": {"kernel": jnp.ones((3, 12))}}
    with pytest.raises(
        ValueError,
        match="compression=2.5 leaves no rank to 'dense/kernel', a 3 x 12 .* at most 2.4",
    ):
        pefts.pela(2.5).init(key, params)
    assert pefts.count(pefts.pela(2.4).init(key, params).trainable) == 15


# ---------------------------------------------------------------------------- the penalty


def penalised(key: jax.Array, **kwargs) -> tuple:
    """The tiny model: head axes, stacked layers, and factors away from their start."""
    params, inputs = tiny.parameters(), tiny.inputs()
    axes = pefts.infer_axes(tiny.Classifier().apply, params, *inputs)
    peft = pefts.pela(compression=1.5, axes=axes, **kwargs)
    return params, axes, peft, pefts.randomize(key, peft.init(key, params))


def kernels(params: dict, axes: dict, state: pefts.PeftState) -> list:
    """(A, B, W) in float64 of each layer of each kernel."""
    chosen, found = pefts.targets.selection(axes=axes), []
    for path, group in sorted(state.trainable.items()):
        leaf = paths.flatten(params)[path]
        W = np.asarray(views.to_matrix(leaf, chosen.axes_of(path, leaf.shape)), np.float64)
        A, B = (np.asarray(group[name], np.float64) for name in "AB")
        found += list(zip(A, B, W, strict=True))
    return found


def test_the_penalty_is_the_mean_over_all_kernels(key):
    params, axes, peft, state = penalised(key, w_inf=0.7, eps=0.05)
    every = kernels(params, axes, state)
    assert len(every) == 12
    wanted = 0.7 * np.mean([(np.abs(A @ B - W).max() - 0.05) ** 2 for A, B, W in every])
    np.testing.assert_allclose(peft.penalty(state, params), wanted, rtol=1e-6)
    jitted = jax.jit(peft.penalty)(state, params)
    np.testing.assert_allclose(jitted, wanted, rtol=1e-6)


def test_the_gradient_is_that_of_the_largest_entry(key):
    """In float64 against the derivative written out: one row of A, one column of B."""
    with jax.enable_x64(True):
        A, B, W = (
            jax.random.normal(jax.random.fold_in(key, n), shape, jnp.float64)
            for n, shape in enumerate([(9, 3), (3, 7), (9, 7)])
        )
        eps = 0.25

        def penalty(A, B):
            return (largest_change(A, B, W) - eps) ** 2

        dA, dB = jax.grad(penalty, (0, 1))(A, B)
        change = np.asarray(A @ B - W)
        i, j = np.unravel_index(np.abs(change).argmax(), change.shape)
        outer = 2 * (np.abs(change[i, j]) - eps) * np.sign(change[i, j])
        wanted_A, wanted_B = np.zeros((9, 3)), np.zeros((3, 7))
        wanted_A[i], wanted_B[:, j] = outer * B[:, j], outer * A[i]
        np.testing.assert_allclose(dA, wanted_A, rtol=1e-12)
        np.testing.assert_allclose(dB, wanted_B, rtol=1e-12)
        naive = jax.grad(lambda A, B: (jnp.max(jnp.abs(A @ B - W)) - eps) ** 2, (0, 1))(A, B)
        np.testing.assert_allclose(naive[0], wanted_A, rtol=1e-12)
        np.testing.assert_allclose(naive[1], wanted_B, rtol=1e-12)


def test_the_penalty_pulls_small_changes_up(key):
    """Two-sided: with every entry closer than eps a step of descent widens the largest change."""
    A, B = jax.random.normal(key, (9, 3)), jax.random.normal(jax.random.fold_in(key, 1), (3, 7))
    params = {"dense": {"kernel": A @ B + 1e-3}}
    peft = pefts.pela(w_inf=1.0, eps=0.5, targets="kernel")
    state = pefts.PeftState({"dense/kernel": {"A": A, "B": B}}, {})
    value, grads = jax.value_and_grad(lambda t: peft.penalty(state._replace(trainable=t), params))(
        state.trainable
    )
    np.testing.assert_allclose(value, 0.499**2, rtol=1e-3)
    after = jax.tree.map(lambda p, g: p - 1e-3 * g, state.trainable, grads)["dense/kernel"]
    assert largest_change(**after, W=params["dense"]["kernel"]) > 1.01e-3


def test_the_penalty_keeps_nothing_dense_for_the_backward_pass(key):
    params, _, peft, state = penalised(key, w_inf=1.0)
    _, pull = jax.vjp(lambda t: peft.penalty(state._replace(trainable=t), params), state.trainable)
    largest = max(leaf.size for leaf in jax.tree.leaves(state.trainable))
    assert max(leaf.size for leaf in jax.tree.leaves(pull)) <= largest


def test_the_penalty_needs_the_base(key):
    params, _, peft, state = penalised(key, w_inf=1.0)
    with pytest.raises(ValueError, match=r"w_inf=1.0: .* params is None; call peft.penalty"):
        peft.penalty(state)
    _, _, off, state = penalised(key)
    assert float(off.penalty(state)) == float(off.penalty(state, params)) == 0.0


def test_the_penalty_in_a_chain_and_over_a_bfloat16_base(key):
    params, axes, peft, _ = penalised(key, w_inf=1.0)
    low = tiny.cast(params, jnp.bfloat16)
    both = pefts.chain(pefts.full(targets="classifier"), peft)
    state = both.init(key, low)
    value = both.penalty(state, low)
    assert value.dtype == jnp.float32
    part = pefts.PeftState(state.trainable["1"], state.frozen["1"])
    every = kernels(low, axes, part)
    wanted = np.mean([(np.abs(A @ B - W).max() - 1e-3) ** 2 for A, B, W in every])
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
