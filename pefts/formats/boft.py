"""BOFT as Hugging Face PEFT stores it (peft_type BOFT).

    boft_R (m, n, b, b)     boft_s (out, 1)     y = ((x R) W) * s + b

peft computes with more than one factor only where it can compile its CUDA extension. Elsewhere it
sets boft_n_butterfly_factor to 1, and the file does not fit. So m > 1 factors are written as the
one block-diagonal rotation that they multiply to, with blocks of 2^(m-1) b entries.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pefts.core import FULL_PRECISION
from pefts.formats.contract import Files, Format, Imported, Native, Slot, Weight, expect
from pefts.formats.oft import check_linear
from pefts.methods.boft import factor_product, rotations

R, S = "boft_R", "boft_s"
LOSS = 1e-4  # the largest error of an entry of R that is written


def to_hf(native: Native) -> Files:
    """Every slice, with one factor."""
    check_linear(native.slices, "BOFT")
    single = {slot: as_one_factor(slot, p["A"]) for slot, p in native.slices.items()}
    blocks, (_, _, b, _) = native.config["blocks"], next(iter(single.values())).shape
    count = None if blocks is None else int(blocks) // 2 ** (int(native.config["factors"]) - 1)
    fields = {
        "boft_block_num": count or 0,
        "boft_block_size": 0 if count else b,
        "boft_dropout": float(native.config["dropout"]),
        "boft_n_butterfly_factor": 1,
        "fan_in_fan_out": any(not slot.transposed for slot in native.slices),
        "init_weights": True,
    }
    modules = {
        slot.module: {R: single[slot], S: p["s"].reshape(-1, 1)}
        for slot, p in native.slices.items()
    }
    return Files(fields, modules)


def from_hf(files: Files, slots: Sequence[Slot], weight: Weight) -> Imported:
    """`boft`; a slice without tensors is neither rotated nor scaled."""
    del weight
    check_linear({slot: None for slot in slots}, "BOFT")
    size, count = (int(files.fields[f"boft_block_{name}"]) or None for name in ("size", "num"))
    factors = int(files.fields["boft_n_butterfly_factor"])
    if (size is None) == (count is None):
        raise ValueError(
            f"boft_block_size={size} and boft_block_num={count}: exactly one of them says how the "
            "inputs are cut; the file is damaged."
        )
    trainable = {}
    for slot in slots:
        n = count or slot.d_in // (size or 1)
        shape = (factors, n, slot.d_in // n, slot.d_in // n)
        tensors = files.modules.get(slot.module)
        if tensors is None:
            tensors = {R: np.zeros(shape, np.float32), S: np.ones((slot.d_out, 1), np.float32)}
        expect(slot.module, tensors, {R: shape, S: (slot.d_out, 1)})
        trainable[slot] = {"A": tensors[R], "s": tensors[S].reshape(-1)}
    config = {
        "method": "boft",
        "block_size": size,
        "blocks": count,
        "factors": factors,
        "dropout": float(files.fields["boft_dropout"]),
    }
    return Imported(config, trainable)


def as_one_factor(slot: Slot, A: np.ndarray) -> np.ndarray:
    """A (1, n / 2^(m-1), B, B) of the same rotation as A (m, n, b, b), B = 2^(m-1) b.

    Raises:
      ValueError: the product turns something by half a turn, which one Cayley form cannot.
    """
    m, n, b, _ = A.shape
    if m == 1:
        return A
    span = 2 ** (m - 1)
    groups = np.moveaxis(A.reshape(m, n // span, span, b, b), 1, 0)
    dense = np.stack([_dense(group) for group in groups])
    K = _inverse_cayley(dense).astype(np.float32)[None]
    error = np.abs(np.asarray(rotations(jnp.asarray(K)))[0] - dense).max()
    if not error <= LOSS:
        raise ValueError(
            f"the {m} factors of {slot.module!r} cannot be written as one: their product turns a "
            f"direction by nearly half a turn (off by {error:.0e}), and peft without its CUDA "
            "extension could not load more than one factor. Merge it instead."
        )
    return K


def _inverse_cayley(M: np.ndarray) -> np.ndarray:
    """K of M = (I - K)(I + K)^-1, which is K = (I - M)(I + M)^-1; NaN where there is none."""
    eye = np.eye(M.shape[-1])
    try:
        return np.linalg.solve(eye + M, eye - M)
    except np.linalg.LinAlgError:
        return np.full_like(M, np.nan)


def _dense(A: np.ndarray) -> np.ndarray:
    """The product (B, B) of one group's factors A (m, 2^(m-1), b, b), in float64 or float32."""
    with FULL_PRECISION():
        D = rotations(jnp.asarray(A))
        x = jnp.eye(math.prod(A.shape[1:3]), dtype=D.dtype)
        for level in reversed(range(len(A))):
            x = factor_product(x, D[level], level)
        return np.asarray(jax.device_get(x), np.float64)


FORMAT = Format(
    peft_type="BOFT",
    suffixes=(R, S),
    to_hf=to_hf,
    from_hf=from_hf,
    fields={
        "boft_block_num": 0,
        "boft_block_size": 4,
        "boft_dropout": 0.0,
        "boft_n_butterfly_factor": 1,
    },
    ignored=("init_weights",),
    biases=("none",),
)
