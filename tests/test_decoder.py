"""Decoders: equal to transformers in every family, with padding, packing and cache; their loss."""

import dataclasses
import json
import math
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_decoders import FAMILIES, SIZES, Reference, batch, torch_logits, torch_model

import models
from models import hf, rope
from models.decoder import empty_cache
from models.decoder_config import DecoderConfig
from models.rope import Rope

Decoders = dict[str, Reference]
LIFTS = ({}, {"scan_layers": False}, {"remat": "full"}, {"remat": "dots", "scan_layers": False})
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "yarn_scales": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "mscale": 0.7,
        "mscale_all_dim": 0.3,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "truncate": False,
    },
    "longrope": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.3],
        "long_factor": [2.0, 3.0, 5.0],
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def close(ours: Any, theirs: Any, mask: np.ndarray | None = None) -> None:
    """Within 2e-5 in float32, of logits of size five."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if mask is not None:
        ours, theirs = ours[mask.astype(bool)], theirs[mask.astype(bool)]
    assert np.abs(theirs).max() > 0.5
    np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)


# ---------------------------------------------------------------------------- parity


@pytest.mark.parametrize("options", LIFTS[:2], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(
    decoders: Decoders, family: str, options: dict[str, Any]
) -> None:
    folder, torch = decoders[family]
    tokens, mask = batch()
    model, params, _ = models.load(folder, **options)
    run = jax.jit(model.apply)
    close(run({"params": params}, tokens), torch_logits(torch, tokens))
    close(run({"params": params}, tokens, mask), torch_logits(torch, tokens, mask), mask)


@pytest.mark.parametrize("options", LIFTS[2:], ids=str)
def test_rematerialised_layers_give_the_same_gradients(
    decoders: Decoders, options: dict[str, Any]
) -> None:
    tokens, mask = batch()

    def gradients(**lift: Any) -> Any:
        model, params, names = models.load(decoders["gemma3_text"].folder, **lift)

        def loss(params: Any) -> jax.Array:
            run = model.apply({"params": params}, tokens, tokens, mask, method="loss")
            return jnp.sum(jnp.where(mask == 1, run, 0.0))

        grads = jax.jit(jax.grad(loss))(params)
        flat = {"/".join(k.key for k in path): g for path, g in jax.tree.leaves_with_path(grads)}
        return {
            key: np.asarray(leaf[names.path(key)[1]] if names.path(key)[1] is not None else leaf)
            for path, leaf in flat.items()
            for key in names.keys(path)
        }

    plain, lifted = gradients(), gradients(**options)
    assert plain.keys() == lifted.keys()
    for key, grad in plain.items():
        np.testing.assert_allclose(lifted[key], grad, atol=2e-5 * np.abs(grad).max(), err_msg=key)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("length", [11, 40])
def test_rope_scalings_equal_transformers(tmp_path: Path, scaling: str, length: int) -> None:
    pytest.importorskip("transformers", reason="parity is measured against transformers")
    torch = torch_model("llama", rope_parameters={"rope_theta": 100.0, **SCALINGS[scaling]})
    torch.save_pretrained(tmp_path)
    model, params, _ = models.load(tmp_path)
    tokens = batch(length)[0]
    theirs = torch_logits(torch, tokens)
    close(jax.jit(model.apply)({"params": params}, tokens), theirs)
    plain = model.clone(config=dataclasses.replace(model.config, rope=Rope(32, 100.0)))
    if length == 40 or scaling not in ("dynamic",):
        assert np.abs(plain.apply({"params": params}, tokens) - theirs).max() > 1e-3


def test_scalings_of_older_config_files_are_read() -> None:
    older = {"type": "su", "short_factor": [1.0], "long_factor": [2.0], "factor": None}
    read = Rope.from_hf(older, 500.0, 64)
    assert (read.kind, read.theta, read.long_factor) == ("longrope", 500.0, (2.0,))
    cos, sin = rope.table(Rope(8, 100.0), 4, jnp.asarray([[3]]))
    np.testing.assert_allclose(cos[0, 0], np.cos([3.0, 0.3]), atol=1e-6)
    np.testing.assert_allclose(sin[0, 0], np.sin([3.0, 0.3]), atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_survive_writing_and_reading(decoders: Decoders, family: str) -> None:
    content = json.loads((decoders[family].folder / "config.json").read_text())
    config = DecoderConfig.from_hf(content)
    assert DecoderConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_opens_what_is_saved(decoders: Decoders, family: str, tmp_path: Path) -> None:
    import transformers

    model, params, names = models.load(decoders[family].folder)
    params = jax.tree.map(lambda leaf: leaf * 0.9, params)
    hf.save_params(tmp_path, params, names, model.config.to_hf())
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens, mask = batch()
    ours = model.apply({"params": params}, tokens, mask)
    close(ours, torch_logits(loaded.eval(), tokens, mask), mask)


def test_the_text_part_of_a_model_with_images_is_read(decoders: Decoders, tmp_path: Path) -> None:
    import safetensors.numpy

    folder, torch = decoders["gemma3_text"]
    tensors = safetensors.numpy.load_file(folder / hf.SINGLE)
    tensors = {key.replace("model.", "model.language_model."): v for key, v in tensors.items()}
    tensors["model.vision_tower.embeddings.weight"] = np.zeros((2, 2), np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / hf.SINGLE, {"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    model, params, _ = models.load(tmp_path)
    tokens = batch()[0]
    close(model.apply({"params": params}, tokens), torch_logits(torch, tokens))


# ---------------------------------------------------------------------------- cache


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_gives_the_logits_of_the_whole(
    decoders: Decoders, family: str, scanned: bool
) -> None:
    folder, torch = decoders[family]
    model, params, _ = models.load(folder, scan_layers=scanned)
    tokens, mask = batch()
    expected = torch_logits(torch, tokens, mask)
    extend = jax.jit(lambda *args: model.apply({"params": params}, *args, method="extend"))
    logits, cache = extend(tokens[:, :9], empty_cache(model.config, 3, 16), mask[:, :9])
    close(logits[:2], expected[:2, 8])
    for step in (9, 10):
        logits, cache = extend(tokens[:, step : step + 1], cache, mask[:, step : step + 1])
        close(logits, expected[:, step])
    assert int(cache.length) == 11
    np.testing.assert_array_equal(cache.real[:, :11], mask.astype(bool))
    assert not cache.real[:, 11:].any()


# ---------------------------------------------------------------------------- packing and loss


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "llama"])
def test_packed_rows_are_the_rows_by_themselves(decoders: Decoders, family: str) -> None:
    model, params, _ = models.load(decoders[family].folder)
    rng = np.random.default_rng(1)
    pieces = [rng.integers(3, SIZES["vocab_size"], (1, n)).astype(np.int32) for n in (7, 5)]
    packed = np.concatenate(pieces, axis=1)
    segments = np.repeat([1, 2], [7, 5])[None].astype(np.int32)
    together = np.asarray(model.apply({"params": params}, packed, segments=segments))
    alone = [np.asarray(model.apply({"params": params}, piece)) for piece in pieces]
    close(together, np.concatenate(alone, axis=1))


@pytest.mark.parametrize("chunk", [1, 4, 11, 500])
@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_the_loss_in_chunks_is_the_loss(decoders: Decoders, family: str, chunk: int) -> None:
    model, params, _ = models.load(decoders[family].folder)
    tokens, mask = batch()
    targets = np.roll(tokens, -1, axis=1)

    def whole(params: Any) -> jax.Array:
        logits = jax.nn.log_softmax(model.apply({"params": params}, tokens, mask))
        return -jnp.take_along_axis(logits, targets[:, :, None], axis=2)[:, :, 0]

    def chunked(params: Any) -> jax.Array:
        arguments = {"params": params}, tokens, targets, mask
        return model.apply(*arguments, chunk=chunk, method="loss")

    np.testing.assert_allclose(chunked(params), whole(params), atol=2e-5)
    gradients = [
        jax.grad(lambda p, f=f: jnp.sum(jnp.where(mask == 1, f(p), 0.0)))(params)
        for f in (chunked, whole)
    ]
    for ours, theirs in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def test_the_loss_in_chunks_never_holds_all_logits(decoders: Decoders) -> None:
    model, params, _ = models.load(decoders["llama"].folder)
    config = dataclasses.replace(model.config, vocab_size=20_000)
    tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32)
    wide = model.clone(config=config)
    params = jax.eval_shape(wide.init, jax.random.key(0), tokens)

    def peak(chunk: int) -> int:
        def loss(params: Any, tokens: Any) -> jax.Array:
            return jnp.mean(wide.apply(params, tokens, tokens, chunk=chunk, method="loss"))

        return (
            jax.jit(jax.grad(loss))
            .lower(params, tokens)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    logits = 4 * 256 * 20_000 * 4
    assert peak(256) > logits
    assert peak(8) < 0.6 * logits


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type='mamba'"),
        ({"hidden_size": None}, "config.json lacks hidden_size"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads=3"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* not supported"),
        ({"hidden_act": "xielu"}, "activation='xielu'"),
        ({"rope_parameters": {"rope_type": "axial"}}, "rope_type='axial'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "needs low_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial"),
        ({"rope_parameters": {"rope_type": "linear", "facto": 2}}, "facto"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"rope_theta": -1.0, "rope_parameters": None}, "rope_theta=-1.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_that_are_not_built_are_refused(change: dict[str, Any], message: str) -> None:
    content = {"model_type": "llama", **SIZES, **change}
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hf(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types has 2 entries for 3"),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types='chunked_attention'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ],
    ids=["length", "kind", "both ways"],
)
def test_gemma_configs_that_are_not_built_are_refused(change: dict[str, Any], message: str) -> None:
    content = {"model_type": "gemma2", **SIZES, **change}
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hf(content)


def test_bad_calls_are_refused(decoders: Decoders) -> None:
    model, params, _ = models.load(decoders["gpt2"].folder)
    tokens, mask = batch()
    with pytest.raises(ValueError, match=r"mask has shape \(3, 4\)"):
        model.apply({"params": params}, tokens, mask[:, :4])
    with pytest.raises(ValueError, match="it must be"):
        model.apply({"params": params}, tokens[0])
    with pytest.raises(ValueError, match="tokens has 33 positions, the model at most 32"):
        model.apply({"params": params}, np.ones((1, 33), np.int32))
    with pytest.raises(ValueError, match="chunk=0"):
        model.apply({"params": params}, tokens, tokens, chunk=0, method="loss")
    with pytest.raises(ValueError, match="no classifier"):
        models.load(decoders["gpt2"].folder, num_labels=2)


def test_stop_tokens_are_those_of_the_generation_config(tmp_path: Path) -> None:
    config = {"model_type": "llama", "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert models.stop_tokens(tmp_path) == (2,)
    file = tmp_path / "generation_config.json"
    file.write_text('{"eos_token_id": [2, 9]}')
    assert models.stop_tokens(tmp_path) == (2, 9)
    file.write_text('{"max_length": 20}')
    assert models.stop_tokens(tmp_path) == (2,)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert models.stop_tokens(tmp_path) == ()
    for bad, message in (
        ("[1]", "is not a JSON object"),
        ('{"eos_token_id": "x"}', "no token ids"),
    ):
        file.write_text(bad)
        with pytest.raises(ValueError, match=message):
            models.stop_tokens(tmp_path)


def test_a_missing_head_is_an_error(decoders: Decoders, tmp_path: Path) -> None:
    import safetensors.numpy

    folder, _ = decoders["llama"]
    tensors = safetensors.numpy.load_file(folder / hf.SINGLE)
    del tensors["lm_head.weight"]
    safetensors.numpy.save_file(tensors, tmp_path / hf.SINGLE, {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"missing: lm_head.weight \(61, 24\)"):
        models.load(tmp_path)


def test_shards_are_read_one_by_one(decoders: Decoders, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = decoders["llama"].folder
    _, whole, _ = models.load(folder)
    mesh = jax.make_mesh((8,), ("fsdp",))
    held: list[int] = []

    def sharding(leaf: Any) -> NamedSharding:
        even = [axis for axis in range(leaf.ndim) if leaf.shape[axis] % 8 == 0]
        return NamedSharding(
            mesh,
            PartitionSpec(*["fsdp" if axis in even[-1:] else None for axis in range(leaf.ndim)]),
        )

    def empty(shape: Any, dtype: Any) -> np.ndarray:
        held.append(math.prod(shape))
        return np.empty(shape, dtype)

    watched = types.SimpleNamespace(**{**vars(np), "empty": empty})
    monkeypatch.setattr(hf, "np", watched)
    _, cut, _ = models.load(folder, shardings=lambda tree: jax.tree.map(sharding, tree))
    assert max(held) * 8 == max(leaf.size for leaf in jax.tree.leaves(whole))
    assert sum(held) == sum(leaf.size for leaf in jax.tree.leaves(whole))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(cut), jax.device_get(whole))
