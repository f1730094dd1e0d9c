"""Learning rates for another width, another batch size, or a model from nothing."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax

from pefts import linalg
from pefts.optimizers import projection as subspaces
from pefts.optimizers.decay import leaf_paths
from pefts.targets import ALL_LINEAR, Targets, only

RULES = ("linear", "sqrt", "none")


class StepLaw(NamedTuple):
    """What the law recommends."""

    learning_rate: float  # the peak
    batch_tokens: float  # tokens of one batch


def scale_by_width(
    base_shapes: Any, *, targets: Targets = ALL_LINEAR, axes: Mapping[str, str] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Multiply the update of each hidden kernel by base fan-in / fan-in, the rule of muP for Adam.

        tx = optax.chain(
            optax.scale_by_adam(),
            scale_by_width(base_shapes),
            optax.add_decayed_weights(1e-2),       # behind it: eta lambda is the same at all widths
            optax.scale_by_learning_rate(eta),     # found on the base model
        )

    Embeddings, biases, norms and the head are unchanged. The rest of muP (the variance of fresh
    kernels, logits times base width / width, attention over d_head) concerns the model, and is no
    matter where weights are pretrained; a model whose logits are not scaled should name its head in
    `targets` too.

    Args:
      base_shapes: a tree like the parameters with the shapes of the base model, by
        jax.eval_shape(model.init, ...); depth may differ.
      targets: which kernels are hidden, as in pefts.targets.
      axes: {regular expression: letters of pefts.views}, for kernels with heads or windows. Without
        it a kernel has two axes, or three below "layers".

    Returns:
      A transformation without state; updates keep their dtype.

    Raises:
      ValueError: at init: a pattern matches no kernel, axes are ambiguous, or the base model lacks
        a hidden kernel or has it with other axes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from pefts.optimizers.transfer import scale_by_width
      >>> params = {"dense": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}
      >>> base = {"dense": {"kernel": jax.ShapeDtypeStruct((2, 4), float)}}
      >>> tx = scale_by_width(base)
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> updates["dense"]["kernel"][0, 0].item(), updates["dense"]["bias"][0].item()
      (0.25, 1.0)

    Source: Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer,
      arXiv 2203.03466.
    """
    options = subspaces.options(1, targets=targets, axes=axes)

    def init(params: Any) -> Any:
        _multipliers(options, base_shapes, params)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        leaves, treedef = jax.tree.flatten(updates)
        scaled = [
            leaf if factor == 1 else (linalg.precise(leaf) * factor).astype(leaf.dtype)
            for leaf, factor in zip(
                leaves, _multipliers(options, base_shapes, updates), strict=True
            )
        ]
        return treedef.unflatten(scaled), state

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))


def scale_learning_rate(
    learning_rate: float, base_batch: int, batch: int, rule: str = "sqrt"
) -> float:
    """The peak learning rate for another batch size.

    Args:
      learning_rate: the peak found with `base_batch`.
      base_batch, batch: examples, or tokens, of a batch.
      rule: "linear", times batch / base_batch (SGD); "sqrt", times its root (Adam and its kin);
        "none".

    Returns:
      The peak for `batch`; a schedule's warm-up and end stay as they are.

    Raises:
      ValueError: the rate is a schedule or not above 0, a batch is below 1, or the rule is unknown.

    Example:
      >>> from pefts.optimizers.transfer import scale_learning_rate
      >>> scale_learning_rate(1e-3, 32, 128), scale_learning_rate(0.1, 32, 128, "linear")
      (0.002, 0.4)

    Source: Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to Neural
      Network Training, arXiv 2006.09092.
    """
    if callable(learning_rate) or not learning_rate > 0:
        raise ValueError(
            f"learning_rate={learning_rate!r}: give the peak, above 0, and build the schedule from "
            "the result."
        )
    for name, value in (("base_batch", base_batch), ("batch", batch)):
        if not value >= 1:
            raise ValueError(f"{name}={value!r}: give the size of a batch, from 1.")
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is unknown; choose one of {RULES}.")
    ratio = batch / base_batch
    return learning_rate * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[rule]


def step_law(parameters: float, tokens: float) -> StepLaw:
    """The Step Law for pre-training: eta = 1.79 N^-0.713 D^0.307, batch tokens 0.58 D^0.571.

    The constants are written from memory and have not been compared with the paper. They speak of
    pre-training language models, not of fine-tuning.

    Args:
      parameters: N, without the embeddings.
      tokens: D, of the whole training.

    Returns:
      A StepLaw of the peak learning rate and the tokens of a batch.

    Raises:
      ValueError: a number is not above 0.

    Example:
      >>> from pefts.optimizers.transfer import step_law
      >>> [float(f"{number:.3g}") for number in step_law(1e9, 1e11)]
      [0.00163, 1110000.0]

    Source: Predictable Scale: Part I, Optimal Hyperparameter Scaling Law in Large Language Model
      Pretraining, arXiv 2503.04715.
    """
    for name, value in (("parameters", parameters), ("tokens", tokens)):
        if not value > 0:
            raise ValueError(f"{name}={value!r}: give a number above 0.")
    return StepLaw(1.79 * parameters**-0.713 * tokens**0.307, 0.58 * tokens**0.571)


def _multipliers(options: subspaces.Options, base_shapes: Any, tree: Any) -> list[float]:
    """One for each leaf of the tree."""
    sites = subspaces.sites(options, tree)
    names = [path.removesuffix("/value") for path in jax.tree.leaves(leaf_paths(base_shapes))]
    base = dict(zip(names, jax.tree.leaves(base_shapes), strict=True))
    factors = []
    for site in sites:
        if site is None:
            factors.append(1.0)
            continue
        if site.path not in base or len(base[site.path].shape) != len(site.shape):
            found = base[site.path].shape if site.path in base else "nothing"
            raise ValueError(
                f"base_shapes has {found} for {site.path!r} of shape {site.shape}: give the shapes "
                "of the same model at another width, or leave the kernel out of targets."
            )
        alike = subspaces.sites(
            subspaces.options(1, targets=only([site.path]), axes={".": site.axes}),
            {site.path: base[site.path]},
        )
        factors.append(alike[0].d_in / site.d_in)  # pyright: ignore[reportOptionalMemberAccess]
    return factors
