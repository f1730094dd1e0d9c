"""NOLA: a LoRA whose factors are combinations of random matrices that a seed generates.

    A = A0 + sum_{i < k} alpha_i A_i        B = sum_{i < k} beta_i B_i        y = x W + s (x A) B

A_i (d_in, r) and B_i (r, d_out) are uniform on +-1 / sqrt(k), A0 on +-1 / sqrt(d_in); the k
coefficients of each factor are trained. The state holds a key of two integers for each kernel and
none of the matrices: they are generated again, `chunk` at a time, whenever a factor or its gradient
    d loss / d alpha_i = <d loss / d A, A_i>
is computed, so a step never holds the k matrices at once. alpha and beta start at zero, so the
model is unchanged at step 0. Trainable: 2 k per kernel, whatever its shape.

NOTE(paper): the released code draws A0 from a stream of its own and has to save it; here it comes
  from the kernel's key too.
"""

from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts.bound import Call, Rule, State, matmul
from pefts.core import Declaration, Traits, factory
from pefts.methods.lora import check_dropout, check_rank, drop
from pefts.targets import Select, Site, selection


@factory
def nola(
    rank: int = 16,
    alpha: float = 4.0,
    *,
    bases: int = 512,
    chunk: int = 16,
    dropout: float = 0.0,
    **select: Unpack[Select],
) -> Declaration:
    """Combinations of random bases: y = x W + s (x A) B, A = A0 + sum_i alpha_i A_i (d_in, r).

    B = sum_i beta_i B_i (r, d_out); s = alpha / r.

    Args:
      rank: r, from 1 to the smaller side of every kernel (the paper's LLaMA-2 runs: 16).
      alpha: s = alpha / r (the same runs: 4).
      bases: k, how many matrices a factor combines (the same runs: 512).
      chunk: how many of them are in memory at once; it changes no result but by rounding.
      dropout: probability of dropping an input of the adapter; active in calls that are given a
        "dropout" random stream.
      **select: targets, exclude, alpha_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W + s A B.

    Raises:
      ValueError: rank out of range, bases or chunk not positive, dropout outside [0, 1), or no
        kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> peft = pefts.nola(rank=2, bases=8)
      >>> pefts.count(peft.init(jax.random.key(0), params).trainable)
      16

    Source: NOLA: Compressing LoRA using Linear Combination of Random Basis, arXiv 2310.02556.
    """
    check_rank(rank)
    check_dropout(dropout)
    for name, value in (("bases", bases), ("chunk", chunk)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: give a positive integer, such as 16.")

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del W, stats
        _check_fit(rank, site)
        zeros = jnp.zeros((bases,), jnp.float32)
        frozen = {
            "key": jax.random.bits(key, (2,), jnp.uint32),
            "scale": jnp.float32(site.alpha / rank),
        }
        return {"alpha": zeros, "beta": zeros}, frozen

    def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
        del call
        A, B = (factor.astype(W.dtype) for factor in factors(W.shape, p, rank, chunk))
        return W + A @ B

    def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
        A, B = factors(jax.eval_shape(call.dense, W).shape, p, rank, chunk)
        return call.dot(x, W) + matmul(call.dot(drop(x, dropout, call.key), A), B)

    return Declaration(
        rule=Rule(start, effective, linear, through_dot=True, uses_key=dropout > 0),
        selection=selection(**select),
        traits=Traits(stochastic=dropout > 0),
        alpha=alpha,
    )


def factors(shape: tuple[int, ...], p: State, rank: int, chunk: int) -> tuple[jax.Array, jax.Array]:
    """A (d_in, r) and s B (r, d_out) of a kernel with this shape."""
    d_in, d_out = shape[-2:]
    # The generator is named so that another default cannot change what a saved key stands for.
    key = jax.random.wrap_key_data(p["key"], impl="threefry2x32")
    key_0, key_A, key_B = (jax.random.key_data(part) for part in jax.random.split(key, 3))
    A0 = initial(key_0, (d_in, rank), p["alpha"].dtype)
    A: jax.Array = A0 + combined(p["alpha"], key_A, (d_in, rank), chunk)
    B: jax.Array = combined(p["beta"], key_B, (rank, d_out), chunk)
    return A, p["scale"].astype(B.dtype) * B


def initial(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    """A0 (d_in, r), uniform on +-1 / sqrt(d_in)."""
    return basis(key, jnp.uint32(0), shape).astype(dtype) / shape[0] ** 0.5


def basis(key: jax.Array, index: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """The random matrix of this index, uniform on +-1: the same whatever is generated with it."""
    # In float32 always: other types would draw other values.
    key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), index)
    return jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0)


def _sum(coefficients: jax.Array, key: jax.Array, shape: tuple[int, int], chunk: int) -> jax.Array:
    """sum_i c_i M_i / sqrt(k), M_i = basis(key, i, shape), with `chunk` of them at a time."""
    k = len(coefficients)

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        indices, c = part
        return total + jnp.einsum("n,nij->ij", c, _bases(key, indices, shape, c.dtype)), None

    indices = _indices(k, chunk)
    padded = jnp.pad(coefficients, (0, indices.size - k)).reshape(indices.shape)
    total, _ = jax.lax.scan(add, jnp.zeros(shape, coefficients.dtype), (indices, padded))
    return total / k**0.5


def _forward(
    coefficients: jax.Array, key: jax.Array, shape: tuple[int, int], chunk: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _sum(coefficients, key, shape, chunk), (coefficients, key)


def _backward(
    shape: tuple[int, int], chunk: int, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None]:
    """<gradient, M_i> / sqrt(k), which is all that a step needs of the bases."""
    coefficients, key = kept
    k = len(coefficients)

    def one(indices: jax.Array) -> jax.Array:
        matrices = _bases(key, indices, shape, gradient.dtype)
        return jnp.einsum("ij,nij->n", gradient, matrices)

    products = jax.lax.map(one, _indices(k, chunk)).reshape(-1)[:k]
    return products / k**0.5, None


combined: Any = jax.custom_vjp(_sum, nondiff_argnums=(2, 3))
combined.defvjp(_forward, _backward)


def _indices(k: int, chunk: int) -> jax.Array:
    """0 to k - 1, and beyond it to the end of the last chunk, in rows of a chunk."""
    chunk = min(chunk, k)
    return jnp.arange(-(-k // chunk) * chunk, dtype=jnp.uint32).reshape(-1, chunk)


def _bases(key: jax.Array, indices: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    return jax.vmap(lambda index: basis(key, index, shape))(indices).astype(dtype)


def _check_fit(rank: int, site: Site) -> None:
    side = min(site.d_in, site.d_out)
    if rank > side:
        raise ValueError(
            f"rank={rank} is out of range for {site.path!r}, a {site.d_in} x {site.d_out} kernel: "
            f"choose 1 to {side}, or exclude it."
        )
