"""Small models that know nothing of adapters: what the conformance suite adapts.

Every kernel is non-square, so that a transposition cannot hide: with d = 12, query, key and value
are 12 x (2, 8), out is (2, 8) x 12, the mlp's kernels are 12 x 20 and 20 x 12, the classifier is
12 x 4. All sides but the vocabulary's are multiples of 4.

Shape legend: B batch, T tokens, D width, N heads, H head size.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

VOCABULARY, WIDTH, HEADS, HEAD_SIZE, HIDDEN, LAYERS, CLASSES = 18, 12, 2, 8, 20, 2, 4
BATCH, TOKENS = 8, 6


class Norm(nn.Module):
    """Layer normalisation in its input's dtype; flax's own mixes dtypes, which tests forbid."""

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        scale_D = self.param("scale", nn.initializers.ones, (WIDTH,))
        bias_D = self.param("bias", nn.initializers.zeros, (WIDTH,))
        centred = x_BxTxD - x_BxTxD.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + 1e-6)
        return normed * scale_D[None, None] + bias_D[None, None]


class Attend(nn.Module):
    """Softmax attention without parameters, as a module that adapters can see (pefts.attention)."""

    @nn.compact
    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        return nn.dot_product_attention(q, k, v, mask=mask)


class Attention(nn.Module):
    """Self-attention whose projections keep the head axes in their kernels."""

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, mask_BxT: jax.Array) -> jax.Array:
        heads = (HEADS, HEAD_SIZE)
        q_BxTxNxH = nn.DenseGeneral(heads, name="query")(x_BxTxD)
        # a bias on the keys cancels in the softmax: it could never receive a gradient
        k_BxTxNxH = nn.DenseGeneral(heads, use_bias=False, name="key")(x_BxTxD)
        v_BxTxNxH = nn.DenseGeneral(heads, name="value")(x_BxTxD)
        attend = Attend(name="attend")
        attended = attend(q_BxTxNxH, k_BxTxNxH, v_BxTxNxH, mask_BxT[:, None, None, :])
        return nn.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(attended)


class Block(nn.Module):
    """Pre-norm attention and mlp, in the (carry, output) form that nn.scan wants."""

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, mask_BxT: jax.Array) -> tuple[jax.Array, None]:
        normed = Norm(name="norm_1")(x_BxTxD)
        x_BxTxD = x_BxTxD + Attention(name="attention")(normed, mask_BxT)
        hidden = nn.gelu(nn.Dense(HIDDEN, name="up")(Norm(name="norm_2")(x_BxTxD)))
        return x_BxTxD + nn.Dense(WIDTH, name="down")(hidden), None


class Classifier(nn.Module):
    """Token ids and a mask (B, T) to logits (B, CLASSES)."""

    scanned: bool = True

    @nn.compact
    def __call__(self, tokens_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
        x_BxTxD = nn.Embed(VOCABULARY, WIDTH, name="embed")(tokens_BxT)
        if self.scanned:
            layers = nn.scan(
                nn.remat(Block),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=LAYERS,
            )
            x_BxTxD, _ = layers(name="layers")(x_BxTxD, mask_BxT)
        else:
            for index in range(LAYERS):
                x_BxTxD, _ = Block(name=f"layers_{index}")(x_BxTxD, mask_BxT)
        x_BxTxD = Norm(name="norm")(x_BxTxD)
        weight_BxT = mask_BxT.astype(x_BxTxD.dtype)
        pooled_BxD = jnp.einsum("btd,bt->bd", x_BxTxD, weight_BxT) / weight_BxT.sum(1)[:, None]
        return nn.Dense(CLASSES, name="classifier")(pooled_BxD)


def inputs(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """(tokens, mask), every row with at least two tokens."""
    tokens = jax.random.randint(jax.random.key(seed), (BATCH, TOKENS), 0, VOCABULARY)
    lengths = 2 + jnp.arange(BATCH) % (TOKENS - 1)
    return tokens, jnp.arange(TOKENS)[None, :] < lengths[:, None]


def parameters(seed: int = 0) -> dict[str, Any]:
    """Of the scanned model; biases and scales are moved off 0 and 1, where errors would hide."""
    params = Classifier().init(jax.random.key(seed), *inputs())["params"]
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    moved = [
        leaf + 0.1 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, moved)


def unroll(params: Mapping[str, Any]) -> dict[str, Any]:
    """The same parameters for Classifier(scanned=False)."""
    rest = {name: value for name, value in params.items() if name != "layers"}
    layers = {
        f"layers_{index}": jax.tree.map(lambda leaf, n=index: leaf[n], params["layers"])
        for index in range(LAYERS)
    }
    return {**rest, **layers}


def cast(params: Any, dtype: Any) -> Any:
    """Floating leaves in another dtype."""

    def one(leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, params)
