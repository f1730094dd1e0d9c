"""Decoder language models in Flax Linen: Llama, Mistral, Qwen, Gemma and GPT-2 by configuration.

Pre-norm transformer: x + attention(norm(x)), then x + mlp(norm(x)); grouped-query attention
(Ainslie et al., arXiv 2305.13245), rotary or learned positions, gated MLP. The cache of keys and
values is an argument and a result, never hidden state.

Parameters mirror the names that transformers gives a Llama: `embed_tokens/embedding`,
`layers/self_attn/q_proj/kernel` with a leading axis L when layers are scanned
(`layers_0/...` when not), `norm/scale`, `lm_head/kernel` where it is not tied.

Shape legend: B batch, T tokens, S slots of keys (T, or the cache's length), D hidden size, N query
heads, K key heads, H head size, F intermediate size, V vocabulary, L layers, Z kinds of layers.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from models import rope
from models.attention import Attend, causal
from models.config import ACTIVATIONS, REMAT
from models.decoder_config import DecoderConfig
from models.layers import BLOCK_OUTPUT, dense, table


class Cache(NamedTuple):
    """Keys and values of the tokens so far, in slots that a call fills from `length` on."""

    keys: jax.Array  # (L, B, S, K, H)
    values: jax.Array  # (L, B, S, K, H)
    real: jax.Array  # (B, S) whether a slot holds a token, not padding or nothing
    length: jax.Array  # () slots in use


class Around(NamedTuple):
    """What every layer of one call is given beside x; a leading axis Z tells full from sliding."""

    mask: jax.Array | None  # (Z, B or 1, 1, T, S); None: causal, nothing else
    turns: tuple[jax.Array, jax.Array] | None  # cos and sin (Z, B, T, H/2)
    first: jax.Array | int = 0  # slot of the cache that the first token goes to


def empty_cache(config: DecoderConfig, batch: int, slots: int) -> Cache:
    """A cache for so many sequences of at most so many tokens."""
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    return Cache(
        jnp.zeros(shape, config.dtype),
        jnp.zeros(shape, config.dtype),
        jnp.zeros((batch, slots), bool),
        jnp.zeros((), jnp.int32),
    )


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) times scale, or times 1 + scale; in float32 inside."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, offset = self.config, self.config.norm == "rms_offset"
        start = nn.initializers.zeros if offset else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],), config.param_dtype)
        scale = scale.astype(jnp.float32) + (1.0 if offset else 0.0)
        x = x.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.norm_eps)
        return (x * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(config.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) times scale plus bias; in float32 inside."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        config, shape = self.config, x_BxTxD.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape, config.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, config.param_dtype)
        x = x_BxTxD.astype(jnp.float32)
        x -= jnp.mean(x, axis=-1, keepdims=True)
        x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.norm_eps)
        x = x * scale.astype(jnp.float32)[None, None] + bias.astype(jnp.float32)[None, None]
        return x.astype(config.dtype)


def norm(config: DecoderConfig, name: str | None = None) -> nn.Module:
    """The configuration's kind of norm."""
    return (LayerNorm if config.norm == "layer" else RMSNorm)(config, name=name)


