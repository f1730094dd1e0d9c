"""Run an unmodified NNX model on bound kernels: `split`, `apply`, `merge`, `infer_axes`.

    graphdef, params, rest = pefts.nnx.split(model)         # params: a plain nested dict
    state = peft.init(key, params)
    y = pefts.nnx.apply(graphdef)(peft.bind(params, state), rest, x)
    model = pefts.nnx.merge(graphdef, peft.merge(params, state), rest)

A bound kernel stands inside the nnx.Param. Each module that owns one gets, in the merged copy
alone, a subclass of its own type whose methods compute the adapted product; nnx.scan and nnx.remat
split and merge that type with the rest. Linear, LinearGeneral, Einsum, Conv and Embed run factored,
by the product of the Linen layer of the same mathematics; any other module gets its effective
kernels for the time of the call. A bound kernel is no array: no path runs the base kernel silently.
"""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from pefts import modules, paths, views
from pefts.bound import Ambient, BoundKernel, effective_kernel
from pefts.targets import site_key

SESSION = "pefts_session"  # the attribute that leads an adapted module to its call of `apply`
KEY = "pefts_key"  # the entry of a kernel's state that carries its layer's random key
ARITHMETIC = (
    "conv_general_dilated",
    "dot_general",
    "dot_general_cls",
    "einsum_op",
    "preferred_element_type",
    "promote_dtype",
)


@dataclasses.dataclass(eq=False)
class _Session:
    """One call of an applied model. Compared by identity: no inner jit can reuse another call's."""

    ambient: Ambient | None
    read: set[str]


