"""Every method of the table on a decoder, with no code of its own for it."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, Case
from conformance import close
from subject import row_id
from tiny_decoders import SIZES

import pefts
from models.decoder import Decoder, empty_cache
from models.decoder_config import DecoderConfig
from pefts import core, paths

FIRST = list({case.method: case for case in reversed(CASES)}.values())
CONFIG = {
    "model_type": "qwen3",
    "head_dim": 8,
    "attention_bias": True,
    **SIZES,
    "num_hidden_layers": 2,
}


class Setting(NamedTuple):
    """A tiny decoder, grouped-query attention and norms of queries and keys, on two batches."""

    model: Decoder
    params: Any
    axes: dict[str, str]
    tokens: np.ndarray
    mask: np.ndarray
    plain: Callable[[Any], jax.Array]  # dense parameters -> losses, compiled once for all methods

    def losses(self, variables: Any, tokens: Any) -> jax.Array:
        return self.model.apply(variables, tokens, tokens, self.mask, chunk=4, method="loss")


@pytest.fixture(scope="module")
def setting() -> Setting:
    model = Decoder(DecoderConfig.from_hf(CONFIG))
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, SIZES["vocab_size"], (8, 6)).astype(np.int32)
    mask = (np.arange(6)[None] >= rng.integers(0, 4, 8)[:, None]).astype(np.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    axes = pefts.infer_axes(model.apply, params, tokens)

    @jax.jit
    def plain(params: Any) -> jax.Array:
        return model.apply({"params": params}, tokens, tokens, mask, chunk=4, method="loss")

    return Setting(model, params, axes, tokens, mask, plain)


def statistics(setting: Setting, peft: pefts.Peft) -> Any:
    if not set(peft.traits.needs) - {core.CONTEXT}:
        return None
    return pefts.calibrate(
        lambda variables, tokens: setting.losses(variables, tokens),
        setting.params,
        [setting.tokens, setting.tokens[::-1].copy()],
        peft,
        loss=(lambda losses, _: jnp.mean(losses))
        if set(peft.traits.needs) & set(core.GRADIENTS)
        else None,
    )


class Outputs(NamedTuple):
    losses: jax.Array
    grads: Any
    stepwise: jax.Array | None  # losses of the last two tokens, through the cache


@pytest.mark.parametrize("case", FIRST, ids=row_id)
def test_it_trains_merges_and_decodes(setting: Setting, case: Case) -> None:
    params = setting.params
    own = case.kwargs.get("targets")
    if isinstance(own, str) and not any(re.search(own, path) for path in paths.flatten(params)):
        pytest.skip(f"the row's targets {own!r} name kernels of an encoder")
    peft = pefts.METHODS[case.method](**case.kwargs, axes=setting.axes)
    state = peft.init(jax.random.key(1), params, statistics(setting, peft))
    moved = pefts.randomize(jax.random.key(2), state)
    context = case.context(len(setting.tokens)) if case.context else {}
    run = jax.jit(lambda state: outputs(setting, peft, state, context))
    base = setting.plain(params)
    fresh, out = run(state), run(moved)
    if peft.traits.identity_at_init:
        close(fresh.losses, base, 2e-5, "losses at step 0")
    if out.losses.shape == base.shape:
        assert float(jnp.abs(out.losses - base).max()) > 1e-3
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(out.grads))
    if peft.traits.mergeable:
        dense = setting.plain(jax.jit(peft.merge)(params, moved))
        close(out.losses, dense, 2e-5, "factored against merged losses")
    if out.stepwise is not None:
        close(out.stepwise, out.losses[:, -2:], 2e-5, "losses through the cache")


def outputs(setting: Setting, peft: pefts.Peft, state: Any, context: Any) -> Outputs:
    tokens, mask, run = setting.tokens, setting.mask, pefts.apply(setting.model.apply)

    def losses(trainable: Any) -> jax.Array:
        bound = peft.bind(setting.params, state._replace(trainable=trainable), **context)
        arguments = {"targets": tokens, "mask": mask, "chunk": 4}
        return run({"params": bound}, tokens, **arguments, method="loss")

    out, pull = jax.vjp(losses, state.trainable)
    grads = pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))[0]
    variables = {"params": peft.bind(setting.params, state, **context)}
    if not peft.traits.decodes:
        return Outputs(out, grads, None)
    cache, steps = empty_cache(setting.model.config, len(tokens), 6), []
    for piece in (slice(0, 5), slice(5, 6)):
        arguments = tokens[:, piece], cache, mask[:, piece]
        logits, cache = run(variables, *arguments, method="extend")
        target = tokens[:, piece.stop - 1]
        steps.append(optax.softmax_cross_entropy_with_integer_labels(logits, target))
    return Outputs(out, grads, jnp.stack(steps, axis=1))
