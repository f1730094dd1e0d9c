"""P-tuning: soft prompts out of an MLP, in front of the embedded tokens.

    E' = [P; E]      P = ReLU(ReLU(T W1 + b1) W2 + b2) W3 + b3

T (n, d) is a table of trained vectors, W1 (d, h), W2 (h, h), W3 (h, d) with their biases are
trained too; the MLP couples the virtual tokens and is left out afterwards: `bake` keeps P, which is
a `prompt`. How the model's arguments grow is told there. Not the identity at step 0, and it cannot
be merged. Trainable: n d + (d + 1) h + (h + 1) h + (h + 1) d.

NOTE(paper): a bidirectional LSTM stands before the MLP there; this is Hugging Face PEFT's default.
"""

import functools
from collections.abc import Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts.bound import State
from pefts.core import Declaration, Peft, PeftState, factory
from pefts.methods.prompt import InCall, check_length, check_table, in_front, linear_layer, prompt
from pefts.targets import Select, Site

LAYERS = ("1", "2", "3")


@factory
def p_tuning(
    length: int = 20,
    *,
    hidden: int | None = None,
    tokens: int | str = 0,
    placeholder: int = 0,
    aligned: Mapping[str, float | None] | None = None,
    **select: Unpack[Select],
) -> Declaration:
    """Soft prompt out of an MLP: E' = [MLP(T); E], T (n, d) and the MLP trained.

    What `prompt` says of the model holds here too.

    Args:
      length: n, the number of virtual tokens (the paper: a few between the parts of a template).
      hidden: h; None: the width d of the table (Hugging Face PEFT's default).
      tokens: where the model's call has its ids; see pefts.prompt.
      placeholder: the id at virtual positions; see pefts.prompt.
      aligned: other arguments along the tokens; see pefts.prompt.
      **select: targets (default: the word embedding by its usual names), exclude, axes; see
        pefts.targets.Select. One table must be left.

    Returns:
      A Peft; it cannot be merged.

    Raises:
      ValueError: length, hidden or placeholder out of range; targets that are no table, or several;
        at the call, as for pefts.prompt.

    Example:
      >>> import jax, pefts
      >>> params = {"wte": {"embedding": jax.numpy.ones((9, 4))}}
      >>> pefts.count(pefts.p_tuning(length=3).init(jax.random.key(0), params).trainable)
      72

    Source: GPT Understands, Too, arXiv 2103.10385.
    """
    check_length(length)
    if hidden is not None and (not isinstance(hidden, int) or hidden < 1):
        raise ValueError(f"hidden={hidden!r}: give a positive size of the MLP, or None.")
    start = functools.partial(_start, length=length, hidden=hidden)
    return in_front(InCall("p_tuning", length, tokens, placeholder, aligned), start, _made, select)


def bake(peft: Peft, state: PeftState) -> tuple[Peft, PeftState]:
    """The prompt that the MLP makes, without the MLP: the same outputs, n d numbers.

    Raises:
      ValueError: the method is no p_tuning.
    """
    config = dict(peft.config)
    if config.pop("method") != "p_tuning":
        raise ValueError(
            f"bake takes a p_tuning, and this is {peft.config['method']!r}: there is no MLP to "
            "leave out."
        )
    del config["hidden"]
    with jax.default_matmul_precision("highest"):
        made = {path: {"P": _made(p)} for path, p in state.trainable.items()}
    return prompt(**config), PeftState(made, state.frozen)


def _start(
    key: jax.Array, W: jax.Array, *, site: Site, stats: Any, length: int, hidden: int | None
) -> tuple[dict, dict]:
    del W, stats
    check_table("p_tuning", site)
    key_T, *keys = jax.random.split(key, 1 + len(LAYERS))
    d, h = site.d_out, hidden or site.d_out
    layers = {}
    for name, layer_key, sizes in zip(LAYERS, keys, ((d, h), (h, h), (h, d)), strict=True):
        layers[f"W{name}"], layers[f"b{name}"] = linear_layer(layer_key, *sizes)
    return {"T": jax.random.normal(key_T, (length, d), jnp.float32), **layers}, {}


def _made(p: State) -> jax.Array:
    """P (n, d)."""
    x = p["T"]
    for name in LAYERS:
        x = x @ p[f"W{name}"] + p[f"b{name}"][None]
        x = x if name == LAYERS[-1] else jax.nn.relu(x)
    return x
