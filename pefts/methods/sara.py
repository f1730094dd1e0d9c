"""SaRA: tune the entries that are nearly zero in the pretrained weights, and only those.

    M = 1[|W| < theta]        W' = W with W'[M] = p        p = W[M] at first

theta is one threshold for all leaves: kernels, biases, scales, embeddings. The state holds p and
the sorted flat indices of M in the matrix (d_in, d_out), so gradients and moments have the size of
M; the backward pass gathers dW at the indices. The penalty lambda sum ||W' * M||_* (nuclear norms
of the tuned entries) keeps what is learned of low rank. At `reselect_step` the entries that have
grown to theta are held at their learned values, and training goes on with the rest.

Trainable: #{|W| < theta}; p of stacked layers is padded to the layer with the most (`selected`
counts without the padding).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from pefts import paths
from pefts.bound import Call, Rule, State
from pefts.core import SHARED, Declaration, Params, PeftState, Sites, Traits, factory
from pefts.linalg import precise
from pefts.targets import Select, Site, selection

EVERY_LEAF = "."
RANK_MODES = ("all", "one_random")
LARGEST_INDEX = np.iinfo(np.int32).max


@factory
def sara(
    threshold: float,
    *,
    reselect_step: int | None = None,
    rank_penalty: float = 5e-4,
    rank_mode: str = "one_random",
    min_side: int = 64,
    **select: Unpack[Select],
) -> Declaration:
    """Progressive sparse low-rank adaptation: W' = W, with p in the entries where |W| < threshold.

    Call init outside jit: how many entries are selected depends on the weights. The paper's
    learning rate is `learning_rate(threshold)`; `threshold_for(params, fraction)` finds the
    threshold of a budget.

    Args:
      threshold: theta, above 0 (paper: 2e-3 for Stable Diffusion 1.5 and 2).
      reselect_step: T_p, the number of completed updates after which entries that have reached
        theta are held; the optimizer's moments are void then (traits.restart_steps). None: never
        (paper: half of training).
      rank_penalty: lambda (paper: 5e-4); 0 leaves the penalty out.
      rank_mode: "one_random" adds the nuclear norm of one matrix, drawn at each step (the
        released code), "all" of every matrix (paper).
      min_side: matrices both of whose sides are longer take part in the penalty (paper: 64).
      **select: targets (default: every floating leaf), exclude, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W with p written into it.

    Raises:
      ValueError: threshold, reselect_step, rank_penalty or min_side out of range, unknown
        rank_mode, nothing below the threshold, no matrix for the penalty, a leaf too large for
        32-bit indices, or init inside jit; at the call: a state made for a kernel of another shape.

    Example:
      >>> import jax, pefts
      >>> params = {"dense": {"kernel": jax.numpy.asarray([[0.5, -0.01, 0.3], [0.02, 0.4, 0.0]])}}
      >>> peft = pefts.sara(threshold=0.1, rank_penalty=0.0)
      >>> peft.init(jax.random.key(0), params).trainable["dense/kernel"]["values"].tolist()
      [-0.009999999776482582, 0.019999999552965164, 0.0]

    Source: SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank
      Adaptation, arXiv 2409.06633.
    """
    _check(threshold, reselect_step, rank_penalty, rank_mode, min_side)
    random_mode = rank_penalty > 0 and rank_mode == "one_random"

    def shared(key: jax.Array, sites: tuple[Site, ...]) -> tuple[dict, dict]:
        _require_entries(sites, threshold)
        if rank_penalty > 0:
            _require_matrices(sites, min_side)
        if not random_mode:
            return {}, {}
        return {}, {"seed": jax.random.bits(key, dtype=jnp.uint32), "step": jnp.int32(0)}

    def penalty(state: PeftState, params: Params | None = None) -> jax.Array:
        del params
        return rank_penalty * _nuclear_norms(state, min_side, random_mode)

    def update(state: PeftState, grads: Any, step: jax.Array) -> PeftState:
        del grads
        return _advance(state, jnp.asarray(step), threshold, reselect_step)

    return Declaration(
        rule=Rule(
            functools.partial(_start, threshold=threshold, progressive=reselect_step is not None),
            effective,
        ),
        selection=selection(default=EVERY_LEAF, vectors=True, **select),
        traits=Traits(
            shapes_from_values=True,
            restart_steps=() if reselect_step is None else (reselect_step,),
        ),
        prepare=functools.partial(_count_entries, threshold=threshold),
        init_shared=shared,
        penalty=penalty if rank_penalty > 0 else None,
        update=update if random_mode or reselect_step is not None else None,
    )


def learning_rate(threshold: float) -> float:
    """The paper's learning rate for a threshold: 1e-3 exp(-350 theta)."""
    _check_threshold(threshold)
    return 1e-3 * math.exp(-350 * threshold)


