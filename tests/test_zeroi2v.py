"""ZeroI2V: adapters that fold into their neighbours, counts of the paper, heads in time."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import models
import pefts
from models import vit
from models.vit_config import VisionConfig

SIZES = {"hidden_size": 12, "num_layers": 2, "num_heads": 3, "intermediate_size": 20}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1, "initializer_range": 0.4}
CONFIG = VisionConfig(**SIZES, **IMAGE)


def made(config=CONFIG, num_labels=3):
    """(model, parameters with biases and scales off 0 and 1, inputs)."""
    model = vit.build(config, num_labels, "cls")
    (example,) = models.MODELS["vit"].inputs(config)
    inputs = jax.random.normal(jax.random.key(3), (4, *example.shape[1:]))
    params = jax.jit(model.init)(jax.random.key(0), example)["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return model, jax.tree.unflatten(tree, moved), inputs


def adapted(model, params, inputs, key, spread=0.1, **options):
    axes = pefts.infer_axes(model.apply, params, inputs)
    peft = pefts.zeroi2v(**options, axes=axes)
    state = pefts.randomize(key, peft.init(key, params), spread)
    return peft, state


# ---------------------------------------------------------------------------- adapters


def test_four_adapters_a_layer_as_published():
    """14,201,856 parameters on a ViT-B/16: 12 layers, 4 adapters of 768 x 192."""
    sizes = {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "intermediate_size": 3072}
    model = vit.VisionTransformer(VisionConfig(**sizes))
    image = jnp.zeros((1, 224, 224, 3))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), image)["params"])
    peft = pefts.zeroi2v(axes=pefts.infer_axes(model.apply, params, image))
    state = jax.eval_shape(peft.init, jax.random.key(0), params)
    assert pefts.count(state.trainable) == 12 * 4 * (2 * 768 * 192 + 192 + 768) == 14_201_856
    assert len(state.frozen) == 6  # kernels, each with the number of its adapter


@pytest.mark.parametrize(("model_type", "scale"), [("vit", 0.5), ("clip_vision_model", 1.0)])
def test_merged_equals_unmerged(key, model_type, scale):
    config = replace(CONFIG, model_type=model_type)
    model, params, images = made(config)
    peft, state = adapted(model, params, images, key, scale=scale)
    merge = jax.jit(peft.merge)
    run = jax.jit(lambda p, s: pefts.apply(model.apply)({"params": peft.bind(p, s)}, images))
    logits = run(params, state)
    base = model.apply({"params": params}, images)
    assert np.abs(logits - base).max() > 0.1
    np.testing.assert_allclose(
        model.apply({"params": merge(params, state)}, images), logits, atol=1e-4
    )
    with jax.enable_x64(True):
        W = np.asarray(params["encoder"]["layers"]["mlp"]["output"]["kernel"], np.float64)
        b = np.asarray(params["encoder"]["layers"]["mlp"]["output"]["bias"], np.float64)
        wide = tiny.cast((params, state), jnp.float64)
        found = peft.merge(*wide)["encoder"]["layers"]["mlp"]["output"]
        shared = {k: np.asarray(v, np.float64) for k, v in state.trainable["shared"].items()}
        index = np.asarray(state.frozen["encoder/layers/mlp/output/kernel"]["after"])
        for layer in range(2):
            D1, b1, D2, b2 = (shared[k][index[layer]] for k in ("D1", "b1", "D2", "b2"))
            E, e = np.eye(12) + scale * D1 @ D2, scale * (b1 @ D2 + b2)
            np.testing.assert_allclose(found["kernel"][layer], W[layer] @ E, rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(found["bias"][layer], b[layer] @ E + e, rtol=1e-10)


def test_biases_in_front_take_the_constant_through_the_kernel(key):
    model, params, images = made()
    peft, state = adapted(model, params, images, key)
    with jax.enable_x64(True):
        wide_params, wide_state = tiny.cast((params, state), jnp.float64)
        merged = peft.merge(wide_params, wide_state)["encoder"]["layers"]
        shared = {k: np.asarray(v) for k, v in wide_state.trainable["shared"].items()}
        for module, name in (("attention", "value"), ("mlp", "intermediate")):
            old = wide_params["encoder"]["layers"][module][name]
            index = np.asarray(state.frozen[f"encoder/layers/{module}/{name}/kernel"]["before"])
            for layer, n in enumerate(index):
                D1, b1, D2, b2 = (shared[k][n] for k in ("D1", "b1", "D2", "b2"))
                W, b = (np.asarray(old[k][layer]) for k in ("kernel", "bias"))
                x = np.random.default_rng(0).normal(size=(5, 12))
                z = x + 0.5 * ((x @ D1 + b1) @ D2 + b2)
                new = merged[module][name]
                mine = x @ np.asarray(new["kernel"][layer]) + np.asarray(new["bias"][layer])
                np.testing.assert_allclose(mine, z @ W + b, rtol=1e-10, atol=1e-12)


def test_queries_keys_and_values_share_one_adapter(key):
    model, params, images = made()
    _, state = adapted(model, params, images, key)
    numbers = {path.split("/")[-2]: next(iter(g.values())) for path, g in state.frozen.items()}
    np.testing.assert_array_equal(numbers["query"], numbers["key"])
    np.testing.assert_array_equal(numbers["query"], numbers["value"])
    paths = ("attention/query", "attention/output", "mlp/intermediate", "mlp/output")
    of = [state.frozen[f"encoder/layers/{path}/kernel"] for path in paths]
    assert [list(group) for group in of] == [["before"], ["after"], ["before"], ["after"]]
    used = np.concatenate([np.asarray(next(iter(group.values()))) for group in of])
    assert sorted(used.tolist()) == list(range(8)) and len(state.trainable["shared"]["D1"]) == 8


def test_adding_a_target_changes_no_other_adapter(key):
    model, params, images = made()
    axes = pefts.infer_axes(model.apply, params, images)
    both = pefts.zeroi2v(axes=axes, targets=r"(query|intermediate)/kernel").init(key, params)
    one = pefts.zeroi2v(axes=axes, targets=r"intermediate/kernel").init(key, params)
    numbers = both.frozen["encoder/layers/mlp/intermediate/kernel"]["before"]
    np.testing.assert_array_equal(
        both.trainable["shared"]["D1"][numbers], one.trainable["shared"]["D1"]
    )


def test_a_kernel_without_bias_runs_but_does_not_merge(key):
    params, inputs = tiny.parameters(), tiny.inputs()
    model = tiny.Classifier()
    axes = pefts.infer_axes(model.apply, params, *inputs)
    peft = pefts.zeroi2v(targets=r"attention/(query|key|value)/kernel", axes=axes)
    state = pefts.randomize(key, peft.init(key, params))
    pefts.apply(model.apply)({"params": peft.bind(params, state)}, *inputs)
    with pytest.raises(
        ValueError, match="'layers/attention/key/bias', which these parameters lack"
    ):
        peft.merge(params, state)


@pytest.mark.parametrize(
    ("front", "behind"),
    [
        (("self_attn/q_proj", "self_attn/v_proj", "mlp/gate_proj", "mlp/up_proj"), "mlp/down_proj"),
        (("attention/self/query", "intermediate/dense"), "attention/output/dense"),
        (("attn/c_attn", "mlp/c_fc"), "mlp/c_proj"),
    ],
)
def test_default_sides(key, front, behind):
    kernels = {f"{name}/kernel": jnp.ones((8, 8)) for name in (*front, behind)}
    params = pefts.paths.unflatten({**kernels, "head/kernel": jnp.ones((8, 3))})
    state = pefts.zeroi2v().init(key, params)
    sides = {path.removesuffix("/kernel"): list(group) for path, group in state.frozen.items()}
    assert sides == {**{name: ["before"] for name in front}, behind: ["after"]}


# ---------------------------------------------------------------------------- heads in time

CLIPS = replace(CONFIG, num_frames=5, head_offsets=(-1, 1))


@pytest.mark.parametrize("offsets", [(-1, 1), (-1, 1, -2), (2,)])
def test_shifted_heads_frame_by_frame(offsets):
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 3, 6)).astype(np.float32)
    found = np.asarray(vit.shift_heads(jnp.asarray(x.reshape(10, 4, 3, 6)), 5, offsets))
    found = found.reshape(x.shape)
    for t in range(5):
        for head in range(3):
            seen = t + (offsets[head] if head < len(offsets) else 0)
            seen = seen if 0 <= seen < 5 else t
            np.testing.assert_array_equal(found[:, t, :, head], x[:, seen, :, head])


def test_clips_of_equal_frames_are_images():
    model, params, clips = made(CLIPS)
    image_model = vit.build(CONFIG, 3, "cls")
    still = jnp.broadcast_to(clips[:, :1], clips.shape)
    flat = {name: leaf for name, leaf in params.items() if name != "temporal_embeddings"}
    zero = jnp.zeros_like(params["temporal_embeddings"]["embedding"])
    logits = model.apply({"params": {**flat, "temporal_embeddings": {"embedding": zero}}}, still)
    np.testing.assert_allclose(logits, image_model.apply({"params": flat}, still[:, 0]), atol=2e-5)
    moved = model.apply({"params": params}, still)
    assert np.abs(moved - logits).max() > 1e-3  # times of their own


def test_every_frame_gets_the_embedding_of_its_time():
    config = replace(CLIPS, head_offsets=())
    model, params, clips = made(config, num_labels=None)
    table = params["temporal_embeddings"]["embedding"]
    hidden = model.apply({"params": params}, clips)
    backwards = {**params, "temporal_embeddings": {"embedding": table[::-1]}}
    other = model.apply({"params": backwards}, clips[:, ::-1])
    np.testing.assert_allclose(other[:, ::-1], hidden, atol=2e-5)


def test_only_near_frames_are_seen():
    """Through 2 layers, with offsets of one frame, frame 0 sees frames 0 to 2."""
    model, params, clips = made(CLIPS, num_labels=None)
    hidden = np.asarray(model.apply({"params": params}, clips))
    assert hidden.shape == (4, 5, 5, 12)
    for frame in range(1, 5):
        other = model.apply({"params": params}, clips.at[:, frame].add(1.0))
        change = np.abs(np.asarray(other) - hidden)[:, 0].max()
        assert (change > 1e-4) == (frame <= 2)
    apart = vit.build(replace(CLIPS, head_offsets=()), None, "cls")
    hidden = np.asarray(apart.apply({"params": params}, clips))
    other = np.asarray(apart.apply({"params": params}, clips.at[:, 1].add(1.0)))
    np.testing.assert_array_equal(other[:, 0], hidden[:, 0])


def test_a_clips_vector_is_the_mean_of_its_frames():
    model, params, clips = made(CLIPS, num_labels=None)
    hidden = model.apply({"params": params}, clips)
    vectors = model.apply({"params": params}, clips, method="embed")
    np.testing.assert_allclose(vectors, np.asarray(hidden)[:, :, 0].mean(1), atol=1e-5)


def test_an_image_checkpoint_reads_clips_and_is_written_back(tmp_path):
    overrides = {"num_frames": 3, "head_offsets": (-1, 1)}
    model, params, names = models.load("tiny-vit", num_labels=2, overrides=overrides)
    assert not np.any(params["temporal_embeddings"]["embedding"])
    clips = np.random.default_rng(0).normal(size=(2, 3, 8, 8, 1)).astype(np.float32)
    logits = model.apply({"params": params}, clips)
    models.save(tmp_path / "clips", "tiny-vit", model, params, names)
    again, loaded, _ = models.load(tmp_path / "clips", num_labels=2)
    assert again.config.head_offsets == (-1, 1)
    np.testing.assert_array_equal(again.apply({"params": loaded}, clips), logits)
    trained = {**params, "temporal_embeddings": {"embedding": jnp.ones((3, 48))}}
    models.save(tmp_path / "trained", "tiny-vit", model, trained, names)
    _, loaded, _ = models.load(tmp_path / "trained", num_labels=4, fresh_head=True)
    assert np.all(loaded["temporal_embeddings"]["embedding"] == 1)
    with pytest.raises(ValueError, match="overrides=.*'frames' is none of .*'num_frames'"):
        models.load("tiny-vit", overrides={"frames": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 1}, r"head_offsets=\(-1, 1\) with num_frames=1"),
        ({"head_offsets": (0, 1)}, "other offsets than 0"),
        ({"head_offsets": (1, 2, 3, 4)}, "num_heads=3"),
        ({"num_frames": 0}, "num_frames=0 must be at least 1"),
    ],
)
def test_offsets_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CLIPS, **changes)


def test_clips_are_checked():
    model, params, clips = made(CLIPS)
    for wrong in (clips[:, 0], clips[:, :4]):
        with pytest.raises(ValueError, match=r"reads \(batch, 5, height, width, channels\)"):
            model.apply({"params": params}, wrong)
    with pytest.raises(ValueError, match="images are 7 x 8"):
        model.apply({"params": params}, clips[:, :, :7])
