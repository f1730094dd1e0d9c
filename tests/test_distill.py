"""Layer outputs of the encoders, and distillation from the unadapted base."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from tiny_encoders import FAMILIES, batch

import models
import pefts
import train
from configs.minilm_stdlib_docs_lora import get_config
from models import encoder
from models.layers import BLOCK_OUTPUT
from training import distill, experiment

LIFTS = ({}, {"scan_layers": False}, {"remat": "full"}, {"remat": "dots", "scan_layers": False})
pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")


# ---------------------------------------------------------------------------- layer outputs


def layer_outputs(seen: dict) -> list:
    """Of each layer in order, from the intermediates of a scanned or an unrolled encoder."""
    layers = seen["intermediates"]["encoder"]
    if "layers" in layers:
        return list(layers["layers"][BLOCK_OUTPUT][0])
    return [layers[f"layers_{n}"][BLOCK_OUTPUT][0] for n in range(len(layers))]


@pytest.mark.parametrize("options", LIFTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_outputs_equal_transformers(checkpoints, family, options):
    import torch

    folder, torch_base = checkpoints[family]
    tokens, mask, types = batch(family, torch_base.config.type_vocab_size)
    inputs = [torch.from_numpy(array.astype(np.int64)) for array in (tokens, mask, types)]
    with torch.no_grad():
        out = torch_base(
            input_ids=inputs[0],
            attention_mask=inputs[1],
            token_type_ids=inputs[2],
            output_hidden_states=True,
        )
    model, params, _ = models.load(folder, **options)
    last, seen = model.apply({"params": params}, tokens, mask, types, mutable=["intermediates"])
    ours = layer_outputs(seen)
    assert len(ours) == len(out.hidden_states) - 1 == 3  # theirs start with the embeddings
    real = mask[..., None].astype(bool)
    for mine, theirs in zip(ours, out.hidden_states[1:], strict=True):
        np.testing.assert_allclose(
            np.where(real, mine, 0), np.where(real, theirs.numpy(), 0), atol=1e-5, rtol=1e-5
        )
    np.testing.assert_array_equal(ours[-1], last)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_nothing_is_kept_where_nobody_asks(checkpoints, scan_layers):
    """The program without intermediates holds no array for all layers and returns none."""
    model, params, _ = models.load(checkpoints["bert"][0], scan_layers=scan_layers)
    tokens, mask, _ = batch("bert")
    plain = str(jax.make_jaxpr(lambda p: model.apply({"params": p}, tokens, mask))(params))
    watched = str(
        jax.make_jaxpr(
            lambda p: model.apply({"params": p}, tokens, mask, mutable=["intermediates"])
        )(params)
    )
    assert "f32[3,4,9,12]" not in plain
    assert ("f32[3,4,9,12]" in watched) == scan_layers
    assert "intermediates" not in models.load(checkpoints["bert"][0])[1]


# ---------------------------------------------------------------------------- the distance


@pytest.fixture
def config(base: Path) -> ConfigDict:
    config = get_config("tiny")
    config.model.source = str(base)
    return config


@pytest.fixture
def run(config: ConfigDict) -> experiment.Experiment:
    return experiment.build(config)


def first_batch(run: experiment.Experiment) -> dict:
    return run.objective.train_batches(run)[0]


def adapted(run: experiment.Experiment, state, inputs: dict, **kwargs):
    """What the student of a step returns: logits and layer outputs."""
    forward = distill.watched(run, pefts.apply(run.model.apply))
    return forward({"params": run.peft.bind(run.params, state)}, inputs, **kwargs)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_student_like_its_teacher_has_no_distance(config, key, scan_layers):
    config.model.scan_layers = scan_layers
    config.distill.features, config.distill.logits = 2.0, 3.0
    run = experiment.build(config)
    inputs, state = first_batch(run), run.peft.init(key, run.params)
    same = distill.loss(run, run.params, inputs, adapted(run, state, inputs))
    np.testing.assert_allclose(same, 0, atol=1e-12)
    moved = pefts.randomize(key, state)
    assert float(distill.loss(run, run.params, inputs, adapted(run, moved, inputs))) > 1e-3


@pytest.mark.parametrize("options", LIFTS, ids=str)
def test_the_distance_is_the_mean_over_layers_and_real_tokens(config, key, options):
    config.distill.features, config.distill.logits = 2.0, 3.0
    with config.model.unlocked():
        config.model.update(options)
    run = experiment.build(config)
    inputs = first_batch(run)
    assert 0 < inputs["mask"].mean() < 1
    state = pefts.randomize(key, run.peft.init(key, run.params))
    student = adapted(run, state, inputs)
    found = distill.loss(run, run.params, inputs, student)

    def outputs(params):
        arguments = {"params": params}, inputs["tokens"], inputs["mask"], inputs["token_types"]
        logits, seen = run.model.apply(*arguments, mutable=["intermediates"])
        layers = layer_outputs(seen)
        return np.asarray(logits, np.float64), np.stack(layers).astype(np.float64)

    mine, theirs = outputs(run.peft.merge(run.params, state)), outputs(run.params)
    real = np.asarray(inputs["mask"]).astype(bool)
    features = [np.mean((a[real] - b[real]) ** 2) for a, b in zip(mine[1], theirs[1], strict=True)]
    assert len(features) == 2
    wanted = 2.0 * np.mean(features) + 3.0 * np.mean((mine[0] - theirs[0]) ** 2)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_each_weight_scales_its_own_part(config, run, key):
    inputs = first_batch(run)
    state = pefts.randomize(key, run.peft.init(key, run.params))

    def loss(features: float, logits: float) -> float:
        config.distill.features, config.distill.logits = features, logits
        here = run._replace(config=config)
        return float(distill.loss(here, run.params, inputs, adapted(here, state, inputs)))

    assert loss(0.0, 0.0) == 0.0
    features, logits = loss(1.0, 0.0), loss(0.0, 1.0)
    assert features > 1e-3 and logits > 1e-3
    assert loss(0.5, 2.0) == pytest.approx(0.5 * features + 2 * logits, rel=1e-6)


def test_gradients_reach_the_student_alone(config, run, key):
    """Against differences along a direction; the teacher is a constant."""
    config.distill.features, config.distill.logits = 1.0, 0.5
    run = run._replace(config=config)
    inputs = first_batch(run)
    state = pefts.randomize(key, run.peft.init(key, run.params))

    def loss(trainable, params):
        student = adapted(run, state._replace(trainable=trainable), inputs)
        return distill.loss(run, params, inputs, student)

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        grads = jax.jit(jax.grad(loss))(state.trainable, run.params)
        flat, unravel = jax.flatten_util.ravel_pytree(state.trainable)
        slope = jax.flatten_util.ravel_pytree(grads)[0]
        assert float(jnp.abs(slope).max()) > 1e-4
        direction = slope / jnp.linalg.norm(slope)
        run_loss = jax.jit(loss)
        h = 3e-3
        up, down = (run_loss(unravel(flat + s * h * direction), run.params) for s in (1, -1))
        np.testing.assert_allclose((up - down) / (2 * h), jnp.linalg.norm(slope), rtol=5e-3)


def test_the_teacher_never_drops(config, key):
    """With dropout in the base the teacher stays the same, and only the student is noisy."""
    config.distill.features = 1.0
    run = experiment.build(config)
    noisy = encoder.build(
        replace(run.model.config, dropout=0.3, attention_dropout=0.3), len(run.task.labels), "mean"
    )
    run = run._replace(model=noisy)
    inputs, state = first_batch(run), run.peft.init(key, run.params)
    calm = adapted(run, state, inputs)
    np.testing.assert_allclose(distill.loss(run, run.params, inputs, calm), 0, atol=1e-12)
    rngs = {"rngs": {"dropout": key}, "deterministic": False}
    shaken = adapted(run, state, inputs, **rngs)
    assert float(distill.loss(run, run.params, inputs, shaken)) > 1e-2


# ---------------------------------------------------------------------------- in training


def three_steps(config: ConfigDict) -> tuple:
    """The first has a learning rate of 0, and the student differs from the teacher after two."""
    session = train.prepare(config)
    state, metrics = session.state, None
    for n in range(3):
        state, metrics = session.update(state, session.place(session.batches[n]))
    return session, state, metrics


def test_the_step_adds_the_distance_to_the_penalty(config):
    config.train.steps = 4
    _, plain_state, plain = three_steps(config)
    assert float(plain.penalty) == 0.0
    config.distill.features = 10.0
    session, state, metrics = three_steps(config)
    assert float(metrics.penalty) > 0 and bool(metrics.finite)
    np.testing.assert_allclose(metrics.loss, plain.loss, rtol=1e-4)
    assert session.plan.trainable_count == pefts.count(plain_state.peft_state.trainable)
    moved = [np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(
        jax.tree.leaves(state.peft_state), jax.tree.leaves(plain_state.peft_state), strict=True
    )]  # fmt: skip
    assert any(moved)


def test_a_step_without_distillation_runs_no_teacher(config):
    """The compiled step costs what it did; with a weight it costs a forward pass more."""

    def flops(config: ConfigDict) -> float:
        run = experiment.build(config)
        state, tx = train.initial_state(run, 4, None)
        step = jax.jit(train.make_step(run, tx))
        compiled = step.lower(state, run.params, first_batch(run)).compile()
        return compiled.cost_analysis()["flops"]

    plain = flops(config)
    config.distill.features = 1.0
    assert flops(config) > 1.2 * plain


def test_distances_fall_when_they_alone_are_trained(config, run, key):
    """Adam on a low-rank model brings its layers back to the teacher's."""
    config.distill.features = 1.0
    axes = dict(run.peft.config["members"][1]["axes"])
    run = run._replace(config=config, peft=pefts.pela(axes=axes))
    inputs, state = first_batch(run), run.peft.init(key, run.params)
    tx = optax.adam(3e-3)

    @jax.jit
    def step(trainable, moments):
        def loss(trainable):
            student = adapted(run, state._replace(trainable=trainable), inputs)
            return distill.loss(run, run.params, inputs, student)

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, moments = tx.update(grads, moments)
        return optax.apply_updates(trainable, updates), moments, value

    trainable, moments = state.trainable, tx.init(state.trainable)
    values = []
    for _ in range(15):
        trainable, moments, value = step(trainable, moments)
        values.append(float(value))
    assert values[-1] < 0.3 * values[0]


def test_weights_and_methods_that_do_not_fit_are_refused(config):
    config.distill.features = -1.0
    with pytest.raises(ValueError, match=r"distill\.features=-1\.0: give a weight"):
        train.prepare(config)
    config.distill.features = 1.0
    config.method = ConfigDict({"method": "prompt", "length": 3})
    with pytest.raises(ValueError, match="this method adds tokens; set distill.features=0"):
        train.prepare(config)
    config.distill.features, config.distill.logits = 0.0, 1.0
    assert train.prepare(config).steps == 2


def test_a_model_without_layer_outputs_is_refused(config):
    config.distill.features = 1.0
    run = experiment.build(config)
    silent = distill.watched(run, lambda *args, **kwargs: (jnp.zeros(3), {}))
    with pytest.raises(ValueError, match="this model sows no 'block_output'"):
        silent({"params": {}}, first_batch(run))