def threshold_for(params: Mapping[str, Any], fraction: float, **select: Unpack[Select]) -> float:
    """The smallest threshold that selects at least this fraction of the targeted entries.

    Args:
      params: the parameters; they are counted where they lie, and never copied or sorted.
      fraction: of all entries, above 0 and at most 1.
      **select: targets (default: every floating leaf), exclude.

    Raises:
      ValueError: fraction out of range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction!r}: give a share of the entries, in (0, 1].")
    flat = paths.flatten(params)
    sites = selection(default=EVERY_LEAF, whole=True, **select).resolve(params)
    leaves = [flat[site.path] for site in sites]
    wanted = math.ceil(fraction * sum(leaf.size for leaf in leaves))
    # Non-negative floats are ordered as their bits are: a binary search over the bits is exact.
    low, high = (
        int(np.float32(end).view(np.uint32)) for end in (np.finfo(np.float32).tiny, np.inf)
    )
    while low < high:
        middle = (low + high) // 2
        theta = np.uint32(middle).view(np.float32)
        if sum(int(_count_below(leaf, theta)) for leaf in leaves) >= wanted:
            high = middle
        else:
            low = middle + 1
    return float(np.uint32(low).view(np.float32))


def selected(state: PeftState) -> dict[str, int]:
    """{path: how many entries are being tuned}, without padding and without held entries."""
    return {
        path: int(jnp.sum(group["active"] if "active" in group else group["per_row"]))
        for path, group in state.frozen.items()
        if path != SHARED
    }


@jax.jit
def _count_below(leaf: jax.Array, theta: jax.Array) -> jax.Array:
    return jnp.sum(_small(leaf, theta))


def _small(W: jax.Array, threshold: Any) -> jax.Array:
    """1[|W| < theta], in float32 or better, whatever W is stored in."""
    W = precise(W)
    return jnp.abs(W) < jnp.asarray(threshold, W.dtype)


def _count_entries(
    sites: Sites, matrix_of: Callable[[Site], jax.Array], stats: Any, *, threshold: float
) -> tuple[Sites, Any]:
    def counted(site: Site) -> Site:
        nnz = _entries(matrix_of(site), site, threshold)
        return dataclasses.replace(site, static=(("nnz", nnz),))

    return tuple(counted(site) for site in sites), stats


def _entries(W: jax.Array, site: Site, threshold: float) -> int:
    """How many entries of a layer are selected, at most."""
    try:
        nnz = int(jnp.max(jnp.sum(_small(W, threshold), axis=(-2, -1))))
    except jax.errors.ConcretizationTypeError:
        raise ValueError(
            f"sara: how many entries of {site.path!r} are below threshold={threshold} is unknown "
            "inside jit or eval_shape; call peft.init outside."
        ) from None
    if site.d_in * site.d_out + nnz > LARGEST_INDEX:
        raise ValueError(
            f"sara: {site.path!r} has {site.d_in} x {site.d_out} entries, too many for "
            "32-bit indices; exclude it."
        )
    return nnz


def _start(
    key: jax.Array, W: jax.Array, *, site: Site, stats: Any, threshold: float, progressive: bool
) -> tuple[dict, dict]:
    del key, stats
    nnz, size = dict(site.static)["nnz"], W.size
    if nnz == 0:
        return {}, {}
    mask = _small(W, threshold)
    found = jnp.nonzero(mask.reshape(-1), size=nnz, fill_value=size)[0].astype(jnp.int32)
    # Padding has indices of its own outside the leaf: the scatter is promised unique ones.
    idx = jnp.where(found < size, found, size + jnp.arange(nnz, dtype=jnp.int32))
    values = _gather(precise(W), idx)
    frozen = {
        "idx": idx,
        # The sides of W, which a penalty that sees the state alone needs; also a check on loading.
        "per_row": jnp.sum(mask, axis=1, dtype=jnp.int32),
        "per_column": jnp.sum(mask, axis=0, dtype=jnp.int32),
    }
    if progressive:
        frozen |= {"active": found < size, "held": values}
    return {"values": values}, frozen


def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
    """W with p written over the selected entries."""
    del call
    if W.shape != _sides(p):
        raise ValueError(
            f"sara: this state selects entries of a {_sides(p)} kernel and is used on one of "
            f"{W.shape}; it was made for another model."
        )
    values = p["values"]
    if "active" in p:
        values = jnp.where(p["active"], values, jax.lax.stop_gradient(values))
    return _write(W, p["idx"], values.astype(W.dtype))


def _sides(p: State) -> tuple[int, int]:
    return p["per_row"].shape[-1], p["per_column"].shape[-1]


@jax.custom_vjp
def _write(W: jax.Array, idx: jax.Array, values: jax.Array) -> jax.Array:
    """W with its flat entries at idx replaced; indices outside are dropped."""
    flat = W.reshape(-1).at[idx]
    flat = flat.set(values, mode="drop", indices_are_sorted=True, unique_indices=True)
    return flat.reshape(W.shape)


def _write_forward(W: jax.Array, idx: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _write(W, idx, values), idx


def _write_backward(idx: jax.Array, dW: jax.Array) -> tuple[jax.Array, None, jax.Array]:
    values = _gather(dW, idx)
    return _write(dW, idx, jnp.zeros_like(values)), None, values


_write.defvjp(_write_forward, _write_backward)


def _gather(W: jax.Array, idx: jax.Array) -> jax.Array:
    """W's flat entries at idx; zero outside."""
    flat = W.reshape(-1).at[idx]
    return flat.get(mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True)


