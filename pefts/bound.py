"""A bound kernel: (kernel, adapter state) standing in the kernel's place in a parameter tree.

Because state and kernel sit side by side, nn.scan slices them together, nn.remat recomputes them
and jax.vmap maps over them with no code of their own. Nothing dense is built until a product asks
for it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pefts import deferred, views
from pefts.linalg import precise

State = Mapping[str, Any]
ADAPTED = "adapted"  # in the context: a boolean scalar, false where the base is to run as it is
_owners = itertools.count()


def next_owner() -> int:
    """A number that tells this instance of a method from every other in the process."""
    return next(_owners)


def matmul(x: jax.Array, W: jax.Array, precision: Any = None) -> jax.Array:
    """x (..., d_in) @ W (d_in, d_out) in x's dtype."""
    # On two axes, or the gradient of W would transpose all of x in memory first.
    rows = x.reshape(-1, x.shape[-1])
    y = jnp.matmul(rows, W.astype(x.dtype), precision=precision)
    return y.reshape(*x.shape[:-1], W.shape[-1])


def _only_arrays(W: Any) -> jax.Array:
    if isinstance(W, BoundKernel):
        raise TypeError(f"the dense form of {W.path!r} needs the session that pefts.apply opens.")
    return W


def _only_beside_attention(*tensors: Any) -> Any:
    del tensors
    raise TypeError("call.attention and call.project are there for Rule.attend alone.")


class Call(NamedTuple):
    """What a rule may use besides its own state, at one call of one module."""

    shared: Mapping[str, Any] = {}  # the method's state for all sites
    context: Mapping[str, Any] = {}  # what peft.bind(..., **context) was given
    key: jax.Array | None = None  # the "dropout" stream; None outside training
    dot: Callable[[Any, Any], jax.Array] = (
        matmul  # (x, M) -> the module's product of x with M (d_in, n)
    )
    dense: Callable[[Any], jax.Array] = (
        _only_arrays  # W, which may be bound itself -> its dense matrix
    )
    # In `Rule.attend`: the layer's attention (q, k, v, mask) -> y without any method around it, and
    # x (n, d_in) -> what its projections of keys and of values make of x, (n, kv) each
    attention: Callable[..., jax.Array] = _only_beside_attention
    project: Callable[[jax.Array], tuple[jax.Array, jax.Array]] = _only_beside_attention


