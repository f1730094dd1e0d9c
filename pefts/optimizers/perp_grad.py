"""perpGrad: the part of a gradient that does not only rescale the weights.

    h = g - (w.g) / (w.w + 1e-30) w,    g' = h ||g|| / ||h||

Beyond the point where all examples are fitted, a gradient mostly lengthens w, which lowers the loss
without changing what the model answers until the softmax runs out of digits; h leaves that out.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pefts import linalg
from pefts.optimizers.decay import leaf_paths
from pefts.optimizers.projection import STACKED

SCOPES = ("tensor", "global")
TINY = 1e-30  # as in the released code; weights of zero leave the gradient as it is
PARALLEL = 1e-6  # ||h|| / ||g|| below which h is rounding


def perp_grad(scope: str = "tensor", rescale: bool = True) -> optax.GradientTransformationExtraArgs:
    """Project gradients orthogonally to the weights; for the front of an optax.chain.

    What a stateful transformation makes of them is no longer exactly orthogonal to the weights.
    A gradient parallel to its weights, as that of a tensor with one entry always is, becomes zero.

    NOTE(paper): the rescaling is the released code's; the formula has none, and takes w for the
      vector of all weights, which is scope="global".

    Args:
      scope: "tensor", each leaf by itself and each layer of leaves stacked below "layers"; or
        "global", all leaves as one vector.
      rescale: give what is left the norm of the gradient.

    Returns:
      A transformation without state; its update needs params. Integer leaves pass as they are.

    Raises:
      ValueError: scope is unknown; at update: no params.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from pefts.optimizers.perp_grad import perp_grad
      >>> w, g = jnp.array([2.0, 0.0]), jnp.array([3.0, 4.0])
      >>> tx = optax.chain(perp_grad(), optax.sgd(1.0))
      >>> tx.update(g, tx.init(w), w)[0].tolist()
      [-0.0, -5.0]

    Source: Grokking at the Edge of Numerical Stability, arXiv 2501.04697.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} is unknown; choose one of {SCOPES}.")

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "perp_grad projects on the weights: call update(grads, state, params)."
            )
        leaves, treedef = jax.tree.flatten(updates)
        at = [n for n, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        weights, paths = jax.tree.leaves(params), jax.tree.leaves(leaf_paths(updates))
        g, w = ([linalg.precise(tree[n]) for n in at] for tree in (leaves, weights))
        if not at:
            return updates, state
        if scope == "global":
            new = _perpendicular(g, w, [0] * len(at), rescale)
        else:
            stacked = [int(bool(re.search(STACKED, paths[n]) and leaves[n].ndim)) for n in at]
            each = zip(g, w, stacked, strict=True)
            new = [_perpendicular([g], [w], [depth], rescale)[0] for g, w, depth in each]
        for n, leaf in zip(at, new, strict=True):
            leaves[n] = leaf.astype(leaves[n].dtype)
        return treedef.unflatten(leaves), state

    return optax.with_extra_args_support(
        optax.GradientTransformation(optax.init_empty_state, update)
    )


def _perpendicular(
    g: list[jax.Array], w: list[jax.Array], stacked: Sequence[int], rescale: bool
) -> list[jax.Array]:
    """g' for one vector w given in parts, or for a stack of them."""
    dot = functools.partial(_dot, stacked=stacked)
    h, squared = g, dot(w, w)
    for _ in range(2):
        # Where g is nearly parallel to w, rounding leaves a part along w that rescaling amplifies.
        along = dot(w, h) / (squared + TINY)
        h = [
            a - along.reshape(along.shape + (1,) * (a.ndim - along.ndim)) * b
            for a, b in zip(h, w, strict=True)
        ]
    before, after = jnp.sqrt(dot(g, g)), jnp.sqrt(dot(h, h))
    factor = before / (after + TINY) if rescale else jnp.ones_like(after)
    factor = jnp.where(after < PARALLEL * before, jnp.zeros_like(factor), factor)
    return [a * factor.reshape(factor.shape + (1,) * (a.ndim - factor.ndim)) for a in h]


def _dot(a: list[jax.Array], b: list[jax.Array], stacked: Sequence[int]) -> jax.Array:
    """The product of two vectors given in parts; (L,) products of stacked ones."""
    parts = [
        jnp.sum(x * y, axis=tuple(range(depth, x.ndim)))
        for x, y, depth in zip(a, b, stacked, strict=True)
    ]
    return functools.reduce(jnp.add, parts)
