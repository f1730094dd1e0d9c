"""Reference models: equal to transformers, sound in bfloat16 and when lifted; their tokenizers."""

import json
import shutil
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from tiny_encoders import FAMILIES, SIZES, batch, close, edit_config, torch_hidden, torch_model

import models
from models import encoder, tokenizer

LIFTS = ({}, {"scan_layers": False}, {"remat": "full"}, {"remat": "dots", "scan_layers": False})


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


# ---------------------------------------------------------------------------- MiniLM


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


def test_load_tokenizer_compares_with_the_model(bert_folder):
    write_vocabulary(bert_folder)
    assert models.load_tokenizer(bert_folder).vocab_size == len(WORDS)
    edit_config(bert_folder, vocab_size=5)
    with pytest.raises(ValueError, match="do not belong together"):
        models.load_tokenizer(bert_folder)
