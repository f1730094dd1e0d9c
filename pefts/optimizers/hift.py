"""HiFT: every step another group of layers, and all of them once in a cycle.

    units     embeddings, layer 0, ..., layer L-1, last norm, head                         n
    groups    the units in some order, m after m                                           k
    step t    AdamW on group t % k with learning rate schedule(t // k); nothing elsewhere

where k = ceil(n / m). Every unit has its own moments and its own count of updates, which stay from
cycle to cycle: the state is that of Adam on all, of which a step needs no more than a group's.
NOTE(paper): there all but that lies in host memory; here the state is where the caller puts it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pefts.optimizers import active
from pefts.optimizers.active import EMBEDDINGS, HEAD, NORM

ORDERS = ("down2up", "up2down", "random")
TICKS = ("cycles", "updates")


def hift(
    learning_rate: Any,
    *,
    group_size: int = 1,
    order: str | Sequence[int] = "down2up",
    before: Sequence[str] = (EMBEDDINGS,),
    after: Sequence[str] = (NORM, HEAD),
    inner: optax.GradientTransformation | None = None,
    weight_decay: Any = 0.0,
    seed: Any = 0,
    ticks: str = "cycles",
) -> optax.GradientTransformationExtraArgs:
    """Hierarchical fine-tuning: one group of m units in each update, one rate for k updates.

    The schedule is asked for ceil(updates / k) values; `cycle_length` gives k. With
    ticks="updates" it is asked for that of update k (t // k), as one made for all updates expects.

    NOTE(paper): the released code counts k = floor(n / m) and takes the units from one endless
      queue, so that where m does not divide n its groups drift and a cycle misses some units; and
      it builds its schedule for k times as many steps as that ever takes.

    Args:
      learning_rate: eta, a number, or an optax schedule of the cycle's number.
      group_size: m, units in a group, from 1 to n (paper: 1).
      order: "down2up", from the input to the output (paper's code), "up2down", "random", shuffled
        once, or unit numbers; units that are left out do not move.
      before, after: regular expressions of leaves outside the layers, each a unit in front of the
        layers or behind them; the usual ones may be missing in a model.
      inner: what is run on a unit, with a state for each (None: optax.scale_by_adam()).
      weight_decay: lambda, of what is at work.
      seed: of the random order.
      ticks: what the schedule counts, "cycles" or "updates".

    Returns:
      A transformation, with a `pefts.optimizers.active.ActiveState` and the schedule's. Its update
      needs params if there is decay. optax.inject_hyperparams takes it with
      static_args=("group_size", "learning_rate"); a schedule it ran itself would not wait.

    Raises:
      ValueError: group_size below 1, an unknown order or ticks; at init: group_size above n, unit
        numbers out of range or twice, a pattern that matches nothing, a leaf in no unit, no layers,
        stacks of different length.

    Example:
      >>> import jax.numpy as jnp
      >>> from pefts.optimizers.hift import hift
      >>> params = {"embed": jnp.ones(2), "layers": {"kernel": jnp.ones((2, 3, 2))}}
      >>> tx = hift(0.1)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update(params, state)
      ...     leaves = (updates["embed"], *updates["layers"]["kernel"])
      ...     print([bool(jnp.any(leaf != 0)) for leaf in leaves])
      [True, False, False]
      [False, True, False]
      [False, False, True]

    Source: HiFT: A Hierarchical Full Parameter Fine-Tuning Strategy, arXiv 2401.15207.
    """
    if ticks not in TICKS:
        raise ValueError(f"ticks={ticks!r} is unknown; choose one of {TICKS}.")
    policy = _policy(group_size, order, before, after, seed)
    tx = active.scale_by_units(active.decayed(inner, weight_decay), policy)
    if not callable(learning_rate):
        return optax.chain(tx, optax.scale_by_learning_rate(learning_rate))

    schedule: Callable[[Any], Any] = learning_rate

    def rate(cycle: int) -> optax.GradientTransformation:
        length = cycle if ticks == "updates" else 1
        return optax.scale_by_learning_rate(
            lambda count: schedule(jnp.asarray(count) // cycle * length)
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        units = active.arrange(policy, updates).units
        return rate(_length(order, group_size, units)).update(updates, state, params)

    return optax.chain(tx, optax.GradientTransformation(rate(1).init, update))


def cycle_length(
    params: Any,
    *,
    group_size: int = 1,
    order: str | Sequence[int] = "down2up",
    before: Sequence[str] = (EMBEDDINGS,),
    after: Sequence[str] = (NORM, HEAD),
) -> int:
    """k, the updates in which every unit moves once: for schedules of ceil(steps / k) values.

    Args:
      params: the tree that is trained, or its shapes.
      group_size, order, before, after: as in `hift`.

    Returns:
      ceil(n / m).

    Raises:
      ValueError: as `hift`.

    Example:
      >>> import jax.numpy as jnp
      >>> from pefts.optimizers.hift import cycle_length
      >>> params = {"embed": jnp.ones(2), "layers": {"kernel": jnp.ones((4, 3, 2))}}
      >>> cycle_length(params, group_size=2)
      3
    """
    policy = _policy(group_size, order, before, after, 0)
    return _length(order, group_size, active.arrange(policy, params).units)


def groups(order: str | Sequence[int], group_size: int, units: int, seed: Any = 0) -> jax.Array:
    """Unit numbers (k, m) of each group, n where the last one has fewer than m."""
    active.check_at_most("group_size", group_size, units)
    if order == "random":
        key = jax.random.key(seed, impl="threefry2x32")
        queue = jax.random.permutation(key, jnp.arange(units, dtype=jnp.int32))
    else:
        queue = jnp.asarray(_queue(order, units), jnp.int32)
    queue = jnp.pad(queue, (0, -len(queue) % group_size), constant_values=units)
    return queue.reshape(-1, group_size)


def _policy(group_size: int, order: Any, before: Any, after: Any, seed: Any) -> active.Policy:
    active.check_steps("group_size", group_size)
    order = active.check_order(order, ORDERS)

    def choose(step: Any, units: int) -> jax.Array:
        table = groups(order, group_size, units, seed)
        return table[jnp.asarray(step, jnp.int32) % len(table)]

    return active.Policy(1, choose, "never", "refused", before, after)


def _queue(order: str | Sequence[int], units: int) -> tuple[int, ...]:
    if isinstance(order, str):
        return tuple(range(units)) if order == "down2up" else tuple(reversed(range(units)))
    active.check_numbers(order, units)
    if len(set(order)) < len(order):
        raise ValueError(f"order={order!r} names a unit twice; each moves once in a cycle.")
    return tuple(order)


def _length(order: str | Sequence[int], group_size: int, units: int) -> int:
    return jax.eval_shape(lambda: groups(order, group_size, units)).shape[0]
