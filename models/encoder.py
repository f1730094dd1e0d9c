"""BERT and RoBERTa encoders in Flax Linen (MiniLM is a BERT), from a Hugging Face config.json.

Post-norm transformer of Devlin et al., arXiv 1810.04805; RoBERTa (Liu et al., arXiv 1907.11692)
differs in the numbering of positions alone.

Shape legend: B batch, T tokens, D hidden size, N heads, H head size, F intermediate size,
C classes, L layers.

Parameters mirror the names of transformers: `embeddings/word_embeddings/embedding`,
`encoder/layers/attention/query/kernel` with a leading axis L when layers are scanned
(`encoder/layers_0/...` when not), `pooler/dense/kernel`, `classifier/kernel`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.config import EncoderConfig, choose
from models.hf import NameMap, entries
from models.layers import Embeddings, Layers, Pooler, dense

POOLINGS = ("cls", "mean", "pooler")


def pool(x_BxTxD: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """Mean over unmasked tokens in float32, (B, T, D) -> (B, D); zero for a row without tokens."""
    weight_BxTx1 = mask_BxT.astype(bool).astype(jnp.float32)[:, :, None]
    total_BxD = jnp.sum(x_BxTxD.astype(jnp.float32) * weight_BxTx1, axis=1)
    return total_BxD / jnp.maximum(jnp.sum(weight_BxTx1, axis=1), 1.0)


class Encoder(nn.Module):
    """Token ids to hidden states, (B, T) -> (B, T, D).

    Called with mutable=["intermediates"] it also returns the output of every layer, under
    models.layers.BLOCK_OUTPUT: one (L, B, T, D) where layers are scanned, else L of (B, T, D).

    Args:
      config: sizes and numerics.
      pooling: of `embed`: "mean" over unmasked tokens, "cls" (first token) or "pooler" (BERT's
        tanh layer on the first token, the only one with parameters).

    Raises:
      ValueError: at the first call: unknown pooling, mask or token types of another shape than
        tokens, or a sequence longer than config.max_length.
    """

    config: EncoderConfig
    pooling: str = "mean"

    def setup(self) -> None:
        choose("pooling", self.pooling, POOLINGS)
        self.embeddings = Embeddings(self.config)
        self.encoder = Layers(self.config)
        if self.pooling == "pooler":
            self.pooler = Pooler(self.config)

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        token_types: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Hidden states of the last layer; mask is true (or 1) at real tokens."""
        _check_shapes(self.config, tokens, mask, token_types)
        types = jnp.zeros_like(tokens) if token_types is None else token_types
        x_BxTxD = self.embeddings(tokens, types, deterministic)
        x_BxTxD = self.encoder(x_BxTxD, mask.astype(bool)[:, None, None, :], deterministic)
        if self.is_initializing() and self.pooling == "pooler":
            self.pooler(x_BxTxD)  # its parameters exist whichever method initialises the model
        return x_BxTxD

    def embed(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        token_types: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Sentence vectors (B, D) in float32, by `pooling`; not normalised."""
        x_BxTxD = self(tokens, mask, token_types, deterministic=deterministic)
        if self.pooling == "mean":
            return pool(x_BxTxD, mask)
        x_BxD = self.pooler(x_BxTxD) if self.pooling == "pooler" else x_BxTxD[:, 0]
        return x_BxD.astype(jnp.float32)


class EncoderClassifier(nn.Module):
    """classifier(dropout(pooled hidden states)), (B, T) -> logits (B, C) in float32.

    Its encoder's parameters sit at the top level, as those of `Encoder` do.

    Args:
      config: sizes and numerics.
      num_labels: C; 1 for regression.
      pooling: see `Encoder`.

    Raises:
      ValueError: as `Encoder` does.
    """

    config: EncoderConfig
    num_labels: int
    pooling: str = "mean"

    def setup(self) -> None:
        self.base = Encoder(self.config, self.pooling)
        nn.share_scope(self, self.base)
        # In float32 whatever the encoder computes in: it is small, and losses need the digits.
        self.classifier = dense(self.config, self.num_labels, dtype="float32")
        self.dropout = nn.Dropout(self.config.classifier_dropout)

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        token_types: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Logits; mask is true (or 1) at real tokens."""
        x_BxD = self.embed(tokens, mask, token_types, deterministic=deterministic)
        return self.classifier(self.dropout(x_BxD, deterministic=deterministic))

    def embed(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        token_types: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Sentence vectors (B, D) in float32, by `pooling`; not normalised."""
        return self.base.embed(tokens, mask, token_types, deterministic=deterministic)


def _check_shapes(
    config: EncoderConfig, tokens: jax.Array, mask: jax.Array, token_types: jax.Array | None
) -> None:
    if tokens.ndim != 2:
        raise ValueError(f"tokens has shape {tokens.shape}; it must be (batch, length)")
    for name, array in (("mask", mask), ("token_types", token_types)):
        if array is not None and array.shape != tokens.shape:
            raise ValueError(
                f"{name} has shape {array.shape}, tokens {tokens.shape}; make them equal"
            )
    if tokens.shape[1] > config.max_length:
        raise ValueError(
            f"tokens has {tokens.shape[1]} positions, the model at most {config.max_length};"
            " truncate when encoding (max_length)"
        )


def build(config: EncoderConfig, num_labels: int | None, pooling: str) -> nn.Module:
    """The encoder, with a classification head when num_labels is given.

    Raises:
      ValueError: unknown pooling, or num_labels below 1.
    """
    choose("pooling", pooling, POOLINGS)
    if num_labels is None:
        return Encoder(config, pooling)
    if num_labels < 1:
        raise ValueError(f"num_labels={num_labels} must be at least 1 (1 is regression)")
    return EncoderClassifier(config, num_labels, pooling)


_TABLE = (
    ("embeddings/word_embeddings", "embeddings.word_embeddings", "embedding"),
    ("embeddings/position_embeddings", "embeddings.position_embeddings", "embedding"),
    ("embeddings/token_type_embeddings", "embeddings.token_type_embeddings", "embedding"),
    ("embeddings/norm", "embeddings.LayerNorm", "norm"),
    ("encoder/layers/attention/query", "encoder.layer.{l}.attention.self.query", "dense"),
    ("encoder/layers/attention/key", "encoder.layer.{l}.attention.self.key", "dense"),
    ("encoder/layers/attention/value", "encoder.layer.{l}.attention.self.value", "dense"),
    ("encoder/layers/attention/output", "encoder.layer.{l}.attention.output.dense", "dense"),
    ("encoder/layers/attention/norm", "encoder.layer.{l}.attention.output.LayerNorm", "norm"),
    ("encoder/layers/mlp/intermediate", "encoder.layer.{l}.intermediate.dense", "dense"),
    ("encoder/layers/mlp/output", "encoder.layer.{l}.output.dense", "dense"),
    ("encoder/layers/mlp/norm", "encoder.layer.{l}.output.LayerNorm", "norm"),
    ("pooler/dense", "pooler.dense", "dense"),
    ("classifier", "classifier", "dense"),
)
NAMES = NameMap(
    entries(_TABLE),
    prefixes=("bert.", "roberta."),
    outside=("classifier",),
    # A RoBERTa head (classifier.dense, classifier.out_proj) is none of ours: it is passed over when
    # no classifier is asked for, and refused, not replaced in silence, when one is.
    optional=(("pooler", r"pooler\..*"), ("classifier", r"classifier\..*")),
    fresh=("classifier",),
    ignored=(r"embeddings\.(position|token_type)_ids", r"(cls|lm_head)\..*"),
    # The first BERT checkpoints call the scale and shift of a norm gamma and beta.
    renamed=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
)
