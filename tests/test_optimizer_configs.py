"""Every optimizer trains by its name in a config, on all parameters or on an adapter."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import pefts
import train
from configs import python_decoder_optimizers as configs
from training import experiment

pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")


def test_there_is_an_entry_for_every_optimizer() -> None:
    used = {entry.optimizer or name for name, entry in configs.ENTRIES.items()}
    assert used == {"adamw", *pefts.OPTIMIZERS}


@pytest.fixture
def task(tmp_path: Path) -> ConfigDict:
    (tmp_path / "text.txt").write_text("".join(f"{n} is {n % 7}.\n\n" for n in range(300)))
    return ConfigDict({"name": "text", "path": str(tmp_path / "text.txt"), "block": 40})


@pytest.mark.parametrize("name", sorted(configs.ENTRIES))
def test_it_trains(name: str, task: ConfigDict, decoder_base: Path) -> None:
    config = configs.get_config(f"{name},tiny")
    assert config.name == f"python_decoder_optimizers_{name}_tiny"
    config.model.source, config.task, config.train.steps = str(decoder_base), task, 3
    config.optimizer.warmup = 0.5
    session = train.prepare(config)
    state = jax.tree.map(jnp.copy, session.state)
    for step in range(3):
        state, metrics = session.update(state, session.place(session.batches[step]))
        assert bool(metrics.finite) and np.isfinite(metrics.grad_norm)
    pairs = zip(
        *(jax.tree.leaves(s.peft_state.trainable) for s in (state, session.state)), strict=True
    )
    assert any(bool(jnp.any(after != before)) for after, before in pairs)


def test_names_and_modes() -> None:
    assert configs.get_config("fira").name == "python_decoder_optimizers_fira"
    assert configs.get_config("fira").optimizer.options.rank == 48
    for mode in ("huge", "fira,huge", "fire", "tiny,fira"):
        with pytest.raises(ValueError, match="none of"):
            configs.get_config(mode)


def test_what_runs_inside_is_named_as_in_optax(language_config: Any) -> None:
    options = {"rank": 2, "inner": "scale_by_lion"}
    language_config.optimizer.name = "galore"
    language_config.optimizer.options = ConfigDict(options)
    tx = experiment.optimizer(language_config, {"kernel": jnp.ones((4, 6))}, 10)
    state = tx.init({"kernel": jnp.ones((4, 6))})
    assert sorted(x.shape for x in jax.tree.leaves(state) if x.ndim) == [(2, 6), (4, 2)]
    language_config.optimizer.options.inner = "scale_by_adam8bits"
    with pytest.raises(ValueError, match="scale_by_adam8bits' is none .*'scale_by_adam8bit',"):
        experiment.optimizer(language_config, {"kernel": jnp.ones((4, 6))}, 10)
