"""The incremental principal components of pefts.calibrate against float64 and the released code."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pefts import principal

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "official" / "eva" / "golden.npz"


def start(k: int, width: int) -> dict[str, jax.Array]:
    shapes = {"components": (k, width), "singular": (k,), "cosine": (k,), "center": (width,)}
    return {
        name: jnp.zeros(shape) for name, shape in {**shapes, "scatter": (), "count": ()}.items()
    }


def after(so_far: dict[str, jax.Array], x: np.ndarray) -> dict[str, jax.Array]:
    new = principal.merge(so_far, jnp.asarray(x), jnp.ones(len(x)))
    return {**new, "count": so_far["count"] + len(x)}


@pytest.fixture
def golden() -> dict[str, np.ndarray]:
    if not GOLDEN.exists():
        pytest.skip("../shared/golden/official/eva is not on this machine")
    return dict(np.load(GOLDEN))


@pytest.mark.parametrize("solver", ["full", "lowrank"])
def test_golden_trajectories(golden: dict[str, np.ndarray], solver: str) -> None:
    """The released incremental PCA after each of three batches, components with their signs."""
    with jax.enable_x64(True):
        batches, k = golden["batches"], int(golden["n_components"])
        state = start(k, batches.shape[2])
        for n, x in enumerate(batches):
            state = after(state, x)
            want = {
                name.removeprefix(f"{solver}_b{n}_"): value
                for name, value in golden.items()
                if name.startswith(f"{solver}_b{n}_")
            }
            assert state["components"].dtype == jnp.float64
            # what the randomised solver loses is stated with its vectors
            allowed = 1e-9 if solver == "full" else 1e-9 + want["max_diff_to_full"]
            np.testing.assert_allclose(state["components"], want["components"], atol=allowed)
            np.testing.assert_allclose(state["singular"], want["singular_values"], rtol=1e-9)
            np.testing.assert_allclose(state["center"], want["mean"], atol=1e-9)
            # with the population variance: the two divisors cancel
            total = state["count"] * want["var"].sum()
            np.testing.assert_allclose(state["scatter"], total, rtol=1e-9)
            ratio = state["singular"] ** 2 / state["scatter"]
            np.testing.assert_allclose(ratio, want["ratio"], atol=1e-9)
            cosine = np.abs(want["cos"]) if n else np.zeros(k)
            np.testing.assert_allclose(state["cosine"], cosine, atol=1e-9)


def test_a_batch_of_padding_leaves_everything_as_it_was() -> None:
    rows = np.random.default_rng(0).standard_normal((30, 6)).astype(np.float32)
    empty = start(3, 6)
    for state in (empty, after(after(empty, rows[:20]), rows[20:])):
        new = principal.merge(state, jnp.asarray(rows), jnp.zeros(len(rows)))
        for name, value in new.items():
            np.testing.assert_array_equal(value, state[name], err_msg=name)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_leading_finds_what_a_full_decomposition_finds(dtype: type) -> None:
    """90 rows of 70: with k = 4 the randomised branch, with k = 30 the exact one."""
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.standard_normal((n, 70)))[0] for n in (90, 70))
    rows = left * 0.6 ** np.arange(70) @ right.T
    with jax.enable_x64(dtype is np.float64):
        for k, tolerance in ((4, 1e-6), (30, 1e-9)):
            singular, vectors = principal.leading(jnp.asarray(rows.astype(dtype)), k)
            assert singular.dtype == vectors.dtype == dtype
            # directions turn by the rounding error over the gap, which is smallest at the end
            allowed = tolerance if dtype is np.float64 else 1e-5
            np.testing.assert_allclose(singular, 0.6 ** np.arange(k), atol=allowed)
            found = np.asarray(vectors, np.float64)
            np.testing.assert_allclose(found @ found.T, np.eye(k), atol=allowed)
            alike = np.abs((found[:4] * right.T[:4]).sum(1))
            np.testing.assert_allclose(alike, 1, atol=allowed)
            largest = np.abs(found).argmax(1)
            assert (np.take_along_axis(found, largest[:, None], axis=1) > 0).all()


@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [
        (9, 4, 4),  # too few rows for blocks
        (32, 4, 4),  # two blocks, none left over
        (2065, 32, 32),  # three levels, rows left over at each
        (1000, 8, 8),
        (1000, 8, 3),  # fewer directions than columns
        (1000, 8, 0),  # zeros
    ],
)
def test_blocked_qr_is_a_qr_decomposition(rows: int, columns: int, rank: int) -> None:
    rng = np.random.default_rng(2)
    a = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns))
    a[rows // 3 : rows // 2] = 0  # whole blocks of padding
    with jax.enable_x64(True):
        q, upper = (np.asarray(part) for part in principal.blocked_qr(jnp.asarray(a)))
    assert q.shape == (rows, columns) and upper.shape == (columns, columns)
    np.testing.assert_allclose(q @ upper, a, atol=1e-12)
    np.testing.assert_allclose(q.T @ q, np.eye(columns), atol=1e-13)
    np.testing.assert_allclose(np.tril(upper, -1), 0, atol=1e-12)
