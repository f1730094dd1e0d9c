"""Prefix tuning: a text's own keys as a prefix, caches, positions, the MLP, and peft's files."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from subject import base_inputs, base_params, model_axes
from tiny_decoders import SIZES, torch_logits, torch_model

import models
import pefts
from models.decoder import Decoder, empty_cache
from models.decoder_config import DecoderConfig
from models.decoder_names import NAMES
from models.generate import generate
from pefts.methods.prefix import bake

LENGTH, TOKENS, BATCH = 3, 8, 2
VALUE = "layers/self_attn/v_proj/kernel"
FAMILIES = {
    "llama": {},
    "gpt2": {"num_key_value_heads": 4},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 10},
}


@functools.cache
def decoder(family: str) -> tuple[Decoder, Any, dict[str, str]]:
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 40, "n_positions": 32}
    sizes |= {**SIZES, "num_hidden_layers": 2, **FAMILIES[family]}
    model = Decoder(DecoderConfig.from_hf({"model_type": family, **sizes}))
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    return model, params, pefts.infer_axes(model.apply, params, tokens)


@pytest.fixture
def tokens() -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.integers(3, SIZES["vocab_size"], (BATCH, TOKENS)).astype(np.int32)


def adapted(family: str, **options: Any) -> tuple[Any, Any, pefts.Peft, pefts.PeftState]:
    """A model and a prefix of it, away from where it starts."""
    model, params, axes = decoder(family)
    peft = pefts.prefix(length=LENGTH, axes=axes, **options)
    state = peft.init(jax.random.key(2), params)
    return model, params, peft, pefts.randomize(jax.random.key(3), state, 0.5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_keys_and_values_of_a_text_are_that_text(family: str, tokens: np.ndarray) -> None:
    """Behind them the model computes what it computes behind the text, if positions go on."""
    model, params, axes = decoder(family)
    text = np.broadcast_to(tokens[:1, :LENGTH], (BATCH, LENGTH))
    whole = np.concatenate([text, tokens], axis=1)
    cache = empty_cache(model.config, 1, LENGTH)
    _, cache = model.apply({"params": params}, text[:1], cache, method="extend")
    peft = pefts.prefix(length=LENGTH, positions="positions", axes=axes)
    state = peft.init(jax.random.key(0), params)
    (path,) = state.trainable
    K, V = (x[:, 0].reshape(2, LENGTH, -1) for x in (cache.keys, cache.values))
    state = state._replace(trainable={path: {"K": K, "V": V}})
    ours = pefts.apply(model.apply)({"params": peft.bind(params, state)}, tokens)
    expected = model.apply({"params": params}, whole)[:, LENGTH:]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2e-5)


def test_it_decodes_through_a_cache(tokens: np.ndarray) -> None:
    """Each new token is the likeliest behind all before it, computed at once."""
    model, params, peft, state = adapted("llama")
    run, bound = pefts.apply(model.apply), {"params": peft.bind(params, state)}
    mask = np.ones_like(tokens)
    mask[1, :2] = 0
    text = np.asarray(generate(run, model.config, bound, tokens, mask, new_tokens=3).tokens)
    seen = np.concatenate([tokens, text], axis=1)
    real = np.concatenate([mask, np.ones_like(text)], axis=1)
    chosen = np.argmax(run(bound, seen, real), axis=-1)[:, TOKENS - 1 : -1]
    np.testing.assert_array_equal(text, chosen)
    base = np.argmax(model.apply({"params": params}, seen, real), axis=-1)[:, TOKENS - 1 : -1]
    assert not np.array_equal(text, base)


def test_no_mask_is_the_causal_one(tokens: np.ndarray) -> None:
    model, params, peft, state = adapted("llama")
    run, bound = pefts.apply(model.apply), {"params": peft.bind(params, state)}
    unmasked = run(bound, tokens)
    np.testing.assert_allclose(run(bound, tokens, np.ones_like(tokens)), unmasked, atol=1e-6)
    later = tokens.copy()
    later[:, -1] += 1
    np.testing.assert_allclose(run(bound, later)[:, :-1], unmasked[:, :-1], atol=1e-6)


def test_a_prefix_is_seen_across_a_window(tokens: np.ndarray) -> None:
    """Gemma's sliding layers see four tokens back, and the prefix from everywhere."""
    model, params, peft, state = adapted("gemma2")
    (path,) = state.trainable

    def last(values: Any) -> jax.Array:
        bound = peft.bind(params, pefts.PeftState({path: values}, {}))
        return pefts.apply(model.apply)({"params": bound}, tokens)[:, -1]

    sliding = np.flatnonzero(model.config.sliding)[0]
    moved = state.trainable[path] | {"V": state.trainable[path]["V"].at[sliding].add(1.0)}
    assert float(jnp.abs(last(moved) - last(state.trainable[path])).max()) > 1e-3


