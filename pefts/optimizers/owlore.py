"""OwLore: LISA that draws layers by how many outliers they hold, with GaLore on those it draws.

    A_ij = |W_ij| ||X_i||_2                    over all tokens of the calibration data; every kernel
    D_l  = 100 mean(A > M mean(A))             over all entries of all kernels of layer l
    p_l  = D_l / sum D                         (mode "owl")

    every K steps   gamma of L layers, one after the other with weights p, none twice
    each step       GaLore on those, AdamW on every leaf outside the layers; nothing elsewhere

D is computed once, before training. State: gamma / L of GaLore's, and twice the rest's size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pefts import linalg, paths
from pefts.optimizers import active, projection
from pefts.optimizers.galore import scale_by_galore
from pefts.optimizers.lisa import draw
from pefts.targets import ALL_LINEAR, Targets

MODES = ("owl", "owl_reverse", "increase", "decrease", "uniform")


def owlore(
    learning_rate: Any,
    *,
    probabilities: Sequence[float],
    gamma: int = 5,
    interval: int = 50,
    rank: int = 256,
    update_interval: int = 100,
    scale: Any = 1.0,
    weight_decay: Any = 0.0,
    seed: Any = 0,
    targets: Targets = ALL_LINEAR,
    axes: Mapping[str, str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Outlier-weighed layerwise sampled low-rank projection: GaLore on layers drawn by p.

    NOTE(paper): the released code keeps the moments and the projector of every layer that was ever
      drawn, and a layer that comes back goes on with that projector; here a layer that was not at
      work before starts anew, one that is drawn again goes on.

    Args:
      learning_rate: eta, a number or an optax schedule of the update's number (paper's code: 3e-4).
      probabilities: p, one for each layer, as of `sampling_probabilities`.
      gamma: layers at work, from 1 to as many as have a p above 0 (paper's code: 5).
      interval: K, updates between two draws (paper's code: 50).
      rank: r (paper's code: 256; the paper speaks of 128).
      update_interval: T, updates of a layer between two refreshes of its projector, the first when
        it starts (paper's code: 100).
      scale: alpha (paper's code: 1).
      weight_decay: lambda, of what is at work.
      seed: the draws are a function of it and of the interval's number.
      targets, axes: which kernels of a layer are projected, as in `scale_by_galore`.

    Returns:
      A transformation whose update needs params, with a `pefts.optimizers.active.ActiveState`;
      there is what counts as a layer, and what unrolled ones cost. optax.inject_hyperparams takes
      it with static_args=("gamma", "interval", "rank", "update_interval").

    Raises:
      ValueError: gamma or interval below 1, probabilities that are no distribution or of fewer
        layers than gamma; as `scale_by_galore`; at init: probabilities of another number of layers,
        no layers, stacks of different length.

    Example:
      >>> import jax.numpy as jnp
      >>> from pefts.optimizers.owlore import owlore
      >>> params = {"layers": {"kernel": jnp.ones((3, 6, 4))}, "norm": {"scale": jnp.ones(6)}}
      >>> tx = owlore(0.1, probabilities=(0.0, 0.0, 1.0), gamma=1, rank=2)
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> jnp.any(updates["layers"]["kernel"] != 0, axis=(1, 2)).tolist()
      [False, False, True]

    Source: OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection for Memory-Efficient LLM
      Fine-tuning, arXiv 2405.18380.
    """
    active.check_steps("gamma", gamma)
    active.check_steps("interval", interval)
    weights = _distribution(probabilities, gamma)

    def choose(window: Any, layers: int) -> jax.Array:
        if len(weights) != layers:
            raise ValueError(
                f"probabilities={weights!r} are {len(weights)}, for {layers} layers: give one for "
                "each."
            )
        return draw(seed, window, weights, gamma)

    low_rank = scale_by_galore(
        rank=rank, update_interval=update_interval, scale=scale, targets=targets, axes=axes
    )
    policy = active.Policy(interval, choose, reset="joining", outside="active")
    tx = active.scale_by_units(
        active.decayed(low_rank, weight_decay), policy, outside=active.decayed(None, weight_decay)
    )
    return projection.with_rate(tx, learning_rate=learning_rate, weight_decay=0.0)


