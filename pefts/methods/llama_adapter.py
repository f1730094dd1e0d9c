"""LLaMA-Adapter: a learned prompt in the upper layers, attended to beside the text and gated.

    y = attend(q, k, v) + g attend(q, P W_k + b_k, P W_v + b_v)

P (n, d) goes through the layer's own projections of keys and values, has no position, and is seen
by every query in a softmax of its own; g starts at 0, so the model is unchanged at step 0 and takes
in the prompt as it learns. A model decodes token by token as without it. It cannot be merged: the
new term depends on the queries. Trainable: n d + 1 a layer.

NOTE(paper): g is one number a layer, as in Hugging Face PEFT; the paper has one for each head, and
  its code bounds them by tanh (unchecked).
"""

import functools
import re
from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts.attention import PROJECTIONS, Attend, as_heads
from pefts.bound import Call, Rule, State
from pefts.core import Declaration, Sites, Traits, factory
from pefts.methods.prompt import check_length
from pefts.targets import Select, Site, selection


@factory
def llama_adapter(
    length: int = 10,
    *,
    layers: int | None = None,
    std: float = 1.0,
    **select: Unpack[Select],
) -> Declaration:
    """A gated prompt per layer: y = attend(q, k, v) + g attend(q, P W_k + b_k, P W_v + b_v).

    P (n, d), g (); W_k, W_v (d, kv). The model has to compute its attention in a module of its own,
    beside its projections; see pefts.attention.

    Args:
      length: n, the length of the prompt (the paper: 10; 100 in Hugging Face PEFT's comparison).
      layers: so many of the upper layers have one (the paper: 30 of 32); None: all. In a model with
        stacked layers the others' numbers exist too, without effect or gradient.
      std: standard deviation of P at first (Hugging Face PEFT: 1).
      **select: targets (default: value projections, and fused ones of queries, keys and values, by
        their usual names), exclude, axes; see pefts.targets.Select.

    Returns:
      A Peft; it cannot be merged.

    Raises:
      ValueError: length or std out of range; more layers than the model has, or layers of several
        stacks, of which none is the upper one; at the call: no attention module beside a target,
        or no projection of keys of a known name.

    Example:
      >>> import jax, pefts
      >>> params = {"value": {"kernel": jax.numpy.ones((6, 4))}}
      >>> pefts.count(pefts.llama_adapter(length=3).init(jax.random.key(0), params).trainable)
      19

    Source: LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention,
      arXiv 2303.16199.
    """
    check_length(length)
    if not std > 0:
        raise ValueError(f"std={std!r}: give a positive standard deviation, such as 1.")
    if layers is not None and (not isinstance(layers, int) or layers < 1):
        raise ValueError(f"layers={layers!r}: give a positive number of upper layers, or None.")
    return Declaration(
        rule=Rule(functools.partial(_start, length=length, std=std), attend=_attend),
        selection=selection(default=PROJECTIONS, **select),
        traits=Traits(mergeable=False),
        prepare=None if layers is None else functools.partial(_upper, layers),
        unmergeable="its term depends on the queries",
    )


def _start(
    key: jax.Array, W: jax.Array, *, site: Site, stats: Any, length: int, std: float
) -> tuple[dict, dict]:
    del W
    P = std * jax.random.normal(key, (length, site.d_in), jnp.float32)
    # A copy of the flag for each layer, where layers are stacked and some have no prompt.
    return {"P": P, "gate": jnp.zeros((), jnp.float32)}, dict(stats or {})


def _attend(attend: Attend, q: Any, k: Any, v: Any, mask: Any, p: State, call: Call) -> jax.Array:
    K, V = (as_heads(x, like) for x, like in zip(call.project(p["P"]), (k, v), strict=True))
    seen = jnp.ones((1, 1, q.shape[1], K.shape[1]), bool)
    gate = p["gate"] * p["on"] if "on" in p else p["gate"]
    y, more = attend(q, k, v, mask), call.attention(q, K, V, seen)
    return y + gate.astype(more.dtype) * more


def _upper(
    layers: int, sites: Sites, matrix_of: Callable[[Site], jax.Array], stats: Any
) -> tuple[Sites, Any]:
    """The sites of the upper layers, or a flag for each layer of a stack."""
    del matrix_of, stats
    top, *others = sorted(sites, key=_numbers, reverse=True)
    is_stacked = any(site.stack for site in sites)
    if is_stacked and others:
        raise ValueError(
            f"layers={layers} counts from the top of one stack, and the targets are "
            f"{[site.path for site in sites]}: give targets for one of them."
        )
    count = top.stack[0] if is_stacked else len(sites)
    if layers > count:
        raise ValueError(
            f"layers={layers}: the targets are in {count} layers; choose 1 to {count}."
        )
    if is_stacked:
        on = (jnp.arange(count) >= count - layers).astype(jnp.float32)
        return sites, {top.path: {"on": on}}
    return (top, *others)[:layers], None


def _numbers(site: Site) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", site.path)]
