"""The decompositions and structured matrices that methods share, in float32 or better.

Matrices are Flax kernels W (..., d_in, d_out); leading axes are a batch. float64 stays float64,
anything lower is computed in float32, and every product runs at full precision on every device.
Singular vectors are defined up to sign, and up to rotation where singular values coincide: compare
products and projectors, never the vectors themselves.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pefts.principal import tall_qr

METHODS = ("exact", "randomized")

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class SVD(NamedTuple):
    """W = U diag(S) V^T, or its best approximation of rank r."""

    U: jax.Array  # (..., d_in, r), orthonormal columns: directions of the input
    S: jax.Array  # (..., r), descending
    V: jax.Array  # (..., d_out, r), orthonormal columns: directions of the output


class LU(NamedTuple):
    """W[permutation] = L diag(D) U, with k = min(d_in, d_out)."""

    permutation: jax.Array  # (..., d_in), rows of W in the order of L's
    L: jax.Array  # (..., d_in, k), ones on the diagonal, zeros above
    D: jax.Array  # (..., k), the pivots
    U: jax.Array  # (..., k, d_out), ones on the diagonal, zeros below


def precise(x: jax.Array) -> jax.Array:
    """x in float32, or float64 where it is."""
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def precise_floats(tree: Any) -> Any:
    """The tree with its floating leaves in float32 or better, the others as they are."""
    return jax.tree.map(
        lambda leaf: precise(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
    )


def singular_values(W: Any) -> jax.Array:
    """S (..., k) of W (..., d_in, d_out), all of them, descending, without the vectors."""
    return jnp.linalg.svd(_matrix(W, "W"), compute_uv=False)


def svd(
    W: Any,
    rank: int | None = None,
    *,
    method: str = "exact",
    iterations: int = 24,
    oversample: int = 32,
) -> SVD:
    """The r largest singular triplets: W ~ U diag(S) V^T, U (..., d_in, r), V (..., d_out, r).

    "randomized" multiplies W by a fixed Gaussian matrix with r + oversample columns, sharpens that
    range by `iterations` steps of subspace iteration, and decomposes W inside it:
        Q = qr(W G);  iterations times: Q = qr(W qr(W^T Q));  svd(Q^T W)
    Its error in a direction falls by (S[r + oversample] / S_i)^(2 iterations + 1), so the vectors
    next to the cut are the worst. Spectra of trained kernels are flat: 4 iterations and oversample
    10 hold 97% of the energy of the 8 leading directions of every kernel of MiniLM but not their
    space; the defaults find it to 1e-3 in all of them, for ranks 8 and 16, in the time of the exact
    method at that size (384 by 384 to 384 by 1536). The Gaussian matrix is the same in every call.

    Args:
      W: (..., d_in, d_out), floating.
      rank: r, from 1 to the smaller side; the smaller side if None.
      method: "exact" or "randomized"; the latter is exact too where r + oversample is no less than
        the smaller side.
      iterations: of the randomised method.
      oversample: columns beyond r of the randomised method.

    Returns:
      An SVD of U, S and V in float32, or float64 where W is.

    Raises:
      ValueError: W is no floating matrix, the method is unknown, or a number is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> U, S, V = svd(jnp.diag(jnp.array([1.0, 3.0, 2.0])), rank=2)
      >>> [round(float(s), 3) for s in S], U.shape
      ([3.0, 2.0], (3, 2))

    Source: Finding Structure with Randomness: Probabilistic Algorithms for Constructing Approximate
      Matrix Decompositions, arXiv 0909.4061, algorithms 4.4 and 5.1.
    """
    W = _matrix(W, "W")
    side = min(W.shape[-2:])
    rank = side if rank is None else rank
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {METHODS}.")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= side:
        raise ValueError(
            f"rank={rank!r} is out of range for a matrix of shape {W.shape}: choose 1 to {side}."
        )
    for name, value in (("iterations", iterations), ("oversample", oversample)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name}={value!r}: give an integer of at least 0.")
    if method == "exact" or rank + oversample >= side:
        U, S, Vt = jnp.linalg.svd(W, full_matrices=False)
    else:
        Q = _leading_range(W, rank + oversample, iterations)
        inner, S, Vt = jnp.linalg.svd(_einsum("...iq,...io->...qo", Q, W), full_matrices=False)
        U = _einsum("...iq,...qr->...ir", Q, inner)
    return SVD(U[..., :rank], S[..., :rank], jnp.swapaxes(Vt[..., :rank, :], -1, -2))


def svd_near(W: Any, start: Any, *, iterations: int = 4, oversample: int = 16) -> SVD:
    """The r largest singular triplets of W, found from a guess of the left space by iteration.

        Q = [start, G];  iterations times: Q = qr(W qr(W^T Q));  Z R = qr(W^T Q)
        R^T = u S v^T;  U = Q u, V = Z v

    with a fixed Gaussian matrix G of `oversample` columns; the only SVD is that of the small R.
    For a spectrum as flat as S_i = i^-1/2, 384 by 1536 and rank 16, the defaults hold 99.97% of the
    energy of the leading space from a random start, at a largest angle of sine 0.15, and find the
    space to 0.007 when they start from that; for S_i = 1 / i these are 0.006 and 0.00001.

    Args:
      W: (d_in, d_out), floating; map over a stack by jax.lax.map.
      start: (d_in, r), any columns: those of an earlier call, or random ones.
      iterations: at least 1.
      oversample: columns beyond r; where r + oversample is no less than the smaller side, the exact
        decomposition is taken.

    Returns:
      An SVD of U, S and V in float32, or float64 where W is.

    Raises:
      ValueError: a shape does not fit, or a number is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> U, S, V = svd_near(jnp.diag(jnp.array([1.0, 3.0, 2.0])), jnp.ones((3, 1)), oversample=1)
      >>> round(float(S[0]), 3), [round(abs(float(u)), 3) for u in U[:, 0]]
      (3.0, [0.0, 1.0, 0.0])

    Source: Finding Structure with Randomness: Probabilistic Algorithms for Constructing Approximate
      Matrix Decompositions, arXiv 0909.4061, algorithm 4.4.
    """
    W = _matrix(W, "W")
    start = _matrix(start, "start").astype(W.dtype)
    side, rank = min(W.shape), start.shape[-1]
    if W.ndim != 2 or start.shape[:-1] != W.shape[:1] or not 1 <= rank <= side:
        raise ValueError(
            f"start of shape {start.shape} does not fit W of shape {W.shape}: give one matrix W "
            "(d_in, d_out) and start (d_in, r), with r from 1 to the smaller side."
        )
    for name, value, least in (("iterations", iterations, 1), ("oversample", oversample, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r}: give an integer of at least {least}.")
    if rank + oversample >= side:
        return svd(W, rank)
    # Named, so that jax_default_prng_impl cannot change a result.
    key = jax.random.key(0, impl="threefry2x32")
    G = jax.random.normal(key, (W.shape[0], oversample), W.dtype)
    Q = jnp.concatenate([start, G], axis=1)
    for _ in range(iterations):
        Z, _ = tall_qr(_einsum("io,iq->oq", W, Q))
        Q, _ = tall_qr(_einsum("io,oq->iq", W, Z))
    Z, R = tall_qr(_einsum("io,iq->oq", W, Q))
    inner, S, outer = jnp.linalg.svd(R.T)
    U, V = _einsum("iq,qr->ir", Q, inner), _einsum("oq,rq->or", Z, outer)
    return SVD(U[:, :rank], S[:rank], V[:, :rank])


def lu(W: Any) -> LU:
    """W[permutation] = L diag(D) U by partial pivoting, L and U with ones on their diagonals.

    L (..., d_in, k), D (..., k) and U (..., k, d_out) with k = min(d_in, d_out). Where a pivot D_i
    is exactly zero no such U need exist: row i of U is then left undivided but for the one on its
    diagonal, everything stays finite, and the product lacks that row. The caller decides.

    Args:
      W: (..., d_in, d_out), floating.

    Returns:
      An LU of permutation, L, D and U in float32, or float64 where W is.

    Raises:
      ValueError: W is no floating matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> permutation, L, D, U = lu(jnp.array([[1.0, 2.0], [4.0, 2.0]]))
      >>> permutation.tolist(), D.tolist(), U.tolist()
      ([1, 0], [4.0, 1.5], [[1.0, 0.5], [0.0, 1.0]])
    """
    W = _matrix(W, "W")
    k = min(W.shape[-2:])
    packed, _, permutation = jax.lax.linalg.lu(W)
    lower, upper = packed[..., :, :k], packed[..., :k, :]
    L = jnp.tril(lower, -1) + _eye_like(lower)
    D = jnp.diagonal(upper, axis1=-2, axis2=-1)
    safe = jnp.where(D == 0, jnp.ones_like(D), D)
    U = jnp.triu(upper / safe[..., None], 1) + _eye_like(upper)
    return LU(permutation, L, D, U)


def qr(W: Any) -> tuple[jax.Array, jax.Array]:
    """W = Q R, thin: Q (..., d_in, k) with orthonormal columns, R (..., k, d_out) upper triangular.

    k = min(d_in, d_out). The signs of R's diagonal are LAPACK's. ValueError unless W is a floating
    matrix.
    """
    Q, R = jnp.linalg.qr(_matrix(W, "W"))
    return Q, R


def orthonormal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """A random (..., n, r) with orthonormal columns, r <= n, uniform over all such matrices.

    Raises:
      ValueError: shape has fewer than two axes, or more columns than rows.
    """
    if len(shape) < 2 or shape[-1] > shape[-2]:
        raise ValueError(
            f"shape={tuple(shape)}: orthonormal columns need (..., n, r) with r at most n."
        )
    *batch, n, r = shape
    return jax.random.orthogonal(key, n, tuple(batch), dtype, m=r)


def skew(vector: Any, n: int) -> jax.Array:
    """The skew-symmetric (..., n, n) whose strict upper triangle, row by row, is the vector.

    Args:
      vector: (..., n (n - 1) / 2), in the order of numpy.triu_indices(n, 1).
      n: the side.

    Raises:
      ValueError: the vector has another length.

    Example:
      >>> import jax.numpy as jnp
      >>> skew(jnp.array([1.0, 2.0, 3.0]), 3).tolist()
      [[0.0, 1.0, 2.0], [-1.0, 0.0, 3.0], [-2.0, -3.0, 0.0]]
    """
    vector = jnp.asarray(vector)
    length = n * (n - 1) // 2
    if vector.shape[-1:] != (length,):
        raise ValueError(
            f"vector of shape {vector.shape}: a skew-symmetric matrix of side n={n} has "
            f"n (n - 1) / 2 = {length} free entries on the last axis."
        )
    rows, columns = jnp.triu_indices(n, 1)
    upper = jnp.zeros((*vector.shape[:-1], n, n), vector.dtype)
    upper = upper.at[..., rows, columns].set(vector)
    return upper - jnp.swapaxes(upper, -1, -2)


def cayley(Q: Any) -> jax.Array:
    """The rotation (I - Q)(I + Q)^-1 of a skew-symmetric Q (..., n, n), by one solve.

    I + Q is never singular for a skew Q. Float32 or better; ValueError unless Q is square.
    """
    Q, eye = _square(Q)
    # The factors commute, so the inverse may stand on the left.
    return jnp.linalg.solve(eye + Q, eye - Q)


def cayley_neumann(Q: Any, terms: int = 5) -> jax.Array:
    """`cayley` with (I + Q)^-1 cut after terms - 1 powers: no solve, but only nearly orthogonal.

    (I - Q) sum_{k < terms-1} (-Q)^k = I - 2 Q + 2 Q^2 - ... + (-Q)^(terms-1), `terms` terms in all;
    the error has the norm of Q^(terms-1), so ||Q|| < 1 is needed.

    NOTE(paper): Hugging Face PEFT's series has the opposite sign, cayley_neumann(-Q), which
      approximates the transpose of what its exact branch computes.

    Args:
      Q: skew-symmetric, (..., n, n).
      terms: of the expanded polynomial, at least 2 (Hugging Face PEFT: 5).

    Raises:
      ValueError: Q is not square, or terms < 2.
    """
    Q, eye = _square(Q)
    if not isinstance(terms, int) or isinstance(terms, bool) or terms < 2:
        raise ValueError(f"terms={terms!r}: give an integer of at least 2.")
    # Horner: (-Q)^0 + (-Q)^1 + ... in terms - 2 products, then the factor I - Q.
    series = eye
    for _ in range(terms - 2):
        series = eye - _einsum("...ij,...jk->...ik", Q, series)
    return _einsum("...ij,...jk->...ik", eye - Q, series)


def block_diagonal(x: jax.Array, blocks: jax.Array) -> jax.Array:
    """x times a block-diagonal matrix that is never built: (..., n i), (n, i, o) -> (..., n o).

    In x's dtype.

    Raises:
      ValueError: the last axis of x is not n i long.
    """
    n, i, o = blocks.shape
    if x.shape[-1] != n * i:
        raise ValueError(
            f"x of shape {x.shape} does not fit blocks {blocks.shape}: its last axis must be "
            f"{n} * {i} = {n * i}."
        )
    parts = x.reshape(*x.shape[:-1], n, i)
    y = jnp.einsum("...ni,nio->...no", parts, blocks.astype(x.dtype))
    return y.reshape(*x.shape[:-1], n * o)


def block_diagonal_matrix(blocks: jax.Array) -> jax.Array:
    """The dense (n i, n o) with the blocks (n, i, o) along its diagonal."""
    n, i, o = blocks.shape
    each = jnp.arange(n)
    dense = jnp.zeros((n, i, n, o), blocks.dtype).at[each, :, each, :].set(blocks)
    return dense.reshape(n * i, n * o)


def projector_distance(A: Any, B: Any) -> jax.Array:
    """||A A^T - B B^T||_2 of A (..., n, r) and B (..., n, q), both with orthonormal columns.

    The sine of the largest angle between the two spaces: 0 where they are one, whatever the signs
    and rotations of the columns; 1 where a direction of one is orthogonal to the other, as always
    with r != q. Accurate to rounding near 0, which 1 - cos^2 would not be.
    """
    A, B = _matrix(A, "A"), _matrix(B, "B")

    def outside(A: jax.Array, B: jax.Array) -> jax.Array:
        inside = _einsum("...nq,...qr->...nr", B, _einsum("...nq,...nr->...qr", B, A))
        return jnp.linalg.norm(A - inside, ord=2, axis=(-2, -1))

    return jnp.maximum(outside(A, B), outside(B, A))


def _leading_range(W: jax.Array, width: int, iterations: int) -> jax.Array:
    """An orthonormal basis (..., d_in, width) of W's dominant column space."""
    # Named, so that jax_default_prng_impl cannot change an initialisation.
    key = jax.random.key(0, impl="threefry2x32")
    G = jax.random.normal(key, (W.shape[-1], width), W.dtype)
    orthonormalise: Callable[[jax.Array], jax.Array] = lambda Y: jnp.linalg.qr(Y)[0]  # noqa: E731
    Q = orthonormalise(_einsum("...io,oq->...iq", W, G))
    for _ in range(iterations):
        Z = orthonormalise(_einsum("...io,...iq->...oq", W, Q))
        Q = orthonormalise(_einsum("...io,...oq->...iq", W, Z))
    return Q


def _eye_like(matrix: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.eye(*matrix.shape[-2:], dtype=matrix.dtype), matrix.shape)


def _square(Q: Any) -> tuple[jax.Array, jax.Array]:
    Q = _matrix(Q, "Q")
    if Q.shape[-1] != Q.shape[-2]:
        raise ValueError(f"Q of shape {Q.shape} is not square.")
    return Q, _eye_like(Q)


def _matrix(W: Any, name: str) -> jax.Array:
    """W in float32, or float64 where it is."""
    W = jnp.asarray(W)
    if W.ndim < 2 or not jnp.issubdtype(W.dtype, jnp.floating):
        raise ValueError(
            f"{name} of shape {W.shape} and dtype {W.dtype}: give a floating matrix (..., m, n)."
        )
    return precise(W)
