"""train.py with optimizers that need no gradients: their logs, their resumption, their scores."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import pefts
import train
from configs.minilm_stdlib_docs_lora import get_config
from pefts.zeroth_order import mezo, seed_log
from training import evaluate, experiment, seeds

pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")


@pytest.fixture
def config(language_config: Any) -> Any:
    config = language_config
    config.optimizer = {
        **config.optimizer.to_dict(),
        "name": "mezo",
        "learning_rate": 1e-3,
        "schedule": "constant",
        "options": {"eps": 1e-2, "queries": 2},
    }
    config.train.steps, config.train.eval_every, config.train.save_every = 6, 6, 2
    return config


def of(folder: Path, config: Any) -> Any:
    """The trained adapter of a run."""
    run = experiment.build(config)
    return run, pefts.load(folder / "adapter.safetensors", run.params)[1]


def test_a_log_is_worth_the_run(config: Any, tmp_path: Path) -> None:
    """The state at the start and a kilobyte make the trained adapter, bit for bit."""
    config.optimizer.name = "sparse_mezo"
    train.train(config, tmp_path)
    run, trained = of(tmp_path, config)
    fresh, tx = train.initial_state(run, config.train.steps, None)
    start = fresh.peft_state.trainable
    log = seed_log.read(tmp_path / seeds.FILE)
    assert len(log.decays) == 6 and np.all(np.isfinite(log.values))
    made = seed_log.replay(tx, start, log)
    jax.tree.map(np.testing.assert_array_equal, made, trained.trainable)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), made, start)
    assert all(jax.tree.leaves(moved))
    assert (tmp_path / seeds.FILE).stat().st_size < 4000
    with pytest.raises(ValueError, match="does not lead to step 9"):
        seeds.Recorder(tmp_path, tx, start, fresh.opt_state, 9)
    seeds.Recorder(tmp_path, tx, start, fresh.opt_state, 5)


def test_resuming_keeps_the_log(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    train.train(config, whole)
    original, calls = train._values, []

    def crash(metrics: train.Metrics) -> dict[str, float]:
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(metrics)

    with monkeypatch.context() as patch:
        patch.setattr(train, "_values", crash)
        with pytest.raises(KeyboardInterrupt):
            train.train(config, tmp_path / "cut")
    train.train(config, tmp_path / "cut")
    ours, theirs = (seed_log.read(folder / seeds.FILE) for folder in (tmp_path / "cut", whole))
    jax.tree.map(np.testing.assert_array_equal, ours[2:], theirs[2:])
    adapters = [of(folder, config)[1].trainable for folder in (tmp_path / "cut", whole)]
    jax.tree.map(np.testing.assert_array_equal, *adapters)


def test_moments_leave_no_log(tmp_path: Path) -> None:
    tx, theta = mezo(1e-3, rule="adam"), jnp.ones(3)
    recorder = seeds.Recorder(tmp_path, tx, theta, tx.init(theta), 0)
    recorder.add(tx.init(theta))
    recorder.write()
    assert seeds.files(tmp_path) == {}


def test_parts_of_a_batch_have_its_value(config: Any) -> None:
    config.data.batch_size = 32
    found = []
    for parts in (1, 4):
        config.train.accumulate = parts
        session = train.prepare(config)
        _, metrics = session.update(session.state, session.place(session.batches[0]))
        found.append(float(metrics.loss))
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_gradients_are_asked_for_by_name(config: Any) -> None:
    config.train.value = "error_rate"
    with pytest.raises(ValueError, match=r"train.value='error_rate' is unknown .* \['loss'\]"):
        train.prepare(config)


def test_a_score_without_gradient_is_lowered(base: Path) -> None:
    config = get_config("tiny")
    config.model.source, config.train.value = str(base), "error_rate"
    with pytest.raises(ValueError, match="'error_rate' has no gradient, which optimizer.name='ad"):
        train.prepare(config)
    config.optimizer.name, config.optimizer.options = "mezo", ConfigDict({"eps": 0.1})
    session = train.prepare(config)
    state, metrics = session.update(session.state, session.place(session.batches[0]))
    # a share of 8 rows, in the mean of two sides
    assert float(metrics.loss) * 16 == pytest.approx(round(float(metrics.loss) * 16))
    forward = evaluate.adapted_forward(session.run)
    assert evaluate.score(session.run, forward, (session.run.params, state.peft_state), "dev")
    config.method = ConfigDict(
        {"method": "adalora", "total_steps": 9, "init_rank": 4, "target_rank": 2, "warmup": (1, 1)}
    )
    with pytest.raises(ValueError, match="adalora decides by gradients"):
        train.prepare(config)


def test_the_schedule_is_known_by_name(config: Any) -> None:
    config.optimizer.schedule = "linear"
    with pytest.raises(ValueError, match="optimizer.schedule='linear' is unknown"):
        train.prepare(config)
    config.optimizer.schedule = "constant"
    rates = [experiment._schedule(config.optimizer, 10, 1e-3)(step) for step in range(3)]
    assert rates == [1e-3] * 3


def test_an_optimizer_is_told_the_length_of_a_run(config: Any) -> None:
    config.optimizer.name, config.optimizer.options = "adazeta", ConfigDict({"eps": 1e-2})
    config.train.steps = 4
    with pytest.raises(ValueError, match="AdaZeta's schedule divides"):
        train.prepare(config)
    tx = experiment.optimizer(config, {"w": jnp.ones(3)}, 40, (), 10)
    assert tx.init({"w": jnp.ones(3)}).last.coefficients.shape == (15,)
