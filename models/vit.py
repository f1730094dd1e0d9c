"""Vision transformers in Flax Linen: ViT, and CLIP's image tower, from a Hugging Face config.json.

Pre-norm transformer on patches and a class token (Dosovitskiy et al., arXiv 2010.11929). CLIP's
(Radford et al., arXiv 2103.00020) has a norm before the layers, and the last norm on the class
token alone. Clips of F frames are B F images whose tokens see their own frame, but for the heads of
`head_offsets`, whose keys and values are another frame's (ZeroI2V, arXiv 2310.01324).

Shape legend: B batch, H and W height and width, C channels, T tokens (the class token, then the
patches row by row), D hidden size, N heads, F intermediate size, K classes, L layers.

Parameters: `embeddings/patch_embedding/kernel` (a convolution's), `embeddings/class_embedding`,
`embeddings/position_embeddings/embedding`, `encoder/layers/attention/query/kernel` with a leading
axis L when layers are scanned (`encoder/layers_0/...` when not), `norm/scale`, `classifier/kernel`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from models.attention import Attend
from models.config import REMAT, choose
from models.decoder import LayerNorm
from models.layers import BLOCK_OUTPUT, Pooler, dense, table
from models.vit_config import ACTIVATIONS, VisionConfig

POOLINGS = {"vit": ("cls", "mean", "pooler"), "clip_vision_model": ("cls", "mean", "projection")}


class Embeddings(nn.Module):
    """[class token, patches of the image] + positions, (B, H, W, C) -> (B, T, D)."""

    config: VisionConfig

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array, deterministic: bool) -> jax.Array:
        config: Any = self.config
        size = config.hidden_size
        start = nn.initializers.normal(config.initializer_range)
        patch = (config.patch_size, config.patch_size)
        project = nn.Conv(
            size,
            patch,
            patch,
            "VALID",
            use_bias=not config.is_clip,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            kernel_init=start,
            name="patch_embedding",
        )
        patches_BxTxD = project(images_BxHxWxC.astype(config.dtype))
        patches_BxTxD = patches_BxTxD.reshape(len(images_BxHxWxC), -1, size)
        token_D = self.param("class_embedding", start, (size,), config.param_dtype)
        token_Bx1xD = jnp.broadcast_to(
            token_D.astype(config.dtype)[None, None], (len(images_BxHxWxC), 1, size)
        )
        x_BxTxD = jnp.concatenate([token_Bx1xD, patches_BxTxD], axis=1)
        positions = jnp.arange(config.num_tokens)[None]
        x_BxTxD += table(config, config.num_tokens, "position_embeddings")(positions)
        if config.is_clip:
            x_BxTxD = LayerNorm(config, name="norm")(x_BxTxD)
        return nn.Dropout(config.dropout)(x_BxTxD, deterministic=deterministic)


def shift_heads(x_BFxTxNxH: jax.Array, frames: int, offsets: tuple[int, ...]) -> jax.Array:
    """Head n of frame t becomes that of frame t + offsets[n]; at the edges it stays its own.

    Args:
      x_BFxTxNxH: keys or values, the frames of a clip one after the other.
      frames: F.
      offsets: of the first heads; the others stay.

    >>> x = jnp.arange(3.0).reshape(3, 1, 1, 1) * jnp.ones((1, 1, 2, 1))
    >>> shift_heads(x, 3, (-1,))[:, 0, :, 0].tolist()
    [[0.0, 0.0], [0.0, 1.0], [1.0, 2.0]]
    """
    if not offsets:
        return x_BFxTxNxH
    x_BxFxTxNxH = x_BFxTxNxH.reshape(-1, frames, *x_BFxTxNxH.shape[1:])
    heads = []
    for head, offset in enumerate(offsets):
        seen = [t + offset if 0 <= t + offset < frames else t for t in range(frames)]
        heads.append(x_BxFxTxNxH[:, np.asarray(seen), :, head : head + 1])
    shifted = jnp.concatenate([*heads, x_BxFxTxNxH[..., len(offsets) :, :]], axis=-2)
    return shifted.reshape(x_BFxTxNxH.shape)


class SelfAttention(nn.Module):
    """output(attend(query x, key x, value x)), every token seeing every other."""

    config: VisionConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        config: Any = self.config
        size, heads = config.hidden_size, config.num_heads

        def project(name: str) -> jax.Array:
            y_BxTxD = dense(config, size, name, bias=config.qkv_bias)(x_BxTxD)
            return y_BxTxD.reshape(*y_BxTxD.shape[:2], heads, size // heads)

        attend = Attend(config.attention_dropout, self.deterministic, name="attend")
        everyone = jnp.ones((1, 1, 1, x_BxTxD.shape[1]), bool)
        k, v = (
            shift_heads(project(name), config.num_frames, config.head_offsets)
            for name in ("key", "value")
        )
        y_BxTxNxH = attend(project("query"), k, v, everyone)
        y_BxTxD = dense(config, size, "output")(y_BxTxNxH.reshape(x_BxTxD.shape))
        return nn.Dropout(config.dropout, deterministic=self.deterministic)(y_BxTxD)


class Mlp(nn.Module):
    """output(activation(intermediate x))."""

    config: VisionConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        config: Any = self.config
        y_BxTxF = dense(config, config.intermediate_size, "intermediate")(x_BxTxD)
        y_BxTxF = ACTIVATIONS[config.activation](y_BxTxF)
        y_BxTxD = dense(config, config.hidden_size, "output")(y_BxTxF)
        return nn.Dropout(config.dropout, deterministic=self.deterministic)(y_BxTxD)


class Layer(nn.Module):
    """x + attention(norm x), then x + mlp(norm x), in the (carry, None) form of a scan body.

    Its output is sown as BLOCK_OUTPUT, which is kept in calls with mutable=["intermediates"] alone.
    """

    config: VisionConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, _: None) -> tuple[jax.Array, None]:
        config: Any = self.config
        y_BxTxD = LayerNorm(config, name="norm_before")(x_BxTxD)
        x_BxTxD += SelfAttention(config, self.deterministic, name="attention")(y_BxTxD)
        y_BxTxD = LayerNorm(config, name="norm_after")(x_BxTxD)
        x_BxTxD += Mlp(config, self.deterministic, name="mlp")(y_BxTxD)
        self.sow("intermediates", BLOCK_OUTPUT, x_BxTxD)
        return x_BxTxD, None


class Layers(nn.Module):
    """All layers: `layers` scanned, or `layers_0`, `layers_1`, ... unrolled."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, deterministic: bool) -> jax.Array:
        config, layer = self.config, Layer
        if config.remat != "none":
            # Inside a scan there is nothing to merge a recomputation with, so CSE may stay on.
            layer = nn.remat(layer, policy=REMAT[config.remat], prevent_cse=not config.scan_layers)
        if not config.scan_layers:
            for i in range(config.num_layers):
                x_BxTxD, _ = layer(config, deterministic, name=f"layers_{i}")(x_BxTxD, None)
            return x_BxTxD
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            length=config.num_layers,
        )
        return scanned(config, deterministic, name="layers")(x_BxTxD, None)[0]


