"""Optimizer state in 8 bits: a codebook of 256 values, and one scale for every block of a leaf.

    s = max |x| over the block,  code = the entry of the map next to x / s,  x ~ map[code] s

A block is `block_size` consecutive numbers of the leaf in row-major order, the last one shorter.
Entries of the maps are the closer the smaller they are: the signed map is for first moments, the
unsigned one, twice as fine, for second moments. n numbers take n + 4 ceil(n / block_size) bytes.

The signed map ends at +1 but begins at -0.99296875: a block whose largest magnitude is negative
comes back with that entry 0.7% smaller, each time. Requantise what changed, and nothing else.

Source: 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861; the maps and the block of
256 are those of its library, bitsandbytes.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pefts import linalg
from pefts.optimizers.projection import STACKED
from pefts.targets import Targets, match

EMBEDDINGS = r"embedding$"  # the leaves that are exact unless told otherwise, where there are any
SECOND_MOMENTS = ("nu",)
EXPONENTS = 7


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "absmax"),
    meta_fields=("signed", "block_size", "stack", "dtype"),
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A leaf in 8 bits, and how to read it."""

    codes: Any  # uint8, in the shape of the leaf
    absmax: Any  # float32 (*axes that blocks do not cross, blocks): s
    signed: bool
    block_size: int
    stack: int  # how many leading axes count layers; no block reaches over two of them
    dtype: str  # of what `dequantize` returns: float32, or float64 if the leaf was


@functools.cache
def codebook(signed: bool) -> np.ndarray:
    """The 256 sorted values of the dynamic map, float32.

    For i = 0 ... 6 the midpoints of 2^i (unsigned: 2^(i+1)) equal parts of [0.1, 1], times
    10^(i-6); their negatives, if signed; 0 and 1.

    Args:
      signed: whether it has negative values.

    Returns:
      (256,), from -0.99296875 or 0 to 1.

    Example:
      >>> from pefts.optimizers.blockwise import codebook
      >>> [f"{value:.4g}" for value in codebook(True)[[0, 127, 128, 255]]]
      ['-0.993', '0', '5.5e-07', '1']

    Source: 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861.
    """
    values = [np.array([0.0, 1.0])]
    for i in range(EXPONENTS):
        edges = np.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        parts = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i + 1 - EXPONENTS)
        values += [parts, -parts] if signed else [parts]
    return np.sort(np.concatenate(values)).astype(np.float32)


def quantize(x: Any, *, signed: bool = True, block_size: int = 256, stack: int = 0) -> Quantized:
    """The leaf x in 8 bits: code = argmin |map - x / s|, s = max |x| of the block.

    Halfway between two entries it is the lower one. A block of zeros has s = 0 and stays zero, and
    so does every zero. NaN or infinity anywhere leaves nothing finite in its block.

    Blocks are those of the whole array wherever its parts are: sharded or not, the result is the
    same. Where a shard's part of the last axis is a multiple of block_size no block straddles two
    shards, whatever other axes are split, and no device needs another's numbers. Under
    jax.shard_map blocks are each shard's own, the same ones in that case.

    Args:
      x: (*stack, ...), floating; computed in float32.
      signed: which map; negative numbers become 0 in the unsigned one.
      block_size: consecutive elements with one scale (the library: 256; paper: 2048).
      stack: the number of leading axes that count layers: each layer has blocks of its own.

    Returns:
      A `Quantized`: uint8 codes in the shape of x and one float32 for each block.

    Raises:
      ValueError: x is not floating, or block_size or stack is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from pefts.optimizers.blockwise import dequantize, quantize
      >>> dequantize(quantize(jnp.array([0.0, 8.0, 0.25, -1e-6]))).tolist()
      [0.0, 8.0, 0.2487500011920929, 0.0]

    Source: 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861.
    """
    _check_block_size(block_size)
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x is {x.dtype}: give floating-point numbers; others are kept as they are."
        )
    if not 0 <= stack <= x.ndim:
        raise ValueError(f"stack={stack!r}: x has {x.ndim} axes, give 0 to {x.ndim}.")
    blocks = _split(x.astype(jnp.float32), block_size, stack)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    scaled = blocks / jnp.where(absmax == 0, jnp.ones_like(absmax), absmax)[..., None]
    return Quantized(
        _join(_nearest(scaled, signed), x.shape, block_size, stack),
        absmax,
        signed,
        block_size,
        stack,
        jax.eval_shape(linalg.precise, x).dtype.name,
    )


