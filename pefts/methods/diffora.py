"""DiffoRA-style selection: which kernels of a layer get a LoRA is learned, then fixed.

    y = x W + z s (drop(x) A) B      A (d_in, r), B (r, d_out), s = alpha / r, z = sigmoid(a)

a is one number for each kernel (together the layers x modules matrix of the paper), zero at the
start, so that z = 1/2; A and B start as LoRA's, so that nothing changes at step 0 and a has no
gradient before B has moved. Training goes through three phases:

    warm-up    A and B learn
    search     every `every`-th step a alone learns, at the others A and B
    the rest   z = 1 for the `keep` largest a of each layer, 0 for the others: plain LoRA

unchecked: only the paper's abstract was available, and this is one reading of it (gates instead of
its exact relaxation, first-order alternation). Trainable: r (d_in + d_out) + 1 per kernel.
"""

import functools
import math
import re
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from pefts.bound import Call, Rule, State, matmul
from pefts.core import SHARED, Declaration, PeftState, Traits, factory
from pefts.methods import lora
from pefts.targets import Select, Site, selection

SCOPES = ("layer", "model")
FACTORS, GATES, FIXED = 0, 1, 2  # what learns in a step; FIXED: factors, behind fixed gates
MOMENTS = (0.5, 0.999)  # of the gates' own Adam, as in first-order DARTS
LAYERS = r"(^|/)(layers?|blocks?|h)(?=/|$)"
NUMBERED = r".*?\d+(?=/|$)"


class Plan(NamedTuple):
    """When which part learns, and how many kernels stay; steps count from 0."""

    keep: int
    scope: str
    warmup: int
    search: int
    every: int
    rate: float

    @property
    def end(self) -> int:
        """The first step with fixed gates."""
        return self.warmup + self.search

    def phase(self, t: jax.Array) -> jax.Array:
        is_gates = (t >= self.warmup) & ((t - self.warmup) % self.every == 0)
        return jnp.where(t >= self.end, FIXED, jnp.where(is_gates, GATES, FACTORS)).astype(
            jnp.int32
        )


@factory
def diffora(
    rank: int = 8,
    alpha: float = 8.0,
    keep: int = 3,
    *,
    scope: str = "layer",
    schedule: tuple[int, int, int] = (50, 100, 2),
    gate_rate: float = 0.05,
    dropout: float = 0.0,
    **select: Unpack[Select],
) -> Declaration:
    """LoRA on the kernels that gates choose: y = x W + z s (x A) B, A (d_in, r), B (r, d_out).

    NOTE(paper): unchecked, from the abstract. The gates' steps should see a held-out split, the
      others the training split: a stream whose batch is held out at each step of the gates gives
      that; from any other stream they take turns. A and B have no gradient at steps of the gates.
    NOTE(paper): kernels share no weights in the search, beyond A and B being kept for the rest.

    Args:
      rank: r, from 1 to the kernel's smaller side.
      alpha: s = alpha / r.
      keep: how many kernels stay.
      scope: "layer" (keep of each layer; kernels outside of layers are one more) or "model".
        Layers are told by the stacked axis, or by the first number in a kernel's path.
      schedule: (warmup, search, every): optimizer steps of A and B alone, from 1; steps of the
        search; the search's first step of every `every` is the gates', from 2.
      gate_rate: learning rate of a, in an Adam of its own (betas 0.5 and 0.999) that runs in
        `update`; what the optimizer does to a is undone.
      dropout: probability of dropping an input of the adapter; active in calls that are given a
        "dropout" random stream.
      **select: targets, exclude, rank_pattern, alpha_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W + z s A B. Training needs its `update`.

    Raises:
      ValueError: keep, rank, gate_rate or the schedule out of range, more to keep than there is,
        an unknown scope, dropout outside [0, 1), or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> peft = pefts.diffora(rank=2, keep=1)
      >>> pefts.count(peft.init(jax.random.key(0), params).trainable)
      21

    Source: DiffoRA: Enabling Parameter-Efficient LLM Fine-Tuning via Differential Low-Rank Matrix
      Adaptation, arXiv 2502.08905.
    """
    lora.check_rank(rank)
    lora.check_dropout(dropout)
    plan = _plan(keep, scope, schedule, gate_rate)

    def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
        A, B = _factors(p, call)
        h = call.dot(lora.drop(x, dropout, call.key), A)
        return call.dot(x, W) + matmul(h, B)

    def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
        A, B = (factor.astype(W.dtype) for factor in _factors(p, call))
        return W + A @ B

    def update(state: PeftState, grads: Any, step: jax.Array) -> PeftState:
        t = jnp.asarray(step, jnp.int32)
        state = _chosen(_stepped(state, grads, t, plan), t, plan)
        return _remembered(state, plan.phase(t + 1))

    return Declaration(
        rule=Rule(
            _start, effective, linear, factors=_factors, through_dot=True, uses_key=dropout > 0
        ),
        selection=selection(**select),
        traits=Traits(stochastic=dropout > 0, reads_gradients=True),
        rank=rank,
        alpha=alpha,
        init_shared=functools.partial(_first_phase, plan),
        update=update,
    )


