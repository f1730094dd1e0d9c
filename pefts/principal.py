"""Principal components of a stream of rows, in memory for k of them: the incremental SVD of EVA.

    [ diag(s) C ; X - mean(X) ; sqrt(m n / (m + n)) (mean(X) - c) ] = U diag(s') C'

C (k, d) and s (k,) come from the m rows before, whose mean is c; X (n, d) is the new batch. The
leading k rows of C' are the components of all m + n rows, up to what earlier batches had to drop.

Source: One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation,
  arXiv 2410.07170.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

POWER_ITERATIONS = 4  # of the randomised SVD


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b in full float32 on every device."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def merge(
    so_far: Mapping[str, jax.Array], x_NxI: jax.Array, weights: jax.Array
) -> dict[str, jax.Array]:
    """The components of all rows, from those of the rows before and the rows of this batch.

    Args:
      so_far: "components" (k, d), "singular" (k,), "center" (d,), "scatter" (the sum of all squared
        distances from the center) and "count", all zero before the first batch.
      x_NxI: the batch.
      weights: (n,), 1 for the rows that count and 0 for the others.

    Returns:
      `so_far` after this batch, without "count".
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
    return {
        "components": components,
        "singular": singular,
        "center": so_far["center"] + share * shift_I,
        "scatter": so_far["scatter"] + jnp.sum(centred_NxI**2) + jnp.sum(between_I**2),
    }


def leading(rows_MxI: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest singular values and right singular vectors, signed by their largest entry.

    Randomised, with twice as many directions as asked for, where that is less than the full SVD.
    """
    width = 2 * k
    if width < min(rows_MxI.shape):
        start = jax.random.normal(jax.random.key(0), (rows_MxI.shape[1], width), jnp.float32)
        range_MxQ = jnp.linalg.qr(matmul(rows_MxI, start))[0]
        for _ in range(POWER_ITERATIONS):
            back_IxQ = jnp.linalg.qr(matmul(rows_MxI.T, range_MxQ))[0]
            range_MxQ = jnp.linalg.qr(matmul(rows_MxI, back_IxQ))[0]
        rows_MxI = matmul(range_MxQ.T, rows_MxI)
    _, singular, vectors_KxI = jnp.linalg.svd(rows_MxI, full_matrices=False)
    singular, vectors_KxI = singular[:k], vectors_KxI[:k]
    largest = jnp.argmax(jnp.abs(vectors_KxI), axis=1)[:, None]
    sign = jnp.sign(jnp.take_along_axis(vectors_KxI, largest, axis=1))
    return singular, vectors_KxI * sign
