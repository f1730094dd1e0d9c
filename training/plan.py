"""What a run will hold and cost, from shapes and the compiled step, before anything is trained."""

from typing import Any, NamedTuple

import jax

import pefts


class Plan(NamedTuple):
    """Scalars and bytes by part."""

    base_count: int
    trainable_count: int
    frozen_count: int  # what the method adds without training it
    base_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    activation_bytes: int  # temporary memory of the compiled step, gradients included
    steps: int

    @property
    def total_bytes(self) -> int:
        return self.base_bytes + self.adapter_bytes + self.optimizer_bytes + self.activation_bytes


def size(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def plan(params: Any, state: Any, compiled: jax.stages.Compiled, steps: int) -> Plan:
    """The plan of a run whose train step is compiled for its largest batch."""
    memory = compiled.memory_analysis()
    return Plan(
        base_count=pefts.count(params),
        trainable_count=pefts.count(state.peft_state.trainable),
        frozen_count=pefts.count(state.peft_state.frozen),
        base_bytes=size(params),
        adapter_bytes=size(state.peft_state),
        optimizer_bytes=size(state.opt_state),
        activation_bytes=0 if memory is None else memory.temp_size_in_bytes,
        steps=steps,
    )
