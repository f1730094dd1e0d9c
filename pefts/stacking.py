"""Several adapters of one method as one state with a leading axis, for jax.vmap.

    states  = [peft.init(key, params) for key in keys]
    stacked = pefts.stack(states)                     # every leaf (K, ...)
    losses  = jax.vmap(lambda state: loss(peft.bind(params, state)))(stacked)
    states  = pefts.unstack(stacked, like=states)

and batches that mix them: `per_example`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pefts.bound import ADAPTED
from pefts.core import Peft, PeftState


def stack(states: Sequence[PeftState], *, pad: bool = False) -> PeftState:
    """K states of one structure as one with a leading axis K on every leaf, for jax.vmap.

    Args:
      states: made by one method for the same targets.
      pad: let leaves differ in size, as those of other ranks do: zeros fill them up to the largest.
        For a method whose products do not change by ranks of zeros (LoRA's A and B, and most that
        are built like it), these get no gradient and stay zero, so each member trains as alone.

    Raises:
      ValueError: no states; other structures; other shapes without `pad`, or other numbers of axes
        with it.

    Example:
      >>> import jax, jax.numpy as jnp, pefts
      >>> params = {"query": {"kernel": jnp.ones((5, 3))}}
      >>> states = [
      ...     pefts.lora(rank=rank, targets="kernel").init(jax.random.key(0), params)
      ...     for rank in (1, 2)
      ... ]
      >>> pefts.stack(states, pad=True).trainable["query/kernel"]["A"].shape
      (2, 5, 2)
    """
    if not states:
        raise ValueError("pefts.stack needs at least one state; it was given none.")
    _check_structures(states)
    if not pad:
        _check_shapes(states)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def padded(*leaves: jax.Array) -> jax.Array:
        sizes = [max(axis) for axis in zip(*(leaf.shape for leaf in leaves), strict=True)]
        return jnp.stack([_filled(leaf, sizes) for leaf in leaves])

    return jax.tree.map(padded, *states)


def unstack(stacked: PeftState, like: Sequence[Any]) -> list[PeftState]:
    """The K states of a stack, each cut to its own shapes again.

    Args:
      stacked: what `stack` returned, trained or not.
      like: the K states that were stacked, or their shapes.

    Raises:
      ValueError: another number of states.
    """
    leading = {leaf.shape[0] for leaf in jax.tree.leaves(stacked)}
    if leading != {len(like)}:
        raise ValueError(
            f"the stack holds {sorted(leading)} states by its leading axes, and like has "
            f"{len(like)}: give the states that were stacked."
        )

    def cut(index: int) -> PeftState:
        def own(leaf: jax.Array, small: Any) -> jax.Array:
            return leaf[(index, *(slice(size) for size in small.shape))]

        return jax.tree.map(own, stacked, like[index])

    return [cut(index) for index in range(len(like))]


def per_example(fn: Callable[..., Any], peft: Peft) -> Callable[..., Any]:
    """A call in which every example has an adapter of its own, or none.

    The base's kernels are multiplied once for the whole batch.

    Args:
      fn: pefts.apply(model.apply), or a function of the variables that ends in it, whose outputs
        have the batch as leading axis.
      peft: the method of the adapters.

    Returns:
      (params, states, which, *args, context={}) -> outputs. `states` is a stack of K adapters,
      `which` (B,) the number of each example's, -1 for the bare base; every argument, and every
      entry of the context, has the batch as leading axis.

    Raises:
      ValueError: at the call: a number that is no adapter's (known outside of jit alone: inside, a
        larger one is taken for the last, a smaller one for -1); a method that changes the model's
        arguments, beside bare examples.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, pefts
      >>> model, x = nn.Dense(3), jnp.ones((4, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> peft = pefts.lora(rank=2, targets="kernel")
      >>> states = pefts.stack([peft.init(jax.random.key(k), params) for k in range(2)])
      >>> mixed = pefts.per_example(pefts.apply(model.apply), peft)
      >>> mixed(params, states, jnp.array([0, 1, 1, -1]), x).shape
      (4, 3)
    """

    def run(
        params: Any,
        states: PeftState,
        which: Any,
        *args: Any,
        context: Mapping[str, Any] | None = None,
    ) -> Any:
        _check_which(which, states)

        def one(number: jax.Array, context: Any, args: Any) -> Any:
            own = jax.tree.map(lambda leaf: leaf[jnp.maximum(number, 0)], states)
            alone = jax.tree.map(lambda leaf: leaf[None], (context, args))
            bound = peft.bind(params, own, **alone[0], **{ADAPTED: number >= 0})
            out = fn({"params": bound}, *alone[1])
            return jax.tree.map(lambda leaf: leaf[0], out)

        return jax.vmap(one)(jnp.asarray(which), dict(context or {}), args)

    return run


def _check_which(which: Any, states: PeftState) -> None:
    count = jax.tree.leaves(states)[0].shape[0]
    try:
        numbers = {int(number) for number in np.asarray(which)}
    except jax.errors.TracerArrayConversionError:
        return
    for number in sorted(numbers):
        if not -1 <= number < count:
            raise ValueError(
                f"which names adapter {number}, and the stack holds {count}: give 0 to "
                f"{count - 1}, or -1 for the bare base."
            )


def _filled(leaf: jax.Array, sizes: Sequence[int]) -> jax.Array:
    more = [(0, size - own) for size, own in zip(sizes, leaf.shape, strict=True)]
    return jnp.pad(leaf, more) if more else leaf


def _check_structures(states: Sequence[PeftState]) -> None:
    first = jax.tree.structure(states[0])
    for index, state in enumerate(states):
        axes = [leaf.ndim for leaf in jax.tree.leaves(state)]
        if jax.tree.structure(state) != first or axes != [
            leaf.ndim for leaf in jax.tree.leaves(states[0])
        ]:
            raise ValueError(
                f"states[{index}] has another structure than states[0]; stack only states that one "
                "method made for the same targets."
            )


def _check_shapes(states: Sequence[PeftState]) -> None:
    shapes = [jax.tree.map(jnp.shape, state) for state in states]
    for index, other in enumerate(shapes):
        if other != shapes[0]:
            raise ValueError(
                f"states[{index}] has other shapes than states[0]; stack only states that one "
                "method made with the same ranks and targets, or fill them up by pad=True."
            )
