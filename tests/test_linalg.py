"""The shared decompositions against numpy and scipy in float64, and on a real encoder."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import models
from pefts import linalg, paths

SHAPES = [(12, 12), (20, 7), (7, 20)]
Array = np.ndarray


def gaussian(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape)


def separated(*shape: int, seed: int = 0) -> Array:
    """Singular values 1, 1/2, 1/3, ...: every cut has a gap."""
    U, S, Vt = np.linalg.svd(gaussian(*shape, seed=seed), full_matrices=False)
    return U * (1 / np.arange(1, S.shape[-1] + 1)) @ Vt


def product(factors: linalg.SVD) -> Array:
    U, S, V = (np.asarray(part, np.float64) for part in factors)
    return U * S[..., None, :] @ V.swapaxes(-1, -2)


def truncated(W: Array, rank: int) -> Array:
    U, S, Vt = np.linalg.svd(W.astype(np.float64), full_matrices=False)
    return U[..., :rank] * S[..., None, :rank] @ Vt[..., :rank, :]


def distance(A: Any, B: Any) -> float:
    """||A A^T - B B^T||_2 by its definition, in float64."""
    A, B = (np.asarray(part, np.float64) for part in (A, B))
    difference = A @ A.swapaxes(-1, -2) - B @ B.swapaxes(-1, -2)
    return float(np.max(np.linalg.norm(difference, 2, axis=(-2, -1))))


def orthonormal(columns: Any, atol: float) -> None:
    columns = np.asarray(columns, np.float64)
    gram = columns.swapaxes(-1, -2) @ columns
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(gram.shape[-1]), gram.shape), atol=atol)


# --- svd ---


@pytest.mark.parametrize("shape", [*SHAPES, (3, 9, 5), (2, 3, 5, 9)])
@pytest.mark.parametrize("rank", [None, 1, 4])
def test_svd_is_numpys(shape, rank):
    W = gaussian(*shape)
    with jax.enable_x64(True):
        factors = linalg.svd(W, rank)
        assert {part.dtype for part in factors} == {jnp.dtype(jnp.float64)}
    r, (*batch, d_in, d_out) = rank or min(shape[-2:]), shape
    assert [part.shape for part in factors] == [(*batch, d_in, r), (*batch, r), (*batch, d_out, r)]
    np.testing.assert_allclose(product(factors), truncated(W, r), atol=1e-12)
    np.testing.assert_allclose(factors.S, np.linalg.svd(W, compute_uv=False)[..., :r], rtol=1e-12)
    orthonormal(factors.U, 1e-12)
    orthonormal(factors.V, 1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("method", linalg.METHODS)
def test_svd_of_low_precision_is_that_of_its_values_in_float32(dtype, method):
    W = jnp.asarray(separated(60, 50), dtype)
    factors = linalg.svd(W, 3, method=method)
    assert {part.dtype for part in factors} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(product(factors), truncated(np.asarray(W, np.float64), 3), atol=1e-6)


@pytest.mark.parametrize("method", linalg.METHODS)
def test_svd_under_vmap_map_and_jit_is_that_of_a_batch(method):
    W = jnp.asarray(separated(4, 60, 50), jnp.float32)
    run = functools.partial(linalg.svd, rank=5, method=method)
    expected = product(run(W))
    np.testing.assert_allclose(expected, truncated(np.asarray(W), 5), atol=1e-6)
    for mapped in (jax.vmap(run), lambda W: jax.lax.map(run, W), run):
        np.testing.assert_allclose(product(jax.jit(mapped)(W)), expected, atol=1e-6)
    np.testing.assert_allclose(product(run(W[1])), expected[1], atol=1e-6)


@pytest.mark.parametrize("shape", [(60, 60), (90, 50), (50, 90), (2, 60, 50)])
def test_randomized_finds_the_leading_space(shape):
    W = separated(*shape)
    with jax.enable_x64(True):
        factors = linalg.svd(W, 6, method="randomized")
    np.testing.assert_allclose(product(factors), truncated(W, 6), atol=1e-9)
    orthonormal(factors.U, 1e-12)
    orthonormal(factors.V, 1e-12)


def test_randomized_is_deterministic_whatever_the_default_generator():
    W = jnp.asarray(gaussian(60, 50), jnp.float32)
    run = functools.partial(linalg.svd, W, 4, method="randomized", iterations=0)
    first = run()
    with jax.default_prng_impl("rbg"):
        second = run()
    for one, two in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, two)


def test_randomized_without_room_for_oversampling_is_exact():
    W = jnp.asarray(gaussian(40, 36), jnp.float32)
    for one, two in zip(linalg.svd(W, 4, method="randomized"), linalg.svd(W, 4), strict=True):
        np.testing.assert_array_equal(one, two)
    rough = linalg.svd(W, 4, method="randomized", oversample=0, iterations=0)
    assert np.abs(product(rough) - truncated(np.asarray(W), 4)).max() > 1e-3


def test_more_iterations_are_nearer():
    W = gaussian(80, 60)
    with jax.enable_x64(True):
        errors = [
            distance(
                linalg.svd(W, 3, method="randomized", oversample=2, iterations=n).U,
                np.linalg.svd(W)[0][:, :3],
            )
            for n in (0, 8, 64)
        ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize("method", linalg.METHODS)
def test_svd_of_a_rank_deficient_matrix(method):
    W = gaussian(60, 3) @ gaussian(3, 50, seed=1)
    factors = linalg.svd(jnp.asarray(W, jnp.float32), 6, method=method)
    np.testing.assert_allclose(product(factors), W, atol=1e-4)
    assert (np.asarray(factors.S[3:]) < 1e-4).all()
    orthonormal(factors.U, 1e-5)
    orthonormal(factors.V, 1e-5)
    zero = linalg.svd(jnp.zeros((60, 50)), 2, method=method)
    assert all(np.isfinite(part).all() for part in zero)


@pytest.fixture(scope="module")
def encoder() -> dict[str, jax.Array]:
    return paths.flatten(models.load("minilm")[1]["encoder"])


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("attention/query", 1),  # S[7] and S[8] differ by 0.15%, less than in any other kernel
        ("attention/output", 4),  # S[15] and S[16] differ by 0.04%, less than in any other kernel
        ("attention/value", 5),  # the flattest spectrum: the slowest to converge
        ("mlp/intermediate", 4),  # wide
        ("mlp/output", 1),  # tall
    ],
)
def test_randomized_defaults_find_the_leading_space_of_real_kernels(encoder, name, layer):
    W = encoder[f"layers/{name}/kernel"][layer]
    U, S, Vt = np.linalg.svd(np.asarray(W, np.float64), full_matrices=False)
    for rank in (8, 16):
        found = linalg.svd(W, rank, method="randomized")
        assert linalg.projector_distance(found.U, U[:, :rank]) < 1e-3
        assert linalg.projector_distance(found.V, Vt[:rank].T) < 1e-3
        np.testing.assert_allclose(found.S, S[:rank], rtol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"method": "fast"}, "method='fast' is unknown"),
        ({"rank": 0}, "rank=0 is out of range.*choose 1 to 7"),
        ({"rank": 8}, "rank=8 is out of range"),
        ({"rank": 2.0}, "rank=2.0 is out of range"),
        ({"iterations": -1}, "iterations=-1"),
        ({"oversample": -1}, "oversample=-1"),
    ],
)
def test_svd_refuses(kwargs, match):
    with pytest.raises(ValueError, match=match):
        linalg.svd(jnp.ones((7, 9)), **kwargs)


@pytest.mark.parametrize("run", [linalg.svd, linalg.lu, linalg.qr, linalg.cayley])
def test_only_floating_matrices(run):
    with pytest.raises(ValueError, match="floating matrix"):
        run(jnp.ones((3, 3), jnp.int32))
    with pytest.raises(ValueError, match="floating matrix"):
        run(jnp.ones(3))


def test_svd_of_a_kernel_over_eight_devices():
    """Layers mapped one by one, d_in cut over the devices."""
    W = jnp.asarray(separated(3, 64, 48), jnp.float32)
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    sharded = jax.device_put(W, NamedSharding(mesh, P(None, ("data", "fsdp"), None)))
    assert len(sharded.sharding.device_set) == 8
    for method in linalg.METHODS:
        run = functools.partial(linalg.svd, rank=4, method=method)
        mapped = jax.jit(lambda W, run=run: jax.lax.map(run, W))
        here, there = mapped(W), mapped(sharded)
        assert distance(here.U, there.U) < 1e-5
        assert distance(here.V, there.V) < 1e-5
        np.testing.assert_allclose(here.S, there.S, rtol=1e-5)


# --- lu and qr ---


@pytest.mark.parametrize("shape", [*SHAPES, (3, 9, 5), (3, 5, 9)])
def test_lu_is_scipys(shape):
    W = gaussian(*shape)
    with jax.enable_x64(True):
        permutation, L, D, U = map(np.asarray, linalg.lu(W))
    k, (*batch, d_in, d_out) = min(shape[-2:]), shape
    assert [part.shape for part in (permutation, L, D, U)] == [
        (*batch, d_in), (*batch, d_in, k), (*batch, k), (*batch, k, d_out),
    ]  # fmt: skip
    permuted = np.take_along_axis(W, np.asarray(permutation)[..., None], axis=-2)
    np.testing.assert_allclose(permuted, L @ (D[..., None] * U), atol=1e-12)
    _, lower, upper = scipy.linalg.lu(W)
    np.testing.assert_allclose(L, lower, atol=1e-12)
    np.testing.assert_allclose(D[..., None] * U, upper, atol=1e-12)
    np.testing.assert_array_equal(np.diagonal(U, axis1=-2, axis2=-1), 1)
    assert np.abs(L).max() <= 1


def test_lu_of_bfloat16_and_under_vmap():
    W = jnp.asarray(gaussian(4, 6, 5), jnp.bfloat16)
    permutation, L, D, U = jax.jit(jax.vmap(linalg.lu))(W)
    assert {part.dtype for part in (L, D, U)} == {jnp.dtype(jnp.float32)}
    permuted = np.take_along_axis(np.asarray(W, np.float32), np.asarray(permutation)[..., None], -2)
    np.testing.assert_allclose(permuted, L @ (D[..., None] * U), atol=1e-5)


def test_lu_with_a_zero_pivot_is_finite_and_lacks_that_row():
    W = np.array([[0.0, 3.0, 5.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    permutation, L, D, U = linalg.lu(W)
    np.testing.assert_array_equal(permutation, [0, 1, 2])
    np.testing.assert_array_equal(D, 0)
    np.testing.assert_array_equal(L, np.eye(3))
    np.testing.assert_array_equal(U, [[1, 3, 5], [0, 1, 2], [0, 0, 1]])


@pytest.mark.parametrize("shape", [*SHAPES, (3, 9, 5)])
def test_qr(shape):
    W = gaussian(*shape)
    with jax.enable_x64(True):
        Q, R = map(np.asarray, linalg.qr(W))
    np.testing.assert_allclose(Q @ R, W, atol=1e-12)
    orthonormal(Q, 1e-12)
    np.testing.assert_array_equal(R, np.triu(R))
    assert Q.shape[-1] == min(shape[-2:])


# --- rotations ---


@pytest.mark.parametrize("shape", [(9, 4), (5, 5), (3, 9, 4)])
def test_orthonormal(key, shape):
    A = linalg.orthonormal(key, shape)
    assert A.shape == shape and A.dtype == jnp.float32
    orthonormal(A, 1e-6)
    assert distance(A, linalg.orthonormal(jax.random.key(1), shape)) > 0.1 or shape == (5, 5)
    if len(shape) == 3:
        assert distance(A[0], A[1]) > 0.1


@pytest.mark.parametrize("shape", [(4, 5), (3,)])
def test_orthonormal_refuses(key, shape):
    with pytest.raises(ValueError, match="orthonormal columns"):
        linalg.orthonormal(key, shape)


def test_orthonormal_is_uniform(key):
    """Neither sign nor direction is preferred: the mean matrix is zero."""
    draws = linalg.orthonormal(key, (4000, 3, 3))
    assert np.abs(np.mean(draws, 0)).max() < 5 / np.sqrt(3 * 4000)


def test_skew_is_row_major():
    vector = gaussian(2, 10).astype(np.float32)
    expected = np.zeros((2, 5, 5), np.float32)
    expected[:, *np.triu_indices(5, 1)] = vector
    expected -= expected.swapaxes(1, 2)
    np.testing.assert_array_equal(linalg.skew(vector, 5), expected)
    np.testing.assert_array_equal(jax.vmap(lambda v: linalg.skew(v, 5))(vector), expected)
    with pytest.raises(ValueError, match=r"vector of shape \(2, 10\).*n=4.*= 6"):
        linalg.skew(vector, 4)


def test_cayley_is_the_rotation_of_its_equation():
    vector = gaussian(3, 15)
    with jax.enable_x64(True):
        Q = np.asarray(linalg.skew(vector, 6))
        R = np.asarray(linalg.cayley(Q))
    expected = (np.eye(6) - Q) @ np.linalg.inv(np.eye(6) + Q)
    np.testing.assert_allclose(R, expected, atol=1e-12)
    orthonormal(R, 1e-12)
    np.testing.assert_allclose(np.linalg.det(R), 1, rtol=1e-12)
    np.testing.assert_array_equal(linalg.cayley(np.zeros((4, 4))), np.eye(4))
    with pytest.raises(ValueError, match="not square"):
        linalg.cayley(np.ones((4, 5)))


@pytest.mark.parametrize("terms", [2, 3, 5, 8])
def test_neumann_is_its_polynomial(terms):
    with jax.enable_x64(True):
        Q = np.asarray(linalg.skew(0.05 * gaussian(2, 15), 6))
        R = np.asarray(linalg.cayley_neumann(Q, terms))
        exact = np.asarray(linalg.cayley(Q))
    powers = [np.linalg.matrix_power(-Q, n) for n in range(terms)]
    expected = powers[0] + powers[-1] + 2 * sum(powers[1:-1], start=np.zeros_like(Q))
    np.testing.assert_allclose(R, expected, atol=1e-12)
    # What is cut off is (-Q)^(terms-1) times a rotation.
    error, last = (np.linalg.norm(part, 2, axis=(-2, -1)) for part in (R - exact, powers[-1]))
    np.testing.assert_allclose(error, last, rtol=1e-9)
    with pytest.raises(ValueError, match="terms=1"):
        linalg.cayley_neumann(Q, 1)


# --- blocks ---


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 4, 2), (1, 2, 5)])
def test_block_diagonal_is_the_dense_product(shape):
    blocks, x = gaussian(*shape), gaussian(2, 5, shape[0] * shape[1])
    dense = scipy.linalg.block_diag(*blocks)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(linalg.block_diagonal_matrix(jnp.asarray(blocks)), dense)
        y = linalg.block_diagonal(jnp.asarray(x), jnp.asarray(blocks))
    np.testing.assert_allclose(y, x @ dense, atol=1e-12)


def test_block_diagonal_keeps_the_inputs_dtype_and_checks_it():
    blocks = jnp.ones((3, 4, 2))
    assert linalg.block_diagonal(jnp.ones((5, 12), jnp.bfloat16), blocks).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"3 \* 4 = 12"):
        linalg.block_diagonal(jnp.ones((5, 11)), blocks)


# --- distance of spaces ---


def test_projector_distance_is_the_norm_of_the_difference():
    A, B = (np.linalg.qr(gaussian(2, 9, 3, seed=seed))[0] for seed in (0, 1))
    rotation = np.linalg.qr(gaussian(3, 3, seed=2))[0]
    expected = [distance(A[n], B[n]) for n in range(2)]
    with jax.enable_x64(True):
        np.testing.assert_allclose(linalg.projector_distance(A, B), expected, rtol=1e-12)
        np.testing.assert_allclose(linalg.projector_distance(A @ rotation, -B), expected, 1e-12)
        assert (np.asarray(linalg.projector_distance(A, A @ rotation)) < 1e-14).all()
        np.testing.assert_allclose(linalg.projector_distance(A, B[..., :2]), 1, rtol=1e-12)


def test_projector_distance_is_accurate_near_zero():
    angle = 1e-5
    A = jnp.asarray([[1.0], [0.0]])
    B = jnp.asarray([[np.cos(angle)], [np.sin(angle)]], jnp.float32)
    np.testing.assert_allclose(linalg.projector_distance(A, B), angle, rtol=1e-3)
