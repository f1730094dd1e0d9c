"""Layers of a post-norm transformer encoder, in Flax Linen; `dense` and `table` serve decoders too.

Every projection is an nn.Dense with a (d_in, d_out) kernel and attention itself is a module without
parameters, so adapters can intercept both. Shape legend: B batch, T tokens, D hidden size, N heads,
H head size, F intermediate size.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.attention import Attend
from models.config import ACTIVATIONS, REMAT, EncoderConfig
from models.decoder_config import DecoderConfig

BLOCK_OUTPUT = "block_output"  # among a model's intermediates: (B, T, D), or (L, B, T, D) scanned


def dense(
    config: EncoderConfig | DecoderConfig,
    features: int,
    name: str | None = None,
    dtype: str | None = None,
    bias: bool = True,
) -> nn.Dense:
    """nn.Dense with the initialiser of the configuration, and its dtypes unless one is given."""
    return nn.Dense(
        features,
        use_bias=bias,
        dtype=dtype or config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=nn.initializers.normal(config.initializer_range),
        name=name,
    )


def table(config: EncoderConfig | DecoderConfig, rows: int, name: str | None = None) -> nn.Embed:
    """nn.Embed with the initialiser and dtypes of the configuration."""
    return nn.Embed(
        rows,
        config.hidden_size,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        embedding_init=nn.initializers.normal(config.initializer_range),
        name=name,
    )


def norm(config: EncoderConfig, x_BxTxD: jax.Array) -> jax.Array:
    """nn.LayerNorm called `norm`; statistics in float32, result in the configuration's dtype."""
    layer_norm = nn.LayerNorm(
        config.norm_eps,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        # E[x^2] - E[x]^2 cancels where the mean is large; the checkpoints were trained without it.
        use_fast_variance=False,
        name="norm",
    )
    # Flax relies on implicit promotion between float32 statistics and bfloat16 scales.
    with jax.numpy_dtype_promotion("standard"):
        return layer_norm(x_BxTxD)


class Embeddings(nn.Module):
    """norm(word + token type + position), (B, T) -> (B, T, D)."""

    config: EncoderConfig

    @nn.compact
    def __call__(
        self, tokens_BxT: jax.Array, types_BxT: jax.Array, deterministic: bool
    ) -> jax.Array:
        config = self.config
        x_BxTxD = table(config, config.vocab_size, "word_embeddings")(tokens_BxT)
        x_BxTxD += table(config, config.type_vocab_size, "token_type_embeddings")(types_BxT)
        positions = _positions(config, tokens_BxT)
        x_BxTxD += table(config, config.max_positions, "position_embeddings")(positions)
        x_BxTxD = norm(config, x_BxTxD)
        return nn.Dropout(config.dropout)(x_BxTxD, deterministic=deterministic)


def _positions(config: EncoderConfig, tokens_BxT: jax.Array) -> jax.Array:
    if config.model_type == "bert":
        return jnp.arange(tokens_BxT.shape[1])[None, :]
    # RoBERTa counts real tokens from pad_id + 1 and leaves pads on row pad_id.
    real_BxT = (tokens_BxT != config.pad_id).astype(jnp.int32)
    return jnp.cumsum(real_BxT, axis=1) * real_BxT + config.pad_id


class SelfAttention(nn.Module):
    """norm(x + output(attend(query x, key x, value x)))."""

    config: EncoderConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, mask_Bx1x1xT: jax.Array) -> jax.Array:
        config = self.config
        size, heads = config.hidden_size, config.num_heads

        def project(name: str) -> jax.Array:
            y_BxTxD = dense(config, size, name)(x_BxTxD)
            return y_BxTxD.reshape(*y_BxTxD.shape[:2], heads, size // heads)

        attend = Attend(config.attention_dropout, self.deterministic, name="attend")
        y_BxTxNxH = attend(project("query"), project("key"), project("value"), mask_Bx1x1xT)
        y_BxTxD = y_BxTxNxH.reshape(*y_BxTxNxH.shape[:2], size)
        y_BxTxD = dense(config, size, "output")(y_BxTxD)
        y_BxTxD = nn.Dropout(config.dropout, deterministic=self.deterministic)(y_BxTxD)
        return norm(config, x_BxTxD + y_BxTxD)


class Mlp(nn.Module):
    """norm(x + output(activation(intermediate x)))."""

    config: EncoderConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        config = self.config
        y_BxTxF = dense(config, config.intermediate_size, "intermediate")(x_BxTxD)
        y_BxTxF = ACTIVATIONS[config.activation](y_BxTxF)
        y_BxTxD = dense(config, config.hidden_size, "output")(y_BxTxF)
        y_BxTxD = nn.Dropout(config.dropout, deterministic=self.deterministic)(y_BxTxD)
        return norm(config, x_BxTxD + y_BxTxD)


class Layer(nn.Module):
    """One transformer layer, in the (carry, None) form of a scan body.

    Its output is sown as BLOCK_OUTPUT, which is kept in calls with mutable=["intermediates"] alone.
    """

    config: EncoderConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, mask_Bx1x1xT: jax.Array) -> tuple[jax.Array, None]:
        attention = SelfAttention(self.config, self.deterministic, name="attention")
        x_BxTxD = attention(x_BxTxD, mask_Bx1x1xT)
        x_BxTxD = Mlp(self.config, self.deterministic, name="mlp")(x_BxTxD)
        self.sow("intermediates", BLOCK_OUTPUT, x_BxTxD)
        return x_BxTxD, None


class Layers(nn.Module):
    """All layers: `layers` scanned, or `layers_0`, `layers_1`, ... unrolled."""

    config: EncoderConfig

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, mask_Bx1x1xT: jax.Array, deterministic: bool
    ) -> jax.Array:
        config, layer = self.config, Layer
        if config.remat != "none":
            # Inside a scan there is nothing to merge a recomputation with, so CSE may stay on.
            layer = nn.remat(layer, policy=REMAT[config.remat], prevent_cse=not config.scan_layers)
        if not config.scan_layers:
            for i in range(config.num_layers):
                x_BxTxD, _ = layer(config, deterministic, name=f"layers_{i}")(x_BxTxD, mask_Bx1x1xT)
            return x_BxTxD
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=config.num_layers,
        )
        return scanned(config, deterministic, name="layers")(x_BxTxD, mask_Bx1x1xT)[0]


class Pooler(nn.Module):
    """tanh(dense(first token)), (B, T, D) -> (B, D)."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        return jnp.tanh(dense(self.config, self.config.hidden_size, "dense")(x_BxTxD[:, 0]))