def test_two_prefixes_are_one_of_both(tokens: np.ndarray) -> None:
    model, params, first, state = adapted("llama")
    second = pefts.prefix(length=2, axes=decoder("llama")[2])
    other = pefts.randomize(jax.random.key(5), second.init(jax.random.key(4), params), 0.5)
    chain = pefts.chain(first, second)
    both = pefts.PeftState(
        {"0": state.trainable, "1": other.trainable}, {"0": state.frozen, "1": other.frozen}
    )
    joined = {
        name: jnp.concatenate([one, state.trainable[VALUE][name]], axis=1)
        for name, one in other.trainable[VALUE].items()
    }
    one = pefts.prefix(length=LENGTH + 2, axes=decoder("llama")[2])
    bound = one.bind(params, pefts.PeftState({VALUE: joined}, {}))
    run = pefts.apply(model.apply)
    np.testing.assert_allclose(
        run({"params": chain.bind(params, both)}, tokens),
        run({"params": bound}, tokens),
        rtol=1e-5,
        atol=1e-5,
    )


def test_it_chains_with_lora_on_the_same_projection(tokens: np.ndarray) -> None:
    model, params, peft, state = adapted("llama")
    lora = pefts.lora(rank=2, targets="v_proj", axes=decoder("llama")[2])
    low = pefts.randomize(jax.random.key(7), lora.init(jax.random.key(6), params), 0.3)
    run = pefts.apply(model.apply)
    merged = run({"params": peft.bind(lora.merge(params, low), state)}, tokens)
    for chain, order in (
        (pefts.chain(lora, peft), (low, state)),
        (pefts.chain(peft, lora), (state, low)),
    ):
        both = pefts.PeftState(
            *({str(n): part[i] for n, part in enumerate(order)} for i in range(2))
        )
        ours = run({"params": chain.bind(params, both)}, tokens)
        np.testing.assert_allclose(ours, merged, rtol=1e-4, atol=1e-5)


def test_zeros_take_a_part_of_the_softmax_and_stay_alike() -> None:
    """n virtual tokens of zeros are one with the weight of n: their gradients are the same."""
    peft = pefts.prefix(length=LENGTH, init="zero", axes=model_axes(True))
    params, model = base_params(), tiny.Classifier()
    state = peft.init(jax.random.key(0), params)

    def loss(trainable: Any) -> jax.Array:
        bound = peft.bind(params, state._replace(trainable=trainable))
        return jnp.sum(pefts.apply(model.apply)({"params": bound}, *base_inputs()) ** 2)

    value, grads = jax.jit(jax.value_and_grad(loss))(state.trainable)
    change = value - jnp.sum(model.apply({"params": params}, *base_inputs()) ** 2)
    assert abs(float(change)) > 1e-3
    (grads,) = grads.values()
    assert float(jnp.abs(grads["V"]).max()) > 1e-3
    for leaf in grads.values():
        np.testing.assert_allclose(leaf, jnp.broadcast_to(leaf[:, :1], leaf.shape), rtol=1e-5)


def test_normal_values_have_the_given_deviation(key: jax.Array) -> None:
    params = {"value": {"kernel": jnp.ones((4, 500))}}
    state = pefts.prefix(length=50, std=0.3).init(key, params).trainable["value/kernel"]
    for leaf in (state["K"], state["V"]):
        assert abs(float(leaf.std()) - 0.3) < 0.005
    assert not np.array_equal(state["K"], state["V"])


def test_sizes_of_fused_and_of_grouped_projections(key: jax.Array) -> None:
    for path, shape, kv in (("qkv_proj", (8, 36), 12), ("v_proj", (8, 6), 6)):
        params = {path: {"kernel": jnp.ones(shape)}}
        for leaf in jax.tree.leaves(pefts.prefix(length=2).init(key, params)):
            assert leaf.shape == (2, kv)
    with pytest.raises(ValueError, match="'c_attn/kernel' has 20 outputs, which are no queries"):
        pefts.prefix().init(key, {"c_attn": {"kernel": jnp.ones((8, 20))}})


