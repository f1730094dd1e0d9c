"""Attention as a module without parameters, and who may see whom.

Shape legend: B batch, T query tokens, S key tokens, N query heads, K key heads (N is a multiple of
K), G = N / K, H head size.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

Implementation = Literal["auto", "xla", "cudnn"]


class Attend(nn.Module):
    """dropout(softmax(cap(scale q k^T))) v over the keys that the mask allows; no parameters.

    A module of its own so that an interceptor can see queries, keys and values (prefix tuning).
    Shapes: q (B, T, N, H); k, v (B, S, K, H); mask boolean (B or 1, 1, T or 1, S), or None: no
    token sees a later one. Returns (B, T, N, H).

    jax.nn's attention neither caps logits nor drops probabilities: those cases are written out.

    Args:
      dropout: of probabilities, in training.
      scale: of the logits; H^(-1/2) by default.
      cap: c tanh(logits / c), or no bound.
      implementation: "xla", "cudnn" (flash attention), or "auto", jax.nn's choice.
    """

    dropout: float = 0.0
    deterministic: bool = True
    scale: float | None = None
    cap: float | None = None
    implementation: Implementation = "auto"

    @nn.compact
    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        drops = self.dropout > 0 and not self.deterministic
        if self.cap is None and not drops:
            return jax.nn.dot_product_attention(
                q,
                k,
                v,
                mask=mask,
                scale=self.scale,
                is_causal=mask is None,
                implementation=None if self.implementation == "auto" else self.implementation,
            )
        batch, length, heads, size = q.shape
        scale = size**-0.5 if self.scale is None else self.scale
        q = (q * jnp.asarray(scale, q.dtype)).reshape(batch, length, k.shape[2], -1, size)
        logits_BxKxGxTxS = jnp.einsum("BTKGH,BSKH->BKGTS", q, k).astype(jnp.float32)
        if self.cap is not None:
            logits_BxKxGxTxS = self.cap * jnp.tanh(logits_BxKxGxTxS / self.cap)
        allowed = causal(length, length) if mask is None else mask
        # The lowest finite number, not -inf: a row without any token stays free of NaN.
        masked = jnp.where(allowed[:, :, None], logits_BxKxGxTxS, jnp.finfo(jnp.float32).min)
        weights_BxKxGxTxS = jax.nn.softmax(masked, axis=-1).astype(v.dtype)
        if drops:
            weights_BxKxGxTxS = nn.Dropout(self.dropout, deterministic=False)(weights_BxKxGxTxS)
        y = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BxKxGxTxS, v)
        return y.reshape(batch, length, heads, size)


def causal(
    queries: int, keys: int, first: jax.Array | int = 0, window: int | None = None
) -> jax.Array:
    """Whether query t, in slot first + t, may see slot s: (1, 1, T, S), boolean.

    Args:
      queries: T.
      keys: S, slots counted from 0.
      first: slot of the first query.
      window: how many slots back a query sees, its own included; None: all.

    >>> causal(2, 4, first=2, window=2)[0, 0].astype(int).tolist()
    [[0, 1, 1, 0], [0, 0, 1, 1]]
    """
    q_Tx1 = (jnp.arange(queries, dtype=jnp.int32) + first)[:, None]
    k_1xS = jnp.arange(keys, dtype=jnp.int32)[None, :]
    seen = k_1xS <= q_Tx1
    if window is not None:
        seen &= k_1xS > q_Tx1 - window
    return seen[None, None]
