"""Flax's linear modules as products with a matrix: what lets `Rule.linear` run inside them.

Each product moves the contracted axes of x last, hands the rule a matrix, and restores the output
axes. `call.dot` is the module's own product, so a low-rank factor A (d_in, r) goes through a
convolution or an embedding as it goes through a Dense.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pefts import deferred, views
from pefts.bound import ADAPTED, Ambient, BoundKernel, effective_matrix, matmul

Product = Callable[..., jax.Array]


def factored(module: nn.Module, method: str, own: Mapping[str, BoundKernel]) -> Product | None:
    """The product that computes this call on bound kernels, or None: use the effective kernel."""
    name = "embedding" if isinstance(module, nn.Embed) else "kernel"
    # A leaf that is replaced whole has no matrix form.
    is_matrix = not any(kernel.is_vector for kernel in own.values())
    if is_matrix and set(own) == {name} and SUPPORTED.get(type(module), _never)(module):
        product = PRODUCTS.get((type(module), method))
        if product is not None:
            return product
    # A hook on what a table looks up has no part in its other use, as the output head.
    as_head = isinstance(module, nn.Embed) and method == "attend"
    for kernel in own.values():
        if any(needs_product(layer, as_head) for layer in layers(kernel)):
            raise ValueError(
                f"the method on {kernel.path!r} works on the output of a linear module, and "
                f"{type(module).__name__}.{method} is none that pefts knows: target another module."
            )
    return None


def needs_product(layer: BoundKernel, as_head: bool = False) -> bool:
    """Whether a dense kernel cannot stand for this method."""
    rule = layer.rule
    beside = (rule.output is not None or rule.bias is not None) and not as_head
    return beside or (rule.effective is None and rule.linear is not None)


def with_inputs(
    kernels: Iterable[BoundKernel], ambient: Ambient, args: tuple, kwargs: dict
) -> tuple[tuple, dict]:
    """The model's arguments as the methods want them, each asked once whatever its sites."""
    asked = set()
    for kernel in kernels:
        if kernel.rule.inputs is not None and kernel.owner not in asked:
            if ADAPTED in ambient.context:
                raise ValueError(
                    f"the method on {kernel.path!r} changes the model's arguments, which a bare "
                    "example cannot share with adapted ones: run them in batches of their own."
                )
            args, kwargs = kernel.rule.inputs(args, kwargs, deferred.arrays(kernel.state))
            asked.add(kernel.owner)
    return args, kwargs


def layers(kernel: BoundKernel) -> list[BoundKernel]:
    """A bound kernel and the bound kernels inside it, outermost first."""
    found = [kernel]
    while isinstance(found[-1].base, BoundKernel):
        found.append(found[-1].base)
    return found


def _plain_dense(module: nn.Dense) -> bool:
    return module.dot_general is None and module.dot_general_cls is None


def _plain_general(module: nn.DenseGeneral) -> bool:
    batch = module.batch_dims
    return module.dot_general is None and module.dot_general_cls is None and batch in ((), 0)


def _plain_conv(module: nn.Conv) -> bool:
    return module.mask is None and module.feature_group_count == 1


def _never(module: nn.Module) -> bool:
    del module
    return False


def _always(module: nn.Module) -> bool:
    del module
    return True


def _axes_tuple(axis: int | Sequence[int]) -> tuple[int, ...]:
    return (axis,) if isinstance(axis, int) else tuple(axis)


def _compute_dtype(module: Any, *values: Any) -> Any:
    if module.dtype is not None:
        return module.dtype
    return jnp.result_type(*[value.dtype for value in values if value is not None])


def _bias(module: Any) -> jax.Array | None:
    return module.get_variable("params", "bias") if module.use_bias else None


def multiply(
    x: jax.Array,
    kernel: Any,
    ambient: Ambient,
    key: jax.Array | None,
    dot: Callable[[jax.Array, jax.Array], jax.Array],
    lookup: bool = False,
) -> jax.Array:
    """The adapted product of x with a kernel; `lookup`: only `dot` can take x (ids, images)."""
    if not isinstance(kernel, BoundKernel):
        return dot(x, kernel)
    axes, rule = kernel.local_axes, kernel.rule

    def inner(inputs: jax.Array, W: Any) -> jax.Array:
        return multiply(inputs, W, ambient, key, dot, lookup)

    def dense(W: Any) -> jax.Array:
        return effective_matrix(W, ambient) if isinstance(W, BoundKernel) else W

    base = kernel.base
    W = base if isinstance(base, BoundKernel) else views.to_matrix(base, axes)
    if rule.linear is not None and (rule.through_dot or not lookup):
        own_key = jax.random.fold_in(key, kernel.owner) if key is not None else None
        call = ambient.call(kernel, key=own_key, dot=inner, dense=dense)
        y = rule.linear(x, W, deferred.arrays(kernel.state), call)
        return ambient.chosen(y, lambda: inner(x, W))
    if rule.effective is not None:
        return dot(x, effective_matrix(kernel, ambient))
    return inner(x, W)


