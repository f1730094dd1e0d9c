"""Monarch beyond the table: the projection, its optimality, the DFT, official golden vectors."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts
from pefts.bound import Call
from pefts.methods.monarch import densify, linear, product, project, projection_error

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "official" / "monarch" / "golden.npz"
D_IN, D_OUT, N1, N2 = 12, 20, 3, 5


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def gaussian(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def grid(W: np.ndarray, n1: int, n2: int) -> np.ndarray:
    """The sub-matrices (n1, n2, i, o) of W: rows in blocks, every n2-th column."""
    return np.stack([[rows[:, j::n2] for j in range(n2)] for rows in np.split(W, n1)])


def started(W: jax.Array, **kwargs: Any) -> tuple[pefts.Peft, pefts.PeftState]:
    peft = pefts.monarch(**kwargs)
    return peft, peft.init(jax.random.key(0), {"kernel": W})


# --- projection ---


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_no_monarch_matrix_of_the_rank_is_nearer(rank: int) -> None:
    """The squared error is the sum of all discarded squared singular values, sub-matrix-wise."""
    W = gaussian(D_IN, D_OUT)
    M = np.asarray(densify(*project(W, N1, N2, rank)))
    parts = np.linalg.svd(grid(np.asarray(W), N1, N2), compute_uv=False)
    np.testing.assert_allclose(np.sum((M - W) ** 2), np.sum(parts[..., rank:] ** 2), rtol=1e-12)
    assert np.linalg.matrix_rank(grid(M, N1, N2), tol=1e-10).max() == rank


@pytest.mark.parametrize("rank", [1, 3])
def test_any_monarch_matrix_is_its_own_projection(rank: int) -> None:
    R, L = gaussian(N1, D_IN // N1, rank * N2), gaussian(N2, N1 * rank, D_OUT // N2, seed=1)
    M = densify(R, L)
    again = densify(*project(M, N1, N2, rank))
    np.testing.assert_allclose(again, M, rtol=0, atol=1e-12)


def test_projecting_twice_is_projecting_once() -> None:
    once = densify(*project(gaussian(D_IN, D_OUT), N1, N2, 2))
    np.testing.assert_allclose(densify(*project(once, N1, N2, 2)), once, rtol=0, atol=1e-12)


def test_the_discrete_fourier_transform_is_monarch() -> None:
    """Of n = m^2, after its inputs are read column by column: each sub-matrix has rank 1.

    Its real and imaginary parts are real matrices of rank 2 per sub-matrix.
    """
    m = 4
    F = np.fft.fft(np.eye(m * m)).reshape(m, m, -1).swapaxes(0, 1).reshape(m * m, -1)
    parts = grid(F, m, m)
    assert np.linalg.matrix_rank(parts, tol=1e-10).max() == 1
    U, S, Vh = np.linalg.svd(parts)
    R = (U[..., 0] * S[..., :1]).transpose(0, 2, 1)
    L = Vh[..., 0, :].swapaxes(0, 1)
    x = np.random.default_rng(1).normal(size=(5, m, m)) + 0j
    y = product(jnp.asarray(x.swapaxes(1, 2).reshape(5, -1)), jnp.asarray(R), jnp.asarray(L))
    np.testing.assert_allclose(y, np.fft.fft(x.reshape(5, -1)), rtol=0, atol=1e-12)
    for part in (F.real, F.imag):
        peft, state = started(jnp.asarray(part), blocks=(m, m), rank=2)
        merged = peft.merge({"kernel": jnp.asarray(part)}, state)["kernel"]
        np.testing.assert_allclose(merged, part, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("blocks", "rank"), [((3, 5), 2), ((1, 1), 4), ((12, 20), 1)])
def test_projection_error_is_that_of_the_discarded_values(blocks: Any, rank: int) -> None:
    W = gaussian(2, D_IN, D_OUT)
    params = {"kernel": W, "bias": jnp.ones(D_OUT)}
    peft = pefts.monarch(blocks=blocks, rank=rank, targets="kernel", axes={"kernel": "lio"})
    error = projection_error(peft, params, peft.init(jax.random.key(0), params))
    parts = [np.linalg.svd(grid(np.asarray(w), *blocks), compute_uv=False) for w in W]
    lost = [np.sqrt(np.sum(s[..., rank:] ** 2) / np.sum(s**2)) for s in parts]
    assert list(error) == ["kernel"]
    np.testing.assert_allclose(error["kernel"], lost, rtol=1e-10, atol=1e-14)


# --- product ---


@pytest.mark.parametrize("shape", [(3, 4, 10, 5, 6, 4), (4, 3, 3, 4, 3, 5), (2, 6, 9, 3, 6, 1)])
def test_the_product_is_that_with_the_dense_form(shape: tuple[int, ...]) -> None:
    """Also where the hidden rows of a block are no multiple of the second factor's blocks."""
    n1, i, m, n2, p, o = shape
    R, L, x = gaussian(n1, i, m), gaussian(n2, p, o, seed=1), gaussian(2, 3, n1 * i, seed=2)
    dense = product(jnp.eye(n1 * i), R, L)
    np.testing.assert_allclose(product(x, R, L), x @ dense, rtol=0, atol=1e-12)
    if m % n2 == 0:
        np.testing.assert_allclose(densify(R, L), dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("blocks", "rank"), [((5, 3), 3), ((7, 6), 1), ((12, 20), 1)])
