"""Every config: its docstring says what it needs to, and its tiny mode trains and resumes."""

import dataclasses
import importlib
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import pefts
import train
from configs.base import plain
from training import checkpoint, evaluate, experiment, report, writing
from training.objective import Writing

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*_*.py"))
CONFIGS = [file.stem for file in FILES if file.stem != "__init__"]
pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")


@pytest.mark.parametrize("name", CONFIGS)
def test_docstring_and_names(name: str) -> None:
    module = importlib.import_module(f"configs.{name}")
    for field in (f"Command: .*configs/{name}.py", r"Time: .*\d", "Result: .*"):
        assert re.search(field, module.__doc__ or ""), field
    assert "TODO" not in module.__doc__
    assert module.get_config().name == name
    assert module.get_config("tiny").name == f"{name}_tiny"
    with pytest.raises(ValueError, match="none of"):
        module.get_config("huge")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    lines = [f"{n} bottles hang on the wall, and one falls down.\n\n" for n in range(300)]
    file.write_text("".join(lines))
    return file


def tiny(name: str, base: Path, decoder_base: Path, text: Path) -> ConfigDict:
    """The config's tiny mode on a tiny model; a language model's on a text made up here."""
    config = importlib.import_module(f"configs.{name}").get_config("tiny")
    if config.model.source == "tiny-vit":  # its task comes with a package, too
        return config
    is_language = "pooling" not in config.model
    config.model.source = str(decoder_base if is_language else base)
    if is_language:
        examples = config.task.examples
        config.task = ConfigDict(
            {"name": "text", "path": str(text), "block": 100, "examples": examples}
        )
    for option, value in SMALL.items():
        if option in config.method:
            config.method[option] = value
    return config


# What the tiny base is too narrow for, or has no weights below.
SMALL = {
    "init_rank": 4,
    "max_rank": 4,
    "target_rank": 2,
    "width": 8,
    "block_size": 2,
    "bottleneck": 8,
    "budget": 3,
    "length": 8,
    "threshold": 0.01,
    "rank": 4,
}


def kind_of(name: str) -> tuple[object, ...]:
    """What decides how a run goes, beside the mathematics of its method."""
    config = importlib.import_module(f"configs.{name}").get_config("tiny")
    traits = pefts.from_config(plain(config.method)).traits
    flags = dataclasses.asdict(traits) | {"restart_steps": bool(traits.restart_steps)}
    return (tuple(config.data), config.optimizer.name, bool(config.sweep), *flags.values())


# One of each kind is saved, resumed and scored.
RESUMED = list({kind_of(name): name for name in reversed(CONFIGS)}.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_tiny_mode_trains_and_resumes(
    name: str, base: Path, decoder_base: Path, text: Path, tmp_path: Path
) -> None:
    config = tiny(name, base, decoder_base, text)
    if config.sweep:
        pytest.skip("tests/test_sweep.py")
    session = train.prepare(config)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(session.state.peft_state.trainable)]
    whole, losses = jax.tree.map(jnp.copy, session.state), []  # a step donates it
    for step in range(2):
        whole, metrics = session.update(whole, session.place(session.batches[step]))
        losses.append(float(metrics.loss))
    after = jax.tree.leaves(whole.peft_state.trainable)
    assert sum(bool(np.any(a != b)) for a, b in zip(after, before, strict=True)) >= len(after) / 2
    assert np.isfinite(losses).all()
    if name in RESUMED:
        _resumes(session, tmp_path, whole, losses)


def _resumes(
    session: train.Session, folder: Path, whole: train.TrainState, losses: list[float]
) -> None:
    adapted = evaluate.adapted_forward(session.run)
    for step in (1, 2):
        start = jax.tree.map(jnp.copy, session.state)
        resumed = train.loop(session._replace(state=start, steps=step), folder, adapted)
    for mine, theirs in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    rows = report.read_rows(folder / "metrics.csv")
    assert [float(row["loss"]) for row in rows] == losses
    assert checkpoint.manager(folder).latest_step() == 2


# Between them: a model and a tokenizer from nothing, answers that are graded.
MADE_UP = ("llama32_3b_metamathqa_lora", "python_docstrings_lora")


@pytest.mark.parametrize("name", MADE_UP)
def test_a_model_made_on_the_spot_runs_to_the_end(name: str, tmp_path: Path) -> None:
    config = importlib.import_module(f"configs.{name}").get_config("tiny")
    root = config.task.get("root")
    if root and not Path(root).is_dir():
        pytest.skip(f"the data of {name} ({root}) are not here")
    train.train(config, tmp_path)
    systems = json.loads((tmp_path / "results.json").read_text())["systems"]
    assert systems["base"]["loss"] != systems["adapted"]["loss"]
    run = experiment.build(config)
    if run.task.grade is None:
        return
    _, state = pefts.load(tmp_path / "adapter.safetensors", run.params)
    grades = writing.grade(run, (run.params, state), "dev", Writing(4), limit=3)
    assert len(grades.answers) == 3 and grades.summary()
