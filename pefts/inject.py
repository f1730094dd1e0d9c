"""Run an unmodified Linen model on bound kernels: `apply`, and `infer_axes`.

The interceptor opens inside the traced function. At each call of a module that owns a bound kernel
it computes the adapted product itself (Dense, DenseGeneral, Einsum, Conv, Embed); any other module
gets its effective kernel, one at a time, inside the layer body. No path runs the base kernel
silently: a bound kernel that reaches foreign code is no array, and one that nobody reads is an
error.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from pefts import attention, modules, paths
from pefts.bound import Ambient, BoundKernel, effective_kernel
from pefts.targets import exactly


def apply(fn: Callable[..., Any], *, strict: bool = True) -> Callable[..., Any]:
    """`fn(variables, *args, **kwargs)` on variables whose params come from `peft.bind`.

    Args:
      fn: a Linen model's `apply`, or any function of the variables that ends in it. Wrap it inside
        the function you jit, never around one that is jitted already.
      strict: refuse a call in which some bound kernel is never read.

    Raises:
      ValueError: params without bound kernels, or (strict) a bound kernel that no module reads, or
        whose method acts on an attention (pefts.attention) that the model does not call.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, pefts
      >>> model, x = nn.Dense(3), jnp.ones((2, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> peft = pefts.lora(rank=2, targets="kernel")
      >>> state = peft.init(jax.random.key(1), params)
      >>> pefts.apply(model.apply)({"params": peft.bind(params, state)}, x).shape
      (2, 3)
    """

    def adapted(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        params, ambient = _open(variables["params"])
        kernels = _bound_kernels(params)
        args, kwargs = modules.with_inputs(kernels.values(), ambient, args, kwargs)
        read: set[str] = set()
        reached: attention.Reached | None = (
            {} if any(kernel.rule.attend for kernel in kernels.values()) else None
        )
        with nn.intercept_methods(_interceptor(ambient, read, reached)):
            out = fn({**variables, "params": params}, *args, **kwargs)
        if strict:
            _check_read(kernels, read)
            attention.check_reached(kernels.values(), reached or {})
        return out

    return adapted


def _open(params: Mapping[str, Any]) -> tuple[dict[str, Any], Ambient]:
    if paths.RESERVED not in params:
        raise ValueError(
            "these params carry no adapter: give pefts.apply what peft.bind(params, state) "
            "returns; to run the base model, call model.apply itself."
        )
    rest = {name: value for name, value in params.items() if name != paths.RESERVED}
    return rest, params[paths.RESERVED]


def _bound_kernels(params: Mapping[str, Any]) -> dict[str, BoundKernel]:
    """The bound kernels of a tree, inner ones of a chain included."""
    found: dict[str, BoundKernel] = {}
    for path, leaf in paths.flatten(params).items():
        while isinstance(leaf, BoundKernel):
            found[f"{path}#{leaf.owner}"] = leaf
            leaf = leaf.base
    return found


def _check_read(kernels: Mapping[str, BoundKernel], read: set[str]) -> None:
    unread = sorted({kernel.path for kernel in kernels.values()} - read)
    if unread:
        raise ValueError(
            f"{len(unread)} adapted kernels were never read by the model, for instance "
            f"{unread[0]!r}: exclude them from the targets, or (if the model was jitted by itself) "
            "wrap it with pefts.apply inside the jitted function."
        )


def _interceptor(
    ambient: Ambient, read: set[str], reached: attention.Reached | None
) -> Callable[..., Any]:
    def intercept(
        next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        if reached is not None and attention.is_attention(module, context.method_name):
            next_fun = attention.hooked(next_fun, module, ambient, reached)
        own = _own_bound(module)
        if not own or context.method_name == "setup":
            return next_fun(*args, **kwargs)
        read.update(kernel.path for kernel in own.values())
        product = modules.factored(module, context.method_name, own)
        if product is not None:
            return product(module, own, ambient, *args, **kwargs)
        return _with_dense_kernels(module, context.method_name, ambient, args, kwargs)

    return intercept


def _own_bound(module: nn.Module) -> dict[str, BoundKernel]:
    if module.scope is None:
        return {}
    own = module.variables.get("params", {})
    return {name: leaf for name, leaf in own.items() if isinstance(leaf, BoundKernel)}


def _with_dense_kernels(
    module: nn.Module, method: str, ambient: Ambient, args: tuple, kwargs: dict
) -> Any:
    """Call the module's own method with its bound kernels made dense, for this call alone."""

    def dense(leaf: Any) -> Any:
        return effective_kernel(leaf, ambient) if isinstance(leaf, BoundKernel) else leaf

    def to_dense(variables: Mapping[str, Any]) -> dict[str, Any]:
        params = variables["params"]
        return {**variables, "params": {name: dense(leaf) for name, leaf in params.items()}}

    def call(inner: nn.Module, *inner_args: Any) -> Any:
        return getattr(inner, method)(*inner_args, **kwargs)

    return nn.map_variables(call, "params", trans_in_fn=to_dense, mutable=False)(module, *args)


def infer_axes(
    fn: Callable[..., Any], params: Mapping[str, Any], *args: Any, **kwargs: Any
) -> dict:
    """The letters of every kernel's axes, read from a Linen model by abstract evaluation.

    Args:
      fn: the model's `apply`.
      params: arrays or shapes.
      *args: what the model is called with, arrays or shapes; also **kwargs.

    Returns:
      {pattern: letters} for the `axes` argument of every method; scanned layers become 'l's.
    """
    flat = paths.flatten(params)
    found: dict[str, str] = {}

    def note(next_fun: Any, call_args: Any, call_kwargs: Any, context: Any) -> Any:
        if context.module.scope is not None and context.method_name == "__call__":
            for name, letters in modules.kernel_axes(context.module).items():
                path = paths.join(context.module.path, name)
                if path in flat:
                    found[path] = "l" * (len(flat[path].shape) - len(letters)) + letters
        return next_fun(*call_args, **call_kwargs)

    def run(tree: Any) -> Any:
        with nn.intercept_methods(note):
            return fn({"params": tree}, *args, **kwargs)

    jax.eval_shape(run, params)
    return {exactly(path): letters for path, letters in sorted(found.items())}
