"""WeLore beyond the table: the official ranks and factors, the threshold, mixed stacks."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import pefts
from pefts.bound import Call
from pefts.methods.welore import first_threshold, linear, normalised, report

GOLDEN = Path(__file__).parents[2] / "shared/golden/official/welore/golden.npz"
MATRICES = range(4)


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.exists():
        pytest.skip("the official WeLore vectors (../shared/golden/official/welore) are absent")
    return dict(np.load(GOLDEN))


def official(golden: dict) -> dict:
    """The kernels, in their own orientation."""
    return {f"m{n}": {"kernel": jnp.asarray(golden[f"W_{n}"].T)} for n in MATRICES}


def of_spectra(key: jax.Array, *spectra: list, shape: tuple[int, int] = (9, 6)) -> jax.Array:
    """Kernels (L, d_in, d_out) with these singular values."""
    W = jax.random.normal(key, (len(spectra), *shape))
    U, _, Vt = jnp.linalg.svd(W, full_matrices=False)
    return jnp.einsum("lik,lk,lko->lio", U, jnp.asarray(spectra, jnp.float32), Vt)


STEEP = [4.0, 1.0, 0.2, 0.1, 0.05, 0.02]
LINEAR = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]


def mixed(key: jax.Array) -> tuple:
    """A stack of a steep, a linear and a steeper layer, and a linear kernel by itself."""
    stack = of_spectra(key, STEEP, LINEAR, [9.0, 0.1, 0.1, 0.1, 0.1, 0.02])
    params = {"layers": {"kernel": stack}, "alone": {"kernel": of_spectra(key, LINEAR)[0]}}
    peft = pefts.welore(threshold=0.3, axes={"layers": "lio"})
    return params, peft, peft.init(key, params)


# ---------------------------------------------------------------------------- official vectors


def test_pruned_ranks_are_the_official_ones(golden, x64):
    params = official(golden)
    for at, tau in enumerate(golden["taus"]):
        told = report(params, threshold=float(tau), min_ratio=0.0, break_even=False)
        pruned = [int(golden["min_dim"][n]) - told.kept[f"m{n}/kernel"][0] for n in MATRICES]
        np.testing.assert_array_equal(pruned, golden["pruned"][at])
        np.testing.assert_allclose(told.pruned, golden["total_reduction"][at], rtol=1e-12)
        # Every kernel is factored with min_ratio 0, so all that lies below tau is gone.
        assert told.achieved == told.pruned and told.target is None


def test_factored_kernels_are_the_official_ones(golden, x64):
    tau, min_ratio = float(golden["tau"]), float(golden["min_ratio"])
    told = report(official(golden), threshold=tau, min_ratio=min_ratio)
    kept = np.asarray([told.kept[f"m{n}/kernel"][0] for n in MATRICES])
    np.testing.assert_array_equal(kept > 0, golden["lrc"])
    np.testing.assert_array_equal(kept[golden["lrc"]], golden["kept_rank"][golden["lrc"]])
    assert golden["min_ratio_zero_lrc"].all()


def test_factors_and_outputs_are_the_official_ones(golden, x64):
    params = official(golden)
    peft = pefts.welore(threshold=float(golden["tau"]), min_ratio=0.0, break_even=False)
    state = peft.init(jax.random.key(0), params)
    dense = peft.merge(params, state)
    for n in MATRICES:
        p = state.trainable[f"m{n}/kernel"]
        k, S = int(golden["kept_rank"][n]), golden[f"singular_values_{n}"]
        assert p["A"].shape[1] == k and p["A"].dtype == jnp.float64
        np.testing.assert_allclose(dense[f"m{n}"]["kernel"].T, golden[f"product_{n}"], atol=1e-12)
        y = linear(jnp.asarray(golden[f"x_{n}"]), None, p, Call())
        np.testing.assert_allclose(y, golden[f"y_{n}"], atol=1e-12)
        for gram in (p["A"].T @ p["A"], p["B"] @ p["B"].T):
            np.testing.assert_allclose(gram, np.diag(S[:k]), atol=1e-12)
        error = np.linalg.norm(params[f"m{n}"]["kernel"] - dense[f"m{n}"]["kernel"])
        np.testing.assert_allclose(error, np.sqrt(np.sum(S[k:] ** 2)), rtol=1e-12)


# ---------------------------------------------------------------------------- the threshold


def test_normalised_spectra_span_zero_to_one():
    S = np.sort(np.random.default_rng(0).exponential(size=(5, 8)).astype(np.float32))[:, ::-1]
    relative = normalised(S)
    assert relative.dtype == np.float64
    np.testing.assert_array_equal(relative[:, 0], 1)
    np.testing.assert_array_equal(relative[:, -1], 0)
    assert ((relative >= 0) & (relative <= 1)).all()
    assert ((relative < 0).sum(-1) == 0).all() and ((relative < 1).sum(-1) == 7).all()


def test_heavy_tails_are_pruned_more_than_linear_decay():
    heavy = normalised(1 / np.arange(1.0, 41.0) ** 2)
    even = normalised(np.linspace(1, 0.1, 40))
    for t in (0.05, 0.2, 0.5, 0.8):
        assert (heavy < t).sum() > (even < t).sum()


def test_the_threshold_is_where_bisection_ends():
    values = normalised(np.random.default_rng(1).exponential(size=(6, 30))).ravel()
    for reduction in (0.01, 0.1, 0.25, 0.5, 0.7, 0.95):
        low, high = 0.0, 1.0
        while np.nextafter(low, 1.0) < high:
            middle = (low + high) / 2
            low, high = (low, middle) if (values < middle).mean() >= reduction else (middle, high)
        t = first_threshold(values, reduction)
        assert t == high
        pruned = int((values < t).sum())
        assert 0 <= pruned - reduction * values.size < 1 or (values == 0).sum() >= pruned
        assert (values < np.nextafter(t, 0)).mean() < reduction


def test_a_share_is_not_missed_by_rounding():
    """In floating point 0.07 * 100 is above 7."""
    values = np.linspace(0, 1, 100)
    assert 0.07 * 100 > 7
    assert (values < first_threshold(values, 0.07)).sum() == 7


def test_reduction_rises_with_the_threshold(key):
    params = tiny.parameters()
    axes = pefts.infer_axes(tiny.Classifier().apply, params, *tiny.inputs())
    grid = np.linspace(0.02, 1, 25)
    told = [report(params, threshold=float(t), min_ratio=0.0, axes=axes) for t in grid]
    assert all(a.pruned <= b.pruned for a, b in zip(told, told[1:], strict=False))
    assert told[-1].pruned == 132 / 144  # one singular value of each kernel is left


def test_targets_are_met_within_one_rank():
    params = tiny.parameters()
    axes = pefts.infer_axes(tiny.Classifier().apply, params, *tiny.inputs())
    for reduction in (0.2, 0.45, 0.6, 0.9):
        told = report(params, reduction, axes=axes)
        assert told.target == reduction
        assert 0 <= told.pruned * 144 - reduction * 144 < 1
        assert told.achieved <= told.pruned


@pytest.mark.parametrize(
    "kernel",
    [np.zeros((6, 4)), np.eye(6, 4), "rotation", np.arange(1.0, 6)[:, None]],
    ids=["zeros", "identity", "rotation", "one column"],
)
def test_a_constant_spectrum_is_refused(key, kernel):
    if isinstance(kernel, str):
        kernel = 3 * jax.random.orthogonal(key, 6)
        S = jnp.linalg.svd(kernel, compute_uv=False)
        assert S[0] > S[-1], "rounding makes the values differ"
    params = {"dense": {"kernel": jnp.asarray(kernel, jnp.float32)}}
    with pytest.raises(ValueError, match="singular values of 'dense/kernel' are all equal"):
        pefts.welore().init(key, params)


def test_the_layer_of_a_constant_spectrum_is_named(key):
    params = {"layers": {"kernel": of_spectra(key, STEEP, [2.0] * 6)}}
    with pytest.raises(ValueError, match="of layer 1 of 'layers/kernel' are all equal"):
        pefts.welore(axes={"layers": "lio"}).init(key, params)


def test_values_must_be_there(key):
    params = {"dense": {"kernel": of_spectra(key, STEEP)[0]}}
    with pytest.raises(ValueError, match="welore: the ranks depend .*'dense/kernel'.* inside jit"):
        jax.eval_shape(pefts.welore().init, key, params)
    params["dense"]["kernel"] = params["dense"]["kernel"].at[0, 0].set(jnp.inf)
    with pytest.raises(ValueError, match="'dense/kernel' has no singular values.*NaN or infinite"):
        pefts.welore().init(key, params)


# ---------------------------------------------------------------------------- the choice


def test_all_ranks_give_the_kernel_back(key):
    """The smallest singular value is always pruned: here it is zero."""
    W = of_spectra(key, [3.0, 2.0, 1.5, 1.0, 0.5, 0.0])[0]
    peft = pefts.welore(threshold=1e-4, min_ratio=0.0, break_even=False)
    state = peft.init(key, {"dense": {"kernel": W}})
    assert state.trainable["dense/kernel"]["A"].shape == (9, 5)
    merged = peft.merge({"dense": {"kernel": W}}, state)["dense"]["kernel"]
    np.testing.assert_allclose(merged, W, atol=1e-5)


def test_factors_must_be_smaller_than_the_kernel(key):
    """9 x 6: k = 3 takes 45 of 54 numbers, k = 4 takes 60."""
    params = {
        "three": {"kernel": of_spectra(key, [1.0, 0.9, 0.8, 0.1, 0.1, 0.0])[0]},
        "four": {"kernel": of_spectra(key, [1.0, 0.9, 0.8, 0.7, 0.1, 0.0])[0]},
    }
    found = report(params, threshold=0.5, min_ratio=0.0)
    assert found.kept == {"four/kernel": [0], "three/kernel": [3]} and found.trainable == 45
    found = report(params, threshold=0.5, min_ratio=0.0, break_even=False)
    assert found.kept == {"four/kernel": [4], "three/kernel": [3]} and found.trainable == 105
    assert report(params, threshold=0.5, min_ratio=0.5).kept == {
        "four/kernel": [0],
        "three/kernel": [0],
    }


def test_a_mixed_stack_keeps_its_dense_layer(key):
    params, peft, state = mixed(key)
    assert set(state.trainable) == {"layers/kernel"}
    np.testing.assert_array_equal(state.frozen["layers/kernel"]["kept"], [1, 0, 1])
    told = report(params, threshold=0.3, axes={"layers": "lio"})
    assert told.kept == {"layers/kernel": [1, 0, 1], "alone/kernel": [0]}
    assert told.trainable == 2 * 15 and told.achieved == 10 / 24 < told.pruned
    merged = peft.merge(params, pefts.randomize(key, state))
    np.testing.assert_array_equal(merged["alone"]["kernel"], params["alone"]["kernel"])
    found, W = merged["layers"]["kernel"], params["layers"]["kernel"]
    np.testing.assert_array_equal(found[1], W[1])
    assert all(np.abs(found[n] - W[n]).max() > 0.1 for n in (0, 2))
    best = peft.merge(params, state)["layers"]["kernel"]
    for n in (0, 2):
        U, S, Vt = np.linalg.svd(np.asarray(W[n], np.float64))
        np.testing.assert_allclose(best[n], S[0] * np.outer(U[:, 0], Vt[0]), atol=2e-6)


def test_only_one_of_the_products_runs(key):
    """A factored layer never reads its kernel, a dense one never its factors."""
    params, _, state = mixed(key)
    x = jax.random.normal(key, (5, 9))
    bad = jnp.full((9, 6), jnp.nan)
    p = {name: leaf[0] for part in state for name, leaf in part["layers/kernel"].items()}
    assert bool(jnp.isfinite(linear(x, bad, p, Call())).all())
    broken = {**p, "kept": jnp.int32(0), "A": jnp.full_like(p["A"], jnp.nan)}
    np.testing.assert_array_equal(
        linear(x, params["alone"]["kernel"], broken, Call()), x @ params["alone"]["kernel"]
    )
    assert "cond" in str(jax.make_jaxpr(lambda x: linear(x, bad, p, Call()))(x))
    always = {"A": p["A"], "B": p["B"]}
    assert "cond" not in str(jax.make_jaxpr(lambda x: linear(x, None, always, Call()))(x))


def test_training_moves_the_factors_inside_their_ranks_alone(key):
    """Padding stays zero under Adam and decay, dense layers get no gradient."""
    params = {"layers": {"kernel": of_spectra(key, STEEP, LINEAR, [4.0, 3.9, 0.1, 0.1, 0.1, 0.0])}}
    peft = pefts.welore(threshold=0.3, axes={"layers": "lio"})
    state = peft.init(key, params)
    kept = np.asarray(state.frozen["layers/kernel"]["kept"])
    np.testing.assert_array_equal(kept, [1, 0, 2])
    model = nn.scan(Twice, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    x = jax.random.normal(key, (5, 9))
    tx = optax.adamw(0.05, weight_decay=0.5)
    moments, start = tx.init(state.trainable), state

    @jax.jit
    def step(state, moments):
        def loss(trainable):
            bound = peft.bind(params, state._replace(trainable=trainable))
            out, _ = pefts.apply(model.apply)({"params": bound}, x)
            return jnp.mean((out - 1) ** 2)

        grads = jax.grad(loss)(state.trainable)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            updates, moments = tx.update(grads, moments, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return peft.update(state._replace(trainable=trainable), grads, jnp.int32(0)), moments

    for _ in range(4):
        state, moments = step(state, moments)
    A, B = (np.asarray(state.trainable["layers/kernel"][name]) for name in "AB")
    A0, B0 = (np.asarray(start.trainable["layers/kernel"][name]) for name in "AB")
    for layer, k in enumerate(kept):
        assert not A[layer][:, k:].any() and not B[layer][k:].any()
        assert (A[layer][:, :k] != A0[layer][:, :k]).all() and (B[layer][:k] != B0[layer][:k]).all()
    merged = peft.merge(params, state)["layers"]["kernel"]
    np.testing.assert_array_equal(merged[1], params["layers"]["kernel"][1])


class Twice(nn.Module):
    """x W + x, padded back to x's width, in the form of a scan body."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        kernel = nn.Dense(6, use_bias=False, name="layers")(x)
        return x + jnp.pad(kernel, ((0, 0), (0, 3))), None


