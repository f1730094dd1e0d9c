"""Continuations: those of transformers, whatever the padding; sampling; adapters; a real model."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoders import FAMILIES, SIZES, Reference, batch

import models
import pefts
from models.generate import Generated, Sampling, draw, generate, per_row

Decoders = dict[str, Reference]


def run(model: Any, params: Any, tokens: Any, mask: Any, **options: Any) -> Generated:
    out = functools.partial(generate, model.apply, model.config, **options)
    return jax.jit(out)({"params": params}, tokens, mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(decoders: Decoders, family: str) -> None:
    import torch

    folder, torch_model = decoders[family]
    model, params, _ = models.load(folder)
    tokens, mask = batch()
    ours = run(model, params, tokens, mask, new_tokens=12, stop=(2,))
    rows = [torch.from_numpy(x.astype(np.int64)) for x in (tokens, mask)]
    theirs = torch_model.generate(
        input_ids=rows[0], attention_mask=rows[1], max_new_tokens=12, do_sample=False
    ).numpy()[:, 11:]
    np.testing.assert_array_equal(ours.tokens[:, : theirs.shape[1]], theirs)
    assert len(np.unique(theirs)) >= 3


def test_rows_end_at_stop_tokens(decoders: Decoders) -> None:
    model, params, _ = models.load(decoders["llama"].folder)
    tokens, mask = batch()
    free = np.asarray(run(model, params, tokens, mask, new_tokens=8).tokens)
    stop = int(free[0, 2])
    out = run(model, params, tokens, mask, new_tokens=8, stop=(stop, 60), pad_id=7)
    for row, length, long in zip(*map(np.asarray, out), free, strict=True):
        ends = np.flatnonzero(np.isin(long, (stop, 60)))
        assert length == (ends[0] + 1 if len(ends) else 8)
        np.testing.assert_array_equal(row[:length], long[:length])
        assert (row[length:] == 7).all()
    assert int(out.lengths[0]) <= 3


def test_an_adapter_generates_what_its_merged_model_does(decoders: Decoders) -> None:
    model, params, _ = models.load(decoders["qwen3"].folder)
    tokens, mask = batch()
    axes = pefts.infer_axes(model.apply, params, tokens)
    peft = pefts.lora(rank=4, alpha=8.0, axes=axes)
    state = pefts.randomize(jax.random.key(1), peft.init(jax.random.key(0), params))
    merged = run(model, peft.merge(params, state), tokens, mask, new_tokens=10)
    adapted = generate(
        pefts.apply(model.apply),
        model.config,
        {"params": peft.bind(params, state)},
        tokens,
        mask,
        new_tokens=10,
    )
    np.testing.assert_array_equal(adapted.tokens, merged.tokens)
    base = run(model, params, tokens, mask, new_tokens=10)
    assert (np.asarray(base.tokens) != merged.tokens).any()


def test_draws_follow_the_distribution() -> None:
    logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]]))
    keys = jax.random.split(jax.random.key(0), 4000)

    def shares(sampling: Sampling) -> np.ndarray:
        drawn = jax.vmap(lambda key: draw(logits, key, sampling))(keys)
        return np.bincount(np.asarray(drawn)[:, 0], minlength=4) / len(keys)

    noise = 4 * np.sqrt(0.25 / len(keys))
    for sampling, expected in (
        (Sampling(1.0), [0.4, 0.3, 0.2, 0.1]),
        (Sampling(0.5), np.array([16, 9, 4, 1]) / 30),
        (Sampling(1.0, top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (Sampling(1.0, top_k=9), [0.4, 0.3, 0.2, 0.1]),
        (Sampling(1.0, top_p=0.4), [1, 0, 0, 0]),
        (Sampling(1.0, top_p=0.41), [4 / 7, 3 / 7, 0, 0]),
        (Sampling(0.0), [1, 0, 0, 0]),
    ):
        found = shares(sampling)
        np.testing.assert_allclose(found, expected, atol=noise, err_msg=str(sampling))
        assert (found[np.asarray(expected) == 0] == 0).all(), sampling


def test_one_key_gives_one_text(decoders: Decoders) -> None:
    model, params, _ = models.load(decoders["llama"].folder)
    tokens, mask = batch()

    def sample(seed: int) -> np.ndarray:
        arguments = {"params": params}, tokens, mask, jax.random.key(seed)
        options = {"new_tokens": 9, "sampling": Sampling(1.0)}
        return np.asarray(generate(model.apply, model.config, *arguments, **options).tokens)

    np.testing.assert_array_equal(sample(0), sample(0))
    assert (sample(0) != sample(1)).any()


def test_bad_arguments_are_refused(decoders: Decoders) -> None:
    model, params, _ = models.load(decoders["gpt2"].folder)
    tokens, mask = batch()
    call = functools.partial(generate, model.apply, model.config, {"params": params}, tokens)
    with pytest.raises(ValueError, match="new_tokens=0"):
        call(mask, new_tokens=0)
    with pytest.raises(ValueError, match="are 33 positions, the model has 32"):
        call(mask, new_tokens=SIZES["max_position_embeddings"] - 10)
    with pytest.raises(ValueError, match="pass key="):
        call(mask, new_tokens=1, sampling=Sampling(0.7))
    with pytest.raises(ValueError, match="top_p"):
        call(mask, new_tokens=1, sampling=Sampling(1.0, top_p=0.0))
    with pytest.raises(ValueError, match="ends with padding"):
        call(mask[:, ::-1], new_tokens=1)
    with pytest.raises(ValueError, match="without any token"):
        call(np.zeros_like(mask), new_tokens=1)


def test_rows_of_one_batch_may_have_adapters_of_their_own(decoders: Decoders) -> None:
    model, params, _ = models.load(decoders["llama"].folder)
    tokens, mask = (np.concatenate([array, array[:2]]) for array in batch())
    axes = pefts.infer_axes(model.apply, params, tokens)
    peft = pefts.lora(rank=4, alpha=8.0, axes=axes)
    start = peft.init(jax.random.key(0), params)
    states = [start, *(pefts.randomize(jax.random.key(k), start) for k in (1, 2))]
    rows = np.arange(len(tokens)) % 3
    chosen = jax.tree.map(lambda leaf: leaf[rows], pefts.stack(states))

    @jax.jit
    def mixed(chosen: Any) -> Generated:
        extend = per_row(pefts.apply(model.apply), peft.bind, chosen)
        variables = {"params": params}
        return generate(extend, model.config, variables, tokens, mask, new_tokens=8, stop=(2,))

    together = mixed(chosen)
    alone = [
        run(model, peft.merge(params, state), tokens, mask, new_tokens=8, stop=(2,))
        for state in states
    ]
    for row, which in enumerate(rows):
        np.testing.assert_array_equal(together.tokens[row], alone[which].tokens[row])
    assert (np.asarray(alone[0].tokens) != np.asarray(alone[1].tokens)).any(axis=1).all()
    # The base's kernels are multiplied once, by the rows of the whole batch.
    text = mixed.lower(chosen).as_text()
    width = model.config.intermediate_size
    pattern = rf"tensor<{len(rows)}x(\d+x)?{model.config.hidden_size}x{width}xf32>"
    assert len(rows) == 5 != model.config.num_layers and not re.search(pattern, text)


def test_the_model_runs_once_for_each_new_token(decoders: Decoders) -> None:
    model, params, _ = models.load(decoders["llama"].folder)
    tokens, mask = batch()
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        jax.debug.callback(lambda: calls.append(1))
        return model.apply(*args, **kwargs)

    out = generate(counted, model.config, {"params": params}, tokens, mask, new_tokens=6)
    jax.block_until_ready(out)
    jax.effects_barrier()
    assert len(calls) == 6