class SelfAttention(nn.Module):
    """o_proj(attend(q_proj x, k_proj x, v_proj x)); keys and values go through the cache."""

    config: DecoderConfig
    deterministic: bool = True

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, stored: Any, layer: jax.Array | int, kind: Any, around: Around
    ) -> tuple[jax.Array, Any]:
        config = self.config
        q, k, v = self._project(x_BxTxD)
        if around.turns is not None:
            cos, sin = (angles[kind] for angles in around.turns)
            q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        if stored is not None:
            zero = jnp.zeros((), jnp.int32)
            at = (jnp.asarray(layer, jnp.int32), zero, around.first, zero, zero)
            stored = tuple(
                jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), at)
                for old, new in zip(stored, (k, v), strict=True)
            )
            k, v = (all_layers[layer] for all_layers in stored)
        attend = Attend(
            config.attention_dropout,
            self.deterministic,
            config.query_scale,
            config.attention_cap,
            config.attention,
            name="attend",
        )
        y_BxTxNxH = attend(q, k, v, None if around.mask is None else around.mask[kind])
        y = y_BxTxNxH.reshape(*y_BxTxNxH.shape[:2], -1)
        return dense(config, config.hidden_size, "o_proj", bias=config.output_bias)(y), stored

    def _project(self, x_BxTxD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        config, bias = self.config, self.config.qkv_bias

        def heads(y: jax.Array, count: int) -> jax.Array:
            return y.reshape(*y.shape[:2], count, config.head_dim)

        n, k = config.num_heads, config.num_kv_heads
        if config.fused_qkv:
            y = dense(config, 3 * n * config.head_dim, "qkv_proj", bias=bias)(x_BxTxD)
            q, key, value = (heads(part, n) for part in jnp.split(y, 3, axis=-1))
            return q, key, value
        q = heads(dense(config, n * config.head_dim, "q_proj", bias=bias)(x_BxTxD), n)
        key = heads(dense(config, k * config.head_dim, "k_proj", bias=bias)(x_BxTxD), k)
        value = heads(dense(config, k * config.head_dim, "v_proj", bias=bias)(x_BxTxD), k)
        if config.qk_norm:
            q, key = RMSNorm(config, name="q_norm")(q), RMSNorm(config, name="k_norm")(key)
        return q, key, value


class Mlp(nn.Module):
    """down_proj(activation(gate_proj x) * up_proj x), or down_proj(activation(up_proj x))."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        config, bias = self.config, self.config.mlp_bias
        activation = ACTIVATIONS[config.activation]
        y_BxTxF = dense(config, config.intermediate_size, "up_proj", bias=bias)(x_BxTxD)
        if config.gated:
            gate_BxTxF = dense(config, config.intermediate_size, "gate_proj", bias=bias)(x_BxTxD)
            y_BxTxF = activation(gate_BxTxF) * y_BxTxF
        else:
            y_BxTxF = activation(y_BxTxF)
        return dense(config, config.hidden_size, "down_proj", bias=bias)(y_BxTxF)


class Layer(nn.Module):
    """One transformer layer, in the (carry, None) form of a scan body.

    The carry is (x, stored keys and values of all layers or None). Its output is sown as
    BLOCK_OUTPUT, which is kept in calls with mutable=["intermediates"] alone.
    """

    config: DecoderConfig
    deterministic: bool = True

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Any], layer: Any, kind: Any, around: Around
    ) -> tuple[tuple[jax.Array, Any], None]:
        config, (x_BxTxD, stored) = self.config, carry
        attention = SelfAttention(config, self.deterministic, name="self_attn")
        y_BxTxD = norm(config, "attention_norm")(x_BxTxD)
        y_BxTxD, stored = attention(y_BxTxD, stored, layer, kind, around)
        x_BxTxD += self._behind(y_BxTxD, "attention_norm_after")
        y_BxTxD = Mlp(config, name="mlp")(norm(config, "mlp_norm")(x_BxTxD))
        x_BxTxD += self._behind(y_BxTxD, "mlp_norm_after")
        self.sow("intermediates", BLOCK_OUTPUT, x_BxTxD)
        return (x_BxTxD, stored), None

    def _behind(self, y_BxTxD: jax.Array, name: str) -> jax.Array:
        if self.config.sandwich:
            y_BxTxD = norm(self.config, name)(y_BxTxD)
        return nn.Dropout(self.config.dropout, deterministic=self.deterministic)(y_BxTxD)


class Layers(nn.Module):
    """All layers: `layers` scanned, or `layers_0`, `layers_1`, ... unrolled."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, stored: Any, around: Around, deterministic: bool
    ) -> tuple[jax.Array, Any]:
        config, layer = self.config, Layer
        kinds = np.asarray(config.sliding or (False,) * config.num_layers, np.int32)
        if config.remat != "none":
            # Inside a scan there is nothing to merge a recomputation with, so CSE may stay on.
            layer = nn.remat(layer, policy=REMAT[config.remat], prevent_cse=not config.scan_layers)
        if not config.scan_layers:
            for i, kind in enumerate(kinds):
                one = layer(config, deterministic, name=f"layers_{i}")
                (x_BxTxD, stored), _ = one((x_BxTxD, stored), i, int(kind), around)
            return x_BxTxD, stored
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, 0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=config.num_layers,
        )
        numbers = jnp.arange(config.num_layers, dtype=jnp.int32)
        carry, _ = scanned(config, deterministic, name="layers")(
            (x_BxTxD, stored), numbers, jnp.asarray(kinds), around
        )
        return carry


