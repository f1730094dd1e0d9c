"""Trainable tokens: some rows of the embedding table, and nothing else.

    E'[t] = R[j] for t = tokens[j]      E'[t] = E[t] for every other token      R (n, d)

R starts as these tokens' own rows, so the model is unchanged at step 0. A lookup touches R beside
the table; a table that is the output head too (tied) gets the new rows there as well. Merging
writes the rows into the table. Trainable: n d, at a rate far above LoRA's: rows are seen as often
as their tokens.
"""

import functools
from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from pefts.bound import Call, Rule, State
from pefts.core import Declaration, factory
from pefts.methods.prompt import TABLES, check_table
from pefts.targets import Select, Site, selection


@factory
def trainable_tokens(tokens: Sequence[int], **select: Unpack[Select]) -> Declaration:
    """Trained rows of the embedding: E'[tokens] = R, R (n, d); all other rows stay.

    Args:
      tokens: ids of the tokens, for instance those that were added to the vocabulary.
      **select: targets (default: the word embedding by its usual names), exclude, axes; see
        pefts.targets.Select.

    Returns:
      A Peft; merging is exact.

    Raises:
      ValueError: no tokens, one that is no id or stands there twice, one outside the table, or
        targets that are no table.

    Example:
      >>> import jax, pefts
      >>> params = {"wte": {"embedding": jax.numpy.ones((9, 4))}}
      >>> peft = pefts.trainable_tokens([2, 7, 8])
      >>> pefts.count(peft.init(jax.random.key(0), params).trainable)
      12

    Source: the method of this name in Hugging Face PEFT; there is no paper.
    """
    ids = _checked(tokens)
    return Declaration(
        rule=Rule(
            functools.partial(_start, ids=ids),
            functools.partial(_table, ids=ids),
            functools.partial(_look_up, ids=ids),
            through_dot=True,
        ),
        selection=selection(default=TABLES, **select),
    )


def _start(
    key: jax.Array, W: jax.Array, *, site: Site, stats: Any, ids: np.ndarray
) -> tuple[dict, dict]:
    del key, stats
    check_table("trainable_tokens", site)
    if ids.max() >= site.d_in:
        raise ValueError(
            f"tokens={ids.tolist()}: {site.path!r} has the ids 0 to {site.d_in - 1}; add rows for "
            "new tokens to the table first."
        )
    return {"R": jnp.take(W, ids, axis=0).astype(jnp.float32)}, {}


def _table(W: jax.Array, p: State, call: Call, *, ids: np.ndarray) -> jax.Array:
    del call
    return W.at[ids].set(p["R"].astype(W.dtype))


def _look_up(x: jax.Array, W: Any, p: State, call: Call, *, ids: np.ndarray) -> jax.Array:
    """Rows for ids x (...): of R where the token has one, else of the table."""
    y, R = call.dot(x, W), p["R"]
    is_mine = x[..., None] == jnp.asarray(ids, x.dtype).reshape((1,) * x.ndim + ids.shape)
    rows = jnp.take(R.astype(y.dtype), jnp.argmax(is_mine, axis=-1), axis=0)
    return jnp.where(is_mine.any(-1)[..., None], rows, y)


def _checked(tokens: Sequence[int]) -> np.ndarray:
    given = list(tokens)
    whole = all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in given)
    if not given or not whole or len(set(given)) < len(given):
        raise ValueError(
            f"tokens={tokens!r}: give ids of the vocabulary, at least one and each once, such as "
            "[3, 7]."
        )
    return np.asarray(given, np.int32)
