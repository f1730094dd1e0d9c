"""AdaLoRA: singular triplets beside each kernel, cut during training to one budget for the model.

    y = x W + s ((drop(x) A) * e) B    A (d_in, r0), e (r0,), B (r0, d_out), s = alpha / (r0 + 1e-5)

e starts at zero, A and B normal with deviation 0.02, so the model is unchanged at step 0.
Trainable: r0 (d_in + d_out + 1) per kernel. After optimizer step t, for each trainable scalar p and
its gradient g,

    I = |p g|,   I' <- b1 I' + (1 - b1) I,   U <- b2 U + (1 - b2) |I - I'|,   score(p) = I' U
    S_k = score(e_k) + mean score(A[:, k]) + mean score(B[k, :])
    b(t) = bT + (b0 - bT) (1 - (t - t_i) / (T - t_f - t_i))^3

with b0 the sum of the kernels' r0 and bT their number times the target rank. e_k becomes zero for
all but the b(t) triplets of the whole model with the largest S_k: every `interval` steps until
T - t_f (a triplet may revive), then at each step, by the scores as they stood. A penalty keeps A's
columns and B's rows orthonormal. `ranks` counts the triplets left, `prune` drops the others.
"""

import bisect
import functools
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from pefts.bound import Call, Rule, State, matmul
from pefts.core import Declaration, Params, PeftState, Traits, factory
from pefts.methods.lora import check_dropout, drop
from pefts.targets import Select, Site, selection

FACTORS = ("A", "B", "e")
Scores = dict[str, jax.Array]  # by path, (*stack, r)


class Schedule(NamedTuple):
    """How triplets are scored and when they are masked; steps count from 1."""

    total_steps: int  # T
    init_rank: int
    target_rank: int
    warmup: tuple[int, int]  # t_i, t_f
    interval: int
    betas: tuple[float, float]  # b1, b2

    @property
    def start(self) -> int:
        """t_i: no step up to it cuts."""
        return self.warmup[0]

    @property
    def end(self) -> int:
        """T - t_f: from this step the budget is the target's and the scores stand still."""
        return self.total_steps - self.warmup[1]


@factory
def adalora(
    total_steps: int | None = None,
    init_rank: int = 12,
    target_rank: int = 8,
    alpha: float = 8.0,
    *,
    warmup: tuple[int, int] = (0, 0),
    interval: int = 1,
    betas: tuple[float, float] = (0.85, 0.85),
    gamma: float = 0.5,
    dropout: float = 0.0,
    **select: Unpack[Select],
) -> Declaration:
    """Adaptive budget allocation: y = x W + s ((x A) * e) B, A (d_in, r0), e (r0,), B (r0, d_out).

    Args:
      total_steps: T, the optimizer steps of the whole training; required.
      init_rank: r0 (Hugging Face PEFT: 12).
      target_rank: the average rank of a kernel at the end (Hugging Face PEFT: 8).
      alpha: s = alpha / (r0 + 1e-5), whatever rank is left (Hugging Face PEFT: 8).
      warmup: (t_i, t_f), t_i updates before the first cut and t_f after the last (official MNLI
        script: 8000 and 50000).
      interval: steps from one cut to the next (official MNLI script: 100).
      betas: (b1, b2), of the smoothed sensitivity and of its uncertainty (the paper: 0.85 both).
      gamma: weight of the orthogonality penalty (Hugging Face PEFT: 0.5; official scripts: 0.1).
      dropout: probability of dropping an input of the adapter; active in calls that are given a
        "dropout" random stream.
      **select: targets, exclude, rank_pattern (initial ranks), alpha_pattern, axes; see
        pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W + s A diag(e) B. Training needs its `penalty` and `update`.

    Raises:
      ValueError: total_steps missing, a schedule that cannot reach its target, target_rank above
        the initial ranks' average, a number out of range, or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> peft = pefts.adalora(total_steps=100, init_rank=3, target_rank=2)
      >>> pefts.count(peft.init(jax.random.key(0), params).trainable)
      33

    Source: AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv
      2303.10512.
    """
    schedule = Schedule(
        _checked_total(total_steps),
        init_rank,
        target_rank,
        _pair("warmup", warmup),
        interval,
        _pair("betas", betas),
    )
    _check_schedule(schedule)
    check_dropout(dropout)
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma={gamma!r}: give a finite weight of at least 0, such as 0.5.")

    def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
        h = call.dot(drop(x, dropout, call.key), p["A"])
        weight = (p["scale"] * p["e"]).astype(h.dtype)
        h = h * weight.reshape((1,) * (h.ndim - 1) + weight.shape)
        return call.dot(x, W) + matmul(h, p["B"])

    def orthogonality(state: PeftState, params: Params | None = None) -> jax.Array:
        del params
        return gamma * _mean_distance(state)

    def update(state: PeftState, grads: Any, step: jax.Array) -> PeftState:
        t = jnp.asarray(step, jnp.int32) + 1
        return _masked(_observed(state, grads, t, schedule), t, schedule)

    return Declaration(
        rule=Rule(_start, _effective, linear, through_dot=True, uses_key=dropout > 0),
        selection=selection(**select),
        traits=Traits(stochastic=dropout > 0, reads_gradients=True),
        rank=init_rank,
        alpha=alpha,
        init_shared=functools.partial(_check_budget, schedule),
        penalty=orthogonality,
        update=update,
    )


