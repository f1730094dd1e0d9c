"""Poly and multi-head routing: an inventory of LoRAs that each task mixes for itself.

    y = x W + s (x A^) B^               A^ (d_in, r) and B^ (r, d_out), of the example's task
    A^[q] = sum_k w_qk A[q, k]          block q of h along d_in         A (h, K, d_in / h, r)
    B^[q] = sum_k w_qk B[q, k]          block q of h along d_out        B (h, K, r, d_out / h)
    w_qk = g_qk / sum_k g_qk            g = sigmoid(Z[task])            Z (T, h, K)

Factors are averaged, not products. h = 1 is Poly, h > 1 multi-head routing (MHR). In training g is
a relaxed Bernoulli sample, sigmoid(Z + log u - log(1 - u)), for each example. B starts at zero, so
the model is unchanged at step 0. Trainable: K r (d_in + d_out) + T h K per kernel, or T h K where
only the router is (MHR-z). With one task for all inputs it is a LoRA, and can be merged.
"""

import functools
from collections.abc import Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from pefts.bound import Call, Rule, State
from pefts.core import CONTEXT, Declaration, Params, Peft, PeftState, Traits, factory
from pefts.low_rank import additive
from pefts.methods.lora import check_rank
from pefts.targets import Select, Site, selection

TRAIN = ("all", "router")
UNIFORM = "uniform"
IDS = "task_ids"
EPS = 1e-12  # in the sum of the gates
LOGITS = 1e-3  # Z starts uniform within
ONE_TASK_EACH = "examples of different tasks have different kernels: fix one by task"


@factory
def poly(
    rank: int = 8,
    *,
    skills: int = 4,
    splits: int = 1,
    tasks: int = 1,
    alpha: float = 1.0,
    task: int | str | None = None,
    train: str = "all",
    noise: bool = True,
    **select: Unpack[Select],
) -> Declaration:
    """Task-mixed LoRAs: y = x W + s (x A^) B^, A^ and B^ weighted means of A, B (h, K, ..).

    s = alpha / r. With several tasks and no `task` those of a batch are given to `bind(params,
    state, task_ids=...)`, one integer for each entry of the first axis of every adapted module's
    input (beams included). States do not depend on `task`: train with task_ids, then merge with a
    method that fixes it, or take `lora_of`.

    Args:
      rank: r (Hugging Face PEFT: 8).
      skills: K, how many LoRAs the inventory has (Hugging Face PEFT: 4).
      splits: h, a divisor of both sides of every kernel (Hugging Face PEFT: 1).
      tasks: T, rows of the router (Hugging Face PEFT: 1); one alone needs no task_ids.
      alpha: s = alpha / r (Hugging Face PEFT has none: 1).
      task: the row of the router that holds for all inputs, or "uniform": all skills alike, as in
        MHR-mu. The method can then be merged; as a LoRA it is what `lora_of` returns.
      train: "all", or "router" (MHR-z: a trained inventory stays; see `for_tasks`).
      noise: sample the gates in calls that are given a "dropout" random stream (the papers); False
        is the plain sigmoid there too.
      **select: targets, exclude, rank_pattern, alpha_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact where one task holds, and refused for a batch of mixed tasks.

    Raises:
      ValueError: rank, skills, splits or tasks out of range, splits that do not divide a side, an
        unknown task or train, or no kernel matches; at the call: task_ids missing, not integers
        (batch,), of another length than the batch or, where their values are known, out of range
        (inside jit the nearest task is taken).

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> peft = pefts.poly(rank=2, skills=3, splits=2, tasks=5)
      >>> pefts.count(peft.init(jax.random.key(0), params).trainable)
      90

    Source: Combining Modular Skills in Multitask Learning, arXiv 2202.13914; Multi-Head Adapter
      Routing for Cross-Task Generalization, arXiv 2211.03831.
    """
    check_rank(rank)
    _check_counts(skills, splits, tasks)
    _check_options(task, tasks, train)
    init = functools.partial(_start, sizes=(tasks, splits, skills), train=train)
    is_routed = task is None and tasks > 1
    is_noisy = noise and task != UNIFORM
    return Declaration(
        rule=_routed(init, noise) if is_routed else _fixed(init, task, is_noisy),
        selection=selection(**select),
        traits=Traits(
            mergeable=not is_routed,
            stochastic=is_noisy,
            needs=(CONTEXT,) if is_routed else (),
        ),
        rank=rank,
        alpha=alpha,
        unmergeable=ONE_TASK_EACH,
    )


def weights(Z: jax.Array, noise: jax.Array | None = None) -> jax.Array:
    """w (..., h, K), each row's sum 1, of logits (..., h, K) and logistic noise beside them."""
    g = jax.nn.sigmoid(Z if noise is None else Z + noise)
    return g / (jnp.sum(g, axis=-1, keepdims=True) + EPS)