def outlier_ratios(
    params: Mapping[str, Any], stats: Mapping[str, Mapping[str, Any]], *, multiplier: float = 13.0
) -> tuple[float, ...]:
    """D (L,), the percentage of each layer's entries |W_ij| ||X_i|| above M times their mean.

    Args:
      params: the base parameters, kernels W (L, d_in, d_out) or those of unrolled layers.
      stats: second moments of the kernels' inputs, of all linear layers, from
        pefts.calibrate(fn, params, batches) (paper: 128 sequences of 2048 tokens of C4). Kernels
        outside the layers are passed over.
      multiplier: M (paper: 13).

    Returns:
      One percentage for each layer, in the order of the layers.

    Raises:
      ValueError: M is not above 0, a kernel has no second moments or is not in params, no layers,
        stacks of different length.

    Example:
      >>> import jax.numpy as jnp
      >>> from pefts.optimizers.owlore import outlier_ratios
      >>> params = {"layers": {"kernel": jnp.ones((2, 4, 5)).at[1, 2, 3].set(99.0)}}
      >>> moments = {"second_moment": jnp.stack([jnp.eye(4)] * 2), "count": jnp.ones(2)}
      >>> outlier_ratios(params, {"layers/kernel": moments})
      (0.0, 5.0)

    Source: the outlier ratio of OWL, arXiv 2310.05175.
    """
    if not 0 < multiplier < float("inf"):
        raise ValueError(f"multiplier={multiplier!r}: give M, a number above 0.")
    leaves, chosen = paths.flatten(params), sorted(stats)
    for path in chosen:
        if path not in leaves or "second_moment" not in stats[path]:
            missing = "'second_moment'" if path in leaves else "such leaf in params"
            raise ValueError(
                f"stats: {path!r} has no {missing}: pass what pefts.calibrate(fn, params, batches) "
                "returns for these params."
            )
    layers, stacked, unrolled = active.find_layers(chosen, [leaves[p].shape for p in chosen])
    whole = [(chosen[at], layer) for layer, places in unrolled.items() for at in places]
    kernels = [(chosen[at], slice(None)) for at in stacked] + [
        (path, slice(layer, layer + 1)) for path, layer in whole
    ]
    total, size, above = (np.zeros(layers) for _ in range(3))
    for path, at in kernels:
        sums, entries = _sizes(leaves[path], stats[path])
        total[at] += np.asarray(sums, np.float64)
        size[at] += entries
    thresholds = multiplier * total / size
    for path, at in kernels:
        above[at] += np.asarray(_count_above(leaves[path], stats[path], thresholds[at]))
    return tuple((100 * above / size).tolist())


def sampling_probabilities(ratios: Sequence[float], mode: str = "owl") -> tuple[float, ...]:
    """p (L,), how likely each layer is drawn.

    Args:
      ratios: D (L,), of `outlier_ratios`.
      mode: "owl", in proportion to D (paper); "owl_reverse", to max(p) - p of that; "increase", to
        1, ..., L; "decrease", to L, ..., 1; "uniform", as LISA.

    Returns:
      A distribution, for `owlore`.

    Raises:
      ValueError: an unknown mode; ratios that are negative, not finite, none, or leave no layer to
        draw in this mode.

    Example:
      >>> from pefts.optimizers.owlore import sampling_probabilities
      >>> sampling_probabilities((1.0, 0.0, 3.0))
      (0.25, 0.0, 0.75)

    Source: OwLore, arXiv 2405.18380.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; choose one of {MODES}.")
    D = np.asarray(ratios, np.float64)
    if D.ndim != 1 or not D.size or not np.all(np.isfinite(D)) or np.any(D < 0):
        raise ValueError(f"ratios={ratios!r}: give one number from 0 for each layer.")
    ranks = np.arange(1.0, len(D) + 1)
    weights = {
        "owl": D,
        "owl_reverse": np.max(D) - D,
        "increase": ranks,
        "decrease": ranks[::-1],
        "uniform": np.ones_like(D),
    }[mode]
    if not np.any(weights > 0):
        raise ValueError(
            f"ratios={ratios!r} leave no layer to draw with mode={mode!r}: a smaller multiplier "
            "finds more outliers, and mode='uniform' needs none."
        )
    return tuple((weights / np.sum(weights)).tolist())


def _distribution(probabilities: Sequence[float], gamma: int) -> tuple[float, ...]:
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 1 or not np.all(p >= 0) or not np.isclose(np.sum(p), 1, rtol=0, atol=1e-5):
        raise ValueError(
            f"probabilities={probabilities!r} are no distribution: give a number from 0 for each "
            "layer, with a sum of 1."
        )
    if np.count_nonzero(p) < gamma:
        raise ValueError(
            f"gamma={gamma!r} layers cannot be drawn: {np.count_nonzero(p)} of "
            f"probabilities={probabilities!r} are above 0."
        )
    return tuple(p.tolist())


def _magnitudes(W: jax.Array, norms: jax.Array) -> jax.Array:
    """|W_ij| ||X_i||, (layers, d_in, d_out)."""
    matrices = jnp.abs(linalg.precise(W)).reshape(*norms.shape, -1)
    return matrices * norms[..., None].astype(matrices.dtype)


def _norms(stats: Mapping[str, Any], W: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The kernels (layers, d_in, ...) and ||X_i|| (layers, d_in) of their inputs."""
    moments = jnp.diagonal(stats["second_moment"], axis1=-2, axis2=-1)
    norms = jnp.sqrt(moments * jnp.asarray(stats["count"], moments.dtype)[..., None])
    return (W[None], norms[None]) if norms.ndim == 1 else (W, norms)


@jax.jit
def _row_sums(W: jax.Array, stats: Mapping[str, Any]) -> jax.Array:
    W, norms = _norms(stats, W)
    return jnp.sum(_magnitudes(W, norms), axis=-1)


def _sizes(W: jax.Array, stats: Mapping[str, Any]) -> tuple[np.ndarray, int]:
    """The sum of each layer's magnitudes, and how many there are."""
    rows = np.asarray(_row_sums(W, dict(stats)), np.float64)
    return np.sum(rows, axis=-1), W.size // len(rows)


@jax.jit
def _over(W: jax.Array, stats: Mapping[str, Any], thresholds: jax.Array) -> jax.Array:
    W, norms = _norms(stats, W)
    found = _magnitudes(W, norms) > thresholds[:, None, None].astype(jnp.float32)
    return jnp.sum(found, axis=(-2, -1), dtype=jnp.int32)


def _count_above(W: jax.Array, stats: Mapping[str, Any], thresholds: np.ndarray) -> jax.Array:
    return _over(W, dict(stats), jnp.asarray(thresholds, jnp.float32))