def dequantize(quantized: Quantized) -> jax.Array:
    """map[code] s, in the shape of the leaf.

    Args:
      quantized: what `quantize` returned.

    Returns:
      float32, or float64 if the leaf was.

    Example:
      >>> import jax.numpy as jnp
      >>> from pefts.optimizers.blockwise import dequantize, quantize
      >>> dequantize(quantize(jnp.array([-2.0, 0.0]))).tolist()
      [-1.985937476158142, 0.0]

    Source: 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861.
    """
    block_size, stack = quantized.block_size, quantized.stack
    codes = _split(quantized.codes, block_size, stack).astype(jnp.int32)
    blocks = jnp.asarray(codebook(quantized.signed))[codes] * quantized.absmax[..., None]
    return _join(blocks, quantized.codes.shape, block_size, stack).astype(quantized.dtype)


def quantize_state(
    inner: optax.GradientTransformation,
    *,
    block_size: int = 256,
    min_size: int = 4096,
    exact: Targets | None = None,
    unsigned: str | Sequence[str] = SECOND_MOMENTS,
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` as it is, in float32, and keep its large moments in 8 bits between steps.

    What is kept so: every floating leaf of the state of `inner` that belongs to a parameter (its
    path ends with the parameter's, and its shape is the same). Layers that are stacked, below
    "layers", are treated one by one: blocks and min_size are of a layer, as if it were a leaf.

    Between steps such a leaf is codes and scales alone. Within a step it is float32: of how many
    leaves at once is up to XLA's schedule (on the CPU backend, of all). Call `update`, and `init`,
    which encodes zeros, under jax.jit. Put what leaves the state as it is at some steps
    (optax.MultiSteps, optax.apply_if_finite) around this, not inside, so that moments are encoded
    only when they have changed.

    As in Adam a gradient with NaN goes through, but here it makes its whole block of moments NaN.

    A second moment v below 1.6e-7 of its block's largest becomes 0: at the first step that is a
    gradient 4e-4 as large as another, and once v is 0 with b2 = 0.999 it stays 0 as long as the
    gradient g is below 1.3% of the root of that largest v. The entry's step is then
    m / (sqrt((1 - b2) g^2) + eps): some 30 times Adam's if m is near g, but m / eps, a leap with an
    eps of 1e-8, if g is zero. Nothing is clipped here. Where gradients come and go (embeddings,
    experts) keep the leaves `exact`, choose an eps near the size of gradients, or clip updates
    (optax.clip after this).

    Args:
      inner: any transformation; extra arguments of `update` reach it. Parameters and gradients
        reach it in float32 or better.
      block_size: consecutive elements with one scale (the library: 256; paper: 2048).
      min_size: leaves with fewer elements stay in float32 (the library: 4096).
      exact: the leaves that stay in float32, as `targets` of pefts.targets, of paths such as
        "embed/embedding" without the "/value" of `pefts.full` (None: those that end with
        "embedding", if there are any, as is customary; (): none).
      unsigned: names of the fields of the state that are never negative ("nu" of
        optax.scale_by_adam): they get the unsigned map. All others get the signed one.

    Returns:
      A transformation; its state is that of `inner`, with a `Quantized` for each leaf in 8 bits and
      float32 or better for the others; updates are in the gradients' dtype.

    Raises:
      ValueError: an argument is out of range; at init: a pattern of `exact` matches no parameter, a
        name in `unsigned` is none of the fields (unless it is the default).

    Example:
      >>> import jax.numpy as jnp, optax, pefts
      >>> from pefts.optimizers.blockwise import quantize_state
      >>> tx = quantize_state(optax.lion(1e-4))
      >>> state = tx.init({"kernel": jnp.ones((64, 128))})
      >>> state[0].mu["kernel"].codes.nbytes, state[0].mu["kernel"].absmax.nbytes
      (8192, 128)

    Source: 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861.
    """
    _check_block_size(block_size)
    if type(min_size) is not int or min_size < 0:
        raise ValueError(
            f"min_size={min_size!r}: give the number of elements, from 0, below which a leaf stays "
            "in float32 (and name it in the static_args of optax.inject_hyperparams)."
        )
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise ValueError(
            f"inner={inner!r} is no gradient transformation: call it, as in optax.scale_by_adam()."
        )
    fields = (unsigned,) if isinstance(unsigned, str) else tuple(unsigned)
    inside = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        state = inside.init(linalg.precise_floats(params))
        leaves, treedef = jax.tree.flatten(state)
        owners = _owners(state, params)
        _check_fields(fields, owners)
        stacks = _stacks(params, min_size, exact)

        def encode(leaf: Any, owner: Any) -> Any:
            if owner is None or (stack := stacks[owner.parameter]) is None:
                return leaf
            signed = owner.field not in fields
            # Else XLA encodes the zeros of a jitted `init` while it compiles, for minutes.
            leaf = jax.lax.optimization_barrier(leaf)
            return quantize(leaf, signed=signed, block_size=block_size, stack=stack)

        return treedef.unflatten(map(encode, leaves, owners))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        stepped, new = inside.update(
            linalg.precise_floats(updates),
            jax.tree.map(_decoded, state, is_leaf=_is_quantized),
            linalg.precise_floats(params),
            **extra,
        )
        stepped = jax.tree.map(lambda step, leaf: step.astype(leaf.dtype), stepped, updates)
        return stepped, jax.tree.map(_encoded_like, state, new, is_leaf=_is_quantized)

    return optax.GradientTransformationExtraArgs(init, update)


class _Owner(NamedTuple):
    """Of a leaf of the state: the key path of its parameter, and the field that holds it."""

    parameter: tuple
    field: str


def _owners(state: Any, params: Any) -> list[_Owner | None]:
    """For each leaf of the state its owner, None where it has no parameter's path and shape."""
    shapes = {path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def owner(path: tuple, leaf: Any) -> _Owner | None:
        # The longest end of the path first: a parameter "b" must not claim what is "a/b"'s.
        for start in range(len(path) + 1):
            if shapes.get(path[start:]) == getattr(leaf, "shape", None):
                field = jax.tree_util.keystr(path[max(start - 1, 0) : start], simple=True)
                return _Owner(path[start:], field) if _is_floating(leaf) else None
        return None

    return [owner(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]


def _stacks(params: Any, min_size: int, exact: Targets | None) -> dict[tuple, int | None]:
    """For each parameter's key path the number of its layer axes, None where it stays exact."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        for path, _ in leaves
    ]
    if exact is None:
        kept = {name for name in names if re.search(EMBEDDINGS, name)}
    else:  # without parameters optax asks where a state holds trees like theirs
        kept = match(exact, names, argument="exact") if names else set()
    stacks = {}
    for name, (path, leaf) in zip(names, leaves, strict=True):
        stack = int(bool(re.search(STACKED, name)) and leaf.ndim > 0)
        small = not leaf.shape or math.prod(leaf.shape[stack:]) < min_size
        stacks[path] = None if small or name in kept else stack
    return stacks


def _check_fields(fields: tuple[str, ...], owners: list[_Owner | None]) -> None:
    found = {owner.field for owner in owners if owner is not None}
    missing = sorted(set(fields) - found)
    if found and missing and fields != SECOND_MOMENTS:
        raise ValueError(
            f"unsigned: {missing[0]!r} names no moments in the state of the inner transformation; "
            f"its fields are {sorted(found)}."
        )


def _check_block_size(block_size: int) -> None:
    if type(block_size) is not int or block_size < 1:
        raise ValueError(
            f"block_size={block_size!r}: give the number of elements, from 1, that share a scale "
            "(and name it in the static_args of optax.inject_hyperparams)."
        )


def _nearest(scaled: jax.Array, signed: bool) -> jax.Array:
    """The number of midpoints between entries that are below each x / s: its code, uint8."""
    # A binary search of eight comparisons, which fuse with what is around them: neither a loop over
    # whole leaves nor a table of all distances. jnp.searchsorted also gathers where all elements
    # are still at the same place, and XLA then computes a leaf of constants while it compiles.
    values = codebook(signed)
    midpoints = (values[:-1] + values[1:]) / np.float32(2)
    code = 128 * (scaled > midpoints[127]).astype(jnp.int32)
    for step in (64, 32, 16, 8, 4, 2, 1):
        above = scaled > jnp.asarray(midpoints)[code + (step - 1)]
        code = code + step * above.astype(jnp.int32)
    return code.astype(jnp.uint8)


def _layout(shape: tuple[int, ...], block_size: int, stack: int) -> tuple[tuple[int, ...], int]:
    """The axes that no block crosses, and the number of elements in each of their entries.

    As few trailing axes are flattened as whole blocks allow: the blocks are those of the flattened
    layer, and a sharded axis before them stays as it is.
    """
    axis = len(shape)
    while axis > stack and math.prod(shape[axis:]) % block_size:
        axis -= 1
    return shape[:axis], math.prod(shape[axis:])


def _split(x: jax.Array, block_size: int, stack: int) -> jax.Array:
    """(*lead, blocks, block_size), the last block of each filled with zeros."""
    lead, size = _layout(x.shape, block_size, stack)
    blocks = -(-size // block_size)
    flat = x.reshape(*lead, size)
    padding = [(0, 0)] * len(lead) + [(0, blocks * block_size - size)]
    return jnp.pad(flat, padding).reshape(*lead, blocks, block_size)


def _join(blocks: jax.Array, shape: tuple[int, ...], block_size: int, stack: int) -> jax.Array:
    """The inverse of `_split`."""
    lead, size = _layout(shape, block_size, stack)
    return blocks.reshape(*lead, math.prod(blocks.shape[-2:]))[..., :size].reshape(shape)


def _is_quantized(node: Any) -> bool:
    return isinstance(node, Quantized)


def _decoded(node: Any) -> Any:
    return dequantize(node) if _is_quantized(node) else node


def _encoded_like(old: Any, leaf: Any) -> Any:
    if not _is_quantized(old):
        return leaf
    return quantize(leaf, signed=old.signed, block_size=old.block_size, stack=old.stack)


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
