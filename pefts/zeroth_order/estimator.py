"""Directional derivatives from values alone: the one estimator below every zeroth-order optimizer.

    two       g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)
    one       g = (L(theta + eps z) - L(theta)) / eps
    forward   g = z . grad L(theta), exact, by one forward-mode pass

for each of Q directions z, and E[g z] = grad L where E[z z^T] = I (two and one: up to O(eps)).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp

from pefts import linalg
from pefts.zeroth_order import directions
from pefts.zeroth_order.directions import DRAWS, Direction

SIDES = ("two", "one", "forward")
ValueFn = Callable[[Any], jax.Array]  # theta, with `Deferred` leaves -> a scalar


class Sampling(TypedDict, total=False):
    """How directions are drawn and evaluated: options of every zeroth-order optimizer.

    Attributes:
      eps: the length of the step to each side (MeZO: 1e-3; 1e-2 for adapters).
      queries: Q, directions for each update, averaged.
      sides: "two", "one" or "forward"; see above.
      distribution: "normal" or "rademacher".
      parallel: evaluations at a time, by vmap. 1 needs the memory of one; the result is the same.
      seed: of the run's key.
    """

    eps: float
    queries: int
    sides: str
    distribution: str
    parallel: int
    seed: int


class Options(NamedTuple):
    """Checked `Sampling`; `options` makes it."""

    eps: float = 1e-3
    queries: int = 1
    sides: str = "two"
    distribution: str = "normal"
    parallel: int = 1
    seed: int = 0


class Estimate(NamedTuple):
    """What Q queries found at theta.

    Attributes:
      keys: uint32 (Q, 2), of the directions.
      slopes: g (Q,); zero where a query was not made, or nothing could be used.
      value: L near theta, the mean of all that were evaluated.
      finite: whether every value was.
    """

    keys: jax.Array
    slopes: jax.Array
    value: jax.Array
    finite: jax.Array


def options(given: Sampling) -> Options:
    """The settings, checked.

    Raises:
      ValueError: an unknown name, or a number out of range.
    """
    unknown = sorted(set(given) - set(Options._fields))
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is no option of sampling; known: {list(Options._fields)}."
        )
    made = Options(**given)
    if not (isinstance(made.eps, int | float) and 0 < made.eps < float("inf")):
        raise ValueError(f"eps={made.eps!r}: give the length of a step, above 0, such as 1e-3.")
    for name in ("queries", "parallel"):
        check_count(name, getattr(made, name))
    for name, known in (("sides", SIDES), ("distribution", tuple(DRAWS))):
        if getattr(made, name) not in known:
            raise ValueError(f"{name}={getattr(made, name)!r} is unknown; choose one of {known}.")
    return made


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless it is an integer from 1."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}={value!r}: give an integer of at least 1.")


def estimate(
    value_fn: ValueFn,
    theta: Any,
    key: jax.Array,
    how: Options = Options(),
    direction: Direction | None = None,
    queries: Any = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Estimate:
    """Slopes of `value_fn` at theta along Q directions, q of which is that of fold_in(key, q).

    Args:
      value_fn: theta -> a scalar. Its argument holds `Deferred` leaves where layers are stacked,
        which peft.bind and pefts.apply take; `pefts.deferred.arrays` makes plain arrays of them.
      theta: a tree, never changed.
      key: uint32 (2,), of this step.
      how: eps, Q and the rest.
      direction: what a key means; None: how.distribution.
      queries: how many of Q are made, traced, from 1; None: all. The rest have slope zero.
      sharding: over which devices the queries are spread, of an array (Q, 2), with parallel = Q:
        every device evaluates its own directions, and scalars alone cross between them.

    Raises:
      ValueError: `value_fn` returns no floating scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from pefts.zeroth_order import directions, estimator
      >>> how = estimator.Options(sides="forward", queries=2)
      >>> found = estimator.estimate(jnp.sum, jnp.ones(3), directions.run_key(0), how)
      >>> found.slopes.shape
      (2,)
    """
    direction = direction or Direction(DRAWS[how.distribution])
    keys = jax.vmap(directions.fold_in, (None, 0))(key, jnp.arange(how.queries))
    if sharding is not None:
        keys = jax.lax.with_sharding_constraint(keys, sharding)

    def value(key: jax.Array, scale: Any) -> jax.Array:
        return _scalar(value_fn(directions.perturb(theta, key, scale, direction)))

    base = value(keys[0], 0.0) if how.sides == "one" else None
    values, slopes = _each(functools.partial(_slope, value, how, base), keys, how, queries)
    made = jnp.arange(how.queries) < (how.queries if queries is None else queries)
    values = jnp.where(made, values, jnp.zeros_like(values))
    finite = jnp.all(jnp.isfinite(values)) & jnp.all(jnp.isfinite(jnp.where(made, slopes, 0)))
    slopes = jnp.where(made & finite, slopes, jnp.zeros_like(slopes))
    mean = jnp.sum(values) / jnp.sum(made).astype(values.dtype)
    return Estimate(keys, slopes, mean, finite)


def _slope(
    value: Callable[[jax.Array, Any], jax.Array], how: Options, base: Any, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """L beside theta in the direction of a key, and how steep it is."""
    if how.sides == "forward":
        zero = jnp.zeros((), jnp.result_type(float))
        return jax.jvp(lambda scale: value(key, scale), (zero,), (jnp.ones_like(zero),))
    if how.sides == "one":
        there = value(key, how.eps)
        return (there + base) / 2, (there - base) / how.eps
    # One after the other: side by side they would need twice the memory.
    sides = jnp.asarray([how.eps, -how.eps], jnp.result_type(float))
    plus, minus = jax.lax.map(lambda scale: value(key, scale), sides)
    return (plus + minus) / 2, (plus - minus) / (2 * how.eps)


def _each(
    fn: Callable[[jax.Array], tuple], keys: jax.Array, how: Options, queries: Any
) -> tuple[jax.Array, jax.Array]:
    """fn of every key, or of the first `queries` of them (zeros for the rest)."""
    if queries is None:
        if how.parallel >= how.queries:
            return jax.vmap(fn)(keys) if how.queries > 1 else jax.tree.map(_row, fn(keys[0]))
        return jax.lax.map(fn, keys, batch_size=how.parallel)
    empty = jax.tree.map(
        lambda out: jnp.zeros((how.queries,), out.dtype), jax.eval_shape(fn, keys[0])
    )

    def body(q: Any, rows: tuple) -> tuple:
        return jax.tree.map(lambda row, x: row.at[q].set(x), rows, fn(keys[q]))

    return jax.lax.fori_loop(0, queries, body, empty)


def _row(x: jax.Array) -> jax.Array:
    return x[None]


def _scalar(given: Any) -> jax.Array:
    if not jax.tree_util.all_leaves([given]):
        raise ValueError(
            f"value_fn returned a {type(given).__name__}: give one floating number, such as the "
            "mean loss of the batch, or -accuracy."
        )
    value = jnp.asarray(given)
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"value_fn returned {value.dtype}{list(value.shape)}: give one floating number, such "
            "as the mean loss of the batch, or -accuracy."
        )
    # The difference of two bfloat16 losses that are nearly equal is rounding alone.
    return linalg.precise(value)
