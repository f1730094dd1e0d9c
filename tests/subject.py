"""One method on the tiny model, with what several properties need computed once."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny
from cases import CASES, Case

import pefts
from pefts import core, paths, views
from pefts.targets import Site

Axes = Mapping[str, str]


base_params = functools.cache(tiny.parameters)
base_inputs = functools.cache(tiny.inputs)


@functools.cache
def base_bfloat16() -> dict[str, Any]:
    return tiny.cast(base_params(), jnp.bfloat16)


@functools.cache
def random_logits() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(tiny.BATCH, tiny.CLASSES)).astype(np.float32)


@functools.cache
def model_axes(scanned: bool) -> dict[str, str]:
    params = base_params() if scanned else tiny.unroll(base_params())
    return pefts.infer_axes(tiny.Classifier(scanned).apply, params, *base_inputs())


@functools.cache
def base_forward() -> Callable[..., jax.Array]:
    return jax.jit(lambda params, *inputs: tiny.Classifier().apply({"params": params}, *inputs))


@functools.cache
def base_pullback() -> Callable[..., tuple[jax.Array, Any]]:
    """(params, cotangent, *inputs) -> outputs, gradient of every parameter."""

    def run(params: Any, cotangent: jax.Array, *inputs: jax.Array) -> tuple[jax.Array, Any]:
        out, pull = jax.vjp(lambda p: base_forward()(p, *inputs), params)
        return out, pull(cotangent)[0]

    return jax.jit(run)


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A row of the table, or a fake, made for the tiny model."""

    case: Case
    declare: Callable[[Axes], core.Declaration]
    build: Callable[[Axes], pefts.Peft]

    @functools.cached_property
    def declaration(self) -> core.Declaration:
        return self.declare(model_axes(True))

    @functools.cached_property
    def peft(self) -> pefts.Peft:
        return self.build(model_axes(True))

    @property
    def params(self) -> dict[str, Any]:
        return base_params()

    @property
    def inputs(self) -> tuple[jax.Array, jax.Array]:
        return base_inputs()

    @functools.cached_property
    def context(self) -> Mapping[str, Any]:
        return self.case.context(tiny.BATCH) if self.case.context else {}

    @functools.cached_property
    def stats(self) -> Any:
        traits = self.peft.traits
        needs = tuple(sorted(set(traits.needs) - {core.CONTEXT}))
        return calibrated(needs, traits.components) if needs else None

    @functools.cached_property
    def state(self) -> pefts.PeftState:
        return self.started(self.peft)

    def started(self, peft: pefts.Peft) -> pefts.PeftState:
        init = peft.init if peft.traits.shapes_from_values else jax.jit(peft.init)
        return init(jax.random.key(1), self.params, self.stats)

    @functools.cached_property
    def moved(self) -> pefts.PeftState:
        """A state away from the identity, which would hide errors."""
        return jax.jit(pefts.randomize)(jax.random.key(2), self.state)

    @functools.cached_property
    def sites(self) -> tuple[Site, ...]:
        declared = self.declaration
        found = declared.selection.resolve(self.params, rank=declared.rank, alpha=declared.alpha)
        if declared.prepare is None:
            return found
        flat = paths.flatten(self.params)
        return declared.prepare(
            found, lambda site: views.to_matrix(flat[site.path], site.axes), self.stats
        )[0]

    @functools.cached_property
    def forward(self) -> Callable[[pefts.PeftState], jax.Array]:
        return jax.jit(lambda state: forward(self, self.params, state))

    @functools.cached_property
    def merged(self) -> dict[str, Any]:
        return jax.jit(self.peft.merge)(self.params, self.moved)

    @functools.cached_property
    def trained(self) -> "Training":
        return Training(self)


def forward(
    subject: Subject,
    params: Any,
    state: Any,
    *,
    peft: Any = None,
    scanned: bool = True,
    **kwargs: Any,
) -> jax.Array:
    """The factored forward pass."""
    bound = (peft or subject.peft).bind(params, state, **subject.context)
    model = tiny.Classifier(scanned)
    return pefts.apply(model.apply)({"params": bound}, *subject.inputs, **kwargs)


