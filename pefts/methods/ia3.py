"""(IA)3: learned vectors that scale activations, and nothing else.

    y = (x W + b) * l          l (d_out,): keys, values, and every target but the following
    y = (x * l) W + b          l (d_in,): the second feed-forward layer

l starts at ones, so the model is unchanged at step 0. Merging scales the columns of W and the bias,
or the rows of W. Trainable: d_out or d_in per kernel, which wants a learning rate ten times LoRA's
and more.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts import views
from pefts.bound import Call, Rule, State
from pefts.core import Declaration, Sites, factory
from pefts.methods.bottleneck import PLACEMENTS
from pefts.targets import Select, Site, Targets, match, selection

KEYS_AND_VALUES = r"(^|/)(k|k_proj|key|v|v_proj|value|wk|wv)/kernel$"
SECOND_FEED_FORWARD = PLACEMENTS["pfeiffer"]
IN, OUT = "l_in", "l_out"  # a site's state has one of the two


@factory
def ia3(feedforward: Targets | None = None, **select: Unpack[Select]) -> Declaration:
    """Scaling by learned vectors: y = (x W + b) * l, or y = (x * l) W + b; l (d_out,) or (d_in,).

    Put it last in pefts.chain: it scales all that a layer puts out. Set weight decay to 0, which
    would pull l to zero and not to one.

    Args:
      feedforward: which of the targets have their input scaled instead of their output: a regular
        expression or a list of names. None: those that have a usual name of a block's second
        feed-forward layer (the paper); []: none.
      **select: targets (by default keys, values and the second feed-forward layer by their usual
        names), exclude, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W and b with their columns, or W with its rows, scaled.

    Raises:
      ValueError: feedforward is no pattern or matches none of the targets, or an embedding, whose
        inputs are ids; a rank_pattern or alpha_pattern, or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"key": {"kernel": jax.numpy.ones((6, 4))}}
      >>> pefts.count(pefts.ia3().init(jax.random.key(0), params).trainable)
      4

    Source: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning,
      arXiv 2205.05638.
    """
    if not isinstance(feedforward, str | Sequence | None):
        raise ValueError(
            f"feedforward={feedforward!r}: give a regular expression, a list of names, or None."
        )
    given = feedforward if isinstance(feedforward, str | None) else tuple(feedforward)

    def prepare(
        sites: Sites, matrix_of: Callable[[Site], jax.Array], stats: Any
    ) -> tuple[Sites, Any]:
        del matrix_of
        scaled = _feedforward(given, [site.path for site in sites])
        marked = [dataclasses.replace(s, static=((IN, s.path in scaled),)) for s in sites]
        return tuple(marked), stats

    default = f"{KEYS_AND_VALUES}|{SECOND_FEED_FORWARD}"
    return Declaration(
        rule=Rule(_start, effective, linear, output, bias, through_dot=True),
        selection=selection(default=default, **select),
        prepare=prepare,
    )


def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
    """x W, or (x * l) W; what scales the output comes behind the bias."""
    return call.dot(x * _row(p[IN], x) if IN in p else x, W)


def output(y: jax.Array, p: State, call: Call) -> jax.Array:
    """y * l, y with its bias."""
    del call
    return _scaled(y, p[OUT]) if OUT in p else y


def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
    """W with its columns or its rows scaled."""
    del call
    if OUT in p:
        return W * p[OUT].astype(W.dtype)[None]
    # A convolution's l has one entry for each channel, the innermost axis of its window.
    rows = jnp.tile(p[IN], W.shape[0] // p[IN].shape[0])
    return W * rows.astype(W.dtype)[:, None]


def bias(W: Any, b: jax.Array, p: State, call: Call) -> jax.Array:
    """b * l where the output is scaled."""
    del W, call
    return b * p[OUT].astype(b.dtype) if OUT in p else b


def _start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
    del key, W, stats
    if not dict(site.static)[IN]:
        return {OUT: jnp.ones((site.d_out,), jnp.float32)}, {}
    if site.is_embedding:
        raise ValueError(
            f"feedforward matches {site.path!r}, an embedding, whose inputs are ids: there is "
            "nothing to scale. Let feedforward match linear layers or convolutions alone."
        )
    window = math.prod(n for n, axis in zip(site.shape, site.axes, strict=True) if axis == "k")
    return {IN: jnp.ones((site.d_in // window,), jnp.float32)}, {}


def _feedforward(given: str | tuple[str, ...] | None, paths: list[str]) -> set[str]:
    """The targeted paths whose input is scaled."""
    if given is not None:
        return match(given, paths, argument="feedforward, among the targeted kernels")
    return {path for path in paths if re.search(SECOND_FEED_FORWARD, path)}


def _scaled(y: jax.Array, vector: jax.Array) -> jax.Array:
    """y with its last axes, which may be (heads, head size), scaled by a vector (d_out,)."""
    flat = views.outputs(y, vector.size)
    return (flat * _row(vector, flat)).reshape(y.shape)


def _row(vector: jax.Array, like: jax.Array) -> jax.Array:
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + vector.shape)