def split(model: nnx.Module) -> tuple[Any, dict[str, Any], Any]:
    """A model as (graphdef, params, rest), with params a nested dict of strings and arrays.

    The indices of an nnx.List become strings, "blocks/0/kernel".

    Raises:
      ValueError: a name that such a path cannot hold.
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return graphdef, _named(nnx.to_pure_dict(params)), rest


def merge(graphdef: Any, params: Mapping[str, Any], rest: Any) -> Any:
    """The model of `split`, with these params: dense ones, such as peft.merge returns."""
    # A fresh copy: the variables of an outer trace may not be changed inside this one.
    return nnx.merge(graphdef, _indexed(params), jax.tree.map(lambda leaf: leaf, rest))


def apply(
    graphdef: Any,
    *,
    method: str = "__call__",
    key: jax.Array | None = None,
    mutable: bool = False,
    strict: bool = True,
) -> Callable[..., Any]:
    """`fn(bound, rest, *args, **kwargs)`: the model on params that come from `peft.bind`.

    Args:
      graphdef: from pefts.nnx.split(model), or from nnx.split(model, nnx.Param, ...).
      method: the model's method to call.
      key: for the adapters' own dropout; None outside training. The model's streams are in `rest`.
      mutable: return (outputs, rest), with what the call changed: batch statistics, random counts.
      strict: refuse a call in which some bound kernel is never read.

    Returns:
      A function for use inside jit and grad. Inside the model, nnx.scan, nnx.vmap and nnx.remat
      work as they do without adapters, if stacked layers have their axis in front.

    Raises:
      ValueError: params without bound kernels, a bound kernel that no module owns as an attribute,
        (strict) one that no module reads, a method on outputs where there is no linear module, or
        one on the attention.

    Example:
      >>> import jax, jax.numpy as jnp, pefts
      >>> from flax import nnx
      >>> graphdef, params, rest = pefts.nnx.split(nnx.Linear(5, 3, rngs=nnx.Rngs(0)))
      >>> peft = pefts.lora(rank=2)
      >>> state = peft.init(jax.random.key(1), params)
      >>> run = jax.jit(lambda s, x: pefts.nnx.apply(graphdef)(peft.bind(params, s), rest, x))
      >>> run(state, jnp.ones((2, 5))).shape
      (2, 3)
    """

    def adapted(bound: Mapping[str, Any], rest: Any, *args: Any, **kwargs: Any) -> Any:
        flat, ambient = _open(bound)
        kernels = {path: leaf for path, leaf in flat.items() if isinstance(leaf, BoundKernel)}
        stacked = [layer for kernel in kernels.values() for layer in modules.layers(kernel)]
        _check_no_attention(stacked)
        args, kwargs = modules.with_inputs(stacked, ambient, args, kwargs)
        if key is not None:
            flat |= {path: _with_key(kernel, key) for path, kernel in kernels.items()}
        session = _Session(ambient, set())
        model = merge(graphdef, paths.unflatten(flat), rest)
        _adapt(model, session, set(kernels))
        out = getattr(model, method)(*args, **kwargs)
        session.ambient = None
        if strict:
            _check_read(set(kernels), session.read)
        return (out, nnx.split(model, nnx.Param, ...)[2]) if mutable else out

    return adapted


def infer_axes(model: nnx.Module) -> dict[str, str]:
    """The letters of every kernel's axes, for the `axes` argument of every method.

    Leading axes that a module's own type does not explain are stacked layers, 'l'.

    Example:
      >>> import pefts
      >>> from flax import nnx
      >>> pefts.nnx.infer_axes(nnx.LinearGeneral(6, (2, 4), rngs=nnx.Rngs(0)))
      {'^kernel$': 'ioo'}
    """
    found: dict[str, str] = {}
    for path, module in nnx.iter_modules(model):
        name, letters = _letters(module)
        if letters:
            ndim = len(getattr(module, name).shape)
            where = re.escape(paths.join(*[str(part) for part in path], name))
            found[f"^{where}$"] = "l" * (ndim - len(letters)) + letters
    return dict(sorted(found.items()))


def _letters(module: nnx.Module) -> tuple[str, str]:
    if isinstance(module, nnx.Linear):
        return "kernel", "io"
    if isinstance(module, nnx.LinearGeneral):
        inputs, outputs = len(module.in_features), len(module.out_features)
        return "kernel", "l" * len(module.batch_axis) + "i" * inputs + "o" * outputs
    if isinstance(module, nnx.Conv):
        return "kernel", "k" * len(module.kernel_size) + "io"
    if isinstance(module, nnx.Embed):
        return "embedding", "io"
    if isinstance(module, nnx.Einsum) and module.einsum_str:
        return "kernel", modules.kernel_axes(_as_einsum(module)).get("kernel", "")
    return "", ""


# Names


def _named(tree: Mapping[Any, Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name, value in tree.items():
        fits = isinstance(name, int) or (isinstance(name, str) and not name.isdecimal())
        if not fits or "/" in str(name):
            raise ValueError(
                f"the model holds parameters under the name {name!r}, which a path cannot hold: "
                "use strings that are no numbers and have no '/', or the indices of an nnx.List."
            )
        named[str(name)] = _named(value) if isinstance(value, Mapping) else value
    return named


def _indexed(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    return {int(n) if n.isdecimal() else n: _indexed(value) for n, value in tree.items()}


# One call of the model


def _open(bound: Mapping[str, Any]) -> tuple[dict[str, Any], Ambient]:
    if paths.RESERVED not in bound:
        raise ValueError(
            "these params carry no adapter: give pefts.nnx.apply what peft.bind(params, state) "
            "returns; to run the base model, use pefts.nnx.merge(graphdef, params, rest)."
        )
    flat = paths.flatten(bound)
    return flat, flat.pop(paths.RESERVED)


def _check_no_attention(kernels: list[BoundKernel]) -> None:
    for kernel in kernels:
        if kernel.rule.attend is not None:
            raise ValueError(
                f"the method on {kernel.path!r} acts on the attention itself, and pefts.nnx adapts "
                "modules with kernels alone: use a Linen model (pefts.apply), or another method."
            )


def _with_key(kernel: BoundKernel, key: jax.Array) -> BoundKernel:
    """The kernel with a key for each stacked layer, which scan slices as it slices the state."""
    own = site_key(key, kernel.path)
    stack = kernel.shape[: views.stacked(kernel.axes)]
    keys = jax.random.split(own, stack) if stack else own
    return dataclasses.replace(kernel, state={**kernel.state, KEY: keys})


def _own_bound(module: Any) -> dict[str, BoundKernel]:
    values = {
        name: attribute.get_raw_value()
        for name, attribute in vars(module).items()
        if isinstance(attribute, nnx.Variable)
    }
    return {name: value for name, value in values.items() if isinstance(value, BoundKernel)}


def _adapt(model: nnx.Module, session: _Session, bound: set[str]) -> None:
    owned: set[str] = set()
    for _, module in list(nnx.iter_modules(model)):
        own = _own_bound(module)
        if own and not isinstance(module, nnx.List | nnx.Dict):
            owned |= {kernel.path for kernel in own.values()}
            setattr(module, SESSION, session)
            object.__setattr__(module, "__class__", _adapted_type(type(module)))
    if bound - owned:
        raise ValueError(
            f"no module has {sorted(bound - owned)[0]!r} as an attribute of its own (it stands in "
            "a list or a dictionary), so there is no call to adapt: exclude it from the targets."
        )


def _check_read(bound: set[str], read: set[str]) -> None:
    unread = sorted(bound - read)
    if unread:
        raise ValueError(
            f"{len(unread)} adapted kernels were never read by the model, for instance "
            f"{unread[0]!r}: exclude them from the targets."
        )


@functools.cache
def _adapted_type(cls: type) -> type:
    """A subclass that computes with bound kernels in every method that is not nnx.Module's."""
    names = {
        name
        for base in cls.__mro__
        if base not in nnx.Module.__mro__
        for name, value in vars(base).items()
        if callable(value) and hasattr(value, "__get__") and not isinstance(value, type)
    }
    public = {name for name in names if name == "__call__" or not name.startswith("_")}
    return type(cls)(cls.__name__, (cls,), {name: _intercepted(cls, name) for name in public})


