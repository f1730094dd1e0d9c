"""Clear an optimizer's state after given numbers of updates.

A method that changes what it trains (SaRA's re-selection) leaves moments that speak of other
entries; its `traits.restart_steps` say when.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class RestartState(NamedTuple):
    """How many updates are complete, and the state of the transformation inside."""

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]  optax's name for it
    inner_state: Any


def restart_at(
    inner: optax.GradientTransformation, steps: Sequence[int]
) -> optax.GradientTransformationExtraArgs:
    """Run `inner`, from a fresh state whenever as many updates as one of `steps` are complete.

    Update t (the first is 0) starts from inner.init(params) if t is one of `steps`.
    Everything in `inner` starts anew: moments, the count of bias correction, and also the count of
    a learning-rate schedule, which therefore belongs outside:

        optax.chain(
            restart_at(optax.scale_by_adam(), peft.traits.restart_steps),
            optax.add_decayed_weights(1e-2),
            optax.scale_by_learning_rate(schedule),
        )

    Args:
      inner: any transformation; extra arguments of `update` reach it.
      steps: numbers of complete updates, from 1; none leaves `inner` as it is.

    Returns:
      A transformation whose update needs params; its state is `RestartState` if `steps` has any.

    Raises:
      ValueError: a step below 1; at the update: no params.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from pefts.optimizers import restart_at
      >>> tx = restart_at(optax.trace(0.5), (2,))
      >>> params, state = jnp.zeros(()), tx.init(jnp.zeros(()))
      >>> for _ in range(3):
      ...     update, state = tx.update(jnp.ones(()), state, params)
      ...     print(update)
      1.0
      1.5
      1.0

    Source: the reset at SaRA's re-selection, arXiv 2409.06633.
    """
    for step in steps:
        if not isinstance(step, int) or isinstance(step, bool) or step < 1:
            raise ValueError(f"steps={tuple(steps)!r}: {step!r} is no number of updates from 1.")
    inner = optax.with_extra_args_support(inner)
    if not steps:
        return inner
    restarts = tuple(steps)

    def init(params: Any) -> RestartState:
        return RestartState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, RestartState]:
        if params is None:
            raise ValueError(
                "restart_at makes a fresh state from the parameters: call "
                "update(grads, state, params)."
            )
        now = jnp.any(state.count == jnp.asarray(restarts, jnp.int32))
        start = jax.tree.map(
            lambda fresh, old: jnp.where(now, fresh, old), inner.init(params), state.inner_state
        )
        updates, inner_state = inner.update(updates, start, params, **extra)
        return updates, RestartState(optax.safe_increment(state.count), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
