"""LoRA+: the factor that starts at zero learns faster.

    group        leaves                              learning rate     weight decay
    slow         everything else (A)                 eta               yes
    fast         path matches `fast` (B)             eta * ratio       yes
    embedding    path matches `embedding`            1e-6, fixed       yes

and no decay where the path matches one of `no_decay`, in whichever group.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import optax

from pefts import targets
from pefts.optimizers.decay import found, leaf_paths

Schedule = Callable[[Any], Any]


def lora_plus(
    learning_rate: float | Schedule,
    ratio: float = 16.0,
    *,
    optimizer: Callable[..., optax.GradientTransformation] = optax.adamw,
    weight_decay: float = 0.0,
    fast: str = r"(^|/)B$",
    embedding: str = r"(^|/)embedding(/|$)",
    embedding_learning_rate: float = 1e-6,
    no_decay: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """One optimizer per group of an adapter's leaves: eta for A, eta * ratio for B.

    Args:
      learning_rate: eta, a number or an optax schedule.
      ratio: lambda = eta_B / eta_A, at least 1 (paper: about 16).
      optimizer: called as optimizer(learning_rate, weight_decay=...) for each group.
      weight_decay: of every leaf that `no_decay` does not match.
      fast: regular expression, searched in a leaf's path ("query/kernel/B"): the fast leaves.
      embedding: regular expression: leaves of adapted embeddings, fast ones among them.
      embedding_learning_rate: theirs; it is neither scheduled nor multiplied (paper's code: 1e-6).
      no_decay: regular expressions: leaves that do not decay.

    Returns:
      A transformation of the trainable tree; extra arguments of `update` reach `optimizer`.

    Raises:
      ValueError: ratio below 1; at init: `fast` or a pattern of `no_decay` that matches no leaf.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from pefts.optimizers import lora_plus
      >>> tree = {"query/kernel": {"A": jnp.ones(2), "B": jnp.ones(2)}}
      >>> sgd = lambda learning_rate, weight_decay: optax.sgd(learning_rate)
      >>> tx = lora_plus(0.5, ratio=4.0, optimizer=sgd)
      >>> updates, _ = tx.update(tree, tx.init(tree), tree)
      >>> updates["query/kernel"]["A"].tolist(), updates["query/kernel"]["B"].tolist()
      ([-0.5, -0.5], [-2.0, -2.0])

    Source: LoRA+: Efficient Low Rank Adaptation of Large Models, arXiv 2402.12354.
    """
    if not ratio >= 1:
        raise ValueError(f"ratio={ratio!r}: B learns at least as fast as A; give a number from 1.")
    rates = {
        "slow": learning_rate,
        "fast": _times(learning_rate, ratio),
        "embedding": embedding_learning_rate,
    }
    groups: dict[Hashable, optax.GradientTransformation] = {
        f"{group}{suffix}": optimizer(rate, weight_decay=decay)
        for group, rate in rates.items()
        for suffix, decay in (("", weight_decay), ("_no_decay", 0.0))
    }
    patterns = tuple([no_decay] if isinstance(no_decay, str) else no_decay)
    label = functools.partial(_labels, fast=fast, embedding=embedding, no_decay=patterns)
    return optax.partition(groups, label)


def _labels(tree: Any, *, fast: str, embedding: str, no_decay: tuple[str, ...]) -> Any:
    paths = leaf_paths(tree)
    flat = jax.tree.leaves(paths)
    targets.match(fast, flat, argument="fast")
    for pattern in no_decay:
        targets.match(pattern, flat, argument="no_decay")

    # NOTE(paper): the released rule also takes every vector (biases, DoRA's magnitudes) for a fast
    # leaf; here the path alone decides, so that what is fast is what was asked for.
    def label(path: str) -> str:
        group = "fast" if found((fast,), path) else "slow"
        group = "embedding" if found((embedding,), path) else group
        return f"{group}_no_decay" if found(no_decay, path) else group

    return jax.tree.map(label, paths)


def _times(learning_rate: float | Schedule, ratio: float) -> float | Schedule:
    if not callable(learning_rate):
        return learning_rate * ratio
    return lambda count: ratio * learning_rate(count)