def after(y: jax.Array, kernel: BoundKernel, ambient: Ambient) -> jax.Array:
    """The output hooks of a kernel, innermost first."""
    for layer in reversed(layers(kernel)):
        if layer.rule.output is not None:
            if layer is not kernel and layer.rule.effective is not None:
                raise ValueError(
                    f"a method on {layer.path!r} scales all that the layer puts out, and the ones "
                    "behind it in pefts.chain would be scaled too, which merging does not do: put "
                    "it last."
                )
            hooked = layer.rule.output(y, deferred.arrays(layer.state), ambient.call(layer))
            y = ambient.chosen(hooked, functools.partial(jnp.asarray, y))
    return y


def _key(module: nn.Module, kernel: BoundKernel) -> jax.Array | None:
    uses = any(layer.rule.uses_key for layer in layers(kernel))
    return module.make_rng("dropout") if uses and module.has_rng("dropout") else None


def _dense(module: Any, own: Mapping[str, BoundKernel], ambient: Ambient, inputs: Any) -> jax.Array:
    kernel, bias = own["kernel"], _bias(module)
    general = isinstance(module, nn.DenseGeneral)
    inputs = jnp.asarray(inputs)
    features = _axes_tuple(module.features)
    # flax sorts the axes: those of the kernel lie in the order of the input's, not as given
    contracted = sorted(n % inputs.ndim for n in _axes_tuple(module.axis if general else -1))
    dtype = _compute_dtype(module, inputs, kernel, bias)
    x = jnp.moveaxis(inputs.astype(dtype), contracted, range(-len(contracted), 0))
    x = x.reshape(*x.shape[: x.ndim - len(contracted)], -1)

    def dot(x: jax.Array, M: jax.Array) -> jax.Array:
        return matmul(x, M, module.precision)

    y = multiply(x, kernel, ambient, _key(module, kernel), dot)
    y = y.reshape(*y.shape[:-1], *features)
    if bias is not None:
        y = y + bias.astype(dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
    return after(y, kernel, ambient)


def _conv(
    module: nn.Conv, own: Mapping[str, BoundKernel], ambient: Ambient, inputs: Any
) -> jax.Array:
    kernel, bias = own["kernel"], _bias(module)
    dtype = _compute_dtype(module, inputs, kernel, bias)
    window = kernel.shape[:-1]

    def dot(x: jax.Array, M: jax.Array) -> jax.Array:
        conv = module.clone(features=M.shape[-1], use_bias=False, parent=None, name=None)
        weights = M.astype(dtype).reshape(*window, M.shape[-1])
        return jnp.asarray(conv.apply({"params": {"kernel": weights}}, x))

    y = multiply(inputs.astype(dtype), kernel, ambient, _key(module, kernel), dot, lookup=True)
    if bias is not None:
        y = y + bias.astype(dtype).reshape((1,) * (y.ndim - 1) + bias.shape)
    return after(y, kernel, ambient)


def _embed(
    module: nn.Embed, own: Mapping[str, BoundKernel], ambient: Ambient, ids: Any
) -> jax.Array:
    kernel = own["embedding"]
    dtype = _compute_dtype(module, kernel)
    if not jnp.issubdtype(jnp.asarray(ids).dtype, jnp.integer):
        raise ValueError(f"{kernel.path!r} is looked up with {ids.dtype} ids; give integers.")

    def dot(x: jax.Array, M: jax.Array) -> jax.Array:
        return jnp.take(M.astype(dtype), x, axis=0)

    y = multiply(ids, kernel, ambient, _key(module, kernel), dot, lookup=True)
    return after(y, kernel, ambient)


class _Terms(NamedTuple):
    """The letters of an einsum of x with a kernel."""

    x: str
    kernel: str
    out: str

    @property
    def contracted(self) -> str:
        return "".join(c for c in self.kernel if c in self.x and c not in self.out)

    @property
    def kept(self) -> str:
        return "".join(c for c in self.kernel if c in self.out and c not in self.x)

    @property
    def axes(self) -> str:
        return "".join("i" if c in self.contracted else "o" for c in self.kernel)

    @property
    def is_matrix_product(self) -> bool:
        return bool(self.out) and len(self.contracted) + len(self.kept) == len(self.kernel)


def _terms(equation: str | None) -> _Terms:
    operands, _, out = (equation or "").replace(" ", "").partition("->")
    x, _, kernel = operands.partition(",")
    return _Terms(x, kernel, out)


def _einsum(
    module: nn.Einsum,
    own: Mapping[str, BoundKernel],
    ambient: Ambient,
    inputs: Any,
    einsum_str: str | None = None,
) -> jax.Array:
    kernel, bias = own["kernel"], _bias(module)
    terms = _terms(einsum_str or module.einsum_str)
    dtype = _compute_dtype(module, inputs, kernel, bias)
    if terms.axes != kernel.local_axes or not terms.is_matrix_product:
        raise ValueError(
            f"axes={kernel.local_axes!r} of {kernel.path!r} disagree with its einsum "
            f"{module.einsum_str!r}, which says {terms.axes!r}: use pefts.infer_axes."
        )
    sizes = dict(zip(terms.kernel, kernel.shape, strict=True))
    batch = "".join(c for c in terms.x if c not in terms.contracted)
    rows, columns = terms.contracted, terms.kept
    x = jnp.einsum(f"{terms.x}->{batch}{rows}", inputs.astype(dtype))
    x = x.reshape(*x.shape[: x.ndim - len(rows)], -1)

    def dot(x: jax.Array, M: jax.Array) -> jax.Array:
        return matmul(x, M, module.precision)

    y = multiply(x, kernel, ambient, _key(module, kernel), dot)
    y = y.reshape(*y.shape[:-1], *[sizes[c] for c in columns])
    y = jnp.einsum(f"{batch}{columns}->{terms.out}", y)
    if bias is not None:
        y = y + _einsum_bias(bias.astype(dtype), terms, sizes, y.ndim)
    return after(y, kernel, ambient)


def _einsum_bias(bias: jax.Array, terms: _Terms, sizes: Mapping[str, int], ndim: int) -> jax.Array:
    """The bias lies over the kernel's output letters, in the order of the result."""
    before, _, behind = terms.out.partition("...")
    ones = [1] * (ndim - len(before) - len(behind))
    shape = [sizes.get(c, 1) for c in before] + ones + [sizes.get(c, 1) for c in behind]
    return bias.reshape(shape)


def _plain_einsum(module: nn.Einsum) -> bool:
    return _terms(module.einsum_str).is_matrix_product


PRODUCTS: dict[tuple[type, str], Product] = {
    (nn.Conv, "__call__"): _conv,
    (nn.Dense, "__call__"): _dense,
    (nn.DenseGeneral, "__call__"): _dense,
    (nn.Einsum, "__call__"): _einsum,
    (nn.Embed, "__call__"): _embed,
}
SUPPORTED: dict[type, Callable[[Any], bool]] = {
    nn.Conv: _plain_conv,
    nn.Dense: _plain_dense,
    nn.DenseGeneral: _plain_general,
    nn.Einsum: _plain_einsum,
    nn.Embed: _always,
}


def kernel_axes(module: Any) -> dict[str, str]:
    """{parameter name: letters} of a module this file knows, without the stacked axes."""
    if isinstance(module, nn.Dense):
        return {"kernel": "io"}
    if isinstance(module, nn.DenseGeneral):
        batch, inputs = _axes_tuple(module.batch_dims), _axes_tuple(module.axis)
        outputs = _axes_tuple(module.features)
        return {"kernel": "l" * len(batch) + "i" * len(inputs) + "o" * len(outputs)}
    if isinstance(module, nn.Conv):
        return {"kernel": "k" * len(_axes_tuple(module.kernel_size)) + "io"}
    if isinstance(module, nn.Embed):
        return {"embedding": "io"}
    if isinstance(module, nn.Einsum) and _plain_einsum(module):
        return {"kernel": _terms(module.einsum_str).axes}
    return {}