def gates(state: PeftState) -> dict[str, Any]:
    """{path: z}, a list by layer where layers are stacked; 0 and 1 when the search is over."""
    phase = state.frozen[SHARED]["phase"]
    return {
        path: _gate({**state.frozen[path], **group}, phase).tolist()
        for path, group in sorted(state.trainable.items())
    }


def _start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
    del W, stats
    trainable = {**lora.factors(key, site), "a": jnp.zeros((), jnp.float32)}
    frozen = {
        "scale": jnp.float32(lora.scaling(site)),
        "kept": jnp.float32(1),
        "m": jnp.zeros((), jnp.float32),
        "v": jnp.zeros((), jnp.float32),
    }
    # Momentum and weight decay move a leaf that has no gradient: its values are kept to go back to.
    return trainable, {**frozen, **{f"held_{name}": leaf for name, leaf in trainable.items()}}


def _first_phase(plan: Plan, key: jax.Array, sites: tuple[Site, ...]) -> tuple[dict, dict]:
    del key
    places = [place for site in sites for place in _places(site.path, site.stack, plan.scope)]
    most = max(places.count(place) for place in set(places))
    if plan.keep > most:
        raise ValueError(
            f"keep={plan.keep} is more than there is to choose from: no {plan.scope} has more than "
            f"{most} of the {len(places)} kernels; lower it, or choose more by targets."
        )
    return {}, {"phase": jnp.int32(FACTORS)}


def _gate(p: State, phase: jax.Array) -> jax.Array:
    """z (*stack,)."""
    kept = p["kept"].astype(p["a"].dtype)
    return jnp.where(phase == FIXED, kept, jax.nn.sigmoid(p["a"]))


def _factors(p: State, call: Call) -> tuple[jax.Array, jax.Array]:
    """A and z s B, without a gradient at steps of the gates."""
    phase = call.shared["phase"]
    A, B = (
        jnp.where(phase == GATES, jax.lax.stop_gradient(p[name]), p[name]) for name in ("A", "B")
    )
    return A, B * (_gate(p, phase) * p["scale"])


