"""WeLore: factor the kernels that compress well, train only those, keep the others dense.

    sigma^ = (S - min S) / (max S - min S)      of each kernel's singular values S
    pruned(t) = #{sigma^ < t},  k(t) = len(S) - pruned(t)
    y = (x A) B      A = U_k sqrt(S_k) (d_in, k), B = sqrt(S_k) V_k^T (k, d_out)

One threshold t for the whole model: the first with sum pruned / sum len(S) >= the target. A kernel
is factored where pruned / len(S) > min_ratio and k (d_in + d_out) < d_in d_out; the others are left
as they are, so less is pruned than the target says (`report` gives both). The factored model
differs from the base at step 0. Trainable: k (d_in + d_out) per factored kernel.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from pefts import linalg, paths, views
from pefts.bound import Call, Rule, State, matmul
from pefts.core import Declaration, Sites, Traits, factory
from pefts.spectra import spectra
from pefts.targets import Select, Site, selection

MatrixOf = Callable[[Site], jax.Array]


class Choice(NamedTuple):
    """How kernels are picked."""

    reduction: float
    threshold: float | None
    min_ratio: float
    break_even: bool


class Report(NamedTuple):
    """What a choice does to a model; shares are of the sum of all kernels' smaller sides."""

    threshold: float  # t
    target: float | None  # the share asked for; None where the threshold was given
    pruned: float  # the share below t, dense kernels included
    achieved: float  # the share that is really gone: of the factored kernels alone
    kept: dict[str, list[int]]  # {path: k of each layer}, 0 where it stays dense
    trainable: int  # sum of k (d_in + d_out), without the padding of stacked layers


@factory
def welore(
    reduction: float = 0.5,
    *,
    threshold: float | None = None,
    min_ratio: float = 0.4999,
    break_even: bool = True,
    **select: Unpack[Select],
) -> Declaration:
    """Factor and train the kernels of low rank: y = (x A) B, with A (d_in, k) and B (k, d_out).

    Kernels that stay dense are frozen and get no state. Of stacked layers the state has the largest
    k, smaller ones are padded with zeros, and a layer that stays dense among factored ones goes
    its own way at run time. Call init outside jit: k depends on the weights. The released code also
    trains the norms: pefts.chain(pefts.ln_tuning(), pefts.welore()).

    Args:
      reduction: share of all singular values to prune, in (0, 1) (released code: 0.1 to 0.7).
      threshold: t in (0, 1], instead of the one that `reduction` leads to (released code for
        LLaMA-2: 0.175 for 0.5; it does not carry over to other models).
      min_ratio: a kernel is factored where more than this share of its own singular values is
        pruned (fine-tuning: 0.4999; compression: 0).
      break_even: factor only where the factors are smaller than the kernel; with min_ratio=0, then,
        wherever they are. NOTE(paper): the released code has min_ratio alone; one below 1/2 also
        takes kernels that grow, 0.4999 leaves out wide ones that would shrink.
      **select: targets, exclude, axes; see pefts.targets.Select.

    Returns:
      A Peft whose merge writes A B in place of the factored kernels. The model changes at step 0.

    Raises:
      ValueError: reduction, threshold or min_ratio out of range; a kernel whose singular values are
        all equal; a reduction no threshold reaches; no kernel to factor; init inside jit.

    Example:
      >>> import jax, pefts
      >>> kernel = jax.numpy.diag(jax.numpy.array([4.0, 0.3, 0.2, 0.1]))
      >>> peft = pefts.welore(reduction=0.6)
      >>> state = peft.init(jax.random.key(0), {"query": {"kernel": kernel}})
      >>> jax.tree.map(jax.numpy.shape, state.trainable)
      {'query/kernel': {'A': (4, 1), 'B': (1, 4)}}

    Source: From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank
      Gradients, arXiv 2407.11239.
    """
    choice = Choice(reduction, threshold, min_ratio, break_even)
    _check(choice)
    return Declaration(
        rule=Rule(_start, effective, linear, through_dot=True),
        selection=selection(**select),
        traits=Traits(identity_at_init=False, shapes_from_values=True),
        prepare=functools.partial(_prepare, choice=choice),
    )


def report(
    params: Mapping[str, Any],
    reduction: float = 0.5,
    *,
    threshold: float | None = None,
    min_ratio: float = 0.4999,
    break_even: bool = True,
    **select: Unpack[Select],
) -> Report:
    """What `welore` with these arguments would do to these parameters, without doing it.

    Args:
      params: the base.
      reduction: as `welore` takes it; also threshold, min_ratio, break_even and **select.

    Raises:
      ValueError: as `welore` and its init, but for kernels: that none is factored is no error here.

    Example:
      >>> import jax
      >>> kernel = jax.numpy.diag(jax.numpy.array([4.0, 0.3, 0.2, 0.1]))
      >>> told = report({"query": {"kernel": kernel}}, reduction=0.6)
      >>> told.achieved, told.kept
      (0.75, {'query/kernel': [1]})
    """
    choice = Choice(reduction, threshold, min_ratio, break_even)
    _check(choice)
    flat = paths.flatten(params)
    sites = selection(**select).resolve(params)
    return _decide(sites, lambda site: views.to_matrix(flat[site.path], site.axes), choice)


def normalised(S: np.ndarray) -> np.ndarray:
    """sigma^ in float64 of singular values (..., k), each spectrum on [0, 1]."""
    S = S.astype(np.float64)
    low, high = S.min(-1, keepdims=True), S.max(-1, keepdims=True)
    return (S - low) / (high - low)


