"""Optimizers that are given values instead of gradients, as optax transformations.

A `ZerothOrder` is an optax transformation whose `update` takes `value_fn`, as optax's line searches
do, and it can also `step`: the same, on donated parameters in place.

    theta, state = tx.step(theta, state, value_fn)            # memory: that of value_fn alone
    updates, state = tx.update(None, state, theta, value_fn=value_fn)   # and of one more theta
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from pefts.zeroth_order import directions, estimator
from pefts.zeroth_order.estimator import Estimate, ValueFn


class ZerothOrderState(NamedTuple):
    """What a run has to remember: no array of theta's size.

    Attributes:
      count: updates so far, skipped ones included.
      skipped: how many had a value that was not finite, and changed nothing.
      key: of the run, uint32 (2,).
      last: the numbers that were the last update: with them and the key it can be made again.
      about: what the directions read beside theta, such as thresholds.
    """

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]  optax's name for it
    skipped: jax.Array
    key: jax.Array
    last: "Record"
    about: Any


class Record(NamedTuple):
    """One update in numbers.

    Attributes:
      coefficients: (Q,), what each direction was multiplied by and added with.
      decay: share of theta that was taken away where it decays.
      value: L near theta.
      slope: sqrt(mean_q g_q^2), whose square has the squared length of L's gradient as its mean.
    """

    coefficients: jax.Array
    decay: jax.Array
    value: jax.Array
    slope: jax.Array


class StepFn(Protocol):
    def __call__(self, theta: Any, state: Any, value_fn: ValueFn) -> tuple[Any, Any]: ...


class ZerothOrder(optax.GradientTransformationExtraArgs):
    """A transformation that needs `value_fn` and no gradients, and can work in place.

    Attributes:
      step: (theta, state, value_fn) -> theta, state.
      replay: (theta, count, key, record, about) -> theta, the update that the record speaks of;
        None where more than a record is needed.
    """

    step: StepFn
    replay: Callable[..., Any] | None

    def __new__(
        cls,
        init: optax.TransformInitFn,
        update: optax.TransformUpdateExtraArgsFn,
        step: StepFn,
        replay: Callable[..., Any] | None = None,
    ) -> "ZerothOrder":
        made = super().__new__(cls, init, update)
        made.step, made.replay = step, replay
        return made


class Rule(NamedTuple):
    """What tells one method on this engine from another.

    Attributes:
      prepare: theta at the start -> what directions read beside it, a tree like it; None: nothing.
      mask: (one layer's theta, its part of that) -> which entries are moved; None: all.
      queries: count -> how many of Q are made at this update; None: all.
      signed: whether only the sign of a slope counts.
      conservative: whether a step is made only where it lowers the value, or else backwards.
    """

    prepare: Callable[[Any], Any] | None = None
    mask: directions.Mask | None = None
    queries: Callable[[jax.Array], Any] | None = None
    signed: bool = False
    conservative: bool = False


class Decay(NamedTuple):
    """Weight decay, and the leaves it spares."""

    rate: Any
    spared: Callable[[str], bool]


class Engine(NamedTuple):
    """What `build` was given."""

    learning_rate: Any
    how: estimator.Options
    rule: Rule
    decay: Decay | None
    draw: directions.Draw

    def direction(self, about: Any) -> directions.Direction:
        return directions.Direction(self.draw, self.rule.mask, about)

    def keys(self, count: Any, key: jax.Array) -> jax.Array:
        """Those of the queries of update `count`."""
        step_key = directions.fold_in(key, count)
        return jax.vmap(directions.fold_in, (None, 0))(step_key, jnp.arange(self.how.queries))


def build(
    learning_rate: Any,
    how: estimator.Options,
    rule: Rule = Rule(),
    decay: Decay | None = None,
    draw: directions.Draw | None = None,
) -> ZerothOrder:
    """theta <- theta - eta (mean_q g_q z_q + lambda theta), from `how` and `rule`.

    Args:
      learning_rate: eta, a number or an optax schedule.
      how: the estimator's options.
      rule: see `Rule`.
      decay: lambda, coupled to eta; None: none.
      draw: instead of that of how.distribution.
    """
    draw = draw or directions.DRAWS[how.distribution]
    engine = Engine(learning_rate, how, rule, decay, draw)

    def init(params: Any) -> ZerothOrderState:
        return _start(engine, params)

    def replay(theta: Any, count: Any, key: jax.Array, record: Record, about: Any) -> Any:
        decays = None if decay is None else _decays(theta, decay, record.decay)
        keys, direction = engine.keys(count, key), engine.direction(about)
        return directions.move(theta, keys, record.coefficients, direction, decays)

    def step(theta: Any, state: Any, value_fn: ValueFn) -> tuple[Any, ZerothOrderState]:
        record, finite = _find(engine, theta, state, value_fn)
        moved = replay(theta, state.count, state.key, record, state.about)
        return moved, _after(state, record, finite)

    def update(
        updates: Any, state: Any, params: Any = None, *, value_fn: ValueFn, **extra: Any
    ) -> tuple[Any, ZerothOrderState]:
        del updates, extra
        _check_params(params)
        record, finite = _find(engine, params, state, value_fn)
        return _updates(engine, params, state, record), _after(state, record, finite)

    return ZerothOrder(init, update, step, replay)


def _start(engine: Engine, theta: Any) -> ZerothOrderState:
    _check_theta(theta)
    how, prepare, dtype = engine.how, engine.rule.prepare, jnp.result_type(float)
    record = Record(jnp.zeros((how.queries,), dtype), *(jnp.zeros((), dtype) for _ in range(3)))
    count, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    about = None if prepare is None else prepare(theta)
    return ZerothOrderState(count, skipped, directions.run_key(how.seed), record, about)


def _find(engine: Engine, theta: Any, state: Any, value_fn: ValueFn) -> tuple[Record, jax.Array]:
    """The next update in numbers, and whether every value was finite."""
    how, rule, decay = engine.how, engine.rule, engine.decay
    direction, key = engine.direction(state.about), directions.fold_in(state.key, state.count)
    queries = None if rule.queries is None else rule.queries(state.count)
    found = estimator.estimate(value_fn, theta, key, how, direction, queries)
    dtype = found.slopes.dtype
    eta = jnp.asarray(_rate(engine.learning_rate, state.count), dtype)
    made = jnp.asarray(how.queries if queries is None else queries, dtype)
    coefficients = -eta * (jnp.sign(found.slopes) if rule.signed else found.slopes) / made
    if rule.conservative:
        coefficients *= _better(value_fn, theta, found, coefficients, direction)
    share = jnp.zeros_like(eta) if decay is None else eta * jnp.asarray(decay.rate, dtype)
    share = jnp.where(found.finite, share, jnp.zeros_like(share))
    slope = jnp.sqrt(jnp.sum(found.slopes**2) / made)
    return Record(coefficients, share, found.value.astype(dtype), slope), found.finite


def _after(state: Any, record: Record, finite: jax.Array) -> ZerothOrderState:
    skipped = state.skipped + (~finite).astype(jnp.int32)
    count = optax.safe_increment(state.count)
    return ZerothOrderState(count, skipped, state.key, record, state.about)


def _updates(engine: Engine, theta: Any, state: Any, record: Record) -> Any:
    """The update as a dense tree, in theta's dtypes."""
    keys, direction = engine.keys(state.count, state.key), engine.direction(state.about)
    steps = directions.total(theta, keys, record.coefficients, direction)
    if engine.decay is not None:
        steps = jax.tree.map(
            lambda step, theta, share: step if share is None else step - share * theta,
            steps,
            theta,
            _decays(theta, engine.decay, record.decay),
            is_leaf=lambda node: node is None,
        )
    return jax.tree.map(lambda step, theta: step.astype(theta.dtype), steps, theta)


def through(
    inner: optax.GradientTransformation, how: estimator.Options, draw: directions.Draw | None = None
) -> ZerothOrder:
    """The mean of g_q z_q as a dense gradient for `inner`: one more theta, and its moments."""
    inner = optax.with_extra_args_support(inner)
    pseudo = build(-1.0, how, draw=draw)

    def init(params: Any) -> tuple[Any, Any]:
        return pseudo.init(params), inner.init(params)

    def update(
        updates: Any, state: Any, params: Any = None, *, value_fn: ValueFn, **extra: Any
    ) -> tuple[Any, Any]:
        own, others = state
        gradient, after = pseudo.update(updates, own, params, value_fn=value_fn)
        new = state_of(after)
        finite = new.skipped == own.skipped
        updates, moved = inner.update(gradient, others, params, value_fn=value_fn, **extra)
        updates = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), updates)
        moved = jax.tree.map(lambda x, old: jnp.where(finite, x, old), moved, others)
        return updates, (new, moved)

    def step(theta: Any, state: Any, value_fn: ValueFn) -> tuple[Any, Any]:
        updates, state = update(None, state, theta, value_fn=value_fn)
        return optax.apply_updates(theta, updates), state

    return ZerothOrder(init, update, step)