def _advance(
    state: PeftState, step: jax.Array, threshold: float, reselect_step: int | None
) -> PeftState:
    """Held entries back to their values; at the switch, the grown ones join them."""
    trainable, frozen = dict(state.trainable), dict(state.frozen)
    if SHARED in frozen:
        frozen[SHARED] = {**frozen[SHARED], "step": frozen[SHARED]["step"] + 1}
    if reselect_step is None:
        return PeftState(trainable, frozen)
    switch = step + 1 == reselect_step
    for path, group in state.trainable.items():
        held, active = state.frozen[path]["held"], state.frozen[path]["active"]
        # Weight decay and clipping reach held entries too: restoring them is exact, a mask is not.
        values = jnp.where(active, group["values"], held)
        still = active & _small(values, threshold)
        trainable[path] = {"values": values}
        frozen[path] = {
            **state.frozen[path],
            "active": jnp.where(switch, still, active),
            "held": jnp.where(switch, values, held),
        }
    return PeftState(trainable, frozen)


def _nuclear_norms(state: PeftState, min_side: int, random_mode: bool) -> jax.Array:
    """Of all matrices that take part, or of one drawn at this step."""
    groups = [
        _slices({**state.frozen[path], **group})
        for path, group in sorted(state.trainable.items())
        if min(_sides(state.frozen[path])) > min_side
    ]
    if not random_mode:
        return sum(jnp.sum(jax.vmap(_tuned_norm)(group)) for group in groups)  # type: ignore
    starts = np.cumsum([0, *[len(group["values"]) for group in groups]])
    shared = state.frozen[SHARED]
    key = jax.random.fold_in(jax.random.key(shared["seed"]), shared["step"])
    drawn = jax.random.randint(key, (), 0, int(starts[-1]), jnp.int32)

    def branch(group: State, start: int) -> Any:
        return lambda n: _tuned_norm({name: leaf[n - start] for name, leaf in group.items()})

    branches = [branch(group, int(start)) for group, start in zip(groups, starts, strict=False)]
    which = jnp.sum(drawn >= jnp.asarray(starts[1:-1], jnp.int32), dtype=jnp.int32)
    return jax.lax.switch(which, branches, drawn)