def test_counts_without_padding(key):
    params = tiny.parameters()
    axes = pefts.infer_axes(tiny.Classifier().apply, params, *tiny.inputs())
    state = pefts.welore(0.45, axes=axes).init(key, params)
    told = report(params, 0.45, axes=axes)
    factored = {path for path, kept in told.kept.items() if any(kept)}
    assert set(state.trainable) == factored and len(factored) == 5
    inside = 0
    for path, kept in told.kept.items():
        if any(kept):
            A, B = (np.asarray(state.trainable[path][name]) for name in "AB")
            columns = np.any(A, axis=1).sum(-1)
            np.testing.assert_array_equal(columns, kept)
            inside += int(columns.sum()) * (A.shape[1] + B.shape[2])
    assert inside == told.trainable
    assert pefts.count(state.trainable) == sum(
        len(kept)
        * max(kept)
        * (state.trainable[p]["A"].shape[1] + state.trainable[p]["B"].shape[2])
        for p, kept in told.kept.items()
        if any(kept)
    )


def test_norms_train_beside_it(key):
    params = tiny.parameters()
    axes = pefts.infer_axes(tiny.Classifier().apply, params, *tiny.inputs())
    both = pefts.chain(pefts.ln_tuning(), pefts.welore(0.6, axes=axes))
    state = both.init(key, params)
    out = pefts.apply(tiny.Classifier().apply)({"params": both.bind(params, state)}, *tiny.inputs())
    merged = tiny.Classifier().apply({"params": both.merge(params, state)}, *tiny.inputs())
    np.testing.assert_allclose(out, merged, rtol=2e-5, atol=2e-5)
