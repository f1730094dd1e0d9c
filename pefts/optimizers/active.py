"""What optimizers share that move only some units of a model at a time.

A unit is a layer, or what one regular expression finds of the leaves outside the layers:

    leaf                                             is a part of
    layers/query/kernel (L, d_in, d_out)             every layer, one slice of each
    layers_3/query/kernel, layers/3/query/kernel     layer 3
    embed_tokens/embedding, norm/scale, lm_head/...  a unit of its own, or of none

Units have numbers: those `before` the layers, the layers, those `after` them. A policy names the
units at work, for `interval` updates at a time. All other leaves get an update of zero: no decay,
and no change of their moments.

The transformation inside sees one unit at a time, a stacked layer as leaves (1, d_in, d_out), and
has a state for each: a norm over all leaves is one over a unit here. Where states are reset, those
of stacked layers are as many as units at work, not L: this is what saves memory. Unrolled layers
and units outside keep a state of full size. A switch compiles nothing: who moves is data.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pefts import linalg, targets
from pefts.optimizers.decay import leaf_paths
from pefts.optimizers.projection import inner_or_adam

# The same leaves are stacked as for projection.STACKED.
LAYERS = r"(?:^|/)layers(?:[_/](?P<number>\d+)(?=/|$)|/)"
EMBEDDINGS = r"(^|/)embed"
NORM = r"(^|/)([a-z]+_)?norm(/|$)"
HEAD = rf"(^|/)pooler(/|$)|{targets.HEADS}"
USUAL = (EMBEDDINGS, NORM, HEAD)  # need not match, as a model may lack them

Whole = tuple[int | None, tuple[int, ...]]  # a unit that is no slice: its number, its leaves


class Policy(NamedTuple):
    """Which units are at work, for how long, and what becomes of their states."""

    interval: int  # K, updates from one switch to the next
    # (number of the interval, n units) -> unit numbers (size,); n stands for none
    choose: Callable[[Any, int], jax.Array]
    # What starts from a fresh state at a switch: "joining", units that were not at work before;
    # "all" of those at work; or "never", where the states of all units are kept.
    reset: str
    outside: str  # leaves that are in no unit: "active", "frozen" or "refused"
    before: Sequence[str] = ()  # regular expressions, a unit each; the first match wins
    after: Sequence[str] = ()


class Layout(NamedTuple):
    """Where the units of a tree are; leaves go by their place in it."""

    layers: int  # L
    first: int  # the unit number of layer 0
    units: int  # n
    stacked: tuple[int, ...]  # leaves
    whole: tuple[Whole, ...]  # a number of None is always at work


class ActiveState(NamedTuple):
    """How many updates are complete, who moves at the next one, and the states inside."""

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]  optax's name for it
    active: Any  # unit numbers (size,) of the next update
    layers: Any  # of stacked layers: a leading axis of slots, of L where states are never reset
    whole: Any  # a tuple, of the other units


class _Parts(NamedTuple):
    """What the steps of one update share."""

    inner: Any
    outside: Any
    policy: Policy
    layout: Layout
    treedef: Any
    params: list[Any] | None


def scale_by_units(
    inner: optax.GradientTransformation | None,
    policy: Policy,
    *,
    outside: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` on the units that the policy names, and give all other leaves a zero update.

    Args:
      inner: for layers (None: optax.scale_by_adam()); weight decay belongs inside, or leaves that
        are not at work would decay too.
      policy: see `Policy`.
      outside: for leaves outside the layers (None: `inner`).

    Returns:
      A transformation; its `ActiveState` is in float32 or better, updates in the gradients' dtype.
      Its update needs params, unless states are never reset and `inner` needs none.

    Raises:
      ValueError: inner is no transformation; at init: as `arrange`; at the update: no params.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from pefts.optimizers.active import Policy, scale_by_units
      >>> in_turn = Policy(1, lambda step, n: (step % n)[None], reset="all", outside="frozen")
      >>> params = {"layers": {"kernel": jnp.ones((3, 2, 2))}, "head": jnp.ones(2)}
      >>> tx = scale_by_units(None, in_turn)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> [int(jnp.count_nonzero(leaf)) for leaf in (*updates["layers"]["kernel"], updates["head"])]
      [4, 0, 0, 0]
      >>> state.active.tolist(), state.layers.mu["layers"]["kernel"].shape
      ([1], (1, 1, 2, 2))
    """
    inside = inner_or_adam(inner)
    around = inside if outside is None else inner_or_adam(outside)
    parts = functools.partial(_Parts, inside, around, policy)

    def init(params: Any) -> ActiveState:
        leaves, treedef = jax.tree.flatten(params)
        part = parts(arrange(policy, params), treedef, leaves)
        zero, every = jnp.zeros((), jnp.int32), jnp.arange(part.layout.layers, dtype=jnp.int32)
        active = policy.choose(zero, part.layout.units)
        rows = every if policy.reset == "never" else _layers(part.layout, active)
        layers = _fresh(part, rows) if part.layout.stacked else ()
        return ActiveState(zero, active, layers, tuple(_init(part, at) for at in part.layout.whole))

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, ActiveState]:
        leaves, treedef = jax.tree.flatten(updates)
        if params is None and policy.reset != "never":
            raise ValueError("Fresh states need params: call update(grads, state, params).")
        values = None if params is None else treedef.flatten_up_to(params)
        part = parts(arrange(policy, updates), treedef, values)
        moved, layers = _step_layers(part, state, leaves, extra)
        whole = []
        for at, old in zip(part.layout.whole, state.whole, strict=True):
            new, after = _step_whole(part, at, state.active, old, leaves, extra)
            moved |= dict(zip(at[1], new, strict=True))
            whole.append(after)
        count = jnp.asarray(optax.safe_increment(state.count))
        active = policy.choose(count // policy.interval, part.layout.units)
        inner = (layers, tuple(whole))
        if policy.reset != "never":
            due = count % policy.interval == 0
            inner = _switch(part, due, state.active, active, inner)
        full = [moved.get(number, jnp.zeros_like(leaf)) for number, leaf in enumerate(leaves)]
        return treedef.unflatten(full), ActiveState(count, active, *inner)

    return optax.GradientTransformationExtraArgs(init, update)


def decayed(
    inner: optax.GradientTransformation | None, weight_decay: Any, mask: Any = None
) -> optax.GradientTransformation:
    """`inner`, or optax.scale_by_adam(), and decay of what it moves (where `mask` says so)."""
    inner = inner_or_adam(inner)
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return inner
    return optax.chain(inner, optax.add_decayed_weights(weight_decay, mask))


def check_steps(name: str, value: Any) -> None:
    """Raise ValueError unless the argument is an integer from 1."""
    if type(value) is not int or value < 1:
        raise ValueError(
            f"{name}={value!r}: give an integer of at least 1 (and name it in the static_args of "
            "optax.inject_hyperparams)."
        )


def check_order(order: str | Sequence[int], known: Sequence[str]) -> str | tuple[int, ...]:
    """The order, a name or unit numbers; ValueError if the name is unknown."""
    if isinstance(order, str) and order not in known:
        raise ValueError(
            f"order={order!r} is unknown; choose one of {tuple(known)}, or give unit numbers."
        )
    return order if isinstance(order, str) else tuple(order)


def check_at_most(name: str, value: int, units: int) -> None:
    """Raise ValueError if the argument is above the number of units."""
    if value > units:
        raise ValueError(f"{name}={value!r}: there are {units} units; give a number up to that.")


def check_numbers(order: Sequence[int], units: int) -> None:
    """Raise ValueError if an order by unit numbers is empty, or an entry is no unit."""
    if not order or not all(isinstance(unit, int) and 0 <= unit < units for unit in order):
        raise ValueError(
            f"order={order!r} must name units by numbers from 0 to {units - 1}, at least one."
        )


def arrange(policy: Policy, tree: Any) -> Layout:
    """The units of a tree of parameters, or of one like it.

    Raises:
      ValueError: no layers, stacks of different length, a layer without leaves, a pattern that
        matches nothing, or a leaf outside the layers that is in no unit where that is refused.
    """
    paths = jax.tree.leaves(leaf_paths(tree))
    length, stacked, unrolled = find_layers(paths, [leaf.shape for leaf in jax.tree.leaves(tree)])
    inside = {*stacked, *(number for numbers in unrolled.values() for number in numbers)}
    free = {path: number for number, path in enumerate(paths) if number not in inside}
    before = _take(policy.before, free, "before")
    after = _take(policy.after, free, "after")
    if free and policy.outside == "refused":
        raise ValueError(
            f"{min(free)!r} is in no layer, and no pattern of before={policy.before} and "
            f"after={policy.after} finds it: add one, or take the leaf out of the trainable tree."
        )
    first, last = len(before), len(before) + length
    whole: list[Whole] = list(enumerate(before))
    whole += [(first + layer, unrolled[layer]) for layer in sorted(unrolled)]
    whole += [(last + number, leaves) for number, leaves in enumerate(after)]
    if free and policy.outside == "active":
        whole.append((None, tuple(free.values())))
    return Layout(length, first, last + len(after), stacked, tuple(whole))


def find_layers(
    paths: Sequence[str], shapes: Sequence[tuple[int, ...]]
) -> tuple[int, tuple[int, ...], dict[int, tuple[int, ...]]]:
    """The number of layers, which leaves are stacked, and the leaves of each unrolled layer.

    Raises:
      ValueError: there are none, their numbers differ between stacks, or one has no leaves.
    """
    lengths: dict[str, int] = {}
    stacked, unrolled = [], {}
    for number, (path, shape) in enumerate(zip(paths, shapes, strict=True)):
        found = re.search(LAYERS, path)
        if found is None:
            continue
        if found["number"] is None:
            if not shape:
                raise ValueError(f"{path!r} is below 'layers', but a scalar has no axis of layers.")
            lengths[path] = shape[0]
            stacked.append(number)
        else:
            layer, stack = int(found["number"]), path[: found.start("number")] + "*"
            lengths[stack] = max(lengths.get(stack, 0), layer + 1)
            unrolled.setdefault(layer, []).append(number)
    if not lengths:
        raise ValueError(
            "no layers: a stacked leaf has a path as 'layers/query/kernel', an unrolled one as "
            f"'layers_3/query/kernel'; there are {sorted(paths)[:5]}."
        )
    shortest, longest = (of(lengths, key=lambda at: lengths[at]) for of in (min, max))
    if lengths[shortest] != lengths[longest]:
        raise ValueError(
            f"{longest!r} has {lengths[longest]} layers and {shortest!r} has {lengths[shortest]}: "
            "one optimizer takes stacks of one length; give each its own by optax.partition."
        )
    missing = sorted({*range(lengths[longest])} - {*unrolled}) if unrolled else []
    if missing:
        raise ValueError(f"{longest!r}: layers {missing} have no leaves; train some of each layer.")
    return lengths[longest], tuple(stacked), {at: tuple(of) for at, of in unrolled.items()}


def _take(patterns: Sequence[str], free: dict[str, int], argument: str) -> list[tuple[int, ...]]:
    """The leaves of each pattern's unit, which are taken out of those that are free."""
    units, everything = [], list(free)
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if pattern not in USUAL:
            targets.match(pattern, everything, argument=argument)
        found = [path for path in free if re.search(pattern, path)]
        if found:
            units.append(tuple(free.pop(path) for path in found))
    return units


def _layers(layout: Layout, units: Any) -> Any:
    """Layer numbers of units; L, which reads nothing and writes nothing, of those that are none."""
    layers = units - layout.first
    return jnp.where((layers >= 0) & (layers < layout.layers), layers, layout.layers)


def _only(part: _Parts, leaves: Sequence[Any], numbers: Sequence[int]) -> Any:
    """The tree with these leaves at their places, and nothing at the others."""
    at = dict(zip(numbers, leaves, strict=True))
    places = range(part.treedef.num_leaves)
    return part.treedef.unflatten([at.get(place, optax.MaskedNode()) for place in places])


def _slice(part: _Parts, leaves: Any, layer: Any) -> Any:
    """One stacked layer, (1, ...) in float32 or better."""
    numbers = part.layout.stacked
    rows = [
        linalg.precise_floats(leaves[number].at[layer].get(mode="clip")[None]) for number in numbers
    ]
    return _only(part, rows, numbers)


def _unit(part: _Parts, leaves: Any, numbers: Sequence[int]) -> Any:
    return _only(part, [linalg.precise_floats(leaves[number]) for number in numbers], numbers)


def _of(part: _Parts, unit: int | None) -> Any:
    """The transformation of a unit that is no slice."""
    layers = range(part.layout.first, part.layout.first + part.layout.layers)
    return part.inner if unit in layers else part.outside


def _init(part: _Parts, at: Whole) -> Any:
    return _of(part, at[0]).init(_unit(part, part.params, at[1]))


def _fresh(part: _Parts, layers: Any) -> Any:
    """A first state for each of these stacked layers."""
    return jax.lax.map(lambda layer: part.inner.init(_slice(part, part.params, layer)), layers)


def _step_layers(
    part: _Parts, state: Any, leaves: list[Any], extra: dict[str, Any]
) -> tuple[dict[int, Any], Any]:
    """Updates of the stacked leaves, by place, and the states after the step."""
    numbers = part.layout.stacked
    if not numbers:
        return {}, state.layers
    layers = _layers(part.layout, state.active)
    slots = jnp.arange(len(layers), dtype=layers.dtype)
    rows = layers if part.policy.reset == "never" else slots

    # One layer after the other: no more than one is held in float32 beside its state.
    def body(carry: Any, at: Any) -> tuple[Any, None]:
        states, moved = carry
        layer, row = at
        mine = jax.tree.map(lambda leaf: leaf.at[row].get(mode="clip"), states)
        grads, params = (values and _slice(part, values, layer) for values in (leaves, part.params))
        steps, mine = part.inner.update(grads, mine, params, **extra)
        states = jax.tree.map(lambda all, one: all.at[row].set(one, mode="drop"), states, mine)
        moved = [
            all.at[layer].set(step[0].astype(all.dtype), mode="drop")
            for all, step in zip(moved, jax.tree.leaves(steps), strict=True)
        ]
        return (states, moved), None

    still = [jnp.zeros_like(leaves[number]) for number in numbers]
    (states, moved), _ = jax.lax.scan(body, (state.layers, still), (layers, rows))
    return dict(zip(numbers, moved, strict=True)), states


def _step_whole(
    part: _Parts, at: Whole, active: Any, state: Any, leaves: list[Any], extra: dict[str, Any]
) -> tuple[list[Any], Any]:
    """Updates of a unit that is no slice, zero unless it is at work, and its state after."""
    unit, numbers = at

    def run() -> tuple[list[Any], Any]:
        grads, params = (
            values and _unit(part, values, numbers) for values in (leaves, part.params)
        )
        steps, after = _of(part, unit).update(grads, state, params, **extra)
        steps = zip(jax.tree.leaves(steps), numbers, strict=True)
        return [step.astype(leaves[number].dtype) for step, number in steps], after

    if unit is None:
        return run()
    still = [jnp.zeros_like(leaves[number]) for number in numbers]
    return jax.lax.cond(jnp.any(active == unit), run, lambda: (still, state))


def _switch(part: _Parts, due: Any, old: Any, new: Any, inner: tuple[Any, Any]) -> tuple[Any, Any]:
    """The states for the units `new`: those that stay may keep theirs, others start afresh."""
    keep = jnp.asarray(part.policy.reset == "joining")
    layers, whole = inner

    def slots() -> Any:
        ours, theirs = _layers(part.layout, new), _layers(part.layout, old)
        # Padding is its own match, and what a slot holds then does not matter.
        same = (ours[:, None] == theirs[None, :]) & keep
        stays, origin = jnp.any(same, axis=1), jnp.argmax(same, axis=1)

        def one(state: jax.Array, start: jax.Array) -> jax.Array:
            stay = stays.reshape(-1, *[1] * (state.ndim - 1))
            return jnp.where(stay, state[origin], start)

        return jax.tree.map(one, layers, _fresh(part, ours))

    def unit(at: Whole, state: Any) -> Any:
        if at[0] is None:
            return state
        joins = due & jnp.any(new == at[0]) & ~(keep & jnp.any(old == at[0]))
        return jax.lax.cond(joins, lambda: _init(part, at), lambda: state)

    if part.layout.stacked:
        layers = jax.lax.cond(due, slots, lambda: layers)
    return layers, tuple(
        unit(at, state) for at, state in zip(part.layout.whole, whole, strict=True)
    )
