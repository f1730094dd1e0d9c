"""Attention as a module of its own: where methods on queries, keys and values get in.

A model offers its attention if it computes it in a Linen module without parameters whose call takes
q, k, v and mask, by these names and in this order:

    q (B, T, N, H)   k, v (B, S, K, H)   mask boolean (B or 1, N or 1, T or 1, S), true where a
    query sees a key, or None: no token sees a later one          returns (B, T, N, H)

and if that module lies in one parent with the projections that make its keys and values. The
adapter of a layer stands at its value projection (or at one that makes queries, keys and values
together); `Rule.attend` of each adapter in the parent goes around the call.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pefts import deferred, modules, paths, views
from pefts.bound import Ambient, BoundKernel, effective_matrix, matmul
from pefts.linalg import precise

Reached = dict[str, tuple[str, ...]]  # kernel's path -> path of the attention that its hook went to
Attend = Callable[..., jax.Array]  # (q, k, v, mask) -> y
ARGUMENTS = ("q", "k", "v", "mask")
KEY_OF = {
    "value": "key",
    "v_proj": "k_proj",
    "v": "k",
    "to_v": "to_k",
    "wv": "wk",
    "v_lin": "k_lin",
}
FUSED = ("c_attn", "qkv", "qkv_proj")  # queries, keys and values, a third of the outputs each
PROJECTIONS = rf"(^|/)({'|'.join([*KEY_OF, *FUSED])})/kernel$"


def is_attention(module: nn.Module, method: str) -> bool:
    """Whether this call of a module is an attention in the sense of this file."""
    if method != "__call__" or module.scope is None or not _takes_attention(type(module)):
        return False
    return not module.variables.get("params")


@functools.cache
def _takes_attention(cls: type) -> bool:
    return tuple(inspect.signature(cls.__call__).parameters)[1:5] == ARGUMENTS


def kv_features(path: str, d_out: int) -> int:
    """K H: the features of keys, and of values, where a kernel with these outputs makes them."""
    if not is_fused(path):
        return d_out
    if d_out % 3:
        raise ValueError(
            f"{path!r} has {d_out} outputs, which are no queries, keys and values of one size: "
            "target the value projection of a model that keeps them apart."
        )
    return d_out // 3


def is_fused(path: str) -> bool:
    """Whether a kernel makes queries, keys and values together."""
    return path.split("/")[-2:-1] in [[name] for name in FUSED]


def as_heads(x: jax.Array, like: jax.Array) -> jax.Array:
    """(n, kv) as (B, n, K, H), for all rows alike, beside keys or values (B, S, K, H)."""
    batch, _, heads, size = like.shape
    if x.shape[-1] != heads * size:
        raise ValueError(
            f"an attention with {heads} key heads of {size} features is to see others of "
            f"{x.shape[-1]} features in all: the adapter does not stand at the projection that "
            "makes its values."
        )
    split = x.astype(like.dtype).reshape(1, -1, heads, size)
    return jnp.broadcast_to(split, (batch, *split.shape[1:]))


def hooked(next_fun: Attend, module: nn.Module, ambient: Ambient, reached: Reached) -> Attend:
    """`next_fun` with the hooks of the adapters around it."""

    def run(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(type(module).__call__).bind(module, *args, **kwargs)
        given.apply_defaults()
        _, *tensors = (given.arguments.pop(name) for name in tuple(given.arguments)[:5])
        _check_tensors(module, *tensors)

        def plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: Any) -> jax.Array:
            return next_fun(q, k, v, mask, **given.arguments)

        attend: Attend = plain
        for local, layer in hooks:
            _note(layer, module, reached)
            project = functools.partial(_project, local, siblings, ambient)
            call = ambient.call(layer, attention=plain, project=project)
            state = deferred.arrays(layer.state)
            attend = functools.partial(_around, layer.rule.attend, attend, ambient, state, call)
        return attend(*tensors)

    siblings = _siblings(module)
    hooks = _hooks(siblings)
    return run if hooks else next_fun


def _around(
    hook: Any, inner: Attend, ambient: Ambient, state: Any, call: Any, *tensors: Any
) -> jax.Array:
    return ambient.chosen(hook(inner, *tensors, state, call), lambda: inner(*tensors))


def _siblings(module: nn.Module) -> dict[str, Any]:
    """The parameters beside an attention, by path inside their common parent."""
    parent = module.parent
    if not isinstance(parent, nn.Module) or parent.scope is None:
        return {}
    return paths.flatten(parent.variables.get("params", {}))


def _hooks(siblings: Mapping[str, Any]) -> list[tuple[str, BoundKernel]]:
    """(path inside the parent, bound kernel) of each adapter with a hook, innermost first."""
    found = [
        (local, layer)
        for local, leaf in sorted(siblings.items())
        if isinstance(leaf, BoundKernel)
        for layer in reversed(modules.layers(leaf))
        if layer.rule.attend is not None
    ]
    owners = [layer.owner for _, layer in found]
    for _, layer in found:
        if owners.count(layer.owner) > 1:
            same = sorted(path for path, other in found if other.owner == layer.owner)
            raise ValueError(
                f"a method on the attention of {layer.path!r} stands at {same}: one projection of "
                "each attention is enough; give targets for the value projection alone."
            )
    return found


def _note(layer: BoundKernel, module: nn.Module, reached: Reached) -> None:
    at = reached.setdefault(layer.path, module.path)
    if at != module.path:
        raise ValueError(
            f"the adapter at {layer.path!r} belongs to one attention, and lies beside two, "
            f"{'/'.join(at)!r} and {'/'.join(module.path)!r}: in which of them its keys and values "
            "go cannot be told. Give each attention a parent module of its own."
        )


def check_reached(kernels: Iterable[BoundKernel], reached: Reached) -> None:
    """Raise ValueError for an adapter on attention whose hook was never called."""
    for kernel in kernels:
        if kernel.rule.attend is not None and kernel.path not in reached:
            raise ValueError(
                f"the method on {kernel.path!r} acts on the attention beside it, and the model "
                f"called none: a parameterless Linen module that takes {ARGUMENTS}, in the same "
                "parent module (see pefts.attention). Target the value projections of such a "
                "model, or take another method."
            )


def _check_tensors(module: nn.Module, q: Any, k: Any, v: Any, mask: Any) -> None:
    shapes = [tuple(x.shape) for x in (q, k, v)]
    if any(len(shape) != 4 for shape in shapes):
        raise ValueError(
            f"{'/'.join(module.path)!r} was called with q, k and v of shapes {shapes}; methods on "
            "attention need (batch, tokens, heads, head size)."
        )
    if mask is not None and (mask.dtype != jnp.bool_ or mask.ndim != 4):
        raise ValueError(
            f"{'/'.join(module.path)!r} was called with a mask of shape {tuple(mask.shape)} and "
            f"{mask.dtype}; methods on attention need a boolean (batch, heads, queries, keys)."
        )


# What the layer's own projections make of other inputs


def _project(
    local: str, siblings: Mapping[str, Any], ambient: Ambient, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """x (n, d_in) through the projections of keys and of values, biases included: (n, kv) each."""
    *above, name, _ = local.split("/")
    value, like = paths.join(above, name), siblings[local]
    if name in FUSED:
        _, k, v = jnp.split(_product(value, like, siblings, ambient, x), 3, axis=-1)
        return k, v
    key = paths.join(above, KEY_OF.get(name, ""))
    if name not in KEY_OF or f"{key}/kernel" not in siblings:
        raise ValueError(
            f"the projection of keys beside {like.path!r} is not known by its name; pairs that are "
            f"known: {KEY_OF}."
        )
    return tuple(_product(at, like, siblings, ambient, x) for at in (key, value))  # type: ignore[return-value]


def _product(
    module: str, like: BoundKernel, siblings: Mapping[str, Any], ambient: Ambient, x: jax.Array
) -> jax.Array:
    kernel, bias = siblings[f"{module}/kernel"], siblings.get(f"{module}/bias")
    if isinstance(kernel, BoundKernel):
        for layer in modules.layers(kernel):
            if modules.needs_product(layer):
                raise ValueError(
                    f"{layer.path!r} carries a method without a dense form and one that reads its "
                    "kernel for other inputs: leave one of the two out."
                )
        W = effective_matrix(kernel, ambient)
    else:
        W = precise(views.to_matrix(kernel, like.local_axes))
    y = matmul(x, W)
    return y if bias is None else y + bias.reshape(1, -1).astype(y.dtype)
