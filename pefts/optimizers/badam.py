"""BAdam: Adam on one block at a time, K steps each, with the moments of that block alone.

    block b(w) of window w = t // K:   W_b <- W_b - eta (Adam(G_b) + lambda W_b)

b goes through the blocks in some order, and Adam starts anew at each of them. Blocks are the
layers; with `before` and `after` also what stands around them. State: 2 / L of the layers' size.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pefts import targets
from pefts.optimizers import active, projection
from pefts.optimizers.decay import found, leaf_paths

ORDERS = ("ascending", "descending", "random")
VECTORS = (r"(^|/)(bias|scale)(/value)?$",)  # biases, and the scales of norms


def badam(
    learning_rate: Any,
    *,
    interval: int = 50,
    order: str | Sequence[int] = "descending",
    inner: optax.GradientTransformation | None = None,
    weight_decay: Any = 0.0,
    no_decay: Sequence[str] | None = None,
    before: Sequence[str] = (),
    after: Sequence[str] = (),
    seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    """Block coordinate descent with Adam: one block for K updates, then the next.

    NOTE(paper): the released code gives the first block K - 1 updates, and keeps a float32 copy of
      the block at work; here it is K, and parameters are as precise as they are.

    Args:
      learning_rate: eta, a number or an optax schedule of the update's number.
      interval: K, updates of a block (paper's code: 50).
      order: "descending", from the last block to the first (paper's code), "ascending", "random",
        every pass in an order of its own, or block numbers, taken in turn: [5] stays at block 5.
      inner: what is run on the block, from a fresh state each time (None: optax.scale_by_adam()).
      weight_decay: lambda, of the block at work (paper's code: that of the optimizer given).
      no_decay: regular expressions of leaves that do not decay (None: biases and scales).
        NOTE(paper): the released code means to spare those but lets them decay, as () does.
      before, after: regular expressions of leaves outside the layers, each a block in front of the
        layers or behind them, with a state of full size; what none finds does not move (paper: no
        such blocks; pefts.optimizers.active has EMBEDDINGS, NORM, HEAD).
      seed: of the random order.

    Returns:
      A transformation whose update needs params, with a `pefts.optimizers.active.ActiveState`;
      there is what counts as a layer, and what unrolled ones cost. optax.inject_hyperparams takes
      it with static_args=("interval",).

    Raises:
      ValueError: interval below 1, an unknown order; at init: a block number out of range, a
        pattern that matches nothing, no layers, stacks of different length.

    Example:
      >>> import jax.numpy as jnp
      >>> from pefts.optimizers.badam import badam
      >>> params = {"layers": {"kernel": jnp.ones((3, 2, 2))}}
      >>> tx = badam(0.1, interval=1)
      >>> state = tx.init(params)
      >>> for _ in range(4):
      ...     updates, state = tx.update(params, state, params)
      ...     print(jnp.any(updates["layers"]["kernel"] != 0, axis=(1, 2)).tolist())
      [False, False, True]
      [False, True, False]
      [True, False, False]
      [False, False, True]

    Source: BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models,
      arXiv 2404.02827.
    """
    active.check_steps("interval", interval)
    order = active.check_order(order, ORDERS)
    no_decay = (no_decay,) if isinstance(no_decay, str) else no_decay
    patterns = VECTORS if no_decay is None else tuple(no_decay)

    def mask(tree: Any) -> Any:
        return jax.tree.map(lambda path: not found(patterns, path), leaf_paths(tree))

    def choose(window: Any, blocks: int) -> jax.Array:
        return block_at(order, seed, window, blocks)[None]

    policy = active.Policy(interval, choose, "all", "frozen", before, after)
    tx = active.scale_by_units(active.decayed(inner, weight_decay, mask), policy)
    tx = projection.with_rate(tx, learning_rate=learning_rate, weight_decay=0.0)

    def init(params: Any) -> Any:
        for pattern in no_decay or ():
            targets.match(pattern, jax.tree.leaves(leaf_paths(params)), argument="no_decay")
        return tx.init(params)

    return optax.GradientTransformationExtraArgs(init, tx.update)


def block_at(order: str | Sequence[int], seed: Any, window: Any, blocks: int) -> jax.Array:
    """The block of a window, a scalar."""
    window = jnp.asarray(window, jnp.int32)
    if not isinstance(order, str):
        active.check_numbers(order, blocks)
        return jnp.asarray(order, jnp.int32)[window % len(order)]
    at = window % blocks
    if order == "random":
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), window // blocks)
        return jax.random.permutation(key, jnp.arange(blocks, dtype=jnp.int32))[at]
    return at if order == "ascending" else blocks - 1 - at