def test_projections_of_another_size_are_refused(tokens: np.ndarray) -> None:
    model, params, axes = decoder("llama")
    peft = pefts.prefix(length=2, targets="q_proj", axes=axes)
    bound = {"params": peft.bind(params, peft.init(jax.random.key(0), params))}
    with pytest.raises(ValueError, match="2 key heads of 6 features .* others of 24 features"):
        pefts.apply(model.apply)(bound, tokens)


# --- positions ---


def shifted(tokens: np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
    model, params, peft, state = adapted("llama", positions="positions")
    bound = {"params": peft.bind(params, state)}
    return np.asarray(pefts.apply(model.apply)(bound, tokens, *args, **kwargs))


def at(tokens: np.ndarray, positions: Any, *args: Any, **kwargs: Any) -> np.ndarray:
    """The same prefix on tokens at these positions, unshifted."""
    model, params, peft, state = adapted("llama")
    bound, where = {"params": peft.bind(params, state)}, jnp.asarray(positions, jnp.int32)
    run = pefts.apply(model.apply)
    return np.asarray(run(bound, tokens, *args, positions=where, **kwargs))


def test_tokens_are_counted_from_the_prefix_on(tokens: np.ndarray) -> None:
    index = np.broadcast_to(np.arange(TOKENS), tokens.shape)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(shifted(tokens), at(tokens, index + LENGTH))
    assert np.abs(shifted(tokens) - at(tokens, index)).max() > 1e-3
    given = jnp.asarray(2 * index, jnp.int32)
    close(shifted(tokens, positions=given), at(tokens, 2 * index + LENGTH))
    mask = np.ones_like(tokens)
    mask[1, :3] = 0
    counted = np.maximum(np.cumsum(mask, axis=1) - 1, 0) + LENGTH
    for masked in (shifted(tokens, mask), shifted(tokens, mask=mask)):
        close(masked, at(tokens, counted, mask))
    losses = shifted(tokens, method="loss", targets=tokens, mask=mask)
    close(losses, at(tokens, counted, tokens, mask, method="loss"))


def test_what_cannot_be_counted_is_refused(tokens: np.ndarray) -> None:
    model = decoder("llama")[0]
    cache = empty_cache(model.config, BATCH, TOKENS)
    with pytest.raises(ValueError, match="argument '1' of this call is a Cache, perhaps a cache"):
        shifted(tokens, cache, method="extend")
    with pytest.raises(ValueError, match="argument '1' runs along them too: give mask= by its"):
        shifted(tokens, tokens, np.ones_like(tokens), method="loss")
    with pytest.raises(ValueError, match="argument 'segments' runs along them too"):
        shifted(tokens, segments=np.zeros_like(tokens))
    with pytest.raises(ValueError, match="prefix: tokens=0 is no array of integer ids"):
        shifted(np.ones((BATCH, TOKENS), np.float32))


def test_it_says_whether_it_decodes() -> None:
    assert pefts.prefix().traits.decodes
    assert not pefts.prefix(positions="positions").traits.decodes


# --- the MLP ---


def test_baked_keys_are_those_of_the_mlp(tokens: np.ndarray) -> None:
    model, params, peft, state = adapted("llama", hidden=5)
    baked, plain = bake(peft, state)
    assert baked.config == {**peft.config, "hidden": None}
    assert set(plain.trainable[VALUE]) == {"K", "V"}
    run = pefts.apply(model.apply)
    np.testing.assert_allclose(
        run({"params": baked.bind(params, plain)}, tokens),
        run({"params": peft.bind(params, state)}, tokens),
        rtol=1e-5,
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="bake takes a prefix with hidden="):
        bake(baked, plain)


def test_an_mlp_of_zeros_starts_at_zero() -> None:
    peft = pefts.prefix(length=2, hidden=4, init="zero", axes=model_axes(True))
    _, state = bake(peft, peft.init(jax.random.key(0), base_params()))
    assert all(not leaf.any() for leaf in jax.tree.leaves(state))


# --- Hugging Face PEFT ---


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("torch", reason="parity is measured against torch")
    pytest.importorskip("peft", reason="parity is measured against Hugging Face PEFT")
    made = {}
    for family in ("qwen2", "gpt2"):
        made[family] = tmp_path_factory.mktemp(family)
        # In a sliding layer peft's prefix slides out of sight; ours stays.
        whole = {} if family == "gpt2" else {"use_sliding_window": False}
        torch_model(family, num_hidden_layers=2, **whole).save_pretrained(made[family])
    return made


def base(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("hidden", [None, 5])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_peft_computes_what_we_compute(
    family: str, hidden: int | None, folders: dict[str, Path], tokens: np.ndarray, tmp_path: Path
) -> None:
    import peft as hf

    model, params, names = models.load(folders[family])
    axes = pefts.infer_axes(model.apply, params, tokens)
    peft = pefts.prefix(length=LENGTH, hidden=hidden, positions="positions", axes=axes)
    state = pefts.randomize(jax.random.key(1), peft.init(jax.random.key(0), params), 0.5)
    pefts.export_hf(tmp_path, peft, state, params, names, task_type="CAUSAL_LM")
    opened = hf.PeftModel.from_pretrained(base(folders[family]), str(tmp_path)).eval()
    run = pefts.apply(model.apply)
    ours = run({"params": peft.bind(params, state)}, tokens)
    assert np.abs(ours - model.apply({"params": params}, tokens)).max() > 1e-2
    np.testing.assert_allclose(ours, torch_logits(opened, tokens), rtol=0, atol=5e-5)
    again, restored = pefts.import_hf(tmp_path, params, names)
    np.testing.assert_allclose(
        run({"params": again.bind(params, restored)}, tokens), ours, rtol=0, atol=5e-5
    )


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("projection", [False, True])
def test_we_compute_what_peft_computes(
    projection: bool, folders: dict[str, Path], tokens: np.ndarray, tmp_path: Path
) -> None:
    import peft as hf
    import torch

    torch.manual_seed(0)
    config = hf.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=LENGTH,
        prefix_projection=projection,
        encoder_hidden_size=7,
    )
    theirs = hf.get_peft_model(base(folders["qwen2"]), config).eval()
    theirs.save_pretrained(tmp_path)
    model, params, names = models.load(folders["qwen2"])
    peft, state = pefts.import_hf(tmp_path, params, names)
    ours = pefts.apply(model.apply)({"params": peft.bind(params, state)}, tokens)
    np.testing.assert_allclose(ours, torch_logits(theirs, tokens), rtol=0, atol=5e-5)
    pefts.export_hf(tmp_path / "again", peft, state, params, names, task_type="CAUSAL_LM")
    (written,) = load_file(tmp_path / "again" / "adapter_model.safetensors").values()
    (original,) = load_file(tmp_path / "adapter_model.safetensors").values()
    np.testing.assert_array_equal(written, original)


def test_layers_go_by_their_numbers(tmp_path: Path) -> None:
    """Twelve unrolled layers: the tenth is behind the ninth, not behind the first."""
    layers = {
        f"layers_{n}": {"self_attn": {"v_proj": {"kernel": jnp.ones((4, 6))}}} for n in range(12)
    }
    names = replace(NAMES["llama"], layers=12, scanned=False, prefix="model.")
    peft = pefts.prefix(length=2, positions="positions")
    state = peft.init(jax.random.key(0), layers)
    pefts.export_hf(tmp_path, peft, state, layers, names, task_type="CAUSAL_LM")
    (table,) = load_file(tmp_path / "adapter_model.safetensors").values()
    for n in range(12):
        layer = state.trainable[f"layers_{n}/self_attn/v_proj/kernel"]
        np.testing.assert_array_equal(table[:, 12 * n : 12 * n + 6], layer["K"])
        np.testing.assert_array_equal(table[:, 12 * n + 6 : 12 * n + 12], layer["V"])


def test_what_peft_would_compute_otherwise_is_refused(tmp_path: Path) -> None:
    model, params, axes = decoder("llama")
    names = replace(NAMES["llama"], layers=2, scanned=True, prefix="model.")
    peft = pefts.prefix(length=2, axes=axes)
    state = peft.init(jax.random.key(0), params)
    with pytest.raises(ValueError, match="counted from 0 .positions=None.*positions='positions'"):
        pefts.export_hf(tmp_path, peft, state, params, names, task_type="CAUSAL_LM")
    moved = pefts.prefix(length=2, positions="positions", axes=axes)
    with pytest.raises(ValueError, match="PREFIX_TUNING without a task_type as the base alone"):
        pefts.export_hf(tmp_path, moved, state, params, names)
    one = {f"layers_{n}": {"self_attn": {"v_proj": {"kernel": jnp.ones((4, 6))}}} for n in (0, 1)}
    partly = pefts.prefix(length=2, positions="positions", targets="layers_0")
    flat = replace(names, scanned=False)
    with pytest.raises(ValueError, match="no way to leave 'layers_1/self_attn/v_proj/kernel' out"):
        pefts.export_hf(
            tmp_path, partly, partly.init(jax.random.key(0), one), one, flat, task_type="CAUSAL_LM"
        )