def mixed(w: jax.Array, A: jax.Array, B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A^ (..., d_in, r) and B^ (..., r, d_out) of weights (..., h, K)."""
    h, _, i, r = A.shape
    lead, o = w.shape[:-2], B.shape[-1]
    return (
        jnp.einsum("...qk,qkir->...qir", w, A.astype(w.dtype)).reshape(*lead, h * i, r),
        jnp.einsum("...qk,qkro->...rqo", w, B.astype(w.dtype)).reshape(*lead, r, h * o),
    )


def lora_of(
    peft: Peft, state: PeftState, params: Params, task: int | str = UNIFORM
) -> tuple[Peft, PeftState]:
    """One task's mixture as a LoRA of rank r and scale 1 on the same base; by default MHR-mu's.

    MHR-mu takes the mean of all skills as the start of an ordinary fine-tuning.

    Args:
      peft: a poly, or a chain or partition with one.
      state: its state.
      params: the base.
      task: a row of the router, or "uniform" for the mean of all skills.

    Example:
      >>> import jax, pefts
      >>> from pefts.methods.poly import lora_of
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> peft = pefts.poly(rank=2, tasks=5)
      >>> lora, _ = lora_of(peft, peft.init(jax.random.key(0), params), params)
      >>> lora.config["method"], lora.config["rank"]
      ('lora', 2)
    """
    from pefts.convert import to_lora  # these two import the methods
    from pefts.registry import from_config

    def fixed(config: Any) -> Any:
        members = config.get("members")
        if members is None:
            changes = {"task": task, "noise": False} if config["method"] == "poly" else {}
            return {**config, **changes}
        if isinstance(members, Mapping):
            return {**config, "members": {label: fixed(m) for label, m in members.items()}}
        return {**config, "members": [fixed(member) for member in members]}

    return to_lora(from_config(fixed(peft.config)), state, params)


def for_tasks(
    peft: Peft, state: PeftState, tasks: int, train: str = "router"
) -> tuple[Peft, PeftState]:
    """A trained inventory under a new router for other tasks, which begin with uniform weights.

    Args:
      peft: a poly.
      state: its state; A and B are kept, Z is not.
      tasks: T of the new router.
      train: "router" (MHR-z) or "all".

    Example:
      >>> import jax, pefts
      >>> from pefts.methods.poly import for_tasks
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> peft = pefts.poly(rank=2, skills=3, tasks=5)
      >>> _, state = for_tasks(peft, peft.init(jax.random.key(0), params), tasks=2)
      >>> state.trainable["query/kernel"]["Z"].shape
      (2, 1, 3)
    """
    config = {name: value for name, value in peft.config.items() if name != "method"}
    new = poly(**{**config, "tasks": tasks, "train": train, "task": None})
    trainable, frozen = {}, {}
    for path, scale in state.frozen.items():
        p = {**scale, **state.trainable[path]}
        rows = (*p["Z"].shape[:-3], tasks, *p["Z"].shape[-2:])
        trainable[path], frozen[path] = _divided({**p, "Z": jnp.zeros(rows, p["Z"].dtype)}, train)
    return new, PeftState(trainable, frozen)


def _start(
    key: jax.Array,
    W: jax.Array,
    *,
    site: Site,
    stats: Any,
    sizes: tuple[int, int, int],
    train: str,
) -> tuple[dict, dict]:
    del W, stats
    T, h, K = sizes
    if site.d_in % h or site.d_out % h:
        raise ValueError(
            f"splits={h} does not divide both sides of {site.path!r}, a {site.d_in} x {site.d_out} "
            f"kernel: choose a divisor of {np.gcd(site.d_in, site.d_out)}, or exclude it."
        )
    key_A, key_Z = jax.random.split(key)
    i, o, r = site.d_in // h, site.d_out // h, site.rank
    bound = float(1 / np.sqrt(i))
    leaves = {
        "A": jax.random.uniform(key_A, (h, K, i, r), jnp.float32, -bound, bound),
        "B": jnp.zeros((h, K, r, o), jnp.float32),
        "Z": jax.random.uniform(key_Z, (T, h, K), jnp.float32, -LOGITS, LOGITS),
        "scale": jnp.float32(site.alpha / site.rank),
    }
    return _divided(leaves, train)


def _divided(p: Mapping[str, Any], train: str) -> tuple[dict, dict]:
    """(trainable, frozen) leaves."""
    trained = ("A", "B", "Z") if train == "all" else ("Z",)
    return {n: p[n] for n in trained}, {n: leaf for n, leaf in p.items() if n not in trained}


def _fixed(init: Any, task: int | str | None, noise: bool) -> Rule:
    """One task for all inputs: a LoRA, but for the noise of each example's gates."""
    row = 0 if task is None else task

    def factors(p: State, call: Call) -> tuple[jax.Array, jax.Array]:
        del call
        Z = jnp.zeros_like(p["Z"][0]) if isinstance(row, str) else p["Z"][row]
        A, B = mixed(weights(Z), p["A"], p["B"])
        return A, B * p["scale"].astype(B.dtype)

    rule = additive(init, factors)
    plain = rule.linear

    def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
        if task is None and IDS in call.context:
            ids_of(call.context, 1)
        if isinstance(row, str) or not noise or call.key is None:
            return plain(x, W, p, call)  # type: ignore[misc]
        batch = x if x.ndim > 1 else x[None]  # a single example under jax.vmap
        ids = jnp.full(len(batch), row)
        return _mix_each(batch, W, p, call, ids, True).reshape(*x.shape[:-1], -1)

    # Only without noise is it always W + A B; `lora_of` turns the noise off.
    return rule._replace(
        factors=None if noise else factors,
        linear=linear,
        through_dot=not noise,
        uses_key=noise,
    )


def _routed(init: Any, noise: bool) -> Rule:
    """A task for each example."""

    def linear(x: jax.Array, W: Any, p: State, call: Call) -> jax.Array:
        return _mix_each(x, W, p, call, ids_of(call.context, len(p["Z"])), noise)

    return Rule(init, _no_dense_kernel, linear, uses_key=noise)


def _mix_each(x: jax.Array, W: Any, p: State, call: Call, ids: jax.Array, noise: bool) -> jax.Array:
    """x W + s (x A^) B^ with factors of each example's own, which are small beside x."""
    if x.ndim < 2 or len(x) != len(ids):
        raise ValueError(
            f"{IDS} names {len(ids)} examples, and a kernel with routed skills is applied to "
            f"inputs of shape {x.shape}: the first axis must be the batch's. Exclude kernels that "
            "see no examples."
        )
    Z, key = p["Z"][ids], call.key if noise else None
    sample = None if key is None else jax.random.logistic(key, Z.shape, Z.dtype)
    w = weights(Z, sample)
    A, B = (factor.astype(x.dtype) for factor in mixed(w, p["A"], p["B"]))
    rows = x.reshape(len(x), -1, x.shape[-1])
    h = jnp.einsum("bti,bir->btr", rows, A) * p["scale"].astype(x.dtype)
    update = jnp.einsum("btr,bro->bto", h, B)
    return call.dot(x, W) + update.reshape(*x.shape[:-1], -1)


def _no_dense_kernel(W: jax.Array, p: State, call: Call) -> jax.Array:
    del W, p, call
    raise ValueError(
        f"poly has no dense kernel for a convolution, an embedding or a module that pefts does not "
        f"know; {ONE_TASK_EACH}, or exclude this one."
    )


def ids_of(context: Mapping[str, Any], tasks: int) -> jax.Array:
    """The tasks (batch,) of a batch; the nearest one for what is out of range inside jit.

    Raises:
      ValueError: task_ids missing or not integers (batch,), or (outside jit) out of range.
    """
    if IDS not in context:
        raise ValueError(
            f"poly routes between {tasks} tasks and was not told the batch's: call "
            f"peft.bind(params, state, {IDS}=...), or fix one by task."
        )
    ids = jnp.asarray(context[IDS])
    if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"{IDS} of shape {ids.shape} and dtype {ids.dtype}: give integers (batch,)."
        )
    _check_known(ids, tasks)
    return jnp.clip(ids, 0, tasks - 1)


def _check_known(ids: jax.Array, tasks: int) -> None:
    try:
        known = np.asarray(ids)
    except jax.errors.TracerArrayConversionError:
        return
    outside = known[(known < 0) | (known >= tasks)]
    if outside.size:
        raise ValueError(
            f"{IDS} holds {outside[0]}, and tasks={tasks} allows 0 to {tasks - 1}; for_tasks makes "
            "a router for other tasks."
        )


def _check_counts(skills: int, splits: int, tasks: int) -> None:
    for name, value in (("skills", skills), ("splits", splits), ("tasks", tasks)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: give a positive integer, such as 4.")


def _check_options(task: int | str | None, tasks: int, train: str) -> None:
    if train not in TRAIN:
        raise ValueError(f"train={train!r} is unknown; choose one of {TRAIN}.")
    if task is None or task == UNIFORM:
        return
    if not isinstance(task, int) or isinstance(task, bool) or not 0 <= task < tasks:
        raise ValueError(
            f"task={task!r}: tasks={tasks} allows 0 to {tasks - 1}, 'uniform' for the mean of all "
            "skills, or None for those that bind is given."
        )
