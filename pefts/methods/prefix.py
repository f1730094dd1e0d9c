"""Prefix tuning: n trained keys and values in front of those of every attention.

    y = attend(q, [K; k], [V; v])       K, V (n, kv) of each layer, kv = key heads * head size

Every query sees all n virtual tokens, whatever the mask says of the others. They are put in front
at each call and enter no cache, so a model decodes token by token as without them. They have no
position: the real tokens are counted from 0, or from n where the model's call takes positions.
Virtual tokens change the outputs from step 0 on, zeros too: they take a part of the softmax. It
cannot be merged. Trainable: 2 n kv a layer.

The paper trains them through an MLP, which the layers share but for its last matrix:
    [K, V] = tanh(E W1 + b1) W2 + b2    E (n, e), W1 (e, h), W2 (h, 2 kv); e: the largest kv
`bake` leaves K and V of it. Trainable then: n e + (e + 1) h, and 2 kv (h + 1) a layer.
"""

import functools
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts.attention import PROJECTIONS, Attend, as_heads, kv_features
from pefts.bound import Call, Rule, State
from pefts.core import SHARED, Declaration, Peft, PeftState, Sites, Traits, factory
from pefts.methods.prompt import check_length, ids_of, is_array, linear_layer
from pefts.targets import Select, Site, selection

INITS = ("normal", "zero")
MASKS = ("mask", "attention_mask")
UNCOUNTED = ("targets", "labels", "token_types", "token_type_ids")
ACTS_ON_ATTENTION = "its keys and values stand beside the kernels"


@factory
def prefix(
    length: int = 20,
    *,
    init: str = "normal",
    std: float = 0.02,
    hidden: int | None = None,
    positions: str | None = None,
    tokens: int | str = 0,
    **select: Unpack[Select],
) -> Declaration:
    """Trained keys and values: y = attend(q, [K; k], [V; v]), K and V (n, kv) of each layer.

    The model has to compute its attention in a module of its own; see pefts.attention.

    Args:
      length: n, the number of virtual tokens (the paper: 10 for table-to-text, 200 for summaries).
      init: of K and V, "normal" (mean 0, standard deviation `std`) or "zero", from which equal
        gradients keep the virtual tokens equal to each other: n of them are then as good as one.
        With `hidden`, "zero" sets the MLP's last layer to zero.
      std: for init="normal" without `hidden`. Hugging Face PEFT uses 1, far off the scale of most
        keys.
      hidden: h of the MLP (the paper: 512 and 800); None trains K and V themselves.
      positions: keyword of the model's call for positions (B, T), which are shifted by n then, as
        Hugging Face PEFT does; where they are not given, real tokens are counted from n. None: no
        shift. A model that counts positions by itself in a cached call is not served with it.
      tokens: where the model's call has its ids: a position (after the variables) or a keyword;
        for `positions` alone.
      **select: targets (default: value projections, and fused ones of queries, keys and values, by
        their usual names), exclude, axes; see pefts.targets.Select.

    Returns:
      A Peft; it cannot be merged.

    Raises:
      ValueError: length, init, std or hidden out of range; targets that no keys' size can be read
        from; at the call: no attention module beside a target, heads of another size, or with
        `positions` a cache, or arguments along the tokens that do not say how to count.

    Example:
      >>> import jax, pefts
      >>> params = {"value": {"kernel": jax.numpy.ones((6, 4))}}
      >>> pefts.count(pefts.prefix(length=3).init(jax.random.key(0), params).trainable)
      24

    Source: Prefix-Tuning: Optimizing Continuous Prompts for Generation, arXiv 2101.00190.
    """
    _check(length, init, std, hidden)
    deviation = std if init == "normal" else 0.0
    start = _start_tokens if hidden is None else _start_layer
    size = length if hidden is None else hidden
    shift = functools.partial(_shifted, n=length, name=positions or "", tokens=tokens)
    share = None
    if hidden is not None:
        share = functools.partial(_start_shared, length=length, hidden=hidden)
    return Declaration(
        rule=Rule(
            functools.partial(start, size=size, std=deviation),
            attend=_attend,
            inputs=None if positions is None else shift,
        ),
        selection=selection(default=PROJECTIONS, **select),
        traits=Traits(mergeable=False, identity_at_init=False, decodes=positions is None),
        init_shared=share,
        unmergeable=ACTS_ON_ATTENTION,
    )


def bake(peft: Peft, state: PeftState) -> tuple[Peft, PeftState]:
    """The keys and values that an MLP makes, without the MLP: the same outputs, fewer numbers.

    Raises:
      ValueError: the method is no prefix with `hidden`.
    """
    config = dict(peft.config)
    if config.pop("method") != "prefix" or config["hidden"] is None:
        raise ValueError(
            f"bake takes a prefix with hidden=..., and this is {dict(peft.config)!r}: there is no "
            "MLP to leave out."
        )
    layers = dict(state.trainable)
    call = Call(shared=layers.pop(SHARED))
    with jax.default_matmul_precision("highest"):
        made = {path: _made(layer, call) for path, layer in layers.items()}
    trainable = {path: {"K": K, "V": V} for path, (K, V) in made.items()}
    return prefix(**{**config, "hidden": None}), PeftState(trainable, state.frozen)