def ranks(state: PeftState) -> dict[str, Any]:
    """{path: number of triplets left}, a list by layer where layers are stacked."""
    return {
        path: jnp.count_nonzero(group["e"], axis=-1).tolist()
        for path, group in state.trainable.items()
    }


def prune(state: PeftState) -> PeftState:
    """The state without the triplets whose e is zero; the adapted model stays the same.

    Stacked layers keep as many triplets as the layer with most of them. For use after training:
    until T - t_f a triplet that is gone might have revived. pefts.export_hf writes what is left;
    pefts.save wants all of the state, of which this can be made again.
    """

    def one(group: dict[str, Any], e: jax.Array) -> dict[str, Any]:
        left = int(jnp.max(jnp.count_nonzero(e, axis=-1), initial=0))
        kept = jnp.sort(jnp.argsort(e == 0, axis=-1, stable=True)[..., :left], axis=-1)
        return {name: _take(name, leaf, kept) for name, leaf in group.items()}

    e = {path: group["e"] for path, group in state.trainable.items()}
    return PeftState(*({path: one(part[path], e[path]) for path in part} for part in state))


def _take(name: str, leaf: jax.Array, kept: jax.Array) -> jax.Array:
    """The kept triplets (*stack, left) of A, B, e or one of their averages."""
    kind = name.rpartition("_")[2]
    if kind not in FACTORS:
        return leaf
    index = {"A": kept[..., None, :], "B": kept[..., None], "e": kept}[kind]
    return jnp.take_along_axis(leaf, index, axis=-2 if kind == "B" else -1)


def _start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
    del W, stats
    key_A, key_B = jax.random.split(key)
    trainable = {
        "A": 0.02 * jax.random.normal(key_A, (site.d_in, site.rank), jnp.float32),
        "B": 0.02 * jax.random.normal(key_B, (site.rank, site.d_out), jnp.float32),
        "e": jnp.zeros((site.rank,), jnp.float32),
    }
    averages = {
        f"{kind}_{name}": jnp.zeros_like(trainable[name])
        for kind in ("sensitivity", "uncertainty")
        for name in FACTORS
    }
    return trainable, {"scale": jnp.float32(site.alpha / (site.rank + 1e-5)), **averages}


def _effective(W: jax.Array, p: State, call: Call) -> jax.Array:
    """W + s A diag(e) B."""
    del call
    A, B, e, scale = (p[name].astype(W.dtype) for name in ("A", "B", "e", "scale"))
    return W + scale * ((A * e[None]) @ B)


def _mean_distance(state: PeftState) -> jax.Array:
    """The mean over all A and B of ||A^T A - I||_F and ||B B^T - I||_F."""
    # NOTE(paper): the paper squares the norm; its code, and so this, does not.
    distances = []
    for group in state.trainable.values():
        A, B = group["A"], group["B"]
        for gram in (jnp.matrix_transpose(A) @ A, B @ jnp.matrix_transpose(B)):
            eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
            squared = jnp.sum((gram - eye) ** 2, axis=(-2, -1))
            # An orthonormal factor is the minimum, where the root has no derivative: take zero.
            safe = jnp.where(squared > 0, squared, jnp.ones_like(squared))
            distances.append(jnp.where(squared > 0, jnp.sqrt(safe), jnp.zeros_like(safe)).ravel())
    return jnp.mean(jnp.concatenate(distances))


def _observed(state: PeftState, grads: Any, t: jax.Array, schedule: Schedule) -> PeftState:
    """The state with its averages moved on, until the scores stand still."""
    beta1, beta2 = schedule.betas
    learning = t < schedule.end

    def one(path: str) -> dict[str, jax.Array]:
        new = dict(state.frozen[path])
        for name in FACTORS:
            # NOTE(paper): as in the official code p has taken the step already that g led to.
            now = jnp.abs(state.trainable[path][name] * grads[path][name])
            old, spread = new[f"sensitivity_{name}"], new[f"uncertainty_{name}"]
            smooth = beta1 * old + (1 - beta1) * now
            moved = beta2 * spread + (1 - beta2) * jnp.abs(now - smooth)
            new[f"sensitivity_{name}"] = jnp.where(learning, smooth, old)
            new[f"uncertainty_{name}"] = jnp.where(learning, moved, spread)
        return new

    return state._replace(frozen={path: one(path) for path in state.frozen})


def scores(state: PeftState) -> Scores:
    """S (*stack, r) of each site."""

    def one(group: State) -> jax.Array:
        A, B, e = (group[f"sensitivity_{name}"] * group[f"uncertainty_{name}"] for name in FACTORS)
        return e + A.mean(-2) + B.mean(-1)

    return {path: one(group) for path, group in sorted(state.frozen.items())}


