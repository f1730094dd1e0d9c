"""RandLoRA: an update of full rank, from random matrices that all kernels share.

    D = sum_{i < n} B_i diag(lambda_i) A diag(gamma_i)      W' = W + s D, or s D^T if d_in < d_out

m and M are the kernel's smaller and larger side and n = ceil(m / r). A (r, m) is one matrix for
all i, B_i (M, r) are n; the lambda_i (r,) and gamma_i (m,) are trained. A and B are slices from the
origin of one A (r, max m) and one B (max M, max n r) for all kernels. They come from `seed`, not
from the key given to init, have unit variance, and lie once in the state, under "shared". Column k
of B_i is column k n + i of B. lambda starts at zero and gamma at 1 / max(n, m), so the model is
unchanged at step 0. Trainable: n (r + m) per kernel, the fewer the larger r is.

The product is (x V) U with V and U of width n r, about m. The one with lambda and gamma in it is
as large as n copies of A: it is built where it is needed, and again for the gradient.

NOTE(paper): B_i is a block of r neighbouring columns there. Both published implementations pair
  the columns as above; for random columns it is the same, and their files stay readable.
"""

import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts.bound import Call, Rule, State, matmul
from pefts.core import Declaration, Traits, factory
from pefts.methods.lora import check_dropout, check_rank, drop
from pefts.targets import Select, Site, selection

ALPHA_PER_RANK = {"official": 2.0, "hf": 20.0}  # by scaling
BASES = ("uniform", "sparse", "very_sparse")


@factory
def randlora(
    rank: int = 32,
    alpha: float | None = None,
    *,
    scaling: str = "official",
    bases: str = "uniform",
    dropout: float = 0.0,
    seed: int = 0,
    **select: Unpack[Select],
) -> Declaration:
    """Full-rank random adaptation: D = sum_i B_i diag(lambda_i) A diag(gamma_i), y = x (W + s D).

    A (r, m) and n matrices B_i (M, r) are frozen and shared; lambda (r, n) and gamma (n, m) train,
    with m and M the smaller and larger side and n = ceil(m / r).

    Args:
      rank: r, from 1 to the kernel's smaller side (the paper: 32). A smaller one trains more
        parameters.
      alpha: of the scale; None: 2 r with scaling "official", 20 r with "hf" (both their defaults).
      scaling: "official", s = alpha / (r sqrt(n)), or "hf", s = alpha / r, some hundred times
        larger by default and known to be unstable at high learning rates.
      bases: "uniform" entries, or ternary ones with +1 and -1 of probability 1/6 each ("sparse")
        or 1 / (2 sqrt(max m)) each ("very_sparse"); scaled to unit variance.
      dropout: probability of dropping an input of the adapter (the paper: 0.05); active in calls
        that are given a "dropout" random stream.
      seed: of the frozen A and B; the same seed and the same largest kernels give the same pair.
      **select: targets, exclude, rank_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W + s D.

    Raises:
      ValueError: rank out of range, alpha not positive, unknown scaling or bases, dropout outside
        [0, 1), a negative seed, sparse bases that came out as zeros, or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> pefts.count(pefts.randlora(rank=2).init(jax.random.key(0), params).trainable)
      12

    Source: RandLoRA: Full-rank parameter-efficient fine-tuning of large models, arXiv 2502.00987.
    """
    check_rank(rank)
    check_dropout(dropout)
    _check(alpha, scaling, bases, seed)

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del key, W, stats
        m = min(site.d_in, site.d_out)
        n = bases_of(m, site.rank)
        lambda_ = jnp.zeros((site.rank, n), jnp.float32)
        return {"gamma": jnp.full((n, m), 1 / max(n, m), jnp.float32), "lambda": lambda_}, {}

    def share(key: jax.Array, sites: tuple[Site, ...]) -> tuple[dict, dict]:
        del key
        return {}, _pair(sites, bases, seed)

    def left(shape: tuple[int, ...], p: State, call: Call) -> jax.Array:
        return factors(shape, _scaled(p, alpha, scaling), call)[0]

    def right(shape: tuple[int, ...], p: State, call: Call) -> jax.Array:
        return factors(shape, _scaled(p, alpha, scaling), call)[1]

    def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
        V, U = (one(W.shape, p, call).astype(W.dtype) for one in (left, right))
        return W + V @ U

    def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
        shape = jax.eval_shape(call.dense, W).shape
        # Checkpoints: a factor would otherwise be kept, in every layer, for the backward pass.
        down = jax.checkpoint(lambda x, p: call.dot(x, left(shape, p, call)))
        up = jax.checkpoint(lambda h, p: matmul(h, right(shape, p, call)))
        return call.dot(x, W) + up(down(drop(x, dropout, call.key), p), p)

    return Declaration(
        rule=Rule(start, effective, linear, through_dot=True, uses_key=dropout > 0),
        selection=selection(**select),
        traits=Traits(stochastic=dropout > 0),
        rank=rank,
        init_shared=share,
        failure="every entry of a sparse base is zero; give another seed or a larger rank",
    )


