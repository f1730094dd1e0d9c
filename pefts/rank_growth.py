"""Ranks that grow during training, under static shapes: how much each kernel gets, and when.

A kernel's components lie in three groups along its rank axis r: the active ones, before `rank`; the
reserves, before `reach`, whose e is held at 1e-5 while their A and B learn; and those that do not
exist yet, which are zero. IncreLoRA (arXiv 2308.12043) names the moves between them.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pefts.bound import State
from pefts.core import SHARED, PeftState
from pefts.targets import Site, site_key

FACTORS = ("A", "B", "e")
RESERVE = 1e-5
SCORES = ("sqrt", "mean")
ALWAYS = -(2**30)  # a birth so long ago that no warm-up is left
ByPath = dict[str, jax.Array]  # one number for each kernel, (*stack,)


class Schedule(NamedTuple):
    """When and by how much ranks grow; steps count from 0."""

    target_rank: float
    top_h: int
    add: int
    warmup: int
    interval: int
    ramp: int  # steps in which a new component comes to its full learning rate
    betas: tuple[float, float]
    gamma: float
    score: str

    def total(self, kernels: int) -> int:
        """The sum of the ranks at the end."""
        return round(self.target_rank * kernels)


def plan_of(
    target_rank: float, growth: Any, schedule: Any, betas: Any, gamma: float, score: str
) -> Schedule:
    """The checked arguments together; JSON has lists for pairs."""
    if isinstance(target_rank, bool) or not 1 <= target_rank < float("inf"):
        raise ValueError(
            f"target_rank={target_rank!r}: every kernel starts at rank 1; give an average of at "
            "least 1, such as 8."
        )
    top_h, add = _several("growth", growth, ("top_h", "add"))
    add = max(1, int(target_rank) // 2) if add is None else add
    warmup, interval, ramp = _several("schedule", schedule, ("warmup", "interval", "ramp"))
    for name, value, given, least in (
        ("growth", top_h, growth, 1),
        ("growth", add, growth, 1),
        ("schedule", warmup, schedule, 0),
        ("schedule", interval, schedule, 1),
        ("schedule", ramp, schedule, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={given!r}: {value!r} is no integer of at least {least}.")
    beta1, beta2 = _several("betas", betas, ("b1", "b2"))
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas={betas!r}: give two numbers in [0, 1), such as (0.85, 0.85).")
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma={gamma!r}: give a finite weight of at least 0, such as 0.1.")
    if score not in SCORES:
        raise ValueError(f"score={score!r} is unknown; choose one of {SCORES}.")
    return Schedule(target_rank, top_h, add, warmup, interval, ramp, (beta1, beta2), gamma, score)


def _several(argument: str, value: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list) or len(value) != len(names):
        raise ValueError(f"{argument}={value!r}: give ({', '.join(names)}).")
    return tuple(value)


def check_target(plan: Schedule, max_rank: int, sites: tuple[Site, ...]) -> None:
    kernels = sum(math.prod(site.stack) for site in sites)
    most = sum(math.prod(site.stack) * site.rank for site in sites)
    if plan.total(kernels) > most:
        raise ValueError(
            f"target_rank={plan.target_rank} asks for ranks of {plan.total(kernels)} in sum, but "
            f"the {kernels} kernels cannot grow beyond {most} (max_rank={max_rank} and "
            f"rank_pattern; {sites[0].path!r} has {sites[0].rank}): raise them or lower the target."
        )


def _index(p: State) -> jax.Array:
    return jnp.arange(p["born"].shape[-1], dtype=jnp.int32)


def below(p: State, limit: jax.Array) -> jax.Array:
    """(*stack, r): the components before `limit` (*stack,)."""
    index = _index(p)
    return index.reshape((1,) * limit.ndim + index.shape) < limit[..., None]


def active(p: State) -> jax.Array:
    return below(p, p["rank"])


def advanced(state: PeftState, found: ByPath, t: jax.Array, plan: Schedule) -> PeftState:
    """The state with averages moved on and ranks grown, where it is time."""
    state = _restrained(state, t, plan)
    kernels = sum(score.size for score in found.values())
    total = sum(jnp.sum(state.frozen[path]["rank"], dtype=jnp.int32) for path in found)
    missing = jnp.int32(plan.total(kernels)) - total
    state = _observed(state, found, missing > 0, plan)
    due = (t > plan.warmup) & (t % plan.interval == 0)
    grants = _grants(state, sorted(found), jnp.where(due, missing, 0), plan)
    granted = sum(jnp.sum(grant, dtype=jnp.int32) for grant in grants.values())
    done = granted == missing
    # NOTE(paper): reserves are there from step 0 on, whose own forward pass comes before them.
    return jax.lax.cond(
        (t == 0) | (granted > 0),
        lambda state: _held(_grown(state, grants, done, t, plan)),
        _held,
        state,
    )


def _restrained(state: PeftState, t: jax.Array, plan: Schedule) -> PeftState:
    """The state without what the optimizer may not do: move reserves' e, or hurry new components.

    Weight decay is what moves an e that has no gradient.
    """
    trainable = {}
    for path, group in state.trainable.items():
        p, new = state.frozen[path], {}
        for name, since in (("A", "born"), ("B", "born"), ("e", "grown")):
            old, dtype = p[f"held_{name}"], group[name].dtype
            share = _ramp(t - p[since], plan.ramp).astype(dtype)
            share = share if name != "e" else jnp.where(active(p), share, jnp.zeros_like(share))
            share = {"A": share[..., None, :], "B": share[..., None], "e": share}[name]
            new[name] = jnp.where(share < 1, old + share * (group[name] - old), group[name])
        trainable[path] = new
    return state._replace(trainable=trainable)


def _ramp(age: jax.Array, ramp: int) -> jax.Array:
    """1 / ramp at the first step that a component takes, 1 from the ramp's end on."""
    return (
        jnp.minimum(age.astype(jnp.float32) / ramp, 1) if ramp else jnp.ones(age.shape, jnp.float32)
    )


