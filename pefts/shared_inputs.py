"""Which kernels of a Linen model multiply the same input: query, key and value, gate and up.

While a model is traced, the modules that share an input are called with one and the same tracer. A
site leads those that come after it with equal calls: the same arrays, in the same order, contracted
over the same axes and cast to the same dtype. Whatever cannot be followed (a module that is none of
Dense, DenseGeneral and Einsum, a model jitted by itself) leads itself alone.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors
from flax.core import tracers

from pefts import paths
from pefts.targets import Site

Calls = dict[str, list[Hashable]]
Run = Callable[[Any, Any], Any]


def leaders(fn: Run, params: Any, batch: Any, sites: Sequence[Site]) -> dict[str, str]:
    """{site path: path of the first site with the same input}, by abstract evaluation.

    Args:
      fn: `fn(variables, batch)`, ending in a Linen model's `apply`.
      params: dense parameters, arrays or shapes.
      batch: arrays or shapes.
      sites: in the order in which they may lead.

    Raises:
      ValueError: params of another model.
    """
    calls: Calls = {}
    jax.eval_shape(_recording(fn, calls), {"params": params}, batch)
    first: dict[Hashable, str] = {}
    found: dict[str, str] = {}
    for site in sites:
        seen = calls.get(site.path)
        key = (site.d_in, site.stack, tuple(seen)) if seen else site.path
        found[site.path] = first.setdefault(key, site.path)
    return found


def checked(fn: Run, leader: Mapping[str, str]) -> Run:
    """fn, which refuses to be traced where a site and its leader no longer have the same input."""

    def run(variables: Any, batch: Any) -> Any:
        calls: Calls = {}
        out = _recording(fn, calls)(variables, batch)
        for path, first in leader.items():
            if calls.get(path) != calls.get(first):
                raise ValueError(
                    f"{path!r} and {first!r} have the same input in the first batch and not in one "
                    "of another shape: calibrate batches of one shape, or each of the two by "
                    "itself."
                )
        return out

    return run


def _recording(fn: Run, calls: Calls) -> Run:
    """fn, which also notes into `calls` what each linear module is called with."""
    inputs: dict[int, tuple[int, Any]] = {}  # they stay alive, or their ids would be used again
    traces: list[Any] = []

    def note(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        rows = CONTRACTED.get(type(module))
        if rows is not None and context.method_name == "__call__" and module.scope is not None:
            x = args[0] if args else kwargs["inputs"]
            number, _ = inputs.setdefault(id(x), (len(inputs), x))
            # Of two branches that close over one array, only one may run.
            where = _index(traces, tracers.current_trace())
            what = (number, where, rows(module, *args, **kwargs), _dtypes(module))
            calls.setdefault(paths.join(module.path, "kernel"), []).append(what)
        try:
            return next_fun(*args, **kwargs)
        except (errors.ScopeParamShapeError, errors.ScopeParamNotFoundError) as error:
            raise ValueError(
                f"params do not fit the model that fn runs at {paths.join(module.path)!r}: {error} "
                "Pass the parameters that belong to this model."
            ) from error

    def run(variables: Any, batch: Any) -> Any:
        with nn.intercept_methods(note):
            return fn(variables, batch)

    return run


def _index(known: list[Any], item: Any) -> int:
    """The position of an item that can be compared and not hashed; it is added if it is new."""
    if item not in known:
        known.append(item)
    return known.index(item)


def _dtypes(module: nn.Module) -> Hashable:
    """What decides the dtype that the module casts its input to."""
    own = module.variables.get("params", {})
    return str(module.dtype), frozenset(str(leaf.dtype) for leaf in own.values())


def _last(module: nn.Dense, inputs: Any) -> Hashable:
    del module
    return (jnp.ndim(inputs) - 1,)


def _given(module: nn.DenseGeneral, inputs: Any) -> Hashable:
    axes = (module.axis,) if isinstance(module.axis, int) else module.axis
    return tuple(sorted(n % jnp.ndim(inputs) for n in axes))


def _summed(module: nn.Einsum, inputs: Any, einsum_str: str | None = None) -> Hashable:
    """In the order of the kernel's axes, which is that of the features."""
    equation = (einsum_str or module.einsum_str or "").replace(" ", "")
    operands, _, out = equation.partition("->")
    x, _, kernel = operands.partition(",")
    x = x.replace("...", "." * (jnp.ndim(inputs) - len(x) + 3))
    return tuple(x.index(c) for c in kernel if c in x and c not in out)


CONTRACTED: dict[type, Callable[..., Hashable]] = {
    nn.Dense: _last,
    nn.DenseGeneral: _given,
    nn.Einsum: _summed,
}
