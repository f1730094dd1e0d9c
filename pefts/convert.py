"""Any additive low-rank adapter as a plain LoRA on the same base: `to_lora`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pefts import linalg, paths
from pefts.bound import Ambient, BoundKernel
from pefts.compose import chain, joined, member_state, partition
from pefts.core import FULL_PRECISION, Params, Peft, PeftState
from pefts.low_rank import Factors
from pefts.methods.dora import MAGNITUDE
from pefts.registry import declare, from_config
from pefts.targets import exactly, only


def to_lora(peft: Peft, state: PeftState, params: Params) -> tuple[Peft, PeftState]:
    """The same change of the base as a LoRA: W + A B with A (d_in, m), B (m, d_out) and scale 1.

    m is the rank of the method's change: r where it adds factors to W, 2r where its factors take
    over a part of W. It is never above the kernel's smaller side. A DoRA whose direction another
    method updates becomes one whose direction A and B update, with the same magnitudes.

    Args:
      peft: a method whose change of a kernel is a low-rank product, or a chain or partition of such
        methods and leaves that are trained outright.
      state: its state.
      params: the base.

    Returns:
      (peft, state) of a LoRA (or DoRA) with the same outputs; parts that are no adapters of kernels
      (`full`, `head_only`, `bitfit`) and LoRAs stay as they are.

    Raises:
      ValueError: a method without such factors, or one whose kernels other methods adapt too.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.eye(6, 4)}}
      >>> peft = pefts.pissa(rank=1)
      >>> lora, state = pefts.to_lora(peft, peft.init(jax.random.key(0), params), params)
      >>> lora.config["method"], lora.config["rank"]
      ('lora', 2)
    """
    members = peft.config.get("members")
    if members is None:
        return _converted(peft, state, params)
    is_partition = isinstance(members, Mapping)
    labelled = members if is_partition else {str(n): member for n, member in enumerate(members)}
    parts = {
        label: to_lora(from_config(config), member_state(state, label), params)
        for label, config in labelled.items()
    }
    pefts = {label: part for label, (part, _) in parts.items()}
    states = joined({label: own for label, (_, own) in parts.items()})
    return partition(pefts, peft.config["labels"]) if is_partition else chain(
        *pefts.values()
    ), states


def _converted(peft: Peft, state: PeftState, params: Params) -> tuple[Peft, PeftState]:
    name, direction = peft.config["method"], direction_of(peft.config)
    # The kernel of a DoRA is no sum, but the direction that it normalises is.
    added = declare(direction).rule if direction else None
    flat = paths.flatten(peft.bind(params, state))
    ambient = flat.pop(paths.RESERVED)
    bound = {path: leaf for path, leaf in flat.items() if isinstance(leaf, BoundKernel)}
    if name == "lora" or not bound:
        return peft, state
    trainable, frozen = {}, {}
    for path, kernel in bound.items():
        factors = (added or kernel.rule).factors
        if factors is None:
            raise ValueError(
                f"{name} does not change {path!r} by a low-rank product, so no LoRA does the same: "
                "use peft.merge and save the model, or pefts.save for the adapter."
            )
        with FULL_PRECISION():
            A, B = _product(factors, kernel, ambient)
        trainable[path] = {"A": A, "B": B}
        if added is not None:
            trainable[path][MAGNITUDE] = kernel.state[MAGNITUDE]
        frozen[path] = {"scale": jnp.ones(A.shape[:-2], jnp.float32)}
    ranks = {path: group["A"].shape[-1] for path, group in trainable.items()}
    config = {
        "method": "lora" if added is None else name,
        "rank": max(ranks.values()),
        "alpha": float(max(ranks.values())),
        "targets": only(bound),
        "axes": {exactly(path): kernel.axes for path, kernel in bound.items()},
    }
    smaller = {exactly(path): rank for path, rank in ranks.items() if rank != config["rank"]}
    if smaller:
        config["rank_pattern"] = smaller
        config["alpha_pattern"] = {pattern: float(rank) for pattern, rank in smaller.items()}
    return from_config(config), PeftState(trainable, frozen)


def direction_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The config of the method that updates a DoRA's direction, where that is not LoRA."""
    return config.get("direction") if config["method"] == "dora" else None


def _product(
    factors: Factors, kernel: BoundKernel, ambient: Ambient
) -> tuple[jax.Array, jax.Array]:
    """A and B of every layer, with no more columns than the kernel's smaller side."""
    call = ambient.call(kernel)

    def one(p: Any) -> tuple[jax.Array, jax.Array]:
        A, B = factors(p, call)
        A, B = A.astype(jnp.float32), B.astype(jnp.float32)
        smaller_side = min(A.shape[0], B.shape[1])
        return (A, B) if A.shape[1] <= smaller_side else _compressed(A, B, smaller_side)

    for _ in range(kernel.axes.count("l")):
        one = jax.vmap(one)
    return one(kernel.state)


def _compressed(A: jax.Array, B: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """A B, exactly, with no more columns than a matrix of its shape can need."""
    U, S, V = linalg.svd(A @ B, rank)
    root = jnp.sqrt(S)
    return U * root[None], root[:, None] * V.T
