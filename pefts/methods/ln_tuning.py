"""LN tuning: train the scales and biases of the normalisation layers, and nothing else.

    g' = value, b' = value         vectors of the norm's width, float32 copies at first

A leaf belongs to a norm when its module's name says so ("norm", "LayerNorm_0", "input_layernorm",
"ln_1"). Trainable: the norms' sizes. The paper tunes the norms of the attention blocks; so does
`targets="attention.*norm"`. It wants a far higher learning rate than LoRA.
"""

from typing import Unpack

from pefts.core import Declaration, factory
from pefts.methods.full import replace_leaves
from pefts.targets import Select

NORMS = r"(?i)(^|/)(\w*norm\w*|ln_?\w*)/(scale|bias)$"


@factory
def ln_tuning(**select: Unpack[Select]) -> Declaration:
    """Train the norms alone: g' = value, b' = value, float32 copies of scale and bias at first.

    Args:
      **select: targets (default: scale and bias of every module named like a norm), exclude; see
        pefts.targets.Select.

    Returns:
      A Peft; merging is exact.

    Raises:
      ValueError: the model has no such norm.

    Example:
      >>> import jax, pefts
      >>> norm = {"scale": jax.numpy.ones(4)}
      >>> params = {"dense": {"kernel": jax.numpy.ones((6, 4))}, "norm": norm}
      >>> pefts.count(pefts.ln_tuning().init(jax.random.key(0), params).trainable)
      4

    Source: Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning,
      arXiv 2312.11420.
    """
    return replace_leaves(NORMS, select)
