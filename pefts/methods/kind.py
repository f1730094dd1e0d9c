"""KIND: a kernel as rank-1 components, some shared by all classes, some gated by the class.

    W_l = sum_{i < N_G} s_i u_i v_i^T  +  sum_{j < N_T} g_j s_j u_j v_j^T

The first are learngenes (U_G, s_G, V_G), the second tailors (U_T, s_T, V_T), with U (d_in, N),
s (N,), V (d_out, N). g in {0, 1}^N_T is the row of a table that belongs to an example's class; all
kernels share it, and it scales the hidden vector, example by example:
    y = ((x U_G) * s_G) V_G^T + ((x U_T) * s_T * g) V_T^T

Components start as the largest singular triplets of W, learngenes first, and are trained without
constraints (unchecked: the paper's text on it was not available). To adapt a pretrained model a few
are enough, if the rest of W stays: with `residual`
    W' = W - C_0 + W_l        C_0 = the components as they start, all gates open
Open gates change nothing at step 0 then; a closed one takes its component out of W. Trainable:
N_T (d_in + d_out + 1) per kernel, or (N_G + N_T) (d_in + d_out + 1) with the learngenes.

NOTE(paper): models are pretrained as W_l there, so nothing is left over, and new tailors start at
  random; the residual and new tailors of s = 0 are for models that were pretrained otherwise.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from pefts import linalg
from pefts.bound import Call, Rule, State, matmul
from pefts.core import CONTEXT, Declaration, Traits, factory
from pefts.low_rank import Init, additive, moved, replacing
from pefts.targets import Select, Site, selection

STARTS = ("svd", "fresh")
TRAIN = ("tailors", "all")
IDS = "class_ids"
G, T = "G", "T"  # learngenes and tailors, in the names of leaves
ONE_KERNEL_EACH = "examples of different classes have different kernels: fix one by active_class"


@factory
def kind(
    learngenes: int = 8,
    tailors: int = 8,
    *,
    gates: Sequence[Sequence[int]] | None = None,
    active_class: int | None = None,
    train: str = "tailors",
    start: str = "svd",
    residual: bool = True,
    **select: Unpack[Select],
) -> Declaration:
    """Class-gated components: W' = W - C_0 + U_G diag(s_G) V_G^T + U_T diag(g s_T) V_T^T.

    U (d_in, N), s (N,), V (d_out, N), g (N_T,) in {0, 1}. With gates and no active_class the
    classes of a batch are given to `bind(params, state, class_ids=...)`, one integer for each entry
    of the first axis of every adapted module's input; a class outside the table raises, or inside
    jit makes its outputs NaN. States do not depend on active_class: train with class_ids, then
    merge with a method that fixes it. Set weight decay to 0.

    Args:
      learngenes: N_G, from 0. Frozen and with a residual they cost nothing, and say which of W's
        directions the tailors skip.
      tailors: N_T, from 1 (DivControl, by the same group: N_G = N_T = 576, all of the rank; as few
        as the defaults are for adapting a pretrained model).
      gates: table of 0 and 1, one row of N_T for each class; a row of zeros uses no tailor. None:
        every tailor serves every input.
      active_class: the class whose row holds for all inputs; the method can then be merged.
      train: "tailors" (the paper's transfer: learngenes frozen) or "all" (its pre-training).
      start: "svd" (tailors take the singular triplets after the learngenes') or "fresh" (random
        orthonormal u and v with s = 0, which add nothing at step 0 whatever the gates).
      residual: keep what the components leave of W (all of it but the learngenes where tailors are
        fresh); False drops it, so that the kernel is its components (the paper).
      **select: targets, exclude, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact where one gate row holds, and refused for a batch of mixed classes.

    Raises:
      ValueError: learngenes or tailors out of range or more in sum than the kernel's smaller side,
        a gate row of another length or with other entries than 0 and 1, an active_class without a
        row, unknown train or start, or no kernel matches; at the call: class_ids missing, not
        integers (batch,), of another length than the batch, or without a gate row.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.eye(6, 4)}}
      >>> peft = pefts.kind(learngenes=1, tailors=2, gates=[[1, 0], [0, 1]])
      >>> pefts.count(peft.init(jax.random.key(0), params).trainable)
      22

    Source: KIND: Knowledge Integration and Diversion for Training Decomposable Models,
      arXiv 2408.07337.
    """
    _check_counts(learngenes, tailors)
    _check_options(train, start)
    table = None if gates is None else _table(gates, tailors)
    init = functools.partial(
        _start, counts=(learngenes, tailors), train=train, start=start, residual=residual
    )
    is_gated = table is not None and active_class is None
    row = np.zeros(tailors) if is_gated else _fixed_row(table, active_class, tailors)
    is_whole = residual and (start == "fresh" or bool(row.all()))
    return Declaration(
        rule=_gated(init, table, residual) if is_gated else _fixed(init, row, residual),
        selection=selection(**select),
        traits=Traits(
            mergeable=not is_gated,
            identity_at_init=is_whole,
            needs=(CONTEXT,) if is_gated else (),
        ),
        unmergeable=ONE_KERNEL_EACH,
    )


def _start(
    key: jax.Array,
    W: jax.Array,
    *,
    site: Site,
    stats: Any,
    counts: tuple[int, int],
    train: str,
    start: str,
    residual: bool,
) -> tuple[dict, dict]:
    del stats
    N_G, N_T = counts
    _check_fit(N_G + N_T, site)
    # Frozen learngenes change nothing where the base holds them already.
    has_learngenes = N_G > 0 and (train == "all" or not residual)
    spectrum = linalg.svd(W, N_G + N_T) if has_learngenes or start == "svd" else ()
    rest = [leaf[..., N_G:] for leaf in spectrum]
    tailors = _named(T, *(rest if start == "svd" else _fresh(key, site, N_T)))
    learngenes = _named(G, *(leaf[..., :N_G] for leaf in spectrum)) if has_learngenes else {}
    trainable = {**learngenes, **tailors} if train == "all" else tailors
    frozen = {} if train == "all" else learngenes
    if residual:
        replaced = trainable if start == "svd" else learngenes
        frozen = {f"{name}0": leaf for name, leaf in replaced.items()}
    return trainable, frozen


def _fixed(init: Init, row: np.ndarray, residual: bool) -> Rule:
    """One row of gates for all inputs: a plain low-rank product."""

    def factors(p: State, call: Call) -> tuple[jax.Array, jax.Array]:
        del call
        A, B, cut = _change(p, T)
        g = jnp.asarray(row, B.dtype)[:, None]
        B = B * jnp.tile(g, (len(B) // len(g), 1))
        if cut is not None:
            B = B.at[len(g) :].add((g - 1) * cut)
        if f"U_{G}" not in p:
            return A, B
        A_G, B_G, _ = _change(p, G)
        return jnp.concatenate([A_G, A], axis=-1), jnp.concatenate([B_G, B], axis=-2)

    return (additive if residual else replacing)(init, factors)


def _gated(init: Init, table: Any, residual: bool) -> Rule:
    """A row of gates for each example, on the hidden vector."""

    def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
        A, B, cut = _change(p, T)
        h = call.dot(x, A)
        g = _broadcast(rows_of(call.context, table), h)
        N_T = g.shape[-1]
        gated = h * jnp.tile(g, len(B) // N_T)
        if cut is not None:
            # (x A_0) (g - 1) takes a component that the base holds out of it.
            gated = jnp.concatenate([gated, h[..., N_T:] * (g - 1)], axis=-1)
            B = jnp.concatenate([B, cut], axis=-2)
        y = matmul(gated, B)
        if f"U_{G}" in p:
            A_G, B_G, _ = _change(p, G)
            y = y + matmul(call.dot(x, A_G), B_G)
        return call.dot(x, W) + y if residual else y

    return Rule(init, _no_dense_kernel, linear, through_dot=True)


def _no_dense_kernel(W: jax.Array, p: State, call: Call) -> jax.Array:
    del W, p, call
    raise ValueError(
        f"kind has no dense kernel for a module that pefts does not know; {ONE_KERNEL_EACH}, or "
        "exclude this one."
    )


def rows_of(context: Mapping[str, Any], table: np.ndarray) -> jax.Array:
    """The gate rows (batch, N_T) of a batch's classes; NaN for a class that the table lacks.

    Raises:
      ValueError: class_ids missing or not integers (batch,), or (outside jit) out of range.
    """
    if IDS not in context:
        raise ValueError(
            f"kind has gates for {len(table)} classes and was not told the batch's: call "
            f"peft.bind(params, state, {IDS}=...), or fix one class with active_class."
        )
    ids = jnp.asarray(context[IDS])
    if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"{IDS} of shape {ids.shape} and dtype {ids.dtype}: give integers (batch,)."
        )
    is_known = (ids >= 0) & (ids < len(table))
    _check_known(ids, is_known, len(table))
    rows = jnp.asarray(table)[jnp.where(is_known, ids, jnp.zeros_like(ids))]
    return jnp.where(is_known[:, None], rows, jnp.full_like(rows, jnp.nan))


def _check_known(ids: jax.Array, is_known: jax.Array, classes: int) -> None:
    try:
        unknown = np.asarray(ids)[~np.asarray(is_known)]
    except jax.errors.TracerArrayConversionError:
        return
    if unknown.size:
        raise ValueError(
            f"{IDS} holds {unknown[0]}, and gates has rows for the classes 0 to {classes - 1}."
        )


def _broadcast(g: jax.Array, h: jax.Array) -> jax.Array:
    """Gates (batch, N_T) against hidden vectors (batch, ..., n)."""
    if h.ndim < 2 or len(h) != len(g):
        raise ValueError(
            f"{IDS} names {len(g)} examples, and a kernel with gates is applied to inputs whose "
            f"hidden vectors have shape {h.shape}: the first axis must be the batch's. Exclude "
            "kernels that see no examples."
        )
    return g.astype(h.dtype).reshape(len(g), *(1,) * (h.ndim - 2), g.shape[-1])


def _change(p: State, group: str) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """A, B whose product is what a group adds with its gates open, and B_0 where it replaces some.

    With components A_0 B_0 at the start, taken over from W: A_1 B_1 - A_0 B_0 = A B with
    A = [A_1 - A_0, A_0].
    """
    A, B = _factors(p, group)
    if f"U_{group}0" not in p:
        return A, B, None
    A_0, B_0 = _factors(p, f"{group}0")
    return *moved(A, B, A_0, B_0, jnp.ones((), B.dtype)), B_0


def _factors(p: State, group: str) -> tuple[jax.Array, jax.Array]:
    return p[f"U_{group}"], p[f"s_{group}"][:, None] * p[f"V_{group}"].T


def _named(group: str, *leaves: jax.Array) -> dict[str, jax.Array]:
    return {f"{name}_{group}": leaf for name, leaf in zip("UsV", leaves, strict=True)}


def _fresh(key: jax.Array, site: Site, tailors: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Random directions of which none is in use yet."""
    key_U, key_V = jax.random.split(key)
    U = linalg.orthonormal(key_U, (site.d_in, tailors))
    V = linalg.orthonormal(key_V, (site.d_out, tailors))
    return U, jnp.zeros((tailors,), U.dtype), V


