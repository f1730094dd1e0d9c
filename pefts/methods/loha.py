"""LoHa: the entrywise product of two low-rank matrices beside a frozen kernel.

    y = x W + s x ((A1 B1) * (A2 B2))        A (d_in, r), B (r, d_out)

s = alpha / r. The update can have rank r^2 from the parameters of a LoRA of rank 2 r. It factors:
    (A1 B1) * (A2 B2) = A B      A (d_in, r^2) the products of a column of A1 with one of A2,
                                 B (r^2, d_out) the products of a row of B1 with one of B2
so nothing of the kernel's size has to be built, as long as r^2 is small beside its sides. A1 starts
uniform on +-1/sqrt(d_in), B1 and B2 on +-1/sqrt(r), and A2 at zero: the model is unchanged at
step 0. Trainable: 2 r (d_in + d_out) per kernel.
"""

import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts.bound import Call, Rule, State, matmul
from pefts.core import Declaration, Traits, factory
from pefts.methods.lora import check_rank, scaling
from pefts.targets import Select, Site, selection


@factory
def loha(
    rank: int = 8,
    alpha: float = 8.0,
    **select: Unpack[Select],
) -> Declaration:
    """Low-rank Hadamard product: y = x W + s x ((A1 B1) * (A2 B2)), A (d_in, r), B (r, d_out).

    In multiply-adds per token the adapter costs r^2 (d_in + d_out), but never more than d_in d_out,
    a second product with a dense kernel: beyond r^2 = d_in d_out / (d_in + d_out) (half the side of
    a square kernel) the update is built, for one layer at a time.

    Args:
      rank: r, from 1 to the kernel's smaller side (Hugging Face PEFT: 8).
      alpha: s = alpha / r (Hugging Face PEFT: 8).
      **select: targets, exclude, rank_pattern, alpha_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W + s (A1 B1) * (A2 B2).

    Raises:
      ValueError: rank out of range, or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> pefts.count(pefts.loha(rank=2).init(jax.random.key(0), params).trainable)
      40

    Source: FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning,
      arXiv 2108.06098; Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
      Evaluation, arXiv 2309.14859. Starts and scale are Hugging Face PEFT's.
    """
    check_rank(rank)
    return Declaration(
        rule=Rule(_start, effective, linear, through_dot=True),
        selection=selection(**select),
        traits=Traits(),
        rank=rank,
        alpha=alpha,
    )


def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
    """W + s (A1 B1) * (A2 B2)."""
    del call
    return W + delta({name: leaf.astype(W.dtype) for name, leaf in p.items()})


def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
    """Through the r^2 columns of the factors where they are thin, through the dense update else."""
    y = call.dot(x, W)
    if is_thin(p["A1"].shape[-2], p["A1"].shape[-1], p["B1"].shape[-1]):
        A, B = factors(p)
        return y + matmul(call.dot(x, A), B)
    return y + call.dot(x, delta(p))


def is_thin(d_in: int, rank: int, d_out: int) -> bool:
    """Whether the product with both factors takes no more multiply-adds than with the update."""
    return rank**2 * (d_in + d_out) <= d_in * d_out


def delta(p: State) -> jax.Array:
    """s (A1 B1) * (A2 B2) (d_in, d_out)."""
    return p["scale"] * (p["A1"] @ p["B1"]) * (p["A2"] @ p["B2"])


def factors(p: State) -> tuple[jax.Array, jax.Array]:
    """A (d_in, r^2), B (r^2, d_out) with A B = s (A1 B1) * (A2 B2): Khatri-Rao products by row."""
    (d_in, r), d_out = p["A1"].shape, p["B1"].shape[-1]
    A = (p["A1"][:, :, None] * p["A2"][:, None, :]).reshape(d_in, r * r)
    B = (p["B1"][:, None, :] * p["B2"][None, :, :]).reshape(r * r, d_out)
    return A, p["scale"] * B


def _start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
    del W, stats
    A, B = (site.d_in, site.rank), (site.rank, site.d_out)
    keys = jax.random.split(key, 3)
    trainable = {
        "A1": uniform(keys[0], A, site.d_in),
        "A2": jnp.zeros(A, jnp.float32),
        "B1": uniform(keys[1], B, site.rank),
        "B2": uniform(keys[2], B, site.rank),
    }
    return trainable, {"scale": jnp.float32(scaling(site))}


def uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Uniform on +-1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