class Training:
    """Adam on a random target, the way train.py composes it: gradients, optax, peft.update."""

    def __init__(self, subject: Subject) -> None:
        self.traces = 0
        self.subject = subject
        self.optimizer = optax.adam(1e-2)
        self.jitted = jax.jit(self.step)

    def start(self) -> tuple[pefts.PeftState, Any]:
        state = self.subject.state
        return state, jax.jit(self.optimizer.init)(state.trainable)

    def step(
        self, params: Any, state: Any, moments: Any, index: Any, inputs: Any, context: Any
    ) -> tuple[Any, Any, jax.Array, Any]:
        """(state, optimizer state) after one update, and the loss and gradients before it."""
        self.traces += 1
        peft, model = self.subject.peft, tiny.Classifier()
        target = random_logits()

        def loss_of(trainable: Any) -> jax.Array:
            full = state._replace(trainable=trainable)
            bound = peft.bind(params, full, **context)
            logits = pefts.apply(model.apply)({"params": bound}, *inputs)
            return jnp.mean((logits - target) ** 2) + peft.penalty(full, params)

        loss, grads = jax.value_and_grad(loss_of)(state.trainable)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            updates, moments = self.optimizer.update(grads, moments, state.trainable)
        state = state._replace(trainable=optax.apply_updates(state.trainable, updates))
        return peft.update(state, grads, index), moments, loss, grads

    @functools.cached_property
    def history(self) -> list[tuple[Any, Any, jax.Array, Any]]:
        """What `step` returned for each of three updates."""
        state, moments = self.start()
        subject, out = self.subject, []
        for index in range(3):
            now = jnp.asarray(index, jnp.int32)
            out.append(
                self.jitted(subject.params, state, moments, now, subject.inputs, subject.context)
            )
            state, moments = out[-1][:2]
        return out


@functools.cache
def calibrated(needs: tuple[str, ...], components: int) -> Any:
    """The statistics that a method needs of every kernel, from two batches."""

    def run(variables: Any, batch: Any) -> jax.Array:
        return tiny.Classifier().apply(variables, *batch)

    return pefts.calibrate(
        run,
        base_params(),
        [tiny.inputs(seed) for seed in (5, 6)],
        axes=model_axes(True),
        collect=needs,
        components=components or None,
        loss=_distance if set(needs) & set(core.GRADIENTS) else None,
    )


def _distance(logits: jax.Array, batch: Any) -> jax.Array:
    del batch
    return jnp.mean((logits - random_logits()) ** 2)


def subject_of(case: Case) -> Subject:
    """The row's method, through its public factory."""
    build = pefts.METHODS[case.method]
    if not hasattr(build, "__wrapped__"):
        raise TypeError(f"{case.method} is not made by @factory, which keeps its declaration.")
    return Subject(
        case,
        declare=lambda axes: build.__wrapped__(**case.kwargs, axes=axes),
        build=lambda axes: build(**case.kwargs, axes=axes),
    )


def fake_of(case: Case, declare: Callable[[Axes], core.Declaration]) -> Subject:
    """A method that stands in no table."""
    return Subject(case, declare, lambda axes: core.lift(declare(axes), {"method": case.method}))


def row_id(case: Case) -> str:
    """The method's name; later rows of one method add a hash of their arguments."""
    first = next(row for row in CASES if row.method == case.method)
    if first is case:
        return case.method
    described = repr(sorted(case.kwargs.items()))
    return f"{case.method}-{zlib.crc32(described.encode()):08x}"


def is_variant(case: Case) -> bool:
    """Whether an earlier row has the same method, called in the same way."""
    return any(
        row.method == case.method and (row.context is None) == (case.context is None)
        for row in CASES[: CASES.index(case)]
    )