class VisionTransformer(nn.Module):
    """Images to hidden states, (B, H, W, C) -> (B, T, D); images normalised, floating.

    Clips likewise, (B, F, H, W, C) -> (B, F, T, D), where config.num_frames is above 1; the vector
    of a clip is the mean of its frames'.

    Args:
      config: sizes and numerics.
      pooling: of `embed`: "cls" (the class token behind the last norm), "mean" over the patches,
        "pooler" (a ViT's tanh layer on the class token) or "projection" (CLIP's, on the same).

    Raises:
      ValueError: at the first call: unknown pooling, or images of another shape than the model's.
    """

    config: VisionConfig
    pooling: str = "cls"

    def setup(self) -> None:
        config: Any = self.config
        choose("pooling", self.pooling, POOLINGS[config.model_type])
        self.embeddings = Embeddings(config)
        self.encoder = Layers(config)
        # CLIP has its last norm on the class token alone: a mean over patches does not meet it.
        if not config.is_clip or self.pooling != "mean":
            self.norm = LayerNorm(config)
        if config.num_frames > 1:
            zeros = nn.initializers.zeros  # an image model's frames start alike
            self.temporal_embeddings = table(config, config.num_frames).clone(embedding_init=zeros)
        if self.pooling == "pooler":
            self.pooler = Pooler(config)
        if self.pooling == "projection":
            self.projection = dense(config, config.projection_dim, bias=False)

    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Hidden states, normalised for a ViT; CLIP's as they leave the last layer."""
        config, frames = self.config, self.config.num_frames
        images = _frames(config, images)
        x_BxTxD = self.embeddings(images, deterministic)
        if frames > 1:
            times_F = jnp.tile(jnp.arange(frames), len(images) // frames)
            x_BxTxD += self.temporal_embeddings(times_F)[:, None]
        x_BxTxD = self.encoder(x_BxTxD, deterministic)
        if not config.is_clip:
            x_BxTxD = self.norm(x_BxTxD)
        if self.is_initializing():
            self._pool(x_BxTxD)  # its parameters exist whichever method initialises the model
        return x_BxTxD if frames == 1 else x_BxTxD.reshape(-1, frames, *x_BxTxD.shape[1:])

    def embed(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Image vectors (B, D) in float32, by `pooling`; not normalised."""
        x = self(images, deterministic=deterministic)
        y_BFxD = self._pool(x.reshape(-1, *x.shape[-2:])).astype(jnp.float32)
        return jnp.mean(y_BFxD.reshape(len(images), self.config.num_frames, -1), axis=1)

    def _pool(self, x_BxTxD: jax.Array) -> jax.Array:
        if self.pooling == "mean":
            return jnp.mean(x_BxTxD[:, 1:].astype(jnp.float32), axis=1)
        if self.pooling == "pooler":
            return self.pooler(x_BxTxD)
        first_Bx1xD = self.norm(x_BxTxD[:, :1]) if self.config.is_clip else x_BxTxD
        first_BxD = first_Bx1xD[:, 0]
        return self.projection(first_BxD) if self.pooling == "projection" else first_BxD


class ImageClassifier(nn.Module):
    """classifier(dropout(image vector)), (B, H, W, C) -> logits (B, K) in float32.

    Its base's parameters sit at the top level, as those of `VisionTransformer` do.

    Args:
      config: sizes and numerics.
      num_labels: K.
      pooling: see `VisionTransformer`.

    Raises:
      ValueError: as `VisionTransformer` does.
    """

    config: VisionConfig
    num_labels: int
    pooling: str = "cls"

    def setup(self) -> None:
        config: Any = self.config
        self.base = VisionTransformer(config, self.pooling)
        nn.share_scope(self, self.base)
        # In float32 whatever the base computes in: it is small, and losses need the digits.
        self.classifier = dense(config, self.num_labels, dtype="float32")
        self.dropout = nn.Dropout(self.config.classifier_dropout)

    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Logits."""
        x_BxD = self.embed(images, deterministic=deterministic)
        return self.classifier(self.dropout(x_BxD, deterministic=deterministic))

    def embed(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Image vectors (B, D) in float32, by `pooling`; not normalised."""
        return self.base.embed(images, deterministic=deterministic)


def _frames(config: VisionConfig, images: jax.Array) -> jax.Array:
    """The images, checked; of clips all frames one after the other."""
    if config.num_frames > 1:
        if images.ndim != 5 or images.shape[1] != config.num_frames:
            raise ValueError(
                f"clips have shape {images.shape}; this model (num_frames={config.num_frames}) "
                f"reads (batch, {config.num_frames}, height, width, channels)"
            )
        images = images.reshape(-1, *images.shape[2:])
    _check_images(config, images)
    return images


def _check_images(config: VisionConfig, images: jax.Array) -> None:
    size, channels = config.image_size, config.num_channels
    expected, shape = (size, size, channels), images.shape
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images are {images.dtype}; the model reads floats: scale and normalise them as its "
            "pretraining did"
        )
    if len(shape) == 4 and shape[1:] == expected:
        return
    if len(shape) == 4 and shape[1] == channels and shape[-1] != channels:
        raise ValueError(
            f"images have shape {shape}, channels before height and width; the model reads "
            f"(batch, *{expected}): transpose them to (0, 2, 3, 1)"
        )
    if len(shape) == 4 and shape[-1] == channels:
        raise ValueError(
            f"images are {shape[1]} x {shape[2]}, and the position table of this model is for "
            f"{size} x {size} (image_size): resize them"
        )
    raise ValueError(f"images have shape {shape}; the model reads (batch, *{expected})")


def build(config: VisionConfig, num_labels: int | None, pooling: str) -> nn.Module:
    """The vision transformer, with a classification head when num_labels is given.

    Raises:
      ValueError: unknown pooling, or num_labels below 1.
    """
    choose("pooling", pooling, POOLINGS[config.model_type])
    if num_labels is None:
        return VisionTransformer(config, pooling)
    if num_labels < 1:
        raise ValueError(f"num_labels={num_labels} must be at least 1")
    return ImageClassifier(config, num_labels, pooling)