def _intercepted(cls: type, name: str) -> Callable[..., Any]:
    @functools.wraps(inspect.getattr_static(cls, name), updated=())
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        own, session = _own_bound(self), getattr(self, SESSION)
        if session.ambient is None:
            raise ValueError(
                f"a {cls.__name__} with bound kernels was kept after the call of pefts.nnx.apply "
                "that made it: return arrays from the model, not modules."
            )
        session.read.update(kernel.path for kernel in own.values())
        if name == "__call__":
            linen, inputs = _as_linen(cls, self, args, kwargs)
            if linen is not None:
                out = _factored(linen, self, own, session.ambient, inputs)
                if out is not None:
                    return out
        return _with_dense_kernels(cls, name, self, own, session.ambient, args, kwargs)

    return method


def _factored(
    linen: nn.Module, module: Any, own: dict[str, BoundKernel], ambient: Ambient, inputs: jax.Array
) -> jax.Array | None:
    (name, kernel), *_ = own.items()
    state = dict(kernel.state)
    key = state.pop(KEY, None)
    kernel = dataclasses.replace(kernel, state=state)
    values = {name: kernel}
    if getattr(module, "bias", None) is not None:
        values["bias"] = module.bias[...]
    scope = linen.bind({"params": values}, rngs={} if key is None else {"dropout": key})
    product = modules.factored(scope, "__call__", {name: kernel})
    return None if product is None else product(scope, {name: kernel}, ambient, inputs)


def _with_dense_kernels(
    cls: type,
    name: str,
    module: Any,
    own: dict[str, BoundKernel],
    ambient: Ambient,
    args: tuple,
    kwargs: dict,
) -> Any:
    """Call the module's own method on a twin whose bound kernels are dense, for this call alone."""
    for kernel in own.values():
        for layer in modules.layers(kernel):
            if layer.rule.effective is None or layer.rule.output is not None:
                raise ValueError(
                    f"the method on {kernel.path!r} works on the output of a linear module, and "
                    f"{cls.__name__}.{name} is none that pefts knows: target another module."
                )
    twin = object.__new__(cls)
    vars(twin).update(vars(module))
    for attribute, kernel in own.items():
        plain = {n: value for n, value in kernel.state.items() if n != KEY}
        dense = effective_kernel(dataclasses.replace(kernel, state=plain), ambient)
        vars(twin)[attribute] = type(vars(module)[attribute])(dense)
    out = getattr(twin, name)(*args, **kwargs)
    vars(module).update({n: value for n, value in vars(twin).items() if n not in own})
    return out


# The Linen layers of the same mathematics


def _is_plain(cls: type, module: Any) -> bool:
    """No argument replaces the arithmetic of the module's own type."""
    arguments = inspect.signature(cls.__init__).parameters
    return all(getattr(module, n) is arguments[n].default for n in ARITHMETIC if n in arguments)


def _as_linen(cls: type, module: Any, args: tuple, kwargs: dict) -> tuple[nn.Module | None, Any]:
    """The Linen layer that computes this call, and its input; (None, None) where there is none."""
    build = LINEN.get(cls)
    if build is None or not _is_plain(cls, module):
        return None, None
    call = inspect.signature(cls.__call__).bind(module, *args, **kwargs).arguments
    if call.get("out_sharding") is not None:
        return None, None
    return build(module, call), call["inputs"]


def _as_dense(module: nnx.Linear, call: Mapping[str, Any]) -> nn.Module:
    del call
    return nn.Dense(
        module.out_features,
        use_bias=module.use_bias,
        dtype=module.dtype,
        precision=module.precision,
        parent=None,
    )


def _as_general(module: nnx.LinearGeneral, call: Mapping[str, Any]) -> nn.Module | None:
    del call
    if module.batch_axis:
        return None
    return nn.DenseGeneral(
        module.out_features,
        axis=module.axis,
        use_bias=module.bias is not None,
        dtype=module.dtype,
        precision=module.precision,
        parent=None,
    )


def _as_einsum(module: nnx.Einsum, call: Mapping[str, Any] = {}) -> nn.Module:  # noqa: B006
    return nn.Einsum(
        module.kernel_shape,
        call.get("einsum_str") or module.einsum_str,
        use_bias=module.bias is not None,
        dtype=module.dtype,
        precision=module.precision,
        parent=None,
    )


def _as_conv(module: nnx.Conv, call: Mapping[str, Any]) -> nn.Module | None:
    del call
    if module.mask is not None or module.feature_group_count != 1:
        return None
    return nn.Conv(
        module.out_features,
        module.kernel_size,
        strides=module.strides,
        padding=module.padding,
        input_dilation=module.input_dilation,
        kernel_dilation=module.kernel_dilation,
        use_bias=module.use_bias,
        dtype=module.dtype,
        precision=module.precision,
        parent=None,
    )


def _as_embed(module: nnx.Embed, call: Mapping[str, Any]) -> nn.Module:
    del call
    return nn.Embed(module.num_embeddings, module.features, dtype=module.dtype, parent=None)


LINEN: dict[type, Callable[..., nn.Module | None]] = {
    nnx.Conv: _as_conv,
    nnx.Einsum: _as_einsum,
    nnx.Embed: _as_embed,
    nnx.Linear: _as_dense,
    nnx.LinearGeneral: _as_general,
}