def _start_tokens(
    key: jax.Array, W: jax.Array, *, site: Site, stats: Any, size: int, std: float
) -> tuple[dict, dict]:
    del W, stats
    K, V = std * jax.random.normal(key, (2, size, kv_features(site.path, site.d_out)), jnp.float32)
    return {"K": K, "V": V}, {}


def _start_layer(
    key: jax.Array, W: jax.Array, *, site: Site, stats: Any, size: int, std: float
) -> tuple[dict, dict]:
    del W, stats
    W2, b2 = linear_layer(key, size, 2 * kv_features(site.path, site.d_out))
    return ({"W2": W2, "b2": b2} if std else {"W2": 0 * W2, "b2": 0 * b2}), {}


def _start_shared(key: jax.Array, sites: Sites, *, length: int, hidden: int) -> tuple[dict, dict]:
    key_E, key_W = jax.random.split(key)
    width = max(kv_features(site.path, site.d_out) for site in sites)
    W1, b1 = linear_layer(key_W, width, hidden)
    return {"E": jax.random.normal(key_E, (length, width), jnp.float32), "W1": W1, "b1": b1}, {}


def _made(p: State, call: Call) -> tuple[jax.Array, jax.Array]:
    """K and V (..., n, kv) of one layer, or of stacked ones."""
    if "K" in p:
        return p["K"], p["V"]
    E, W1, b1 = (call.shared[name] for name in ("E", "W1", "b1"))
    hidden = jnp.tanh(E @ W1 + b1[None])
    both = jnp.einsum("nh,...ho->...no", hidden, p["W2"]) + p["b2"][..., None, :]
    K, V = jnp.split(both, 2, axis=-1)
    return K, V


def _attend(attend: Attend, q: Any, k: Any, v: Any, mask: Any, p: State, call: Call) -> jax.Array:
    K, V = (as_heads(x, like) for x, like in zip(_made(p, call), (k, v), strict=True))
    if mask is None:
        mask = jnp.tril(jnp.ones((1, 1, q.shape[1], k.shape[1]), bool))
    seen = jnp.ones((*mask.shape[:-1], K.shape[1]), bool)
    return attend(
        q,
        jnp.concatenate([K, k], axis=1),
        jnp.concatenate([V, v], axis=1),
        jnp.concatenate([seen, mask], axis=-1),
    )


def _shifted(
    args: tuple, kwargs: dict, p: State, *, n: int, name: str, tokens: int | str
) -> tuple[tuple, dict]:
    """The arguments with positions that start behind the n virtual tokens."""
    del p
    given = kwargs.get(name)
    found = _counted(args, kwargs, name, tokens) if given is None else jnp.asarray(given)
    return args, {**kwargs, name: found + n}


def _counted(args: tuple, kwargs: dict, name: str, tokens: int | str) -> jax.Array:
    """How many real tokens lie before each."""
    given = {**{str(index): value for index, value in enumerate(args)}, **kwargs}
    ids = ids_of("prefix", given, tokens)
    # Behind a method's name the second argument may be anything.
    masks = MASKS if "method" in kwargs else ("1", *MASKS)
    mask = None
    for key, value in given.items():
        if key in (str(tokens), *UNCOUNTED) or value is None or isinstance(value, bool | str):
            continue
        if not is_array(value):
            raise ValueError(
                f"prefix: positions={name!r} shifts the positions of the tokens, and argument "
                f"{key!r} of this call is a {type(value).__name__}, perhaps a cache that holds "
                f"tokens to be counted: give {name}= in the call, or take positions=None."
            )
        if key in masks and value.shape == ids.shape:
            mask = jnp.asarray(value)
        elif value.shape == ids.shape:
            raise ValueError(
                f"prefix: positions={name!r} counts the tokens by their mask, and argument {key!r} "
                f"runs along them too: give mask= by its keyword, or {name}= in the call."
            )
    if mask is None:
        index = jnp.arange(ids.shape[-1], dtype=jnp.int32)
        return jnp.broadcast_to(index.reshape((1,) * (ids.ndim - 1) + index.shape), ids.shape)
    return jnp.maximum(jnp.cumsum(mask.astype(bool), axis=-1, dtype=jnp.int32) - 1, 0)


def _check(length: int, init: str, std: float, hidden: int | None) -> None:
    check_length(length)
    if init not in INITS:
        raise ValueError(f"init={init!r} is unknown; choose one of {INITS}.")
    if not std > 0:
        raise ValueError(f"std={std!r}: give a positive standard deviation, such as 0.02.")
    if hidden is not None and (not isinstance(hidden, int) or hidden < 1):
        raise ValueError(
            f"hidden={hidden!r}: give a positive size of the MLP, such as 512, or None."
        )
