"""Training and scoring on images: the whole way from a config to a merged model."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import eval as evaluation
import models
import pefts
import train
from training import evaluate, experiment

pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")


def tiny(name):
    return importlib.import_module(f"configs.{name}").get_config("tiny")


def test_a_base_is_pretrained_merged_and_adapted(tmp_path: Path) -> None:
    pretrain = tiny("digits_vit_pretrain")
    pretrain.train.steps = 3
    train.train(pretrain, tmp_path / "pretrain")
    run, state = experiment.load_run(tmp_path / "pretrain")
    scores = evaluation.evaluate_run(run, state, "test")
    assert scores["adapted"].summary() == scores["merged"].summary()
    merged = run.peft.merge(run.params, state)
    models.save(tmp_path / "base", pretrain.model.source, run.model, merged, run.names)

    config = tiny("digits_vit_lora")
    config.model.source = str(tmp_path / "base")
    train.train(config, tmp_path / "lora")
    adapted, _ = experiment.load_run(tmp_path / "lora")
    kernel = adapted.params["encoder"]["layers"]["mlp"]["output"]["kernel"]
    np.testing.assert_array_equal(kernel, merged["encoder"]["layers"]["mlp"]["output"]["kernel"])
    head, old = adapted.params["classifier"]["kernel"], merged["classifier"]["kernel"]
    assert head.shape == old.shape and np.abs(np.asarray(head) - np.asarray(old)).max() > 1e-3
    results = json.loads((tmp_path / "lora" / "results.json").read_text())
    assert results["labels"] == ["5", "6", "7", "8", "9"]
    assert set(results["systems"]) == {"majority class", "linear probe", "adapted"}


def test_predictions_follow_the_split_whatever_the_batches() -> None:
    config = tiny("digits_vit_lora")
    config.data.eval_batch_size = 16
    run = experiment.build(config)
    forward = evaluate.forward(run)
    logits = run.objective.predict(run, forward, run.params, "test")
    rows = run.rows["test"]
    pixels = rows.pixels.astype(np.float32) / 255
    expected = run.model.apply({"params": run.params}, (pixels - 0.5) / 0.5)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    scores = run.objective.scores(run, logits, "test")
    assert scores.accuracy == np.mean(np.asarray(expected).argmax(-1) == rows.labels)


def test_the_linear_probe_is_one_on_image_vectors() -> None:
    from training import classification

    run = experiment.build(tiny("digits_vit_lora"))

    def features(split: str) -> np.ndarray:
        pixels = run.rows[split].pixels.astype(np.float32) / 255
        images = (pixels - 0.5) / 0.5
        return np.asarray(run.model.apply({"params": run.params}, images, method="embed"))

    scaler = StandardScaler().fit(features("train"))
    probe = LogisticRegression(C=0.03, max_iter=500)
    probe.fit(scaler.transform(features("train")), run.rows["train"].labels)
    guess = probe.predict(scaler.transform(features("test")))
    found = classification.linear_probe(run, ["test"], strengths=[0.03])["test"]
    assert abs(found.accuracy - np.mean(guess == run.rows["test"].labels)) <= 1 / 40


def test_a_method_that_looks_at_data_first_sees_images() -> None:
    config = tiny("digits_vit_lora")
    config.method = {"method": "eva", "rank": 2, "targets": r"query/kernel"}
    config.calibrate.batches = 1
    session = train.prepare(config)
    _, metrics = session.update(session.state, session.place(session.batches[0]))
    assert np.isfinite(float(metrics.loss))


def test_layers_are_distilled_over_patches() -> None:
    config = tiny("digits_vit_lora")
    config.distill.features = 1.0
    session = train.prepare(config)
    state, penalties = session.state, []
    for step in range(3):
        state, metrics = session.update(state, session.place(session.batches[step]))
        penalties.append(float(metrics.penalty))
    assert penalties[0] < 1e-9 < penalties[2]  # the adapter starts as the base


def test_the_rate_counts_tokens_and_compiles_one_shape() -> None:
    from data import pipeline

    run = experiment.build(tiny("digits_vit_pretrain"))
    batches = run.objective.train_batches(run)
    assert pipeline.tokens(batches[0]) == 8 * 17
    assert pipeline.inputs_shape(batches.longest()) == batches.shapes[-1] == (8, 8, 8, 1)


def test_a_text_model_reads_no_images(base: Path) -> None:
    config = tiny("digits_vit_lora")
    config.model.source = str(base)
    with pytest.raises(ValueError, match="is a bert, and task 'digits' has images"):
        experiment.build(config)


def test_the_pretraining_config_learns_to_read() -> None:
    """A few of its steps, on its whole task."""
    config = importlib.import_module("configs.digits_vit_pretrain").get_config()
    config.train.steps = 60
    session = train.prepare(config)
    state, losses = session.state, []
    for step in range(60):
        state, metrics = session.update(state, session.place(session.batches[step]))
        losses.append(float(metrics.loss))  # waits: steps that pile up starve each other's devices
    run = session.run
    adapted = evaluate.adapted_forward(run)
    scores = evaluate.score(run, adapted, (run.params, state.peft_state), "dev")
    assert np.mean(losses[-5:]) < 0.7 * losses[0] and scores.accuracy > 0.5
    assert pefts.count(state.peft_state.trainable) == pefts.count(run.params)