def test_padding_is_exact(blocks: tuple[int, int], rank: int) -> None:
    """The product is the merged kernel's, and of full rank the kernel's own."""
    W, x = gaussian(D_IN, D_OUT), gaussian(4, D_IN, seed=1)
    peft, state = started(W, blocks=blocks, rank=rank, padding=True)
    merged = peft.merge({"kernel": W}, state)["kernel"]
    y = linear(x, W, state.trainable["kernel"], Call())
    np.testing.assert_allclose(y, x @ merged, rtol=0, atol=1e-12)
    sides = [-(-side // n) for side, n in zip((D_IN, D_OUT), blocks, strict=True)]
    if rank == min(sides):
        np.testing.assert_allclose(merged, W, rtol=0, atol=1e-12)


def test_the_kernel_is_replaced_and_nothing_of_its_size_is_built() -> None:
    W, x = jnp.full((64, 81), jnp.nan), gaussian(3, 64)
    _, state = started(gaussian(64, 81))
    p = state.trainable["kernel"]
    assert jnp.isfinite(linear(x, W, p, Call())).all()

    def loss(x: jax.Array, p: Any) -> jax.Array:
        return jnp.sum(linear(x, W, p, Call()) ** 2)

    program = jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, p)
    sizes = {v.aval.size for equation in program.jaxpr.eqns for v in equation.outvars}
    assert max(sizes) < W.size


def test_the_product_keeps_bfloat16_and_names_a_misfit() -> None:
    R, L = jnp.ones((3, 4, 5)), jnp.ones((5, 3, 2))
    assert product(jnp.ones((7, 12), jnp.bfloat16), R, L).dtype == jnp.bfloat16
    for width in (9, 13):
        with pytest.raises(ValueError, match=rf"x of shape \(7, {width}\) does not fit the 3"):
            product(jnp.ones((7, width)), R, L)


@pytest.mark.parametrize("kind", ["conv", "embed"])
def test_convolutions_and_embeddings_use_the_dense_form(kind: str) -> None:
    if kind == "conv":
        model, x = nn.Conv(6, (3,), param_dtype=jnp.float64), gaussian(2, 9, 4)
    else:
        model, x = nn.Embed(10, 6, param_dtype=jnp.float64), jnp.arange(8).reshape(2, 4)
    params = model.init(jax.random.key(0), x)["params"]
    axes = pefts.infer_axes(model.apply, params, x)
    peft = pefts.monarch(blocks=(2, 3), rank=1, targets="kernel|embedding", axes=axes)
    state = peft.init(jax.random.key(0), params)
    factored = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    merged = model.apply({"params": peft.merge(params, state)}, x)
    np.testing.assert_allclose(factored, merged, rtol=0, atol=1e-12)


def test_a_lora_adapts_the_factors() -> None:
    params = {"kernel": gaussian(D_IN, D_OUT)}
    model, x = nn.Dense(D_OUT, use_bias=False, param_dtype=jnp.float64), gaussian(4, D_IN, seed=1)
    both = pefts.chain(
        pefts.monarch(blocks=(N1, N2), targets="kernel"), pefts.lora(2, targets="kernel")
    )
    state = pefts.randomize(jax.random.key(1), both.init(jax.random.key(0), params))
    factored = pefts.apply(model.apply)({"params": both.bind(params, state)}, x)
    merged = model.apply({"params": both.merge(params, state)}, x)
    np.testing.assert_allclose(factored, merged, rtol=1e-10)


# --- choices ---


@pytest.mark.parametrize(
    ("shape", "n1", "n2"),
    [((384, 1536), 24, 32), ((12, 12), 4, 3), ((16, 16), 4, 4), ((7, 7), 7, 1)],
)
def test_default_blocks_are_nearest_to_the_roots(shape: tuple[int, int], n1: int, n2: int) -> None:
    state = jax.eval_shape(pefts.monarch().init, jax.random.key(0), {"kernel": jnp.ones(shape)})
    group = state.trainable["kernel"]
    assert (len(group["R"]), len(group["L"])) == (n1, n2)


@pytest.mark.parametrize("side", [16, 256, 1024])
def test_a_square_kernel_has_twice_its_side_to_the_three_halves(side: int) -> None:
    params = {"kernel": jax.ShapeDtypeStruct((side, side), jnp.float32)}
    state = jax.eval_shape(pefts.monarch().init, jax.random.key(0), params)
    assert pefts.count(state.trainable) == 2 * round(side**1.5)


def test_kernels_have_ranks_of_their_own() -> None:
    params = {name: {"kernel": gaussian(D_IN, D_OUT)} for name in ("up", "gate")}
    peft = pefts.monarch(blocks=(N1, N2), rank=1, rank_pattern={"gate": 4})
    state = peft.init(jax.random.key(0), params)
    merged = peft.merge(params, state)
    np.testing.assert_allclose(merged["gate"]["kernel"], params["gate"]["kernel"], atol=1e-12)
    assert not np.allclose(merged["up"]["kernel"], params["up"]["kernel"], atol=0.1)


# --- official golden vectors: torch kernels are ours transposed, and so is every block ---


@pytest.fixture
def golden() -> dict[str, np.ndarray]:
    if not GOLDEN.exists():
        pytest.skip("../shared/golden/official/monarch is not on this machine")
    return dict(np.load(GOLDEN))


def blocks_of(array: np.ndarray) -> jax.Array:
    return jnp.asarray(array.swapaxes(1, 2))


@pytest.mark.parametrize("which", ["rank1", "rankr"])
def test_golden_projection(golden: dict, which: str) -> None:
    W, blocks = jnp.asarray(golden["W"].T), (int(golden["n1"]), int(golden["n2"]))
    rank = int(golden["rho"]) if which == "rankr" else 1
    params = {"kernel": W}
    peft, state = started(W, blocks=blocks, rank=rank)
    merged = peft.merge(params, state)["kernel"]
    np.testing.assert_allclose(merged, golden[f"{which}_dense"].T, rtol=0, atol=1e-12)
    error = projection_error(peft, params, state)["kernel"] * np.linalg.norm(W)
    np.testing.assert_allclose(error, golden[f"{which}_error"], rtol=1e-10)
    shapes = [golden[f"{which}_{name}"].swapaxes(1, 2).shape for name in ("w1", "w2")]
    assert [state.trainable["kernel"][name].shape for name in "RL"] == shapes


@pytest.mark.parametrize("which", ["rank1", "rankr"])
def test_golden_product_and_gradients(golden: dict, which: str) -> None:
    x, R, L = (jnp.asarray(golden["x"]), *map(blocks_of, _pair(golden, which, "w1", "w2")))
    np.testing.assert_allclose(product(x, R, L), golden[f"{which}_y"], rtol=0, atol=1e-12)
    _, pull = jax.vjp(lambda R, L: product(x, R, L), R, L)
    wanted = map(blocks_of, _pair(golden, which, "grad_w1", "grad_w2"))
    for got, expected in zip(pull(jnp.asarray(golden["cot"])), wanted, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def _pair(golden: dict, which: str, *names: str) -> list[np.ndarray]:
    return [golden[f"{which}_{name}"] for name in names]


def test_golden_square_projection_with_default_blocks(golden: dict) -> None:
    W = jnp.asarray(golden["square_W"].T)
    peft, state = started(W)
    group = state.trainable["kernel"]
    assert (len(group["R"]), len(group["L"])) == (golden["square_n1"], golden["square_n2"])
    merged = peft.merge({"kernel": W}, state)["kernel"]
    np.testing.assert_allclose(merged, golden["square_dense"].T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("which", ["layer_up", "layer_down"])
def test_golden_layer_for_training_from_scratch(golden: dict, which: str) -> None:
    """Equal numbers of blocks, hidden rows that they do not divide, padded inputs and outputs."""
    x, bias = jnp.asarray(golden[f"{which}_x"]), golden[f"{which}_bias"]
    R, L = map(blocks_of, _pair(golden, which, "blkdiag1", "blkdiag2"))

    def run(R: jax.Array, L: jax.Array) -> jax.Array:
        return product(x, R, L)[:, : len(bias)]

    y, pull = jax.vjp(run, R, L)
    np.testing.assert_allclose(y + bias[None], golden[f"{which}_y"], rtol=0, atol=1e-12)
    wanted = map(blocks_of, _pair(golden, which, "grad_blkdiag1", "grad_blkdiag2"))
    for got, expected in zip(pull(jnp.asarray(golden[f"{which}_cot"])), wanted, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