def _stepped(state: PeftState, grads: Any, t: jax.Array, plan: Plan) -> PeftState:
    """The state in which only what this step is for has moved; a by its own Adam."""
    phase = state.frozen[SHARED]["phase"]
    count = jnp.maximum((t - plan.warmup) // plan.every, 0).astype(jnp.float32) + 1
    trainable, frozen = {}, dict(state.frozen)
    for path, group in state.trainable.items():
        p = frozen[path]
        moves = (phase == FACTORS) | ((phase == FIXED) & (p["kept"] > 0))
        a, m, v = _adam(p, grads[path]["a"], count, plan.rate)
        is_gates = phase == GATES
        trainable[path] = {
            "A": jnp.where(moves[..., None, None], group["A"], p["held_A"]),
            "B": jnp.where(moves[..., None, None], group["B"], p["held_B"]),
            "a": jnp.where(is_gates, a, p["held_a"]),
        }
        frozen[path] = {
            **p,
            "m": jnp.where(is_gates, m, p["m"]),
            "v": jnp.where(is_gates, v, p["v"]),
        }
    return PeftState(trainable, frozen)


def _adam(
    p: State, g: jax.Array, count: jax.Array, rate: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """a, m and v after the gates' step number `count`, from 1."""
    b1, b2 = MOMENTS
    m, v = b1 * p["m"] + (1 - b1) * g, b2 * p["v"] + (1 - b2) * g**2
    direction = (m / (1 - b1**count)) / (jnp.sqrt(v / (1 - b2**count)) + 1e-12)
    return p["held_a"] - rate * direction, m, v


def _chosen(state: PeftState, t: jax.Array, plan: Plan) -> PeftState:
    """The state with `kept` decided after the last step of the search."""
    sites = sorted(state.trainable)
    a = jnp.concatenate([state.trainable[path]["a"].ravel() for path in sites])
    places = [
        place
        for path in sites
        for place in _places(path, state.trainable[path]["a"].shape, plan.scope)
    ]
    codes = np.asarray([places.index(place) for place in places])
    together = jnp.asarray(codes[:, None] == codes[None])
    earlier = jnp.asarray(np.tri(len(codes), k=-1, dtype=bool))  # of equal gates the first stay
    ahead = (a[None] > a[:, None]) | ((a[None] == a[:, None]) & earlier)
    chosen = (jnp.sum(together & ahead, axis=1) < plan.keep).astype(jnp.float32)
    frozen, first = dict(state.frozen), 0
    for path in sites:
        old = frozen[path]["kept"]
        new = chosen[first : first + old.size].reshape(old.shape)
        frozen[path] = {**frozen[path], "kept": jnp.where(t + 1 == plan.end, new, old)}
        first += old.size
    return state._replace(frozen=frozen)


def _remembered(state: PeftState, phase: jax.Array) -> PeftState:
    frozen = {**state.frozen, SHARED: {**state.frozen[SHARED], "phase": phase}}
    for path, group in state.trainable.items():
        held = {f"held_{name}": leaf for name, leaf in group.items()}
        frozen[path] = {**frozen[path], **held}
    return state._replace(frozen=frozen)


def _places(path: str, stack: tuple[int, ...], scope: str) -> list[Any]:
    """The layer of each kernel at a path, in the order of a raveled stack."""
    if scope == "model":
        return [""] * math.prod(stack)
    named = re.search(LAYERS, path) if stack else re.match(NUMBERED, path)
    prefix = path[: named.end()] if named else ""
    return [(prefix, *index) for index in np.ndindex(stack)]


def _plan(keep: int, scope: str, schedule: Any, rate: float) -> Plan:
    """The checked arguments together; JSON has lists for tuples."""
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} is unknown; choose one of {SCOPES}.")
    if not _is_count(keep, 1):
        raise ValueError(f"keep={keep!r}: give the number of kernels that stay, from 1.")
    if not isinstance(schedule, tuple | list) or len(schedule) != 3:
        raise ValueError(f"schedule={schedule!r}: give (warmup, search, every).")
    for name, value, least in zip(("warmup", "search", "every"), schedule, (1, 1, 2), strict=True):
        if not _is_count(value, least):
            raise ValueError(
                f"schedule={tuple(schedule)!r}: {name}={value!r} is no integer of at least {least}"
                + (" (gates have no gradient before the first step)." if name == "warmup" else ".")
            )
    if not 0 < rate < float("inf"):
        raise ValueError(f"gate_rate={rate!r}: give a learning rate above 0, such as 0.05.")
    warmup, search, every = schedule
    return Plan(keep, scope, warmup, search, every, rate)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