class Rule(NamedTuple):
    """The mathematics of one kernel W (d_in, d_out); p is its state, trainable and frozen together.

    At least one of `effective`, `linear`, `output` and `attend` exists; where `effective` and
    `linear` both do, they agree.
    """

    init: Callable[..., tuple[dict, dict]]  # (key, W, *, site, stats) -> trainable, frozen
    effective: Callable[[Any, State, Call], jax.Array] | None = None  # (W, p, call) -> W'
    linear: Callable[[Any, Any, State, Call], jax.Array] | None = None  # (x, W, p, call) -> y
    output: Callable[[jax.Array, State, Call], jax.Array] | None = None  # (y + bias, p, call) -> y'
    # (W, b (d_out,), p, call) -> b', the bias beside a merged kernel; None: merging leaves it alone
    bias: Callable[[Any, jax.Array, State, Call], jax.Array] | None = None
    needs_bias: bool = False  # merging moves something into the bias, so there has to be one
    inputs: Callable[[tuple, dict, State], tuple[tuple, dict]] | None = (
        None  # the model's arguments, once for all sites
    )
    # (attend, q, k, v, mask, p, call) -> y: around the attention whose values this kernel makes, as
    # pefts.attention finds it; attend(q, k, v, mask) is what stands there without this method
    attend: Callable[..., jax.Array] | None = None
    # (p, call) -> A (d_in, m), B (m, d_out) where W' = W + A B: see pefts.low_rank
    factors: Callable[[State, Call], tuple[jax.Array, jax.Array]] | None = None
    through_dot: bool = (
        False  # `linear` touches x by call.dot alone: embeddings and convolutions too
    )
    eager: bool = False  # replaces the leaf when bound, whatever module reads it
    uses_key: bool = False  # draws from call.key


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "state"),
    meta_fields=("rule", "axes", "path", "owner"),
)
@dataclasses.dataclass(frozen=True)
class BoundKernel:
    """A kernel with the state of the method that adapts it. It is no array, on purpose."""

    base: Any  # the dense kernel, or another BoundKernel
    state: State
    rule: Rule
    axes: str  # of the whole leaf; nn.scan slices the leading 'l's away
    path: str
    owner: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        raise TypeError(
            f"{self.path!r} is adapted, and a BoundKernel is no array: run the model with "
            "pefts.apply(model.apply) on what peft.bind returns, or make plain parameters of it by "
            "peft.merge."
        )

    def __jax_array__(self) -> jax.Array:
        """Called by jax's functions and operators instead of `__array__`; as clear an error."""
        return jnp.asarray(self.__array__())

    @property
    def is_vector(self) -> bool:
        return not set(self.axes) & set("ik")

    @property
    def local_axes(self) -> str:
        return views.local(self.axes, self.ndim)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("shared", "context"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class Ambient:
    """What belongs to no single layer, under the reserved key of a bound tree."""

    shared: Mapping[int, Mapping[str, Any]]  # by owner
    context: Mapping[str, Any]

    def extended(self, owner: int, shared: State) -> "Ambient":
        return Ambient({**self.shared, owner: dict(shared)}, self.context)

    def with_context(self, context: Mapping[str, Any]) -> "Ambient":
        return Ambient(self.shared, {**self.context, **context})

    def chosen(self, adapted: jax.Array, base: Callable[[], jax.Array]) -> jax.Array:
        """What a method made, or what stands there without it, as the context says."""
        if ADAPTED not in self.context:
            return adapted
        # Most methods compute the base's product too, and XLA computes equal products once.
        return jnp.where(self.context[ADAPTED], adapted, base().astype(adapted.dtype))

    def call(self, bound: BoundKernel, **kwargs: Any) -> Call:
        return Call(shared=self.shared.get(bound.owner, {}), context=self.context, **kwargs)


def effective_matrix(bound: BoundKernel, ambient: Ambient) -> jax.Array:
    """The dense adapted kernel as (*stack, d_in, d_out), in float32 or better."""
    rule, axes, base = bound.rule, bound.local_axes, bound.base
    if isinstance(base, BoundKernel):
        matrix = effective_matrix(base, ambient)
    else:
        matrix = precise(views.to_matrix(base, axes))
    if rule.effective is None:
        return matrix
    call = ambient.call(bound)

    def one(W: jax.Array, p: State) -> jax.Array:
        made = rule.effective(W, deferred.arrays(p), call)  # type: ignore[misc]
        return ambient.chosen(made, lambda: W)

    return _over_layers(one, axes)(matrix, bound.state)


def _over_layers(one: Callable[..., jax.Array], axes: str) -> Callable[..., jax.Array]:
    for _ in range(views.stacked(axes)):
        one = jax.vmap(one)
    return one


def merged_bias(bound: BoundKernel, bias: jax.Array, ambient: Ambient) -> jax.Array:
    """The bias beside a merged kernel, in its own shape and dtype."""
    axes, call = bound.local_axes, ambient.call(bound)
    stack = bias.shape[: views.stacked(axes)]

    def one(W: jax.Array, b: jax.Array, p: State) -> jax.Array:
        return bound.rule.bias(W, b, deferred.arrays(p), call)  # type: ignore[misc]

    W = precise(views.to_matrix(bound.base, axes))
    merged = _over_layers(one, axes)(W, precise(bias).reshape(*stack, -1), bound.state)
    return merged.reshape(bias.shape).astype(bias.dtype)


def effective_kernel(bound: BoundKernel, ambient: Ambient) -> jax.Array:
    """The dense adapted kernel in its own shape and dtype."""
    matrix = effective_matrix(bound, ambient)
    return views.from_matrix(matrix, bound.local_axes, bound.shape).astype(bound.dtype)
