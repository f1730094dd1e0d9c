"""Every property must catch the fault it is there for: broken fakes of a method that passes."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from conformance import (
    carries_through_scan,
    compiles_once,
    counts_its_parameters,
    factored_equals_merged,
    gradient_reaches_leaves,
    gradients_flow,
    jit_equals_eager,
    keeps_bfloat16,
    matches_oracle,
    mixes_in_a_batch,
    random_state_changes_outputs,
    scanned_equals_unrolled,
    shards,
    starts_at_identity,
    trains_only_trainable,
)
from subject import Axes, Subject, fake_of

from pefts.bound import Call, Rule
from pefts.core import Declaration
from pefts.targets import Site, selection

RANK, SCALE = 2, 0.5


def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
    del W, stats
    A = jax.random.normal(key, (site.d_in, RANK)) / np.sqrt(site.d_in)
    B = jnp.zeros((RANK, site.d_out))
    return {"A": A, "B": B}, {"scale": jnp.float32(SCALE)}


def parts(p: Any, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    return p["A"].astype(dtype), p["B"].astype(dtype), p["scale"].astype(dtype)


def linear(x: jax.Array, W: Any, p: Any, call: Call) -> jax.Array:
    A, B, scale = parts(p, x.dtype)
    return call.dot(x, W) + scale * (x @ A @ B)


def effective(W: jax.Array, p: Any, call: Call) -> jax.Array:
    del call
    A, B, scale = parts(p, W.dtype)
    return W + scale * (A @ B)


SOUND = Rule(start, effective, linear)
CASE = Case(
    "fake",
    {},
    count=lambda sites: sum(int(np.prod(s.stack)) * RANK * (s.d_in + s.d_out) for s in sites),
    oracle=lambda W, p, shared: W + p["scale"] * p["A"] @ p["B"],
    zero_grad_at_start=("A",),
)


def make(**changes: Any) -> Subject:
    """The sound method with fields of its rule or of its declaration exchanged."""
    rule = SOUND._replace(**{k: v for k, v in changes.items() if k in Rule._fields})
    rest = {k: v for k, v in changes.items() if k not in Rule._fields}

    def declare(axes: Axes) -> Declaration:
        return Declaration(rule, selection(axes=axes), **rest)

    return fake_of(CASE, declare)


def zero_delta_linear(x: jax.Array, W: Any, p: Any, call: Call) -> jax.Array:
    return linear(x, W, {**p, "B": jnp.zeros_like(p["B"])}, call)


def zero_delta_effective(W: jax.Array, p: Any, call: Call) -> jax.Array:
    return effective(W, {**p, "B": jnp.zeros_like(p["B"])}, call)


def flipped_linear(x: jax.Array, W: Any, p: Any, call: Call) -> jax.Array:
    return linear(x, W, {**p, "B": -p["B"]}, call)


def flipped_effective(W: jax.Array, p: Any, call: Call) -> jax.Array:
    return effective(W, {**p, "B": -p["B"]}, call)


def unscaled_effective(W: jax.Array, p: Any, call: Call) -> jax.Array:
    return effective(W, {**p, "scale": jnp.ones_like(p["scale"])}, call)


def transposed(p: Any) -> dict[str, Any]:
    """The square part of A, its first two rows, the wrong way round."""
    return {**p, "A": jnp.concatenate([p["A"][:RANK].T, p["A"][RANK:]])}


def transposed_effective(W: jax.Array, p: Any, call: Call) -> jax.Array:
    return effective(W, transposed(p), call)


def transposed_linear(x: jax.Array, W: Any, p: Any, call: Call) -> jax.Array:
    return linear(x, W, transposed(p), call)


def idle_leaf(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
    trainable, frozen = start(key, W, site=site, stats=stats)
    return {**trainable, "idle": jnp.ones(3)}, frozen


def moved_start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
    trainable, frozen = start(key, W, site=site, stats=stats)
    return {**trainable, "B": trainable["B"] + 0.01}, frozen


def base_dtype_start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
    trainable, frozen = start(key, W, site=site, stats=stats)
    return {name: leaf.astype(W.dtype) for name, leaf in trainable.items()}, frozen


def other_start_in_scan(
    key: jax.Array, W: jax.Array, *, site: Site, stats: Any
) -> tuple[dict, dict]:
    trainable, frozen = start(key, W, site=site, stats=stats)
    return trainable, {**frozen, "layers": jnp.ones(())} if site.stack else frozen


def detached_linear(x: jax.Array, W: Any, p: Any, call: Call) -> jax.Array:
    return linear(x, W, {**p, "A": jax.lax.stop_gradient(p["A"])}, call)


def grow_frozen(state: Any, grads: Any, step: Any) -> Any:
    del grads, step
    return state._replace(frozen=jax.tree.map(lambda leaf: leaf * 1.01, state.frozen))


def half_frozen(state: Any, grads: Any, step: Any) -> Any:
    del grads, step
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.frozen)
    return state._replace(frozen=halved)


RUNS = itertools.count(1)


def remembering_linear(x: jax.Array, W: Any, p: Any, call: Call) -> jax.Array:
    return linear(x, W, {**p, "B": p["B"] * next(RUNS)}, call)


class Fault(NamedTuple):
    name: str
    changes: Mapping[str, Any]  # of the sound method
    caught_by: Callable[[Subject], None]
    match: str  # the message says what is wrong, not merely that something is
    error: type[Exception] = AssertionError


FAULTS = (
    Fault(
        "delta_returned_as_zero",
        {"linear": zero_delta_linear, "effective": zero_delta_effective},
        random_state_changes_outputs,
        "changes the outputs by 0.0",
    ),
    Fault(
        "delta_zero_in_merge",
        {"effective": zero_delta_effective},
        factored_equals_merged,
        "factored against merged outputs: off by",
    ),
    Fault(
        "sign_flipped_in_linear",
        {"linear": flipped_linear},
        factored_equals_merged,
        "factored against merged outputs: off by",
    ),
    Fault(
        "sign_flipped_in_linear",
        {"linear": flipped_linear},
        gradients_flow,
        "factored against merged outputs in float64: off by",
    ),
    Fault(
        "sign_flipped_in_both",
        {"linear": flipped_linear, "effective": flipped_effective},
        matches_oracle,
        "merge at .*: off by",
    ),
    Fault(
        "scale_forgotten_in_merge",
        {"effective": unscaled_effective},
        factored_equals_merged,
        "factored against merged outputs: off by",
    ),
    Fault(
        "scale_forgotten_in_merge",
        {"effective": unscaled_effective},
        matches_oracle,
        "merge at .*: off by",
    ),
    Fault(
        "axes_transposed_in_both",
        {"linear": transposed_linear, "effective": transposed_effective},
        matches_oracle,
        "merge at .*: off by",
    ),
    Fault(
        "axes_transposed_in_merge",
        {"effective": transposed_effective},
        factored_equals_merged,
        "factored against merged outputs: off by",
    ),
    Fault(
        "gradient_cut_off",
        {"linear": detached_linear},
        gradients_flow,
        "no gradient reaches .*'A'",
    ),
    Fault(
        "trainable_leaf_never_used",
        {"init": idle_leaf},
        gradients_flow,
        "no gradient reaches .*'idle'",
    ),
    Fault(
        "trainable_leaf_never_used",
        {"init": idle_leaf},
        gradient_reaches_leaves,
        "'idle'.* is zero",
    ),
    Fault(
        "trainable_leaf_never_used",
        {"init": idle_leaf},
        trains_only_trainable,
        "'idle'.* never moved",
    ),
    Fault(
        "more_leaves_than_the_formula",
        {"init": idle_leaf},
        counts_its_parameters,
        "trainable scalars, the formula says",
    ),
    Fault(
        "no_identity_at_the_start",
        {"init": moved_start},
        starts_at_identity,
        "outputs at step 0: off by",
    ),
    Fault(
        "gradient_where_none_is_declared",
        {"init": moved_start},
        gradient_reaches_leaves,
        "'A'.* is not zero",
    ),
    Fault(
        "state_in_the_base_dtype",
        {"init": base_dtype_start},
        keeps_bfloat16,
        "a bfloat16 base changes the state",
    ),
    Fault("frozen_leaf_updated", {"update": grow_frozen}, trains_only_trainable, "'scale'.* moved"),
    Fault(
        "recompiles_at_each_step", {"update": half_frozen}, compiles_once, "traced 2 times in three"
    ),
    Fault(
        "update_changes_a_dtype", {"update": half_frozen}, carries_through_scan, "carry", TypeError
    ),
    Fault(
        "remembers_its_calls",
        {"linear": remembering_linear},
        jit_equals_eager,
        "eager against jitted outputs: off by",
    ),
    Fault(
        "other_state_for_scanned_layers",
        {"init": other_start_in_scan},
        scanned_equals_unrolled,
        "init on unrolled layers has other shapes",
    ),
)


@pytest.mark.parametrize(
    "fault", FAULTS, ids=[f"{fault.name}-{fault.caught_by.__name__}" for fault in FAULTS]
)
def test_fault_is_caught(fault: Fault) -> None:
    with pytest.raises(fault.error, match=fault.match):
        fault.caught_by(make(**fault.changes))


@pytest.fixture(scope="module")
def sound() -> Subject:
    return make()


@pytest.mark.parametrize(
    "prop",
    sorted({fault.caught_by for fault in FAULTS}, key=lambda prop: prop.__name__)
    + [mixes_in_a_batch, shards],
    ids=lambda prop: prop.__name__,
)
def test_sound_method_passes(sound: Subject, prop: Callable[[Subject], None]) -> None:
    prop(sound)