def _masked(state: PeftState, t: jax.Array, schedule: Schedule) -> PeftState:
    """The state with e zero outside the budget, at the steps that cut."""
    found = scores(state)
    final = t > schedule.end
    # NOTE(paper): T - t_f, where the budget reaches the target, cuts only if `interval` divides it
    # (official code; Hugging Face PEFT always cuts there); from the next step on every step does.
    cuts = (t > schedule.start) & ((t % schedule.interval == 0) | final)
    kept = _largest(found, _budget(found, t, schedule))
    trainable = {}
    for path, group in state.trainable.items():
        keep = kept[path] | ~cuts
        trainable[path] = {**group, "e": jnp.where(keep, group["e"], jnp.zeros_like(group["e"]))}
    return state._replace(trainable=trainable)


def _largest(scores: Scores, budget: jax.Array) -> dict[str, jax.Array]:
    """True at the `budget` largest scores; of equal ones the first by path, layer, index stay."""
    flat = jnp.concatenate([score.ravel() for score in scores.values()])
    order = jnp.argsort(-flat, stable=True)
    places = jnp.zeros(flat.shape, jnp.int32).at[order].set(jnp.arange(flat.size, dtype=jnp.int32))
    kept, masks, first = places < budget, {}, 0
    for path, score in scores.items():
        masks[path] = kept[first : first + score.size].reshape(score.shape)
        first += score.size
    return masks


def _budget(scores: Scores, t: jax.Array, schedule: Schedule) -> jax.Array:
    """b(t), whole triplets."""
    start = sum(score.size for score in scores.values())
    kernels = sum(_slices(score.shape[:-1]) for score in scores.values())
    drops = budget_drops(start, schedule.target_rank * kernels, schedule.end - schedule.start)
    gone = jnp.asarray(drops) <= t - schedule.start
    return start - jnp.sum(gone, dtype=jnp.int32)


def budget_drops(start: int, target: int, steps: int) -> np.ndarray:
    """The step, from 1 to `steps`, at which each of the start - target triplets leaves the budget.

    b(u) = target + floor((start - target) (1 - u / steps)^3), inverted in whole numbers: rounding
    inside a compiled float32 formula would move a cut.
    """
    extra = start - target
    drops = []
    for left in range(extra - 1, -1, -1):
        # the largest n = steps - u for which extra n^3 < (left + 1) steps^3
        above = bisect.bisect_left(
            range(steps + 1), (left + 1) * steps**3, key=lambda n: extra * n**3
        )
        drops.append(steps - (above - 1))
    return np.asarray(drops, np.int32)


def _slices(stack: tuple[int, ...]) -> int:
    return int(np.prod(stack, dtype=int))


def _checked_total(total_steps: int | None) -> int:
    if total_steps is None or not _is_count(total_steps, 1):
        raise ValueError(
            f"total_steps={total_steps!r}: the budget falls along the whole training; give the "
            "number of optimizer steps it will take."
        )
    return total_steps


def _pair(argument: str, value: Any) -> tuple[Any, Any]:
    """The argument as a tuple of two; JSON has lists alone."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(f"{argument}={value!r}: give two numbers.")
    return value[0], value[1]


def _check_schedule(schedule: Schedule) -> None:
    total, (initial, final), interval = schedule.total_steps, schedule.warmup, schedule.interval
    for argument in ("init_rank", "target_rank", "interval"):
        value = getattr(schedule, argument)
        if not _is_count(value, 1):
            raise ValueError(f"{argument}={value!r}: give an integer of at least 1.")
    if not (_is_count(initial, 0) and _is_count(final, 0)):
        raise ValueError(f"warmup={schedule.warmup!r}: give two integers of at least 0.")
    if not all(0 <= beta < 1 for beta in schedule.betas):
        raise ValueError(
            f"betas={schedule.betas!r}: give two numbers in [0, 1), such as (0.85, 0.85)."
        )
    if schedule.start >= schedule.end:
        raise ValueError(
            f"warmup={schedule.warmup!r} leaves no steps for the cuts: {initial} + {final} must be "
            f"below total_steps={total}."
        )
    if final == 0 and total % interval:
        raise ValueError(
            f"interval={interval} does not divide total_steps={total}, and "
            f"warmup={schedule.warmup!r} ends with 0: the cut to the target would never come; give "
            f"warmup=({initial}, 1) or more, or another interval."
        )


def _is_count(value: Any, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest


def _check_budget(schedule: Schedule, key: jax.Array, sites: tuple[Site, ...]) -> tuple[dict, dict]:
    """No shared state; raises ValueError when the target is above what the sites start with."""
    del key
    target, kernels = schedule.target_rank, sum(_slices(site.stack) for site in sites)
    start = sum(_slices(site.stack) * site.rank for site in sites)
    if target * kernels > start:
        raise ValueError(
            f"target_rank={target} asks for {target * kernels} triplets at the end, but the "
            f"{kernels} kernels start with {start} (init_rank={schedule.init_rank} and "
            f"rank_pattern; {sites[0].path!r} has {sites[0].rank}): lower target_rank or raise the "
            "initial ranks."
        )
    return {}, {}
