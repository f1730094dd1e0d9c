"""Any kernel as a stack of matrices (d_in, d_out), by one letter for each of its axes.

    l   stacked: scanned layers, experts; a method is applied to every slice by itself
    i   input:   contracted with the features that come in
    k   window:  a convolution's spatial axis, part of the input
    o   output

"io" is a Dense kernel, "lio" the same under nn.scan, "ioo" a query projection (d_model, heads,
head_dim), "iio" its output projection, "kkio" a two-dimensional convolution, "o" a bias or a norm's
scale.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

LETTERS = "liko"


def check(axes: str, shape: Sequence[int], path: str) -> None:
    """Raise ValueError unless `axes` names every axis of `shape` and leaves an output."""
    if len(axes) != len(shape) or any(letter not in LETTERS for letter in axes):
        raise ValueError(
            f"axes={axes!r} does not describe {path!r} of shape {tuple(shape)}: give one letter of "
            f"{LETTERS!r} (stacked, input, window, output) for each of its {len(shape)} axes."
        )
    if "o" not in axes:
        raise ValueError(f"axes={axes!r} of {path!r} names no output axis 'o'.")
    if "l" in axes.lstrip("l"):
        raise ValueError(
            f"axes={axes!r} of {path!r}: stacked axes 'l' come first (nn.scan over axis 0)."
        )


def stacked(axes: str) -> int:
    """How many leading axes are stacked."""
    return axes.count("l")


def local(axes: str, ndim: int) -> str:
    """The axes that are left of a kernel of which nn.scan has sliced away the leading stack."""
    return axes[len(axes) - ndim :]


def _order(axes: str) -> list[int]:
    groups = ("l", "ik", "o")
    return [n for group in groups for n, letter in enumerate(axes) if letter in group]


def _sizes(axes: str, shape: Sequence[int], letters: str) -> list[int]:
    return [size for letter, size in zip(axes, shape, strict=True) if letter in letters]


def matrix_shape(axes: str, shape: Sequence[int]) -> tuple[int, ...]:
    """(*stack, d_in, d_out) of a kernel of this shape; d_in is 1 for vectors."""
    d_in, d_out = (math.prod(_sizes(axes, shape, letters)) for letters in ("ik", "o"))
    return (*_sizes(axes, shape, "l"), d_in, d_out)


def to_matrix(kernel: jax.Array, axes: str) -> jax.Array:
    """The kernel as (*stack, d_in, d_out)."""
    return jnp.transpose(kernel, _order(axes)).reshape(matrix_shape(axes, kernel.shape))


def from_matrix(matrix: jax.Array, axes: str, shape: Sequence[int]) -> jax.Array:
    """The inverse of `to_matrix` for a kernel of this shape."""
    order = _order(axes)
    permuted = matrix.reshape([shape[n] for n in order])
    return jnp.transpose(permuted, np.argsort(order).tolist())


def outputs(y: jax.Array, d_out: int) -> jax.Array:
    """What a module puts out, (..., d_out): its last axes, d_out numbers in all, as one.

    Raises:
      ValueError: no last axes of y have d_out numbers.
    """
    for axes in range(1, y.ndim + 1):
        if math.prod(y.shape[-axes:]) == d_out:
            return y.reshape(*y.shape[:-axes], d_out)
    raise ValueError(
        f"a method on the output of a linear module met an output of shape {y.shape}: it does not "
        f"end in axes of {d_out} numbers in all, as the targeted kernel's does; target a module "
        "whose output axes come last."
    )
