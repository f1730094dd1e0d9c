"""Every config: its docstring says what it needs to, and its tiny mode trains and resumes."""

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
    "target_rank": 2,
    "width": 8,
    "bottleneck": 8,
    "threshold": 0.01,
    "rank": 4,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_tiny_mode_trains_and_resumes(
    name: str, base: Path, decoder_base: Path, text: Path, tmp_path: Path
) -> None:
    session = train.prepare(tiny(name, base, decoder_base, text))
    adapted = evaluate.adapted_forward(session.run)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(session.state.peft_state.trainable)]

    def train_to(step: int) -> train.TrainState:
        start = jax.tree.map(jnp.copy, session.state)  # a step donates it
        return train.loop(session._replace(state=start, steps=step), tmp_path, adapted)

    whole, losses = jax.tree.map(jnp.copy, session.state), []
    for step in range(2):
        whole, metrics = session.update(whole, session.place(session.batches[step]))
        losses.append(float(metrics.loss))
    after = jax.tree.leaves(whole.peft_state.trainable)
    assert sum(bool(np.any(a != b)) for a, b in zip(after, before, strict=True)) >= len(after) / 2

    train_to(1)
    resumed = train_to(2)
    for mine, theirs in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    rows = report.read_rows(tmp_path / "metrics.csv")
    assert [float(row["loss"]) for row in rows] == losses
    assert checkpoint.manager(tmp_path).latest_step() == 2


MADE_UP = [
    name
    for name in CONFIGS
    if importlib.import_module(f"configs.{name}").get_config("tiny").model.source == "tiny-llama"
    and name != "python_decoder_optimizers"  # the task and model of python_decoder_pretrain
]


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
