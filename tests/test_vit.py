"""Vision transformers: equal to transformers, sound when lifted, written back, errors by name."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from tiny_vits import FAMILIES, SIZES, images, moved, torch_model, torch_outputs

import models
import pefts
from models import create_vit, hf, vit, vit_names
from models.vit_config import VisionConfig

LIFTS = ({}, {"scan_layers": False}, {"remat": "full"}, {"remat": "dots", "scan_layers": False})


def near(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs.numpy(), atol=2e-5, rtol=2e-5)


@pytest.fixture(scope="module")
def bases(transformers, tmp_path_factory):
    """A saved base model of every family: name -> (folder, torch model)."""
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        model = torch_model(transformers, family)
        model.save_pretrained(folder)
        made[family] = folder, model
    return made


# ---------------------------------------------------------------------------- parity


@pytest.mark.parametrize("options", LIFTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_equal_transformers(bases, family, options):
    folder, theirs = bases[family]
    model, params, _ = models.load(folder, **options)
    hidden = jax.jit(model.apply)({"params": params}, images())
    near(hidden, torch_outputs(theirs, images()).last_hidden_state)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_equals_transformers(bases, family):
    folder, theirs = bases[family]
    theirs.config.output_hidden_states = True
    try:
        expected = torch_outputs(theirs, images()).hidden_states
    finally:
        theirs.config.output_hidden_states = False
    model, params, _ = models.load(folder)
    _, seen = model.apply({"params": params}, images(), mutable=["intermediates"])
    layers = seen["intermediates"]["encoder"]["layers"][vit.BLOCK_OUTPUT][0]
    for index, layer in enumerate(layers):
        near(layer, expected[index + 1])


@pytest.mark.parametrize(
    ("family", "pooling"),
    [("vit", "pooler"), ("vit_without_qkv_bias", "pooler"), ("clip_vision_model", "cls")],
)
def test_image_vectors_equal_transformers(bases, family, pooling):
    folder, theirs = bases[family]
    model, params, _ = models.load(folder, pooling=pooling)
    vectors = model.apply({"params": params}, images(), method="embed")
    assert vectors.dtype == jnp.float32
    near(vectors, torch_outputs(theirs, images()).pooler_output)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu_new", "relu"])
def test_activations_equal_transformers(transformers, tmp_path, activation):
    theirs = torch_model(transformers, "vit", hidden_act=activation)
    theirs.save_pretrained(tmp_path)
    model, params, _ = models.load(tmp_path)
    hidden = model.apply({"params": params}, images())
    near(hidden, torch_outputs(theirs, images()).last_hidden_state)


def test_vit_logits_equal_transformers(transformers, tmp_path):
    theirs = torch_model(transformers, "vit", "ViTForImageClassification", num_labels=5)
    theirs.save_pretrained(tmp_path)
    model, params, names = models.load(tmp_path, num_labels=5)
    assert names.prefix == "vit." and model.pooling == "cls"
    logits = model.apply({"params": params}, images())
    assert logits.dtype == jnp.float32
    near(logits, torch_outputs(theirs, images()).logits)
    models.save(tmp_path / "again", tmp_path, model, params, names)
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "again")
    near(logits, torch_outputs(again.eval(), images()).logits)


def test_clip_projection_equals_transformers(transformers, tmp_path):
    head = "CLIPVisionModelWithProjection"
    theirs = torch_model(transformers, "clip_vision_model", head, projection_dim=7)
    theirs.save_pretrained(tmp_path)
    model, params, names = models.load(tmp_path, pooling="projection")
    vectors = model.apply({"params": params}, images(), method="embed")
    assert vectors.shape == (4, 7)
    near(vectors, torch_outputs(theirs, images()).image_embeds)
    models.save(tmp_path / "again", tmp_path, model, params, names)
    again = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "again")
    near(vectors, torch_outputs(again.eval(), images()).image_embeds)
    _, params, _ = models.load(tmp_path)
    assert "projection" not in params


def test_the_image_tower_of_a_whole_clip(transformers, tmp_path):
    import torch

    torch.manual_seed(0)
    text = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        vision_config=SIZES, text_config={**text, "intermediate_size": 12}, projection_dim=6
    )
    theirs = moved(transformers.CLIPModel(config))
    theirs.save_pretrained(tmp_path)
    model, params, names = models.load(tmp_path, pooling="projection")
    vectors = model.apply({"params": params}, images(), method="embed")
    expected = torch_outputs(theirs.get_image_features, images())
    near(vectors, getattr(expected, "pooler_output", expected))
    models.save(tmp_path / "tower", tmp_path, model, params, names)
    tower = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "tower")
    near(vectors, torch_outputs(tower.eval(), images()).image_embeds)


def test_clip_logits_of_a_mean_equal_transformers(transformers, tmp_path):
    import torch

    torch.manual_seed(0)
    config = transformers.CLIPConfig(vision_config=SIZES, num_labels=3)
    theirs = moved(transformers.CLIPForImageClassification(config))
    theirs.save_pretrained(tmp_path)
    model, params, _ = models.load(tmp_path, num_labels=3, pooling="mean")
    near(model.apply({"params": params}, images()), torch_outputs(theirs, images()).logits)


# ---------------------------------------------------------------------------- files


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_what_was_read(bases, tmp_path, family, scan_layers):
    folder, _ = bases[family]
    pooling = "cls" if family.startswith("clip") else "pooler"
    model, params, names = models.load(folder, pooling=pooling, scan_layers=scan_layers)
    models.save(tmp_path / "out", folder, model, params, names)
    first, second = (
        safetensors.numpy.load_file(at / hf.SINGLE) for at in (folder, tmp_path / "out")
    )
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)


def test_preparation_of_images_goes_along(bases, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for file in bases["vit"][0].iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    model, params, names = models.load(base)
    models.save(tmp_path / "out", base, model, params, names)
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"image_mean": [0.5]}'


def test_shardings_place_each_parameter_as_it_is_read(bases):
    """Also the kernel of the patches, whose axes lie in another order in the file."""
    mesh = jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[:2])

    def shardings(abstract):
        def of(leaf):
            rows = ("fsdp",) if leaf.ndim == 4 else ()
            return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*rows))

        return jax.tree.map(of, abstract)

    folder = bases["vit"][0]
    _, placed, _ = models.load(folder, shardings=shardings)
    _, params, _ = models.load(folder)
    kernel = placed["embeddings"]["patch_embedding"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 4, 3, 12)
    jax.tree.map(np.testing.assert_array_equal, placed, params)


def test_a_fresh_head_replaces_one_of_other_classes(transformers, tmp_path):
    theirs = torch_model(transformers, "vit", "ViTForImageClassification", num_labels=5)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"shape: classifier.weight is \(5, 12\) in the file"):
        models.load(tmp_path, num_labels=3)
    _, params, _ = models.load(tmp_path, num_labels=3, fresh_head=True, seed=1)
    assert params["classifier"]["kernel"].shape == (12, 3)
    _, same, _ = models.load(tmp_path, num_labels=5, fresh_head=True, seed=1)
    _, held, _ = models.load(tmp_path, num_labels=5)
    assert np.abs(same["classifier"]["kernel"] - held["classifier"]["kernel"]).max() > 0.1
    for trees in (params, same):
        jax.tree.map(np.testing.assert_array_equal, trees["encoder"], held["encoder"])


def test_parameter_paths(bases):
    norms = {f"{n}/{p}" for n in ("norm_before", "norm_after") for p in ("scale", "bias")}
    dense = ("attention/query", "attention/key", "attention/value", "attention/output")
    dense = (*dense, "mlp/intermediate", "mlp/output")
    layer = norms | {f"{d}/{p}" for d in dense for p in ("kernel", "bias")}
    outside = {"embeddings/class_embedding", "embeddings/position_embeddings/embedding"}
    outside |= {"embeddings/patch_embedding/kernel", "embeddings/patch_embedding/bias"}
    outside |= {"norm/scale", "norm/bias", "classifier/kernel", "classifier/bias"}
    _, params, names = models.load(bases["vit"][0], num_labels=2)
    flat = traverse_util.flatten_dict(params, sep="/")
    assert set(flat) == outside | {f"encoder/layers/{p}" for p in layer}
    assert flat["embeddings/patch_embedding/kernel"].shape == (4, 4, 3, 12)
    for path in flat:
        for i, name in enumerate(names.keys(path)):
            assert names.path(name) == (path, i if "/layers/" in path else None, names.op(path))


# ---------------------------------------------------------------------------- numerics, adapters


@pytest.mark.parametrize("options", LIFTS[::3], ids=str)
def test_bfloat16_runs_and_differentiates(bases, options):
    folder = bases["clip_vision_model"][0]
    exact, params, _ = models.load(folder)
    reference = exact.apply({"params": params}, images())
    kwargs = {"dtype": "bfloat16", "param_dtype": "bfloat16", **options}
    with jax.numpy_dtype_promotion("standard"):  # jax.nn's attention mixes in float32
        model, params, _ = models.load(folder, num_labels=2, **kwargs)
        hidden = models.load(folder, **kwargs)[0].apply({"params": params}, images())
        grads = jax.jit(jax.grad(lambda p: model.apply({"params": p}, images()).sum()))(params)
    assert hidden.dtype == jnp.bfloat16
    assert 0 < np.abs(np.asarray(hidden, np.float32) - reference).mean() < 0.03
    assert jax.tree.map(lambda g: g.dtype, grads) == jax.tree.map(lambda p: p.dtype, params)


def test_each_dropout_rate_acts():
    def outputs(model, params):
        rngs = {"dropout": jax.random.key(1)}
        noisy = model.apply(params, images(), deterministic=False, rngs=rngs)
        return noisy, model.apply(params, images())

    def change(**rates):
        sizes = dict(hidden_size=12, num_layers=1, num_heads=3, intermediate_size=20)
        config = VisionConfig(**sizes, image_size=12, patch_size=4, initializer_range=0.4)
        model = vit.ImageClassifier(replace(config, **rates), 3)
        params = jax.jit(model.init)(jax.random.key(0), images())
        noisy, quiet = jax.jit(outputs, static_argnums=0)(model, params)
        return float(jnp.abs(noisy - quiet).max())

    assert change() == 0.0
    for rate in ("dropout", "attention_dropout", "classifier_dropout"):
        assert change(**{rate: 0.3}) > 1e-3


def test_adapters_reach_every_kernel_the_patches_too(bases, key):
    model, params, _ = models.load(bases["vit"][0], num_labels=2)
    axes = pefts.infer_axes(model.apply, params, *models.example(model))
    assert axes["^embeddings/patch_embedding/kernel$"] == "kkio"
    peft = pefts.lora(rank=2, axes=axes)
    state = pefts.randomize(key, peft.init(key, params))
    assert len(state.trainable) == 7 and "embeddings/patch_embedding/kernel" in state.trainable
    adapted = pefts.apply(model.apply)({"params": peft.bind(params, state)}, images())
    merged = model.apply({"params": peft.merge(params, state)}, images())
    np.testing.assert_allclose(adapted, merged, atol=1e-5)
    assert np.abs(merged - model.apply({"params": params}, images())).max() > 1e-2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["vit", "clip_vision_model"])
def test_peft_runs_an_exported_lora_as_we_do(transformers, bases, tmp_path, key, family):
    peft_library = pytest.importorskip("peft", reason="the export is opened by peft")
    folder = bases[family][0]
    model, params, names = models.load(folder)
    if int(transformers.__version__.split(".")[0]) >= 5:
        names = vit_names.of_modules(names)
    axes = pefts.infer_axes(model.apply, params, *models.example(model))
    adapter = pefts.lora(rank=2, targets=r"(query|output|intermediate)/kernel", axes=axes)
    state = pefts.randomize(key, adapter.init(key, params))
    pefts.export_hf(tmp_path, adapter, state, params, names, base_model_name_or_path=str(folder))
    theirs = getattr(transformers, FAMILIES[family][1]).from_pretrained(folder)
    wrapped = peft_library.PeftModel.from_pretrained(theirs, tmp_path).eval()
    ours = pefts.apply(model.apply)({"params": adapter.bind(params, state)}, images())
    near(ours, torch_outputs(wrapped, images()).last_hidden_state)


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (images().transpose(0, 3, 1, 2), r"transpose them to \(0, 2, 3, 1\)"),
        (np.zeros((2, 16, 16, 3), np.float32), "16 x 16, and the position table .* 12 x 12"),
        (np.zeros((2, 12, 12, 1), np.float32), r"reads \(batch, \*\(12, 12, 3\)\)"),
        (images()[0], r"reads \(batch, \*\(12, 12, 3\)\)"),
        (np.zeros((2, 12, 12, 3), np.uint8), "images are uint8; .*scale and normalise"),
    ],
)
def test_images_are_checked(bases, pixels, message):
    model, params, _ = models.load(bases["vit"][0])
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, pixels)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("vit", {"image_size": 14}, r"image_size=14 is no multiple of patch_size=4: .*\[12, 16\]"),
        ("vit", {"image_size": [12, 16]}, r"image_size=\[12, 16\] is not supported"),
        (
            "vit",
            {"image_size": 16},
            r"position_embeddings is \(1, 10, 12\) in the file, \(1, 17, 12\) in the model",
        ),
        ("vit", {"num_channels": 1}, r"weight is \(12, 3, 4, 4\) in the file, \(12, 1, 4, 4\)"),
        (
            "clip_vision_model",
            {"image_size": 8},
            r"position_embedding.weight is \(10, 12\) in the file, \(5, 12\) in the model",
        ),
        ("vit", {"hidden_act": "tanhh"}, "hidden_act='tanhh' is not supported"),
        ("vit", {"num_attention_heads": 5}, "must be a multiple of num_heads=5"),
        ("vit", {"patch_size": 0}, "patch_size=0 must be at least 1"),
        ("vit", {"hidden_dropout_prob": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
    ],
)
def test_configurations_are_checked(bases, tmp_path, family, changes, message):
    for file in bases[family][0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | changes))
    with pytest.raises(ValueError, match=message):
        models.load(tmp_path)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("vit", {"pooling": "projection"}, r"pooling='projection' .*\['cls', 'mean', 'pooler'\]"),
        ("clip_vision_model", {"pooling": "pooler"}, "pooling='pooler' is not supported"),
        ("clip_vision_model", {"pooling": "projection"}, "missing: visual_projection.weight"),
        ("vit", {"num_labels": 0}, "num_labels=0 must be at least 1"),
    ],
)
def test_bad_options_are_refused(bases, family, options, message):
    with pytest.raises(ValueError, match=message):
        models.load(bases[family][0], **options)


def test_a_size_that_is_not_there(bases):
    with pytest.raises(ValueError, match="config.json lacks hidden_size"):
        VisionConfig.from_hf({"model_type": "vit"})


# ---------------------------------------------------------------------------- made on the spot


def test_the_tiny_vit_is_the_same_for_everyone():
    folder = models.folder("tiny-vit")
    assert folder == models.folder("tiny-vit")
    model, params, _ = models.load("tiny-vit", num_labels=10)
    layer = 4 * (48 * 48 + 48) + 2 * 48 * 96 + 96 + 48 + 4 * 48
    around = (2 * 2 * 48 + 48) + 48 + 17 * 48 + 2 * 48 + (48 * 10 + 10)
    assert pefts.count(params) == 4 * layer + around
    logits = model.apply({"params": params}, np.ones((2, 8, 8, 1), np.float32))
    assert logits.shape == (2, 10)
    again = create_vit.create(folder.parent / "tiny_vit_again", model.config)
    first, second = (safetensors.numpy.load_file(at / hf.SINGLE) for at in (folder, again))
    for file in again.iterdir():
        file.unlink()
    again.rmdir()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


def test_the_command_makes_a_folder_that_transformers_opens(transformers, tmp_path, capsys):
    sizes = {"image_size": 12, "num_channels": 3, "hidden_size": 12, "num_layers": 1}
    arguments = [f"--{name}={value}" for name, value in sizes.items()]
    create_vit.main([str(tmp_path / "new"), *arguments])
    assert "wrote" in capsys.readouterr().out
    theirs = transformers.ViTModel.from_pretrained(tmp_path / "new", add_pooling_layer=False)
    model, params, _ = models.load(tmp_path / "new")
    expected = torch_outputs(theirs.eval(), images()).last_hidden_state
    near(model.apply({"params": params}, images()), expected)
    with pytest.raises(SystemExit):
        create_vit.main([str(tmp_path / "bad"), "--patch_size=5"])
    assert "no multiple of patch_size=5" in capsys.readouterr().err
    assert not Path(tmp_path / "bad").exists()