def first_threshold(values: np.ndarray, reduction: float) -> float:
    """The smallest t for which at least this share of the values lies below it.

    The share is a step function of t that rises behind each value, so the place at which a
    bisection of [0, 1] would end is read off the sorted values.

    Raises:
      ValueError: no t up to 1 has so many values below it.
    """
    wanted = math.ceil(reduction * values.size)
    # The product may lie above the count whose quotient it came from: 0.07 * 100 > 7.
    if (wanted - 1) / values.size >= reduction:
        wanted -= 1
    last = np.partition(values, wanted - 1)[wanted - 1]
    if last >= 1:
        below = int((values < 1).sum())
        raise ValueError(
            f"reduction={reduction}: every kernel keeps its largest singular value, so at most "
            f"{below} of {values.size} can be pruned, a share of {below / values.size:.4f}; ask "
            "for less."
        )
    return float(np.nextafter(last, 2.0))


def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
    """A B, or W where the layer stays dense."""
    del call
    product = p["A"].astype(W.dtype) @ p["B"].astype(W.dtype)
    return jnp.where(p["kept"] > 0, product, W) if "kept" in p else product


def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
    """(x A) B, or x W where the layer stays dense; only one of them is computed."""

    def factored() -> jax.Array:
        return matmul(call.dot(x, p["A"]), p["B"])

    if "kept" not in p:
        return factored()
    return jax.lax.cond(p["kept"] > 0, factored, lambda: call.dot(x, W))


def _decide(sites: Sites, matrix_of: MatrixOf, choice: Choice) -> Report:
    spectrum = spectra("welore", sites, matrix_of)
    for site in sites:
        _check_spectrum(spectrum[site.path], site)
    relative = {path: normalised(S) for path, S in spectrum.items()}
    everything = np.concatenate([values.ravel() for values in relative.values()])
    t, target = choice.threshold, None
    if t is None:
        t, target = first_threshold(everything, choice.reduction), choice.reduction
    kept, gone, trainable = {}, 0, 0
    for site in sites:
        side = min(site.d_in, site.d_out)
        k = (relative[site.path] >= t).sum(-1)
        factored = (side - k) / side > choice.min_ratio
        if choice.break_even:
            factored &= k * (site.d_in + site.d_out) < site.d_in * site.d_out
        kept[site.path] = np.where(factored, k, 0).tolist()
        gone += int((side - k)[factored].sum())
        trainable += int(k[factored].sum()) * (site.d_in + site.d_out)
    return Report(
        t,
        target,
        float((everything < t).mean()),
        gone / everything.size,
        kept,
        trainable,
    )


def _prepare(
    sites: Sites, matrix_of: MatrixOf, stats: Any, *, choice: Choice
) -> tuple[Sites, dict[str, Any]]:
    told = _decide(sites, matrix_of, choice)
    chosen = [
        dataclasses.replace(
            site, rank=max(told.kept[site.path]), static=(("mixed", 0 in told.kept[site.path]),)
        )
        for site in sites
        if any(told.kept[site.path])
    ]
    if not chosen:
        raise ValueError(
            f"min_ratio={choice.min_ratio}, break_even={choice.break_even}: at the threshold "
            f"{told.threshold:.4f}, which prunes {told.pruned:.1%} of the singular values, none of "
            f"the {len(sites)} targeted kernels is worth factoring; raise reduction."
        )
    handed = {
        site.path: {
            **(stats or {}).get(site.path, {}),
            "kept": jnp.asarray(told.kept[site.path], jnp.int32).reshape(site.stack),
        }
        for site in chosen
    }
    return tuple(chosen), {**(stats or {}), **handed}


def _start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
    del key
    U, S, V = linalg.svd(W, site.rank)
    inside = jnp.arange(site.rank, dtype=jnp.int32) < stats["kept"]
    root = jnp.where(inside, jnp.sqrt(S), jnp.zeros_like(S))
    factors = {"A": U * root[None], "B": root[:, None] * V.T}
    return factors, {"kept": stats["kept"]} if dict(site.static)["mixed"] else {}


def _check(choice: Choice) -> None:
    if not 0 < choice.reduction < 1:
        raise ValueError(
            f"reduction={choice.reduction!r}: give a share of the singular values, in (0, 1)."
        )
    # Above 1 nothing would be kept; at 0 nothing is pruned.
    if choice.threshold is not None and not 0 < choice.threshold <= 1:
        raise ValueError(f"threshold={choice.threshold!r}: give a number in (0, 1], or None.")
    if not 0 <= choice.min_ratio < 1:
        raise ValueError(f"min_ratio={choice.min_ratio!r}: give a share in [0, 1).")


def _check_spectrum(S: np.ndarray, site: Site) -> None:
    """Raise ValueError where max S - min S is zero or nothing but the decomposition's rounding."""
    # A rotation of any size comes out of a float32 decomposition within 15 eps.
    rounding = 64 * np.finfo(S.dtype).eps * S.max(-1)
    constant = np.flatnonzero(S.max(-1) - S.min(-1) <= rounding)
    if len(constant):
        where = f"layer {constant[0]} of {site.path!r}" if site.stack else repr(site.path)
        raise ValueError(
            f"welore: the {S.shape[-1]} singular values of {where} are all equal, so none is small "
            "beside the others; exclude it."
        )
