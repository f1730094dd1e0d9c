"""Bottleneck adapters: a small two-layer network on the output of a linear module.

    y' = y + s (act(y D + b_D) U + b_U)        D (d, m), b_D (m,), U (m, d), b_U (d,)

y (..., d) is the module's output with its bias, before the block's dropout and residual sum, so
the placement is just the choice of targets. Houlsby: after attention's output projection and after
the second feed-forward layer; Pfeiffer: after the second feed-forward layer alone. D starts as a
truncated normal and the rest at zero, so the model is unchanged at step 0. It is not linear in y
and cannot be merged. Trainable: d m + m + m d + d per site.
"""

from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts import views
from pefts.bound import Call, Rule, State, matmul
from pefts.core import Declaration, Traits, factory
from pefts.targets import ALL_LINEAR, Select, Site, selection

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "swish": jax.nn.swish,
}
_ATTENTION_OUTPUT = (
    r"(?i:attn|attention)[^/]*/(output|out|out_proj|o_proj|c_proj|proj|o)(/dense)?/kernel$"
)
_SECOND_FEED_FORWARD = (
    r"(^|/)(down|down_proj|fc2|fc_out|w2|wo)/kernel$"
    r"|(?i:mlp|ffn|feed_?forward)[^/]*/(output|c_proj|[Dd]ense_1)(/dense)?/kernel$"
    r"|layer[^/]*/(\d+/)?output/dense/kernel$"
)
PLACEMENTS = {
    "houlsby": f"{_ATTENTION_OUTPUT}|{_SECOND_FEED_FORWARD}",
    "pfeiffer": _SECOND_FEED_FORWARD,
}
DEFAULT_WIDTH = 64


@factory
def bottleneck(
    width: int | None = None,
    *,
    reduction: int | None = None,
    placement: str | None = "houlsby",
    activation: str = "gelu",
    scale: float = 1.0,
    std: float = 1e-2,
    **select: Unpack[Select],
) -> Declaration:
    """Serial adapter: y' = y + s (act(y D + b_D) U + b_U), with D (d, m) and U (m, d).

    The output axes of a DenseGeneral (heads, head size) are taken together as d.

    Args:
      width: m, from 1 to the kernel's smaller side (Houlsby et al. try 8, 64 and 256; 64 when
        `reduction` is absent too); rank_pattern gives single sites another m.
      reduction: m = d // reduction instead (Pfeiffer et al.: 16).
      placement: default targets, "houlsby" or "pfeiffer"; None is "all-linear".
        `targets` overrules it.
      activation: act, one of "gelu" (by the error function), "relu", "swish".
      scale: s; alpha_pattern gives single sites another one.
      std: standard deviation of D before it is truncated at two of them (paper: 1e-2).
      **select: targets, exclude, rank_pattern, alpha_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; it cannot be merged.

    Raises:
      ValueError: width and reduction both given or out of range, unknown placement or
        activation, std not positive, or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"mlp": {"output": {"kernel": jax.numpy.ones((6, 4))}}}
      >>> adapter = pefts.bottleneck(2, placement="pfeiffer")
      >>> pefts.count(adapter.init(jax.random.key(0), params).trainable)
      22

    Source: Parameter-Efficient Transfer Learning for NLP, arXiv 1902.00751; AdapterFusion:
      Non-Destructive Task Composition for Transfer Learning, arXiv 2005.00247.
    """
    rank = _width(width, reduction, select)
    _check(placement, activation, std)

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del W, stats
        d, m = site.d_out, site.rank or _reduced(site, reduction)
        # NOTE(paper): Houlsby et al. draw U like D, near the identity; U = 0 is exactly there.
        trainable = {
            "D": std * jax.random.truncated_normal(key, -2.0, 2.0, (d, m), jnp.float32),
            "b_D": jnp.zeros(m, jnp.float32),
            "U": jnp.zeros((m, d), jnp.float32),
            "b_U": jnp.zeros(d, jnp.float32),
        }
        return trainable, {"scale": jnp.float32(site.alpha)}

    def output(y: jax.Array, p: State, call: Call) -> jax.Array:
        del call
        return _adapt(y, p, activation)

    default = ALL_LINEAR if placement is None else PLACEMENTS[placement]
    return Declaration(
        rule=Rule(start, output=output),
        selection=selection(default=default, **select),
        traits=Traits(mergeable=False),
        rank=rank,
        alpha=scale,
    )


def _adapt(y: jax.Array, p: State, activation: str) -> jax.Array:
    D, b_D, U, b_U, scale = (p[name].astype(y.dtype) for name in ("D", "b_D", "U", "b_U", "scale"))
    x = views.outputs(y, D.shape[0])
    ones = (1,) * (x.ndim - 1)
    h = ACTIVATIONS[activation](matmul(x, D) + b_D.reshape(*ones, -1))
    return y + (scale * (matmul(h, U) + b_U.reshape(*ones, -1))).reshape(y.shape)


def _width(width: int | None, reduction: int | None, select: Select) -> int:
    """m for all sites, or 0 when each site has its own by `reduction`."""
    if reduction is None:
        width = DEFAULT_WIDTH if width is None else width
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise ValueError(f"width={width!r}: give a positive integer, such as 64.")
        return width
    if width is not None or select.get("rank_pattern"):
        raise ValueError(
            f"reduction={reduction!r} sets the width of every site: give either it, or width "
            "(with or without rank_pattern)."
        )
    if not isinstance(reduction, int) or isinstance(reduction, bool) or reduction < 1:
        raise ValueError(f"reduction={reduction!r}: give a positive integer, such as 16.")
    return 0


def _reduced(site: Site, reduction: int | None) -> int:
    m = site.d_out // (reduction or 1)
    if m < 1:
        raise ValueError(
            f"reduction={reduction} leaves no width for {site.path!r}, whose output has "
            f"{site.d_out} features: choose 1 to {site.d_out}."
        )
    return m


def _check(placement: str | None, activation: str, std: float) -> None:
    if placement is not None and placement not in PLACEMENTS:
        raise ValueError(
            f"placement={placement!r} is unknown; choose one of {sorted(PLACEMENTS)}, or None with "
            "targets of your own."
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation={activation!r} is unknown; choose one of {sorted(ACTIVATIONS)}."
        )
    if not std > 0:
        raise ValueError(
            f"std={std!r} must be positive: with D and U both zero no gradient reaches either."
        )
