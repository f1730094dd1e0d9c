"""EVA: a LoRA whose A spans the inputs, with ranks given to the layers whose inputs need them.

    y = x W + s_l (drop(x) A) B      A (d_in, r_l), B (r_l, d_out)
    A = C[:r_l]^T                    C (k, d_in), principal components of the centred inputs
    B = 0, so the model is unchanged at step 0

The budget R, one rank r for each layer, is shared out anew: the k = round(rho r) leading shares of
explained variance of every layer are pooled, and a layer gets as many ranks as it has entries among
the R largest. A layer is one slice of a kernel: scanned layers may differ. Their leaf has the
largest of their ranks, and in the others the columns of A and rows of B beyond r_l are zero, which
no optimizer changes. Layers with the same inputs have the same shares and so ranks that differ by
at most one. Trainable: sum over layers of r_l (d_in + d_out), and the padding.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from pefts.bound import Call, State
from pefts.core import Declaration, PeftState, Sites, Traits, factory
from pefts.low_rank import additive
from pefts.methods.lora import check_dropout, check_rank, drop, low_rank
from pefts.targets import Select, Site, selection

METRICS = ("ratio", "raw", "sum", "max")


@factory
def eva(
    rank: int = 16,
    alpha: float = 1.0,
    *,
    rho: float = 2.0,
    metric: str = "ratio",
    adjust_scaling: bool = True,
    whiten: bool = False,
    dropout: float = 0.0,
    **select: Unpack[Select],
) -> Declaration:
    """Explained-variance adaptation: y = x W + s_l (drop(x) A) B, A from the inputs' components.

    A (d_in, r_l) holds the r_l leading principal components of the layer's inputs, B (r_l, d_out)
    zeros; the ranks r_l sum to those of a LoRA of rank r. Collect the components first, by
    stats = pefts.calibrate(fn, params, batches, peft), with padding masked. Unless rho = 1, call
    init outside jit: the shapes depend on the data. `ranks(state)` tells what each layer got.

    NOTE(paper): the released code repeats its batches until every component that gets a rank has a
      cosine of at least tau = 0.99 with what it was a batch before. pefts.calibrate reads the
      batches that it is given once, and returns the cosines of the last, "cosine", in its stats.

    Args:
      rank: r, the mean rank of a layer (paper: 16).
      alpha: s_l = alpha / r (paper: 1).
      rho: a layer gets at most round(rho r) ranks, which is also how many components are collected,
        so at most its input's width (Hugging Face PEFT: 2). With 1 every layer keeps rank r.
      metric: what is compared between layers, of the explained variances v: "ratio", v over the
        input's total variance; "raw", v; "sum", v over the sum of the k; "max", v over the largest.
      adjust_scaling: s_l = alpha / r whatever r_l, as in Hugging Face PEFT; if not, s_l = alpha /
        r_l, as in the released code.
      whiten: divide each component by the square root of its singular value.
      dropout: probability of dropping an input of the adapter; active in calls that are given a
        "dropout" random stream.
      **select: targets, exclude, rank_pattern, alpha_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W + s_l A B. Kernels all of whose layers got rank 0 have no state.

    Raises:
      ValueError: rank out of range, rho below 1, dropout outside [0, 1), unknown metric, stats
        absent or with too few components, a singular value of zero with whiten, init inside jit
        with rho above 1, or no kernel matches.

    Example:
      >>> import flax.linen as nn, jax, pefts
      >>> model, x = nn.Dense(3), jax.random.normal(jax.random.key(0), (9, 5))
      >>> params = model.init(jax.random.key(1), x)["params"]
      >>> peft = pefts.eva(rank=2)
      >>> stats = pefts.calibrate(lambda v, batch: model.apply(v, batch), params, [x], peft)
      >>> peft.init(jax.random.key(2), params, stats).trainable["kernel"]["A"].shape
      (5, 2)

    Source: One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation,
      arXiv 2410.07170.
    """
    check_rank(rank)
    check_dropout(dropout)
    if not 1 <= rho < np.inf:
        raise ValueError(f"rho={rho!r}: give a number from 1 (no redistribution), such as 2.")
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r} is unknown; choose one of {METRICS}.")
    chosen = selection(**select)
    given = (rank, *(r for _, r in chosen.rank_pattern))
    components = max(round(rho * r) for r in given)
    redistributes = any(round(rho * r) > r for r in given)

    def prepare(
        sites: Sites, matrix_of: Callable[[Site], jax.Array], stats: Any
    ) -> tuple[Sites, Any]:
        del matrix_of
        _check_components(sites, stats, components)
        even = {site.path: np.full(site.stack, site.rank) for site in sites}
        found = _redistributed(sites, stats, rho, metric) if redistributes else even
        return _with_ranks(sites, stats, found, adjust_scaling)

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del key, W
        A = _components(stats, site.rank, whiten).T
        live = jnp.arange(site.rank) < stats["rank"]
        trainable = {
            "A": jnp.where(live[None, :], A, jnp.zeros_like(A)),
            "B": jnp.zeros((site.rank, site.d_out), jnp.float32),
        }
        return trainable, {"scale": stats["scale"], "rank": stats["rank"]}

    def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
        return call.dot(x, W) + low_rank(drop(x, dropout, call.key), p, call)

    return Declaration(
        rule=additive(start, _factors)._replace(linear=linear, uses_key=dropout > 0),
        selection=chosen,
        traits=Traits(
            stochastic=dropout > 0,
            needs=("pca",),
            components=components,
            shapes_from_values=redistributes,
        ),
        rank=rank,
        alpha=alpha,
        prepare=prepare,
        failure="whiten divides by the square root of a component's singular value, and one is "
        "zero: its inputs vary in fewer directions than rho r. Lower rank or rho",
    )


def ranks(state: PeftState) -> dict[str, np.ndarray]:
    """{path: the rank of each layer (*stack)}; kernels without any rank are not in the state."""
    return {path: np.asarray(group["rank"]) for path, group in state.frozen.items()}


def _factors(p: State, call: Call) -> tuple[jax.Array, jax.Array]:
    del call
    return p["A"], p["scale"] * p["B"]


def _components(stats: Mapping[str, jax.Array], rank: int, whiten: bool) -> jax.Array:
    """(rank, d_in)."""
    C = stats["components"][:rank].astype(jnp.float32)
    if not whiten:
        return C
    rows = jnp.maximum(stats["count"] - 1, 1)
    singular = jnp.sqrt(stats["explained_variance"][:rank] * rows)
    return C / jnp.sqrt(singular)[:, None]


def _redistributed(
    sites: Sites, stats: Mapping[str, Any], rho: float, metric: str
) -> dict[str, np.ndarray]:
    """How many entries each layer has among the largest of all, by path."""
    layers = [(site, index) for site in sites for index in np.ndindex(site.stack)]
    values = [_variances(site, stats[site.path], metric)[index] for site, index in layers]
    inputs = [v.tobytes() for v in values]
    widths: dict[bytes, int] = {}
    for (site, _), same in zip(layers, inputs, strict=True):
        # Layers with the same inputs may all have as many ranks as the one that may have most.
        widths[same] = max(widths.get(same, 0), round(rho * site.rank))
    pool = [_compared(v[: widths[same]], metric) for v, same in zip(values, inputs, strict=True)]
    owner = np.repeat(np.arange(len(pool)), [len(entries) for entries in pool])
    # Stable: of layers with the same inputs, whose entries tie, the first path gets the odd one.
    order = np.argsort(-np.concatenate(pool), kind="stable")
    budget = sum(site.rank for site, _ in layers)
    counts = np.bincount(owner[order[:budget]], minlength=len(layers))
    found = {site.path: np.zeros(site.stack, int) for site in sites}
    for (site, index), count in zip(layers, counts, strict=True):
        found[site.path][index] = count
    return found


def _variances(site: Site, found: Mapping[str, jax.Array], metric: str) -> np.ndarray:
    """(*stack, k), descending in k."""
    name = "explained_variance_ratio" if metric == "ratio" else "explained_variance"
    if name not in found:
        raise ValueError(
            f"eva: the stats of {site.path!r} hold no {name!r}, which metric={metric!r} compares: "
            "collect them by pefts.calibrate(fn, params, batches, peft)."
        )
    try:
        return np.asarray(found[name], np.float64)
    except jax.errors.TracerArrayConversionError:
        raise ValueError(
            f"eva: which rank {site.path!r} gets is unknown inside jit or eval_shape; call "
            "peft.init outside, or set rho=1."
        ) from None


def _compared(variances: np.ndarray, metric: str) -> np.ndarray:
    """The numbers that are pooled, from the k variances or ratios of one layer."""
    if metric not in ("sum", "max"):
        return variances
    total = variances.sum() if metric == "sum" else variances.max()
    return variances / (total if total > 0 else 1)


def _with_ranks(
    sites: Sites, stats: Mapping[str, Any], found: Mapping[str, np.ndarray], adjust_scaling: bool
) -> tuple[Sites, dict[str, dict[str, Any]]]:
    """Each kernel at the largest rank of its layers, with the ranks and scales of all of them."""
    kept, given = [], {}
    for site in sites:
        r_l = found[site.path]
        if not r_l.any():
            continue
        divisor = np.full(r_l.shape, site.rank) if adjust_scaling else np.maximum(r_l, 1)
        scale = np.where(r_l > 0, site.alpha / divisor, 0)
        kept.append(dataclasses.replace(site, rank=int(r_l.max())))
        given[site.path] = {
            **stats[site.path],
            "rank": jnp.asarray(r_l, jnp.int32),
            "scale": jnp.asarray(scale, jnp.float32),
        }
    return tuple(kept), given


def _check_components(sites: Sites, stats: Mapping[str, Any], needed: int) -> None:
    for site in sites:
        available = stats[site.path]["components"].shape[-2]
        if available < needed:
            raise ValueError(
                f"eva compares {needed} components, rho times the rank, and the stats of "
                f"{site.path!r} hold {available}: collect them by pefts.calibrate(fn, params, "
                "batches, peft), with this peft."
            )
