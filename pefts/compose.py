"""Several methods as one: `chain` on the same kernels, `partition` on different ones."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from pefts import paths, targets
from pefts.core import Params, Peft, PeftState, Traits


def chain(*pefts: Peft) -> Peft:
    """Methods one after the other: each works on the kernels as the ones before it left them.

    Args:
      *pefts: at least one method. A method that replaces whole leaves (full fine-tuning) comes
        before the ones that adapt the same leaves.

    Returns:
      A Peft whose state holds one entry per member, "0", "1", ...; penalties add up.

    Example:
      >>> import pefts
      >>> both = pefts.chain(pefts.lora(rank=4), pefts.full(targets="classifier"))
      >>> both.config["method"], len(both.config["members"])
      ('chain', 2)
    """
    if not pefts:
        raise ValueError("pefts.chain needs at least one method; it was given none.")
    members = {str(index): member for index, member in enumerate(pefts)}
    everything = dict.fromkeys(members, None)
    config = {"method": "chain", "members": [dict(member.config) for member in pefts]}
    return _combine(members, everything, config)


def partition(
    pefts: Mapping[str, Peft], labels: Mapping[str, str] | Callable[[str], str | None]
) -> Peft:
    """Different methods on different parameters, as optax.partition does for optimizers.

    Args:
      pefts: {label: method}.
      labels: {regular expression: label}, first match wins, or a function path -> label; a path
        with no label (None) stays frozen. Inside its part each method's own targets apply.

    Raises:
      ValueError: a label that no method has; at init, a pattern that matches nothing or a method
        whose label no parameter has.

    Example:
      >>> import pefts
      >>> split = pefts.partition(
      ...     {"low": pefts.lora(rank=2), "high": pefts.lora(rank=8)},
      ...     {"attention": "low", "mlp": "high"},
      ... )
      >>> sorted(split.config["members"])
      ['high', 'low']
    """
    described = {} if callable(labels) else dict(labels)
    unknown = sorted(set(described.values()) - set(pefts))
    if unknown:
        raise ValueError(f"labels name {unknown[0]!r}; the methods given are {sorted(pefts)}.")

    def label_of(path: str) -> str | None:
        return labels(path) if callable(labels) else targets.first(described.items(), path, None)

    def wanted(label: str) -> Callable[[str], bool]:
        return lambda path: label_of(path) == label

    config = {
        "method": "partition",
        "members": {label: dict(member.config) for label, member in pefts.items()},
        "labels": None if callable(labels) else described,
    }
    combined = _combine(dict(pefts), {label: wanted(label) for label in pefts}, config)

    def init(key: jax.Array, params: Params, stats: Any = None) -> PeftState:
        found = paths.flatten(params)
        for pattern in described:
            targets.match(pattern, found, argument="labels")
        _check_labels({path: label_of(path) for path in found}, pefts)
        return combined.init(key, params, stats)

    return combined._replace(init=init)


def _check_labels(label_of: Mapping[str, str | None], pefts: Mapping[str, Peft]) -> None:
    """Every label has a method, and every method a parameter."""
    for path, label in label_of.items():
        if label is not None and label not in pefts:
            raise ValueError(
                f"labels give {path!r} the label {label!r}; the methods given are {sorted(pefts)}, "
                "and None leaves a parameter frozen."
            )
    for label in sorted(set(pefts) - set(label_of.values())):
        raise ValueError(
            f"labels leave no parameter to {label!r} ({pefts[label].config['method']}): give it a "
            "pattern before the others, as the first match wins, or leave the method out."
        )


def _combine(
    members: Mapping[str, Peft],
    wanted: Mapping[str, Callable[[str], bool] | None],
    config: Mapping[str, Any],
) -> Peft:
    def part(params: Params, label: str) -> Params:
        keep = wanted[label]
        if keep is None:
            return params
        return paths.keep(params, lambda path: path == paths.RESERVED or keep(path))

    def init(key: jax.Array, params: Params, stats: Any = None) -> PeftState:
        states = {
            label: member.init(targets.site_key(key, label), part(params, label), stats)
            for label, member in members.items()
        }
        return joined(states)

    def bind(params: Params, state: PeftState, **context: Any) -> dict[str, Any]:
        for label, member in members.items():
            bound = member.bind(part(params, label), member_state(state, label), **context)
            params = paths.replace(params, paths.flatten(bound))
        return dict(params)

    def merge(params: Params, state: PeftState) -> dict[str, Any]:
        for label, member in members.items():
            own = member_state(state, label)
            dense = member.merge(_with_biases(part(params, label), params, own), own)
            params = paths.replace(params, paths.flatten(dense))
        return dict(params)

    def penalty(state: PeftState, params: Params | None = None) -> jax.Array:
        return sum(
            (
                member.penalty(member_state(state, label), params and part(params, label))
                for label, member in members.items()
            ),
            start=jax.numpy.zeros((), jax.numpy.float32),
        )

    def update(state: PeftState, grads: Any, step: jax.Array) -> PeftState:
        new = {
            label: member.update(member_state(state, label), grads and grads[label], step)
            for label, member in members.items()
        }
        return joined(new)

    traits = [member.traits for member in members.values()]
    return Peft(init, bind, merge, penalty, update, _combined(traits), config)


def _with_biases(part: Params, params: Params, state: PeftState) -> Params:
    """A part of the parameters, and the biases beside the kernels that its method adapts."""
    flat, sites = paths.flatten(params), {*state.trainable, *state.frozen}
    beside = [paths.join(*site.split("/")[:-1], "bias") for site in sites]
    return paths.replace(part, {path: flat[path] for path in beside if path in flat})


def member_state(state: PeftState, label: str) -> PeftState:
    """The part of a composition's state that belongs to one member."""
    return PeftState(state.trainable[label], state.frozen[label])


def joined(states: Mapping[str, PeftState]) -> PeftState:
    """The state of a composition of members with these states."""
    return PeftState(
        {label: state.trainable for label, state in states.items()},
        {label: state.frozen for label, state in states.items()},
    )


def _combined(traits: list[Traits]) -> Traits:
    return Traits(
        mergeable=all(t.mergeable for t in traits),
        identity_at_init=all(t.identity_at_init for t in traits),
        decodes=all(t.decodes for t in traits),
        stochastic=any(t.stochastic for t in traits),
        needs=tuple(sorted({need for t in traits for need in t.needs})),
        components=max(t.components for t in traits),
        shapes_from_values=any(t.shapes_from_values for t in traits),
        restart_steps=tuple(sorted({step for t in traits for step in t.restart_steps})),
        reads_gradients=any(t.reads_gradients for t in traits),
    )