def _fixed_row(table: np.ndarray | None, active_class: int | None, tailors: int) -> np.ndarray:
    """The gates of all inputs."""
    if active_class is None:
        return np.ones(tailors, np.float32)
    rows = [] if table is None else list(table)
    if not isinstance(active_class, int) or not 0 <= active_class < len(rows):
        raise ValueError(
            f"active_class={active_class!r}: gates has {len(rows)} rows; give the index of one, "
            "or None."
        )
    return rows[active_class]


def _table(gates: Sequence[Sequence[int]], tailors: int) -> np.ndarray:
    if not isinstance(gates, Sequence) or not gates:
        raise ValueError(
            f"gates={gates!r}: give a list of rows, one for each class, with a 0 or 1 for each of "
            "the tailors (an array's .tolist()), or None."
        )
    for index, row in enumerate(gates):
        if not isinstance(row, Sequence) or len(row) != tailors:
            raise ValueError(
                f"gates[{index}]={row!r}: give a list with one entry for each of tailors={tailors}."
            )
        if any(entry not in (0, 1) for entry in row):
            raise ValueError(f"gates[{index}]={row!r}: gates are 0 or 1.")
    return np.asarray(gates, np.float32)


def _check_fit(components: int, site: Site) -> None:
    side = min(site.d_in, site.d_out)
    if components > side:
        raise ValueError(
            f"learngenes + tailors = {components} are more than the {side} components of "
            f"{site.path!r}, a {site.d_in} x {site.d_out} kernel: take fewer, or exclude it."
        )


def _check_counts(learngenes: int, tailors: int) -> None:
    for name, value, least in (("learngenes", learngenes, 0), ("tailors", tailors, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r}: give an integer of at least {least}.")


def _check_options(train: str, start: str) -> None:
    for name, value, known in (("train", train, TRAIN), ("start", start, STARTS)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {known}.")
