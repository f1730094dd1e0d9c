"""Many runs in one step: each member is what train.py makes of its config alone."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import pefts
import train
from configs.base import Config
from configs.minilm_stdlib_docs_sweep import get_config
from training import checkpoint, evaluate, experiment, report, sweep

STEPS = 3
pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")


@pytest.fixture
def config(base: Path) -> Config:
    config: Config = get_config("tiny")
    config.model.source = str(base)
    config.train.steps, config.train.eval_every, config.train.save_every = STEPS, 3, 2
    return config


def swept(config: Config, **fields: Any) -> Config:
    config.sweep = ConfigDict(fields)
    return config


def trained(config: Config, folder: Path) -> tuple[sweep.Sweep, sweep.State]:
    session = sweep.prepare(config)
    assert (len(session.batches) > 1) == ("seed" in config.sweep)
    start = jax.tree.map(jnp.copy, session.state)  # a step donates it
    adapted = evaluate.adapted_forward(session.runs[0])
    return session, sweep.loop(session._replace(state=start), folder, adapted)


def alone(config: Config, folder: Path) -> pefts.PeftState:
    session = train.prepare(config)
    return train.loop(session, folder, evaluate.adapted_forward(session.run)).peft_state


def assert_alone_is_the_same(config: Config, folder: Path) -> None:
    session, state = trained(config, folder / "sweep")
    adapters = pefts.unstack(state.runs.peft_state, session.shapes)
    started = pefts.unstack(session.state.runs.peft_state, session.shapes)
    assert len(adapters) > 1
    for member, start, adapter in zip(session.members, started, adapters, strict=True):
        own = alone(member.config, folder / member.name)
        for path, leaf in jax.tree_util.tree_leaves_with_path(own):
            name = f"{member.name} {jax.tree_util.keystr(path)}"
            mine = np.asarray(dict(jax.tree_util.tree_leaves_with_path(adapter))[path])
            before = np.asarray(dict(jax.tree_util.tree_leaves_with_path(start))[path])
            moved = np.abs(np.asarray(leaf) - before).max(initial=0.0)
            # Adam makes of a gradient's last digits, where it is near 0, a step of any size.
            np.testing.assert_allclose(
                mine, leaf, rtol=1e-5, atol=1e-5 + 1e-3 * moved, err_msg=name
            )


def test_each_member_is_its_own_run(config: Config, tmp_path: Path) -> None:
    assert_alone_is_the_same(swept(config, seed=(0, 1), method={"rank": (2, 3)}), tmp_path)


def test_members_share_batches_where_all_see_the_same(config: Config, tmp_path: Path) -> None:
    fields = {"learning_rate": (4e-3,), "weight_decay": (0.0, 0.5), "clip_norm": (1e-3, 10.0)}
    assert_alone_is_the_same(swept(config, optimizer=fields), tmp_path)


def test_by_values_too(config: Config, tmp_path: Path) -> None:
    config.optimizer.name, config.optimizer.learning_rate = "mezo", 1e-2
    config = swept(config, seed=(0, 3), optimizer={"learning_rate": (1e-2, 2e-2)})
    assert_alone_is_the_same(config, tmp_path)


def test_a_sweep_leaves_what_it_names(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train.train(config, tmp_path)
    printed = capsys.readouterr().out
    assert "sweep, on dev" in printed and "linear probe" in printed
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["member"] for row in record["members"]] == [str(k) for k in range(6)]
    chosen = max(record["members"], key=lambda row: row["accuracy"])
    assert record["best"] == chosen["member"]
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    for row in record["members"]:
        folder = tmp_path / sweep.MEMBERS / row["member"]
        run, state = experiment.load_run(folder)
        rank = run.peft.config["members"][1]["rank"]
        assert rank == row["method.rank"]
        ranks = {leaf.shape[-1] for path, leaf in paths(state) if path.endswith("/A")}
        assert ranks == {rank}
        assert len(report.read_rows(folder / "metrics.csv")) == STEPS
    best = tmp_path / sweep.MEMBERS / record["best"]
    assert (best / "results.json").exists() and (best / "figure.png").exists()


def paths(state: pefts.PeftState) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(state.trainable)
    return [("/".join(str(key.key) for key in path), leaf) for path, leaf in leaves]


def test_resuming_is_bit_identical(config: Config, tmp_path: Path) -> None:
    config = swept(config, seed=(0, 1))
    session, whole = trained(config, tmp_path / "whole")
    start = jax.tree.map(jnp.copy, session.state)
    adapted = evaluate.adapted_forward(session.runs[0])
    sweep.loop(session._replace(state=start, steps=2), tmp_path / "cut", adapted)
    start = jax.tree.map(jnp.copy, session.state)
    resumed = sweep.loop(session._replace(state=start), tmp_path / "cut", adapted)
    for mine, theirs in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for member in session.members:
        files = [
            tmp_path / name / sweep.MEMBERS / member.name / "metrics.csv"
            for name in ("whole", "cut")
        ]
        rows, again = ([row["loss"] for row in report.read_rows(file)] for file in files)
        assert rows == again and len(rows) == STEPS


def test_a_member_that_diverges_leaves_the_others_alone(config: Config, tmp_path: Path) -> None:
    config = swept(config, optimizer={"learning_rate": (1e-3, 1e30)})
    session, state = trained(config, tmp_path)
    assert np.asarray(state.alive).tolist() == [True, False]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.runs.peft_state))
    own = alone(session.members[0].config, tmp_path / "alone")
    mine = pefts.unstack(state.runs.peft_state, session.shapes)[0]
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(own), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert sweep.best(session, [None, None]) == 0
    with pytest.raises(FloatingPointError, match="no member's loss"):
        trained(swept(config, optimizer={"learning_rate": (1e30, 2e30)}), tmp_path / "none")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"data": {"batch_size": (4, 8)}}, "cannot differ in 'data.batch_size'"),
        ({"optimizer": {"warmup": (0.0, 0.1)}}, "cannot differ in 'optimizer.warmup'"),
        ({"method": {"rnak": (2, 4)}}, "no field 'method.rnak'"),
        ({"method": {"method": ("lora", "dora")}}, "one method"),
        ({"seed": ()}, "at least one value"),
        ({"seed": 3}, "at least one value"),
    ],
)
def test_bad_fields_are_refused(config: Config, fields: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        sweep.members(swept(config, **fields))


def test_what_lives_outside_the_state_is_refused(config: Config) -> None:
    with pytest.raises(ValueError, match=r"member 1 \(dropout 0.5\).*differs by"):
        sweep.prepare(swept(config, method={"dropout": (0.0, 0.5)}))


def test_filled_up_ranks_are_refused_where_values_alone_are_read(config: Config) -> None:
    config.optimizer.name = "mezo"
    with pytest.raises(ValueError, match="keep one rank"):
        sweep.prepare(swept(config, method={"rank": (2, 4)}))


def test_batches_of_several_lengths_are_filled_up() -> None:
    short, long = ({"tokens": np.ones((2, n), np.int32), "label": np.ones(2)} for n in (3, 5))
    both = sweep.gathered([short, long])
    assert both["tokens"].shape == (2, 2, 5) and both["label"].shape == (2, 2)
    assert both["tokens"][0, :, 3:].sum() == 0 and both["tokens"].sum() == 16


def test_stacks_come_apart_again() -> None:
    params = {"query": {"kernel": jnp.ones((5, 3))}}
    states = [
        pefts.lora(rank=rank, targets="kernel").init(jax.random.key(rank), params)
        for rank in (1, 3, 2)
    ]
    stacked = pefts.stack(states, pad=True)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(stacked)} == {3}
    for mine, theirs in zip(pefts.unstack(stacked, states), states, strict=True):
        assert jax.tree.all(jax.tree.map(np.array_equal, mine, theirs))
    with pytest.raises(ValueError, match="pad=True"):
        pefts.stack(states)
    with pytest.raises(ValueError, match="another structure"):
        other = pefts.vera(rank=2, targets="kernel").init(jax.random.key(0), params)
        pefts.stack([states[0], other], pad=True)
    with pytest.raises(ValueError, match="like has 2"):
        pefts.unstack(stacked, states[:2])


def test_a_sweep_folder_belongs_to_its_config(config: Config, tmp_path: Path) -> None:
    checkpoint.claim(tmp_path, config)
    config.sweep.seed = (0, 1)
    with pytest.raises(ValueError, match=r"sweep\.seed"):
        checkpoint.claim(tmp_path, config)
