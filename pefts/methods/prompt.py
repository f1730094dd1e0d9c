"""Prompt tuning: n trained vectors in front of the embedded tokens.

    E' = [P; E]        P (n, d), E (..., T, d) the looked-up embeddings

The token ids get n placeholder ids in front, and the arguments that run along with them (the mask,
token types) a fill value each; the lookup's first n positions are then overwritten with P. The
other parts of the model see n + T tokens: positions count from the first virtual one, and outputs
per token keep n virtual positions in front. A table that is also the output head (tied) is left
alone there. Not the identity at step 0, and it cannot be merged. Trainable: n d.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from pefts.bound import Call, Rule, State
from pefts.core import Declaration, Traits, factory
from pefts.low_rank import Init
from pefts.targets import Select, Site, selection

INITS = ("normal", "vocab")
TABLES = (
    r"(^|/)(embed|embedder|embed_tokens|tok_embeddings|token_embed(der|ding|dings)?"
    r"|word_embeddings?|wte)/embedding$"
)
ALIGNED: Mapping[str, float] = {
    "1": 1,
    "mask": 1,
    "attention_mask": 1,
    "targets": 0,
    "token_types": 0,
    "token_type_ids": 0,
}


@factory
def prompt(
    length: int = 20,
    *,
    init: str = "vocab",
    std: float = 0.02,
    tokens: int | str = 0,
    placeholder: int = 0,
    aligned: Mapping[str, float | None] | None = None,
    **select: Unpack[Select],
) -> Declaration:
    """Soft prompt: E' = [P; E], with P (n, d) trained and E (..., T, d) the embedded tokens.

    A model that looks the table up for a second sequence too (one table for encoder and decoder)
    is not served: every lookup's first n positions become P. Nor is decoding token by token with a
    cache: each call gets its own virtual tokens.

    Args:
      length: n, the number of virtual tokens (Hugging Face PEFT has no default; its guides use 20).
      init: of P, "vocab" (rows of the table, drawn at random, each once where there are enough) or
        "normal" (mean 0, standard deviation `std`).
      std: for init="normal". Hugging Face PEFT uses 1, far off the scale of most tables.
      tokens: where the model's call has its ids: a position (after the variables) or a keyword.
      placeholder: the id at virtual positions. It must be one that the model does not treat as
        padding (RoBERTa counts positions by ids other than its pad, 1); else it does not matter.
      aligned: {position or keyword: fill value} of other arguments shaped (..., T) or
        (..., T, more), extended by n values; None leaves that argument alone. Joined to the
        default: position "1", "mask" and "attention_mask" with 1, "token_types" and
        "token_type_ids" with 0.
      **select: targets (default: the word embedding by its usual names), exclude, axes; see
        pefts.targets.Select. One table must be left.

    Returns:
      A Peft; it cannot be merged.

    Raises:
      ValueError: length, std, placeholder or init out of range; targets that are no table, or
        several; at the call: no ids where `tokens` says, or an argument along the tokens that
        `aligned` does not name.

    Example:
      >>> import jax, pefts
      >>> params = {"wte": {"embedding": jax.numpy.ones((9, 4))}}
      >>> pefts.count(pefts.prompt(length=3).init(jax.random.key(0), params).trainable)
      12

    Source: The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv 2104.08691.
    """
    _check(length, init, std)

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del stats
        check_table("prompt", site)
        if init == "normal":
            return {"P": std * jax.random.normal(key, (length, site.d_out), jnp.float32)}, {}
        rows = jax.random.choice(key, site.d_in, (length,), replace=length > site.d_in)
        return {"P": jnp.take(W, rows, axis=0).astype(jnp.float32)}, {}

    in_call = InCall("prompt", length, tokens, placeholder, aligned)
    return in_front(in_call, start, lambda p: p["P"], select)


class InCall(NamedTuple):
    """Where virtual tokens stand in the arguments of a model's call."""

    method: str  # for errors
    length: int
    tokens: int | str
    placeholder: int
    aligned: Mapping[str, float | None] | None

    @property
    def fills(self) -> dict[str, float | None]:
        return {**ALIGNED, **{str(name): fill for name, fill in (self.aligned or {}).items()}}


def in_front(
    in_call: InCall, start: Init, virtual: Callable[[State], jax.Array], select: Select
) -> Declaration:
    """What puts virtual(state) (n, d) in front of the embedded tokens.

    Raises:
      ValueError: the placeholder is no id.
    """
    placeholder = in_call.placeholder
    if not isinstance(placeholder, int) or placeholder < 0:
        raise ValueError(f"placeholder={placeholder!r}: give an id of the vocabulary, such as 0.")

    def inputs(args: tuple, kwargs: dict, p: State) -> tuple[tuple, dict]:
        del p
        return _extend(args, kwargs, in_call)

    def output(y: jax.Array, p: State, call: Call) -> jax.Array:
        del call
        return _overwrite(in_call.method, y, virtual(p).astype(y.dtype))

    return Declaration(
        rule=Rule(start, output=output, inputs=inputs),
        selection=selection(default=TABLES, **select),
        traits=Traits(mergeable=False, identity_at_init=False, decodes=False),
        init_shared=functools.partial(_one_table, in_call.method),
    )


