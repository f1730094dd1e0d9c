"""ZeroI2V's linear adapters: maps near the identity that fold into the kernels beside them.

    z = x + s ((x D1 + b1) D2 + b2) = x E + e      E = I + s D1 D2,  e = s (b1 D2 + b2)

D1 (d, m), b1 (m,), D2 (m, d), b2 (d,), without any nonlinearity. One stands in front of the
projections of queries, keys and values (one for all three), one behind attention's output, one in
front of the first feed-forward layer (or pair of gated ones), one behind the second. Merged, a
kernel behind it is W' = E W with b' = e W + b, a kernel in front of it W' = W E with b' = b E + e:
exact, and free at inference. D2 and b2 start at zero: unchanged at step 0. Trainable: 2 d m + m + d
per adapter, four of them per layer.

The other half of the method, heads that look at neighbouring frames, has no parameters: it is an
option of models/vit.py (`head_offsets`).
"""

import math
import re
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts.bound import Call, Rule, State, matmul
from pefts.core import Declaration, Traits, factory
from pefts.methods.bottleneck import PLACEMENTS
from pefts.targets import Select, Site, selection, site_key

_BEHIND = PLACEMENTS["houlsby"]
_IN_FRONT = (
    r"(?i:attn|attention)[^/]*/((self/)?(query|key|value|qkv|in_proj|c_attn|[qkv]_proj|qkv_proj))"
    r"(/dense)?/kernel$"
    r"|(^|/)(intermediate|up|up_proj|gate_proj|fc1|c_fc)(/dense)?/kernel$"
)
BEFORE, AFTER = "before", "after"  # leaves with the number of a site's adapter