class Decoder(nn.Module):
    """Token ids to logits, (B, T) -> (B, T, V) in float32.

    Called with mutable=["intermediates"] it also returns the output of every layer, under
    models.layers.BLOCK_OUTPUT: one (L, B, T, D) where layers are scanned, else L of (B, T, D).

    Arguments of its methods: `tokens` (B, T); `mask` (B, T), true (or 1) at real tokens, on either
    side, None if all are; `segments` (B, T), for packed rows: tokens see their own segment only and
    positions start anew in each; `positions` (B, T) counts real tokens if not given.

    Raises:
      ValueError: at the first call: arrays of other shapes than tokens, or more tokens than learned
        positions.
    """

    config: DecoderConfig

    def setup(self) -> None:
        config = self.config
        self.embed_tokens = table(config, config.vocab_size)
        if config.rope is None:
            self.embed_positions = table(config, config.max_positions)
        self.embed_dropout = nn.Dropout(config.embed_dropout)
        self.stack = Layers(config)
        nn.share_scope(self, self.stack)
        self.norm = norm(config)
        if not config.tie_embeddings:
            self.lm_head = dense(config, config.vocab_size, bias=False)

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        *,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Logits (B, T, V) of the token after each."""
        x_BxTxD = self.hidden(
            tokens, mask, segments=segments, positions=positions, deterministic=deterministic
        )
        return self.logits(x_BxTxD)

    def hidden(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        *,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Hidden states (B, T, D) behind the last norm."""
        _check_shapes(self.config, tokens, mask=mask, segments=segments, positions=positions)
        real = None if mask is None else mask.astype(bool)
        if positions is None:
            positions = _positions(tokens, real, segments)
        around = self._around(tokens.shape[1], tokens.shape[1], positions, real, segments)
        return self._run(tokens, positions, None, around, deterministic)[0]

    def extend(
        self, tokens: jax.Array, cache: Cache, mask: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Logits (B, V) of the token after the last one given, and the cache with all of them.

        Padding goes to the left, and only the first call may have any.
        """
        _check_shapes(self.config, tokens, mask=mask)
        real = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        before = jnp.sum(cache.real, axis=1, dtype=jnp.int32, keepdims=True)
        positions = jnp.maximum(before + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)
        zero = jnp.zeros((), jnp.int32)
        seen = jax.lax.dynamic_update_slice(cache.real, real, (zero, cache.length))
        slots = cache.real.shape[1]
        around = self._around(tokens.shape[1], slots, positions, seen, None, cache.length)
        x_BxTxD, (keys, values) = self._run(tokens, positions, cache[:2], around, True)
        new = Cache(keys, values, seen, cache.length + tokens.shape[1])
        return self.logits(x_BxTxD[:, -1:])[:, 0], new

    def logits(self, x_BxTxD: jax.Array) -> jax.Array:
        """The head on hidden states, (B, T, D) -> (B, T, V) in float32."""
        tied = self.config.tie_embeddings
        y_BxTxV = self.embed_tokens.attend(x_BxTxD) if tied else self.lm_head(x_BxTxD)
        y_BxTxV, cap = y_BxTxV.astype(jnp.float32), self.config.logit_cap
        return y_BxTxV if cap is None else cap * jnp.tanh(y_BxTxV / cap)

    def loss(
        self,
        tokens: jax.Array,
        targets: jax.Array,
        mask: jax.Array | None = None,
        *,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        deterministic: bool = True,
        chunk: int = 128,
    ) -> jax.Array:
        """-log p(target) of every token, (B, T) in float32, without ever holding all logits.

        Args:
          tokens: with mask, segments and positions as in `__call__`.
          targets: (B, T), the token after each.
          deterministic: without dropout.
          chunk: tokens of a row whose logits exist at a time, and again in the backward pass.
        """
        if chunk < 1:
            raise ValueError(f"chunk={chunk} must be at least 1")
        x_BxTxD = self.hidden(
            tokens, mask, segments=segments, positions=positions, deterministic=deterministic
        )
        batch, length = targets.shape
        pieces = -(-length // min(chunk, length))
        size = -(-length // pieces)
        behind = pieces * size - length
        x_BxTxD = jnp.pad(x_BxTxD, ((0, 0), (0, behind), (0, 0)))
        targets = jnp.pad(targets, ((0, 0), (0, behind)))

        def piece(module: "Decoder", carry: None, x: jax.Array, y: jax.Array) -> tuple[None, Any]:
            logits = module.logits(x)
            return carry, optax.softmax_cross_entropy_with_integer_labels(logits, y)

        over = nn.scan(
            nn.remat(piece, prevent_cse=False),
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        x_BxPxCxD = x_BxTxD.reshape(batch, pieces, size, -1)
        y_BxPxC = targets.reshape(batch, pieces, size)
        losses = over(self, None, x_BxPxCxD, y_BxPxC)[1]  # pyright: ignore[reportCallIssue]
        return losses.reshape(batch, -1)[:, :length]

    def _run(
        self, tokens: jax.Array, positions: jax.Array, stored: Any, around: Around, steady: bool
    ) -> tuple[jax.Array, Any]:
        config = self.config
        x_BxTxD = self.embed_tokens(tokens)
        if config.embed_scale != 1.0:
            # Rounded as the table is: Gemma's sqrt(D) in bfloat16 is another number.
            scale = jnp.asarray(config.embed_scale, config.param_dtype)
            x_BxTxD *= scale.astype(x_BxTxD.dtype)
        if config.rope is None:
            x_BxTxD += self.embed_positions(positions)
        x_BxTxD = self.embed_dropout(x_BxTxD, deterministic=steady)
        x_BxTxD, stored = self.stack(x_BxTxD, stored, around, steady)
        return self.norm(x_BxTxD), stored

    def _around(
        self,
        length: int,
        slots: int,
        positions: jax.Array,
        real: jax.Array | None,
        segments: jax.Array | None,
        first: jax.Array | None = None,
    ) -> Around:
        config, turns = self.config, None
        kinds = (False, True) if any(config.sliding) else (False,)
        slides = any(kinds) and config.window is not None and config.window < slots
        if config.rope is not None:
            ropes = [config.local_rope or config.rope if kind else config.rope for kind in kinds]
            tables = [rope.table(one, config.head_dim, positions) for one in ropes]
            turns = jnp.stack([cos for cos, _ in tables]), jnp.stack([sin for _, sin in tables])
        if real is None and segments is None and first is None and not slides:
            return Around(None, turns)
        at = 0 if first is None else first
        windows = [config.window if kind and slides else None for kind in kinds]
        masks = jnp.stack([causal(length, slots, at, window) for window in windows])
        if real is not None:
            masks &= real[None, :, None, None, :]
        if segments is not None:
            same = segments[:, :, None] == segments[:, None, :]
            masks &= same[None, :, None]
        return Around(masks, turns, at)


def build(config: DecoderConfig, num_labels: int | None, pooling: str) -> Decoder:
    """The decoder with its language-model head.

    Raises:
      ValueError: num_labels is given: decoders have no classification head here.
    """
    del pooling
    if num_labels is not None:
        raise ValueError(
            f"num_labels={num_labels}: a {config.model_type} has a language-model head here and no"
            " classifier; give an encoder for classification"
        )
    return Decoder(config)


def _positions(tokens: jax.Array, real: jax.Array | None, segments: jax.Array | None) -> jax.Array:
    """Real tokens before each, in its row or its segment."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    if segments is not None:
        starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
        return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    if real is None:
        return index
    return jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)


def _check_shapes(config: DecoderConfig, tokens: jax.Array, **arrays: jax.Array | None) -> None:
    if tokens.ndim != 2:
        raise ValueError(f"tokens has shape {tokens.shape}; it must be (batch, length)")
    for name, array in arrays.items():
        if array is not None and array.shape != tokens.shape:
            raise ValueError(
                f"{name} has shape {array.shape}, tokens {tokens.shape}; make them equal"
            )
    if config.max_length is not None and tokens.shape[1] > config.max_length:
        raise ValueError(
            f"tokens has {tokens.shape[1]} positions, the model at most {config.max_length};"
            " truncate when encoding (max_length)"
        )