def check_table(method: str, site: Site) -> None:
    """Raise ValueError unless the site is a table of the vocabulary."""
    if not site.is_embedding or site.stack:
        raise ValueError(
            f"{method} replaces rows looked up in an embedding table, and {site.path!r} of shape "
            f"{site.shape} is none; give targets=r'...embedding$'."
        )


def linear_layer(key: jax.Array, d_in: int, d_out: int) -> tuple[jax.Array, jax.Array]:
    """(W (d_in, d_out), b (d_out,)), both uniform on +-1/sqrt(d_in)."""
    key_W, key_b = jax.random.split(key)
    bound = d_in**-0.5
    W = jax.random.uniform(key_W, (d_in, d_out), jnp.float32, -bound, bound)
    return W, jax.random.uniform(key_b, (d_out,), jnp.float32, -bound, bound)


def _overwrite(method: str, y: jax.Array, P: jax.Array) -> jax.Array:
    """[P; y[n:]] along the token axis."""
    n, d = P.shape
    if y.ndim < 2 or y.shape[-2] < n:
        raise ValueError(
            f"{method}: the table was looked up for {y.shape[:-1]} ids, too few for its {n} "
            "virtual tokens; the model looks it up for something else than the extended tokens."
        )
    front = jnp.broadcast_to(P.reshape((1,) * (y.ndim - 2) + (n, d)), (*y.shape[:-2], n, d))
    return jnp.concatenate([front, y[..., n:, :]], axis=-2)


def _extend(args: tuple, kwargs: dict, in_call: InCall) -> tuple[tuple, dict]:
    """The arguments with n more positions in the tokens and in what runs along with them."""
    tokens, n = in_call.tokens, in_call.length
    given = {**{str(index): value for index, value in enumerate(args)}, **kwargs}
    ids = ids_of(in_call.method, given, tokens)
    new = {str(tokens): _in_front(ids, n, in_call.placeholder, ids.ndim - 1)}
    for name, value in given.items():
        if name != str(tokens) and is_array(value):
            new[name] = _aligned(name, value, ids.shape, in_call)
    merged = {**given, **new}
    return tuple(merged[str(i)] for i in range(len(args))), {k: merged[k] for k in kwargs}


def ids_of(method: str, given: Mapping[str, Any], tokens: int | str) -> Any:
    """The ids among a call's arguments by position or keyword; (..., T)."""
    ids = given.get(str(tokens))
    if ids is None or not is_array(ids) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"{method}: tokens={tokens!r} is no array of integer ids in this call, which has "
            f"{sorted(given)}; give the position (after the variables) or the keyword of the ids."
        )
    if ids.ndim < 1:
        raise ValueError(f"{method}: the ids, tokens={tokens!r}, have no token axis: shape ().")
    return ids


def _aligned(name: str, value: Any, ids_shape: tuple[int, ...], in_call: InCall) -> Any:
    axis, length = len(ids_shape) - 1, ids_shape[-1]
    method, n, fills = in_call.method, in_call.length, in_call.fills
    if name in fills:
        if fills[name] is None:
            return value
        if tuple(value.shape[: axis + 1]) != tuple(ids_shape):
            raise ValueError(
                f"{method}: argument {name!r} of shape {tuple(value.shape)} does not run along ids "
                f"of shape {tuple(ids_shape)}; give aligned={{{name!r}: None}} to leave it alone."
            )
        return _in_front(value, n, fills[name], axis)
    if length in value.shape[axis:]:
        raise ValueError(
            f"{method}: argument {name!r} of shape {tuple(value.shape)} seems to run along the "
            f"{length} tokens, which become {length + n}: give aligned={{{name!r}: fill}} with the "
            f"value for virtual positions, or aligned={{{name!r}: None}} to leave it alone."
        )
    return value


def _in_front(value: Any, n: int, fill: Any, axis: int) -> jax.Array:
    value = jnp.asarray(value)
    shape = (*value.shape[:axis], n, *value.shape[axis + 1 :])
    return jnp.concatenate([jnp.full(shape, fill, value.dtype), value], axis=axis)


def is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _one_table(method: str, key: jax.Array, sites: tuple[Site, ...]) -> tuple[dict, dict]:
    """Nothing shared; it is where all sites are seen at once."""
    del key
    if len(sites) > 1:
        raise ValueError(
            f"{method} belongs to one embedding table, and the targets match {len(sites)}: "
            f"{[site.path for site in sites]}; give targets for the one that embeds the tokens."
        )
    return {}, {}


def check_length(length: int) -> None:
    """Raise ValueError unless there is a virtual token."""
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(
            f"length={length!r}: give a positive number of virtual tokens, such as 20."
        )


def _check(length: int, init: str, std: float) -> None:
    check_length(length)
    if init not in INITS:
        raise ValueError(f"init={init!r} is unknown; choose one of {INITS}.")
    if not std > 0:
        raise ValueError(f"std={std!r}: give a positive standard deviation, such as 0.02.")