def _observed(state: PeftState, found: ByPath, learning: jax.Array, plan: Schedule) -> PeftState:
    """The state with its averages moved on, until the target is reached."""
    beta1, beta2 = plan.betas
    frozen = dict(state.frozen)
    for path, now in found.items():
        old, spread = frozen[path]["sensitivity"], frozen[path]["uncertainty"]
        smooth = beta1 * old + (1 - beta1) * now
        moved = beta2 * spread + (1 - beta2) * jnp.abs(now - smooth)
        frozen[path] = {
            **frozen[path],
            "sensitivity": jnp.where(learning, smooth, old),
            "uncertainty": jnp.where(learning, moved, spread),
        }
    return state._replace(frozen=frozen)


def _grants(state: PeftState, paths: list[str], missing: jax.Array, plan: Schedule) -> ByPath:
    """How many components each kernel gets; of equal scores the first by path and layer."""
    groups = [state.frozen[path] for path in paths]
    score = jnp.concatenate([(p["sensitivity"] * p["uncertainty"]).ravel() for p in groups])
    room = jnp.concatenate([(p["born"].shape[-1] - p["rank"]).ravel() for p in groups])
    # NOTE(paper): kernels that are full are passed over, and the last of the chosen get what is
    # left up to the target; the official code goes past it then, and so never ends.
    order = jnp.argsort(jnp.where(room > 0, -score, jnp.inf), stable=True)
    asked = jnp.minimum(room[order], plan.add)
    asked = jnp.where(jnp.arange(asked.size, dtype=jnp.int32) < plan.top_h, asked, 0)
    before = jnp.cumsum(asked, dtype=jnp.int32) - asked
    flat = jnp.zeros_like(room).at[order].set(jnp.clip(missing - before, 0, asked))
    grants, first = {}, 0
    for path, p in zip(paths, groups, strict=True):
        grants[path] = flat[first : first + p["rank"].size].reshape(p["rank"].shape)
        first += p["rank"].size
    return grants


def _grown(
    state: PeftState, grants: ByPath, done: jax.Array, t: jax.Array, plan: Schedule
) -> PeftState:
    """The state with its grants active and new reserves, or at the end none."""
    key = jax.random.fold_in(jax.random.key(state.frozen[SHARED]["seed"]), t)
    trainable, frozen = {}, dict(state.frozen)
    for path, grant in grants.items():
        p, group = frozen[path], state.trainable[path]
        rank = p["rank"] + grant
        reach = jnp.maximum(jnp.minimum(rank + plan.add, p["born"].shape[-1]), p["reach"])
        old, exists, grown = below(p, p["reach"]), below(p, reach), below(p, rank)
        fresh = exists & ~old
        trainable[path] = _with_reserves(site_key(key, path), group, fresh, done & ~grown)
        frozen[path] = {
            **p,
            "rank": rank,
            "reach": reach,
            "born": jnp.where(fresh, t, p["born"]),
            "grown": jnp.where(grown & ~active(p), t, p["grown"]),
        }
    return PeftState(trainable, frozen)


def _with_reserves(
    key: jax.Array, group: State, fresh: jax.Array, void: jax.Array
) -> dict[str, jax.Array]:
    """New components where `fresh`, and e = 0 where `void`."""
    key_A, key_B = jax.random.split(key)
    A, B, e = (group[name] for name in FACTORS)
    e = jnp.where(fresh, jnp.asarray(RESERVE, e.dtype), e)
    return {
        "A": jnp.where(fresh[..., None, :], 0.02 * jax.random.normal(key_A, A.shape, A.dtype), A),
        "B": jnp.where(fresh[..., None], 0.02 * jax.random.normal(key_B, B.shape, B.dtype), B),
        "e": jnp.where(void, jnp.zeros_like(e), e),
    }


def _held(state: PeftState) -> PeftState:
    """The state that remembers its trainable leaves."""
    frozen = dict(state.frozen)
    for path, group in state.trainable.items():
        frozen[path] = {**frozen[path], **{f"held_{name}": group[name] for name in FACTORS}}
    return state._replace(frozen=frozen)