def factors(shape: tuple[int, ...], p: State, call: Call) -> tuple[jax.Array, jax.Array]:
    """V (d_in, n r) and U (n r, d_out) with V U = D or D^T, by the kernel's shape."""
    d_in, d_out = shape[-2:]
    lambda_, gamma = p["lambda"], p["gamma"]
    (r, n), m = lambda_.shape, gamma.shape[-1]
    A = call.shared["A"][:r, :m].astype(gamma.dtype)
    # Column k n + i of `small` belongs to row k of A and to base i.
    small = (lambda_[:, :, None] * A[:, None] * gamma[None]).reshape(r * n, m)
    large = call.shared["B"][: max(d_in, d_out), : r * n]
    return (small.T, large.T) if d_in <= d_out else (large, small)


def bases_of(m: int, rank: int) -> int:
    """n, as many bases of this rank as make the update's rank full."""
    return -(-m // rank)


def scale_of(rank: int, n: int, alpha: float | None, scaling: str) -> float:
    """s = alpha / r, divided by sqrt(n) with the official scaling."""
    alpha = ALPHA_PER_RANK[scaling] * rank if alpha is None else alpha
    return alpha / rank / (math.sqrt(n) if scaling == "official" else 1.0)


def _scaled(p: State, alpha: float | None, scaling: str) -> State:
    """The state with the scale in lambda, its smallest leaf."""
    rank, n = p["lambda"].shape
    return {**p, "lambda": p["lambda"] * scale_of(rank, n, alpha, scaling)}


def _pair(sites: tuple[Site, ...], bases: str, seed: int) -> dict[str, jax.Array]:
    """A (r, max m) and B (max M, max n r), of unit variance."""
    d_in, d_out = max(site.d_in for site in sites), max(site.d_out for site in sites)
    m, M, ranks = min(d_in, d_out), max(d_in, d_out), {site.rank for site in sites}
    width = max(bases_of(m, rank) * rank for rank in ranks)
    # The generator is named so that another default cannot change the pair.
    key_A, key_B = jax.random.split(jax.random.key(seed, impl="threefry2x32"))
    sparsity = {"uniform": 0.0, "sparse": 3.0, "very_sparse": math.sqrt(m)}[bases]
    return {
        "A": _base(key_A, (max(ranks), m), sparsity),
        "B": _base(key_B, (M, width), sparsity),
    }


def _base(key: jax.Array, shape: tuple[int, int], sparsity: float) -> jax.Array:
    """Uniform entries, or 1 and -1 with probability 1 / (2 sparsity) each; divided by their std."""
    entries = jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0)
    if sparsity:
        kept = jnp.abs(entries) > 1 - 1 / sparsity
        entries = jnp.where(kept, jnp.sign(entries), jnp.zeros_like(entries))
    return entries / jnp.std(entries)


def _check(alpha: float | None, scaling: str, bases: str, seed: int) -> None:
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha={alpha!r}: give a positive number, or None for the default.")
    for name, value, known in (
        ("scaling", scaling, tuple(ALPHA_PER_RANK)),
        ("bases", bases, BASES),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {known}.")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed={seed!r}: give a non-negative integer, such as 0.")