def state_of(state: Any) -> ZerothOrderState:
    """The engine's own part of the state of a `ZerothOrder`."""
    return state if isinstance(state, ZerothOrderState) else state[0]


def _better(
    value_fn: ValueFn, theta: Any, found: Estimate, coefficients: jax.Array, direction: Any
) -> jax.Array:
    """1 for the step, -1 for its opposite, 0 for staying, whichever has the lowest value."""

    def value(scale: jax.Array) -> jax.Array:
        return value_fn(directions.perturb(theta, found.keys[0], scale, direction))

    sides = jnp.asarray([0.0, 1.0, -1.0], coefficients.dtype)
    values = jax.lax.map(value, sides * coefficients[0])
    return sides[jnp.argmin(jnp.where(jnp.isnan(values), jnp.inf, values))]


def _rate(learning_rate: Any, count: jax.Array) -> Any:
    return learning_rate(count) if callable(learning_rate) else learning_rate


def _decays(theta: Any, decay: Decay, share: jax.Array) -> Any:
    """A tree like theta: the share that is taken away, None where nothing is."""
    leaves, treedef = jax.tree.flatten(theta)
    names = [leaf.path for leaf in directions.leaves_of(theta)]
    shares = [None if decay.spared(name) else share for name in names]
    return jax.tree.unflatten(treedef, shares) if leaves else theta


def _check_theta(theta: Any) -> None:
    if not any(leaf.index >= 0 for leaf in directions.leaves_of(theta)):
        raise ValueError("there is no floating leaf to move: give the parameters to train.")


def _check_params(params: Any) -> None:
    if params is None:
        raise ValueError(
            "a zeroth-order update is made from the parameters: call "
            "update(None, state, params, value_fn=...)."
        )
