"""Principal components of a stream of rows, in memory for k of them: the incremental SVD of EVA.

    [ diag(s) C ; X - mean(X) ; sqrt(m n / (m + n)) (mean(X) - c) ] = U diag(s') C'

C (k, d) and s (k,) come from the m rows before, whose mean is c; X (n, d) is the new batch. The
leading k rows of C' are the components of all m + n rows, up to what earlier batches had to drop.
float64 stays float64, the rest is float32.

Source: One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation,
  arXiv 2410.07170.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

POWER_ITERATIONS = 4  # of the randomised SVD
BLOCK = 4  # rows of a block of `blocked_qr`, as a multiple of its columns


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b in full float32 on every device."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def merge(
    so_far: Mapping[str, jax.Array], x_NxI: jax.Array, weights: jax.Array
) -> dict[str, jax.Array]:
    """The components of all rows, from those of the rows before and the rows of this batch.

    Args:
      so_far: "components" (k, d), "singular" (k,), "cosine" (k,), "center" (d,), "scatter" (the sum
        of all squared distances from the center) and "count", all zero before the first batch.
      x_NxI: the batch.
      weights: (n,), 1 for the rows that count and 0 for the others.

    Returns:
      `so_far` after this batch, without "count"; as it was where no row counts. "cosine" is |cos|
      between each component and the one in its place before this batch.
    """
    before, here = so_far["count"], jnp.sum(weights)
    share = here / jnp.maximum(before + here, 1)
    mean_I = jnp.sum(x_NxI * weights[:, None], axis=0) / jnp.maximum(here, 1)
    centred_NxI = (x_NxI - mean_I[None]) * jnp.sqrt(weights)[:, None]
    shift_I = mean_I - so_far["center"]
    between_I = jnp.sqrt(before * share) * shift_I
    known_KxI = so_far["singular"][:, None] * so_far["components"]
    singular, components = leading(
        jnp.concatenate([known_KxI, centred_NxI, between_I[None]]), len(known_KxI)
    )
    after = {
        "components": components,
        "singular": singular,
        "cosine": jnp.abs(jnp.sum(components * so_far["components"], axis=1)),
        "center": so_far["center"] + share * shift_I,
        "scatter": so_far["scatter"] + jnp.sum(centred_NxI**2) + jnp.sum(between_I**2),
    }
    return {name: jnp.where(here > 0, value, so_far[name]) for name, value in after.items()}


def leading(rows_MxI: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest singular values and right singular vectors, signed by their largest entry.

    Randomised, with twice as many directions as asked for, where that is much less than the full
    SVD, which is taken otherwise. Like pefts.linalg.svd, but with `tall_qr` in every place.
    """
    width = 2 * k
    if 2 * width < min(rows_MxI.shape):
        # Named, so that jax_default_prng_impl cannot change an initialisation.
        key = jax.random.key(0, impl="threefry2x32")
        basis_IxQ = jax.random.normal(key, (rows_MxI.shape[1], width), rows_MxI.dtype)
        range_MxQ, _ = tall_qr(matmul(rows_MxI, basis_IxQ))
        for _ in range(POWER_ITERATIONS):
            basis_IxQ, _ = tall_qr(matmul(rows_MxI.T, range_MxQ))
            range_MxQ, _ = tall_qr(matmul(rows_MxI, basis_IxQ))
        basis_IxQ, inner_QxQ = tall_qr(matmul(rows_MxI.T, range_MxQ))
        left_QxQ, singular, _ = jnp.linalg.svd(inner_QxQ)
        vectors_KxI = matmul(basis_IxQ, left_QxQ).T
    else:
        _, singular, vectors_KxI = jnp.linalg.svd(rows_MxI, full_matrices=False)
    singular, vectors_KxI = singular[:k], vectors_KxI[:k]
    largest = jnp.argmax(jnp.abs(vectors_KxI), axis=1)[:, None]
    sign = jnp.sign(jnp.take_along_axis(vectors_KxI, largest, axis=1))
    return singular, vectors_KxI * sign


def tall_qr(a_MxQ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a = Q R, thin, for many more rows than columns.

    On CPU by blocks of rows. LAPACK splits a call on thousands of rows over threads that wait for
    each other at every column, a thousand times slower where other work keeps the cores busy.
    """
    return jax.lax.platform_dependent(a_MxQ, cpu=blocked_qr, default=_whole_qr)


def _whole_qr(a_MxQ: jax.Array) -> tuple[jax.Array, jax.Array]:
    q_MxQ, upper_QxQ = jnp.linalg.qr(a_MxQ)
    return q_MxQ, upper_QxQ


def blocked_qr(a_MxQ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The QR decompositions of blocks of rows, then that of their R's; as accurate as one of all.

    Source: Communication-optimal parallel and sequential QR and LU factorizations, arXiv 0808.2664.
    """
    rows, columns = a_MxQ.shape
    size = BLOCK * columns
    blocks = rows // size
    if blocks < 2:
        return _whole_qr(a_MxQ)
    whole_BxSxQ = a_MxQ[: blocks * size].reshape(blocks, size, columns)
    # One after the other: LAPACK calls on a batch wait for threads that may all be waiting so.
    within_BxSxQ, each_BxQxQ = jax.lax.map(_whole_qr, whole_BxSxQ)
    rest = a_MxQ[blocks * size :]
    across, upper_QxQ = blocked_qr(jnp.concatenate([each_BxQxQ.reshape(-1, columns), rest]))
    inner_BxQxQ = across[: blocks * columns].reshape(blocks, columns, columns)
    q_MxQ = matmul(within_BxSxQ, inner_BxQxQ).reshape(-1, columns)
    return jnp.concatenate([q_MxQ, across[blocks * columns :]]), upper_QxQ