@factory
def zeroi2v(
    width: int | None = None,
    *,
    scale: float = 0.5,
    after: str | None = None,
    **select: Unpack[Select],
) -> Declaration:
    """Linear adapters that merge: z = x + s ((x D1 + b1) D2 + b2), D1 (d, m) and D2 (m, d).

    Kernels of one module that are adapted in front (queries, keys, values) read the same, and share
    their adapter. All adapters have one d.

    Args:
      width: m, from 1 to d; None: d // 4 (the paper).
      scale: s (the paper: 0.5 on Kinetics-400, 1 on Something-Something v2).
      after: regular expression of the targeted kernels that are adapted behind, on their outputs,
        the others being adapted in front; None: attention's output and the second feed-forward
        layer.
      **select: targets (default: queries, keys, values, attention's output and both feed-forward
        layers), exclude, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, and changes biases too.

    Raises:
      ValueError: width out of range, scale zero or not finite, an `after` that matches no target,
        an embedding or a convolution, adapters of different d, or no kernel matches; when merged: a
        kernel without a bias.

    Example:
      >>> import jax, pefts
      >>> params = {"attention": {"query": {"kernel": jax.numpy.ones((6, 4))}}}
      >>> pefts.count(pefts.zeroi2v(width=2).init(jax.random.key(0), params).trainable)
      32

    Source: ZeroI2V: Zero-Cost Adaptation of Pre-trained Transformers from Image to Video,
      arXiv 2310.01324; details checked against its code.
    """
    # NOTE(paper): the code also drops entries of x D1 in training; an output hook has no key here.
    _check(width, scale)
    behind = re.compile(_BEHIND if after is None else after)

    def number(sites: tuple[Site, ...], matrix_of: Any, stats: Any) -> tuple[tuple[Site, ...], Any]:
        del matrix_of
        _check_sites(sites, behind, after, width)
        first, numbered = _first_numbers(sites, behind), dict(stats or {})
        for site in sites:
            count = math.prod(site.stack)
            index = jnp.arange(count, dtype=jnp.int32).reshape(site.stack)
            numbered[site.path] = {"index": index + first[_group(site, behind)]}
        return sites, numbered

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del key, W
        return {}, {AFTER if behind.search(site.path) else BEFORE: stats["index"]}

    def share(key: jax.Array, sites: tuple[Site, ...]) -> tuple[dict, dict]:
        d = _width_of(sites[0], behind)
        m = max(1, d // 4) if width is None else width
        sizes = {_group(site, behind): math.prod(site.stack) for site in sites}
        bound = 1 / math.sqrt(d)
        drawn = [
            jax.random.uniform(site_key(key, name), (count, d, m), jnp.float32, -bound, bound)
            for name, count in sizes.items()
        ]
        total = sum(sizes.values())
        trainable = {
            "D1": jnp.concatenate(drawn),
            "b1": jnp.zeros((total, m), jnp.float32),
            "D2": jnp.zeros((total, m, d), jnp.float32),
            "b2": jnp.zeros((total, d), jnp.float32),
        }
        return trainable, {}

    return Declaration(
        rule=_rule(start, scale),
        selection=selection(default=f"{_IN_FRONT}|{_BEHIND}", **select),
        traits=Traits(),
        prepare=number,
        init_shared=share,
    )


def _rule(start: Any, scale: float) -> Rule:
    def adapted(x: jax.Array, p: State, call: Call) -> jax.Array:
        D1, b1, D2, b2 = (part.astype(x.dtype) for part in _parts(p, call))
        ones = (1,) * (x.ndim - 1)
        h = matmul(x, D1) + b1.reshape(*ones, -1)
        return x + scale * (matmul(h, D2) + b2.reshape(*ones, -1))

    def linear(x: jax.Array, W: Any, p: State, call: Call) -> jax.Array:
        return call.dot(adapted(x, p, call) if BEFORE in p else x, W)

    def output(y: jax.Array, p: State, call: Call) -> jax.Array:
        return adapted(y, p, call) if AFTER in p else y

    def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
        """E W or W E."""
        D1, _, D2, _ = (part.astype(W.dtype) for part in _parts(p, call))
        return W + scale * (D1 @ (D2 @ W) if BEFORE in p else (W @ D1) @ D2)

    def bias(W: jax.Array, b: jax.Array, p: State, call: Call) -> jax.Array:
        """e W + b or b E + e."""
        D1, b1, D2, b2 = (part.astype(b.dtype) for part in _parts(p, call))
        if BEFORE in p:
            return b + scale * (b1 @ D2 + b2) @ W
        return b + scale * ((b @ D1 + b1) @ D2 + b2)

    return Rule(start, effective, linear, output, bias, needs_bias=True)


def _parts(p: State, call: Call) -> list[jax.Array]:
    """D1, b1, D2, b2 of the site's adapter."""
    index = p[BEFORE] if BEFORE in p else p[AFTER]
    return [call.shared[name][index] for name in ("D1", "b1", "D2", "b2")]


def _group(site: Site, behind: re.Pattern[str]) -> str:
    """What the sites of one adapter have in common: the module around them, if it is in front."""
    if behind.search(site.path):
        return site.path
    module = site.path.split("/")[:-1]
    # torch-like trees put a Dense of its own name around the kernel
    return "/".join(module[: -2 if module[-1] == "dense" else -1]) + "/"


def _first_numbers(sites: tuple[Site, ...], behind: re.Pattern[str]) -> dict[str, int]:
    """The number of each group's first adapter; its layers follow."""
    first, total = {}, 0
    for site in sites:
        group = _group(site, behind)
        if group not in first:
            first[group] = total
            total += math.prod(site.stack)
    return first


def _width_of(site: Site, behind: re.Pattern[str]) -> int:
    return site.d_out if behind.search(site.path) else site.d_in


def _check_sites(
    sites: tuple[Site, ...], behind: re.Pattern[str], after: str | None, width: int | None
) -> None:
    if after is not None and not any(behind.search(site.path) for site in sites):
        raise ValueError(
            f"after={after!r} matches none of the targets, for instance {sites[0].path!r}: give a "
            "pattern of those that are adapted behind."
        )
    for site in sites:
        if site.is_embedding or "k" in site.axes:
            raise ValueError(
                f"{site.path!r} belongs to an embedding or a convolution, which has no linear "
                "neighbour to fold into: exclude it."
            )
        if behind.search(site.path) and site.axes.count("o") != 1:
            raise ValueError(
                f"{site.path!r} has head axes {site.axes!r} at its output: it can be adapted in "
                "front alone; give another `after`."
            )
    widths = {site.path: _width_of(site, behind) for site in sites}
    if len(set(widths.values())) != 1:
        raise ValueError(
            f"the adapters have one width, and the targets need several: {widths}. Give each its "
            "own method by pefts.partition, or set `after`."
        )
    d = _width_of(sites[0], behind)
    if width is not None and width > d:
        raise ValueError(f"width={width} is out of range for adapters of {d}: choose 1 to {d}.")


def _check(width: int | None, scale: float) -> None:
    if width is not None and (not isinstance(width, int) or isinstance(width, bool) or width < 1):
        raise ValueError(f"width={width!r}: give a positive integer, or None for d // 4.")
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"scale={scale!r}: give a finite number other than 0, such as 0.5.")
