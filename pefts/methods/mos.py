"""MoS, Mixture of Shards: LoRA factors put together from pools that the layers share.

    row n of A^T = [P_A[a_n1], ..., P_A[a_nc]]      row n of B = [P_B[b_n1], ..., P_B[b_nc]]
    y = x W + s (drop(x) A) B                       A (d_in, r), B (r, d_out)

A module type is what kernels of one shape have in common whose paths differ in layer numbers alone,
stacked or not. The L layers of a type share the pools P_A (e L c, d_in / c) and P_B (e L c,
d_out / c): as many numbers as LoRAs of rank e, for factors of a rank r that may be larger. The
tables a and b (r, c) of each layer are drawn once and frozen: (r - p) c different rows of the first
(e - p) L c, for A and B apart; behind them, the same in both, the layer's own p c rows, which no
other layer uses. P_A starts uniform on +-1/sqrt(d_in) and P_B at zero, so the model is unchanged at
step 0. Trainable: e L (d_in + d_out) for each type.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from pefts.bound import Call, State, matmul
from pefts.core import Declaration, Traits, factory
from pefts.low_rank import additive
from pefts.methods.lora import check_dropout, check_rank, drop, scaling
from pefts.targets import Select, Site, selection, site_key

LAYER_NUMBER = r"(^|[/_])\d+(?=/|$)"
Sites = tuple[Site, ...]


@factory
def mos(
    rank: int = 8,
    alpha: float = 16.0,
    *,
    budget: int = 2,
    private: int = 1,
    shards: int = 4,
    dropout: float = 0.0,
    **select: Unpack[Select],
) -> Declaration:
    """Mixture of shards: y = x W + s (x A) B, the rows of A^T and B put together from shared pools.

    The pools of a module type with L layers are P_A (e L c, d_in / c) and P_B (e L c, d_out / c);
    s = alpha / r. The released scripts have no defaults but those of alpha and dropout.

    Args:
      rank: r, of the factors that a layer puts together, at least the budget.
      alpha: s = alpha / r (the released scripts: 16).
      budget: e, the rank of the LoRA that would have as many parameters.
      private: p, how much of the budget is kept for each layer alone, from 0 to e; where it is all
        of e, r must be e.
      shards: c, the pieces of a row, a divisor of both sides of every kernel.
      dropout: probability of dropping an input of the adapter (the released scripts: 0.1); active
        in calls that are given a "dropout" random stream.
      **select: targets, exclude, rank_pattern, alpha_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W + s A B, and pefts.to_lora gives each layer's A and B.

    Raises:
      ValueError: a number out of range, no private <= budget <= rank, shards that do not divide a
        side, pools too small for the rank, dropout outside [0, 1), or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {f"layer_{n}": {"kernel": jax.numpy.ones((6, 4))} for n in range(3)}
      >>> peft = pefts.mos(rank=3, budget=2, shards=2)
      >>> pefts.count(peft.init(jax.random.key(0), params).trainable)
      60

    Source: MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards,
      arXiv 2410.00938 (unchecked: its tables were not available; the released code was).
    """
    check_rank(rank)
    check_dropout(dropout)
    _check(budget, private, shards)

    def plan(sites: Sites, matrix_of: Callable[[Site], jax.Array], stats: Any) -> tuple[Sites, Any]:
        del matrix_of, stats
        planned, places = _planned(sites)
        for site in planned:
            _check_fit(site, budget, private, shards)
        return planned, places

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del W
        tables = _tables(key, site, stats["layer"], (budget, private, shards))
        return {}, {**tables, "scale": jnp.float32(scaling(site))}

    def share(key: jax.Array, sites: Sites) -> tuple[dict, dict]:
        return _pools(key, sites, budget, shards), {}

    def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
        A, B = factors(p, call)
        return call.dot(x, W) + matmul(call.dot(drop(x, dropout, call.key), A), B)

    return Declaration(
        rule=additive(start, factors)._replace(linear=linear, uses_key=dropout > 0),
        selection=selection(**select),
        traits=Traits(stochastic=dropout > 0),
        rank=rank,
        alpha=alpha,
        prepare=plan,
        init_shared=share,
    )


def factors(p: State, call: Call) -> tuple[jax.Array, jax.Array]:
    """A (d_in, r) and s B (r, d_out) of a layer: the rows that its tables name."""
    A, B = (_gathered(p, call, factor) for factor in "AB")
    return A.T, p["scale"].astype(B.dtype) * B


def _gathered(p: State, call: Call, factor: str) -> jax.Array:
    # A table lies in the state by the name of its pool.
    name = next(name for name in p if name.startswith(f"{factor}."))
    table, pool = p[name], call.shared[name]
    return pool[table].reshape(len(table), -1)


def module_type(site: Site) -> str:
    """What the layers of a type have in common: the path without layer numbers, and the shape."""
    path = re.sub(LAYER_NUMBER, "", site.path).strip("/").replace("/", ".")
    return f"{path}.{site.d_in}x{site.d_out}"


def _planned(sites: Sites) -> tuple[Sites, dict[str, Any]]:
    """Sites that know how many layers their type has, and {path: each layer's number in it}."""
    layers: dict[str, int] = {}
    places: dict[str, Any] = {}
    for site in sites:
        first, count = layers.get(module_type(site), 0), math.prod(site.stack)
        numbers = np.arange(first, first + count, dtype=np.int32).reshape(site.stack)
        places[site.path] = {"layer": jnp.asarray(numbers)}
        layers[module_type(site)] = first + count
    planned = (
        dataclasses.replace(site, static=(("layers", layers[module_type(site)]),)) for site in sites
    )
    return tuple(planned), places


def _layers(site: Site) -> int:
    return dict(site.static)["layers"]


def _tables(
    key: jax.Array, site: Site, layer: jax.Array, sizes: tuple[int, int, int]
) -> dict[str, jax.Array]:
    """Which shards make up a layer's factors, (r, c) rows of a pool for each."""
    e, p, c = sizes
    common, drawn = (e - p) * _layers(site) * c, (site.rank - p) * c
    own = common + layer * (p * c) + jnp.arange(p * c, dtype=jnp.int32)
    tables = {}
    for factor, part in zip("AB", jax.random.split(key), strict=True):
        shared = jax.random.permutation(part, common)[:drawn].astype(jnp.int32)
        table = jnp.concatenate([shared, own]).reshape(site.rank, c)
        tables[f"{factor}.{module_type(site)}"] = table
    return tables


def _pools(key: jax.Array, sites: Sites, budget: int, shards: int) -> dict[str, jax.Array]:
    pools: dict[str, jax.Array] = {}
    by_type: Mapping[str, Site] = {module_type(site): site for site in sites}
    for name, site in by_type.items():
        rows, bound = budget * _layers(site) * shards, 1 / math.sqrt(site.d_in)
        shape = (rows, site.d_in // shards)
        pools[f"A.{name}"] = jax.random.uniform(
            site_key(key, name), shape, jnp.float32, -bound, bound
        )
        pools[f"B.{name}"] = jnp.zeros((rows, site.d_out // shards), jnp.float32)
    return pools


def _check(budget: int, private: int, shards: int) -> None:
    for name, value, least in (
        ("budget", budget, 1),
        ("private", private, 0),
        ("shards", shards, 1),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r}: give an integer of at least {least}.")
    if private > budget:
        raise ValueError(
            f"private={private} is a part of budget={budget} and cannot be larger: choose 0 to "
            f"{budget}."
        )


def _check_fit(site: Site, budget: int, private: int, shards: int) -> None:
    r, L = site.rank, _layers(site)
    if site.d_in % shards or site.d_out % shards:
        raise ValueError(
            f"shards={shards} does not divide both sides of {site.path!r}, a {site.d_in} x "
            f"{site.d_out} kernel: choose a divisor of {math.gcd(site.d_in, site.d_out)}, or "
            "exclude it."
        )
    if r < budget or (private == budget and r != budget):
        rule = "equal to it, as all of it is private" if private == budget else "no smaller"
        raise ValueError(
            f"rank={r} at {site.path!r} does not fit budget={budget}: the rank must be {rule}."
        )
    if r - private > (budget - private) * L:
        raise ValueError(
            f"rank={r} at {site.path!r} is more than the pools of its {L} layers hold: they share "
            f"(budget - private) layers = {(budget - private) * L} rows, so choose at most "
            f"{(budget - private) * L + private}, or a larger budget."
        )
