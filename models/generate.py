"""Continuations from a decoder: one jitted prefill, one jitted loop over new tokens.

    run = jax.jit(functools.partial(generate, model.apply, config, new_tokens=64, stop=(2,)))
    out = run({"params": params}, tokens, mask, key)

`apply` may be `pefts.apply(model.apply)` and the parameters bound ones: an adapter works here as it
does in training.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from models.decoder import Cache, empty_cache
from models.decoder_config import DecoderConfig

Array = jax.Array | np.ndarray


class Sampling(NamedTuple):
    """How the next token is drawn from the logits z.

    Attributes:
      temperature: of softmax(z / temperature); 0 takes the likeliest token.
      top_k: only so many likeliest tokens; 0: all.
      top_p: only the likeliest tokens that together reach this probability; 1: all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


class Generated(NamedTuple):
    """New tokens of every row, and how many of them count: a stop token is the last."""

    tokens: jax.Array  # (B, N), pad_id behind a row's end
    lengths: jax.Array  # (B,)


class _Loop(NamedTuple):
    step: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    running: jax.Array
    logits: jax.Array
    cache: Cache


def generate(
    apply: Callable[..., Any],
    config: DecoderConfig,
    variables: Any,
    tokens: Array,
    mask: Array,
    key: jax.Array | None = None,
    *,
    new_tokens: int,
    stop: tuple[int, ...] = (),
    pad_id: int = 0,
    sampling: Sampling = Sampling(),
) -> Generated:
    """Up to `new_tokens` tokens behind every prompt; ends early when all rows have stopped.

    Args:
      apply: model.apply, or pefts.apply(model.apply).
      config: the model's, for the shapes of its cache.
      variables: {"params": parameters}, plain or bound.
      tokens: (B, T) prompts, padded on the left.
      mask: (B, T), true (or 1) at real tokens.
      key: for sampling; not needed at temperature 0.
      new_tokens: the most to add.
      stop: tokens that end a row.
      pad_id: fills a row behind its end.
      sampling: greedy by default.

    Raises:
      ValueError: a prompt without tokens or padded on the right (where values are known), more
        positions than the model has learned, no key, or a choice out of range.
    """
    _check(config, tokens, mask, key, new_tokens, sampling)
    batch, length = tokens.shape
    cache = empty_cache(config, batch, length + new_tokens)
    logits, cache = apply(variables, tokens, cache, mask, method="extend")
    keys = jax.random.split(jax.random.key(0) if key is None else key, new_tokens)
    stops = jnp.asarray(stop, jnp.int32)[None]

    def body(loop: _Loop) -> _Loop:
        token = draw(loop.logits, keys[loop.step], sampling)
        token = jnp.where(loop.running, token, pad_id)
        zero = jnp.zeros((), jnp.int32)
        new = jax.lax.dynamic_update_slice(loop.tokens, token[:, None], (zero, loop.step))
        running = loop.running & ~jnp.any(token[:, None] == stops, axis=1)
        lengths = loop.lengths + loop.running.astype(jnp.int32)
        logits, cache = apply(variables, token[:, None], loop.cache, method="extend")
        return _Loop(loop.step + 1, new, lengths, running, logits, cache)

    start = _Loop(
        jnp.zeros((), jnp.int32),
        jnp.full((batch, new_tokens), pad_id, jnp.int32),
        jnp.zeros(batch, jnp.int32),
        jnp.ones(batch, bool),
        logits,
        cache,
    )
    end = jax.lax.while_loop(
        lambda loop: (loop.step < new_tokens) & jnp.any(loop.running), body, start
    )
    return Generated(end.tokens, end.lengths)


def draw(logits_BxV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """One token of each row, (B, V) -> (B,).

    >>> draw(jnp.asarray([[0.0, 2.0, 1.0]]), jax.random.key(0), Sampling()).tolist()
    [1]
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    logits_BxV = logits_BxV / sampling.temperature
    if sampling.top_k:
        floor_Bx1 = jax.lax.top_k(logits_BxV, min(sampling.top_k, logits_BxV.shape[1]))[0][:, -1:]
        logits_BxV = jnp.where(logits_BxV < floor_Bx1, -jnp.inf, logits_BxV)
    if sampling.top_p < 1:
        logits_BxV = _nucleus(logits_BxV, sampling.top_p)
    return jax.random.categorical(key, logits_BxV, axis=-1).astype(jnp.int32)


def _nucleus(logits_BxV: jax.Array, top_p: float) -> jax.Array:
    """-inf for tokens before which, in order of likelihood, top_p is already reached."""
    order = jnp.argsort(-logits_BxV, axis=-1)
    ranked = jnp.take_along_axis(jax.nn.softmax(logits_BxV, axis=-1), order, axis=-1)
    kept = jnp.cumsum(ranked, axis=-1) - ranked < top_p
    back = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(kept, back, axis=-1), logits_BxV, -jnp.inf)


def _check(
    config: DecoderConfig,
    tokens: Array,
    mask: Array,
    key: jax.Array | None,
    new_tokens: int,
    sampling: Sampling,
) -> None:
    if new_tokens < 1:
        raise ValueError(f"new_tokens={new_tokens} must be at least 1")
    total = tokens.shape[1] + new_tokens
    if config.max_length is not None and total > config.max_length:
        raise ValueError(
            f"{tokens.shape[1]} tokens of prompt and new_tokens={new_tokens} are {total} positions,"
            f" the model has {config.max_length}: shorten the prompt or ask for fewer"
        )
    if sampling.temperature < 0 or sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
        raise ValueError(
            f"{sampling}: temperature and top_k must not be negative, and 0 < top_p <= 1"
        )
    if sampling.temperature > 0 and key is None:
        raise ValueError(f"temperature={sampling.temperature} draws tokens at random: pass key=")
    if not isinstance(mask, jax.core.Tracer):
        _check_padding(np.asarray(mask).astype(bool))


def _check_padding(mask: np.ndarray) -> None:
    if not mask.any(axis=1).all():
        raise ValueError("mask has a row without any token; a prompt needs at least one")
    if not mask[:, -1].all():
        raise ValueError(
            "mask ends with padding; pad prompts on the left, so that all end together"
        )
