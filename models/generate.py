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
    step: jax.Array  # tokens drawn so far
    last: jax.Array  # (B,)
    tokens: jax.Array
    lengths: jax.Array
    running: jax.Array
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
    keys = jax.random.split(jax.random.key(0) if key is None else key, new_tokens)
    stops, zero = jnp.asarray(stop, jnp.int32)[None], jnp.zeros((), jnp.int32)

    def grow(loop: _Loop, logits: jax.Array, cache: Cache) -> _Loop:
        """One more token in every row that has not ended."""
        token = jnp.where(loop.running, draw(logits, keys[loop.step], sampling), pad_id)
        tokens = jax.lax.dynamic_update_slice(loop.tokens, token[:, None], (zero, loop.step))
        lengths = loop.lengths + loop.running.astype(jnp.int32)
        running = loop.running & ~jnp.any(token[:, None] == stops, axis=1)
        return _Loop(loop.step + 1, token, tokens, lengths, running, cache)

    def body(loop: _Loop) -> _Loop:
        return grow(loop, *apply(variables, loop.last[:, None], loop.cache, method="extend"))

    cache = empty_cache(config, batch, length + new_tokens - 1)
    none = jnp.zeros(batch, jnp.int32)
    new = jnp.full((batch, new_tokens), pad_id, jnp.int32)
    empty = _Loop(zero, none, new, none, jnp.ones(batch, bool), cache)
    start = grow(empty, *apply(variables, tokens, cache, mask, method="extend"))
    end = jax.lax.while_loop(
        lambda loop: (loop.step < new_tokens) & jnp.any(loop.running), body, start
    )
    return Generated(end.tokens, end.lengths)


def per_row(
    apply: Callable[..., Any], bind: Callable[[Any, Any], Any], states: Any
) -> Callable[..., Any]:
    """`apply` for a batch in which every row has an adapter of its own.

    What the rows share, the base's kernels, is multiplied once for all of them.

        peft, states = ..., pefts.stack([state_0, state_1, state_2])
        chosen = jax.tree.map(lambda leaf: leaf[rows], states)    # rows (B,): which adapter
        mixed = per_row(pefts.apply(model.apply), peft.bind, chosen)
        out = generate(mixed, model.config, {"params": params}, tokens, mask, new_tokens=64)

    Args:
      apply: pefts.apply(model.apply).
      bind: (params, state) -> parameters that `apply` takes.
      states: adapter states with a leading axis B on every leaf.

    Returns:
      What `generate` takes as apply; its variables hold the plain parameters.
    """
    axes = Cache(1, 1, 0, None)  # pyright: ignore[reportArgumentType]

    def extend(
        variables: Any, tokens: Array, cache: Cache, mask: Array | None = None, *, method: str
    ) -> tuple[jax.Array, Cache]:
        def one(state: Any, row: Array, real: Array, held: Cache) -> tuple[jax.Array, Cache]:
            bound = {**variables, "params": bind(variables["params"], state)}
            held = Cache(held.keys[:, None], held.values[:, None], held.real[None], held.length)
            logits, held = apply(bound, row[None], held, real[None], method=method)
            held = Cache(held.keys[:, 0], held.values[:, 0], held.real[0], held.length)
            return logits[0], held

        real = jnp.ones(tokens.shape, bool) if mask is None else mask
        rows = jax.vmap(one, in_axes=(0, 0, 0, axes), out_axes=(0, axes))
        return rows(states, tokens, real, cache)

    return extend


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
