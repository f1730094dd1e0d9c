"""Adam whose moments are kept in 8 bits, a scale for every block of 256 numbers.

    m, v = map[code] s                                   what the last step left
    m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2    in float32
    update = -eta m^ / (sqrt(v^) + eps)                  with the usual correction of the bias
    codes, s = quantize(m), quantize(v)                  2 (1 + 4/256) bytes a parameter, not 8

See pefts.optimizers.blockwise for the format, and for any other optimizer than Adam.
"""

from typing import Any

import optax

from pefts.optimizers.blockwise import quantize_state
from pefts.optimizers.projection import with_rate
from pefts.targets import Targets


def adam8bit(
    learning_rate: Any,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    block_size: int = 256,
    min_size: int = 4096,
    exact: Targets | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with moments in 8 bits: W <- W - eta (m^ / (sqrt(v^) + eps) + lambda W).

    Args:
      learning_rate: eta, a number or an optax schedule.
      weight_decay: lambda, of every leaf. To spare some, chain `scale_by_adam8bit` with
        optax.add_decayed_weights(lambda, pefts.optimizers.decay_mask(...)).
      b1, b2, eps, block_size, min_size, exact: as in `scale_by_adam8bit`.

    Returns:
      A transformation; its update needs params if there is decay. optax.inject_hyperparams takes
      it with static_args=("block_size", "min_size").

    Raises:
      ValueError: as `scale_by_adam8bit`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from pefts.optimizers.adam8bit import adam8bit
      >>> params = {"dense": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}}
      >>> tx = adam8bit(1e-3, weight_decay=0.1)
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)

    Source: 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861.
    """
    return with_rate(
        scale_by_adam8bit(b1, b2, eps, block_size=block_size, min_size=min_size, exact=exact),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
    )


def scale_by_adam8bit(
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    *,
    block_size: int = 256,
    min_size: int = 4096,
    exact: Targets | None = None,
) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_adam in float32, with large moments in 8 bits between steps.

    It is 8-bit GaLore where it stands inside, galore(..., inner=scale_by_adam8bit()): the moments
    of the projected gradients are in 8 bits, the projectors and weight decay as they were.
    What happens to NaN, and to second moments far below their block's largest, is described at
    pefts.optimizers.blockwise.quantize_state.

    Args:
      b1, b2: decay of the first and second moments, from 0 to below 1 (the library: 0.9, 0.999).
      eps: above 0 (the library: 1e-8).
      block_size: consecutive elements with one scale (the library: 256; paper: 2048).
      min_size: leaves with fewer elements, in a layer if layers are stacked, stay in float32 (the
        library: 4096).
      exact: which leaves stay in float32, as `targets` of pefts.targets (None: embeddings).

    Returns:
      A transformation; its state is optax's ScaleByAdamState with `Quantized` leaves.

    Raises:
      ValueError: an argument is out of range; at init: `exact` matches no parameter.

    Example:
      >>> import jax.numpy as jnp
      >>> from pefts.optimizers.adam8bit import scale_by_adam8bit
      >>> state = scale_by_adam8bit().init({"kernel": jnp.ones((64, 128))})
      >>> state.nu["kernel"].codes.dtype, state.nu["kernel"].signed
      (dtype('uint8'), False)

    Source: 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861.
    """
    for name, value in (("b1", b1), ("b2", b2)):
        if isinstance(value, int | float) and not 0 <= value < 1:
            raise ValueError(f"{name}={value!r}: give a number from 0 to below 1.")
    if isinstance(eps, int | float) and not 0 < eps < float("inf"):
        raise ValueError(
            f"eps={eps!r}: give a number above 0; second moments that round to 0 are divided by it."
        )
    return quantize_state(
        optax.scale_by_adam(b1, b2, eps), block_size=block_size, min_size=min_size, exact=exact
    )