def _slices(group: State) -> dict[str, jax.Array]:
    """The group with its stacked axes as one, length 1 where there are none."""
    return {name: leaf.reshape(-1, leaf.shape[-1]) for name, leaf in group.items()}


def _tuned_norm(p: State) -> jax.Array:
    """||W' * M||_* with M the entries that are still tuned."""
    values = p["values"]
    if "active" in p:
        values = jnp.where(p["active"], values, jnp.zeros_like(values))
    return nuclear_norm(_write(jnp.zeros(_sides(p), values.dtype), p["idx"], values))


@jax.custom_vjp
def nuclear_norm(X: jax.Array) -> jax.Array:
    """The sum of X's singular values; its gradient is U V^T over the singular values above zero."""
    return jnp.sum(jnp.linalg.svd(X, full_matrices=False, compute_uv=False))


def _nuclear_forward(X: jax.Array) -> tuple[jax.Array, jax.Array]:
    U, sigma, Vt = jnp.linalg.svd(X, full_matrices=False)
    # Singular vectors of zero are arbitrary: they are left out of the subgradient.
    floor = sigma[0] * jnp.asarray(max(X.shape) * jnp.finfo(X.dtype).eps, X.dtype)
    polar = jnp.where((sigma > floor)[None, :], U, jnp.zeros_like(U)) @ Vt
    return jnp.sum(sigma), polar


def _nuclear_backward(polar: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    return (cotangent * polar,)


nuclear_norm.defvjp(_nuclear_forward, _nuclear_backward)


def _require_entries(sites: tuple[Site, ...], threshold: float) -> None:
    if not any(dict(site.static)["nnz"] for site in sites):
        raise ValueError(
            f"threshold={threshold} selects no entry of the {len(sites)} targeted leaves: raise "
            "it, or let threshold_for(params, fraction) find one for a share of the entries."
        )


def _require_matrices(sites: tuple[Site, ...], min_side: int) -> None:
    sides = [min(site.d_in, site.d_out) for site in sites if dict(site.static)["nnz"]]
    if max(sides) <= min_side:
        raise ValueError(
            f"min_side={min_side}: no targeted matrix has both sides longer (the best has "
            f"{max(sides)}), so the rank penalty is empty: lower min_side, or set rank_penalty=0."
        )


def _check(
    threshold: float, reselect_step: int | None, rank_penalty: float, rank_mode: str, min_side: int
) -> None:
    _check_threshold(threshold)
    if reselect_step is not None and (not isinstance(reselect_step, int) or reselect_step < 1):
        raise ValueError(
            f"reselect_step={reselect_step!r}: give a number of updates from 1, or None for never."
        )
    if not rank_penalty >= 0:
        raise ValueError(
            f"rank_penalty={rank_penalty!r}: give 0 or a positive weight, such as 5e-4."
        )
    if rank_mode not in RANK_MODES:
        raise ValueError(f"rank_mode={rank_mode!r} is unknown; choose one of {RANK_MODES}.")
    if not isinstance(min_side, int) or min_side < 1:
        raise ValueError(f"min_side={min_side!r}: give a positive integer, such as 64.")


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold={threshold!r}: give a positive magnitude, such as 2e-3.")
