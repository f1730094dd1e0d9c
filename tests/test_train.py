"""train.py and eval.py as a user runs them, on a tiny random BERT and the real task."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import pefts
import train
from configs.minilm_stdlib_docs_lora import get_config
from training import checkpoint, evaluate, experiment, report

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6
pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")


@pytest.fixture
def config(base: Path) -> ConfigDict:
    config = get_config("tiny")
    config.model.source = str(base)
    config.train.steps, config.train.eval_every, config.train.save_every = STEPS, 3, 2
    return config


def leaves(folder: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint and of the adapter file, by name."""
    from safetensors.numpy import load_file

    checkpoints = checkpoint.manager(folder)
    tree = checkpoints.restore(checkpoints.latest_step()).state
    checkpoints.close()
    found = {f"adapter:{k}": v for k, v in load_file(folder / "adapter.safetensors").items()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found[jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


def same(one: Path, other: Path) -> None:
    mine, theirs = leaves(one), leaves(other)
    assert mine.keys() == theirs.keys() and len(mine) > 20
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()


def test_a_run_leaves_what_it_names(
    config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train.train(config, tmp_path / "run")
    printed = capsys.readouterr().out
    for word in ("trainable", "activations", "majority class", "linear probe", "adapted"):
        assert word in printed
    for name in ("adapter.safetensors", "figure.png", "results.json", "metrics.csv", "config.json"):
        assert (tmp_path / "run" / name).stat().st_size > 100, name
    rows = report.read_rows(tmp_path / "run" / "metrics.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert [bool(row["dev_accuracy"]) for row in rows] == [False, False, True] * 2
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for scores in results["systems"].values():
        assert np.sum(scores["confusion"]) == 40 and 0 <= scores["accuracy"] <= 1


def test_the_base_is_not_in_a_checkpoint(config: ConfigDict, tmp_path: Path) -> None:
    session = train.prepare(config)
    train.loop(session, tmp_path, evaluate.adapted_forward(session.run))
    checkpoints = checkpoint.manager(tmp_path)
    saved = checkpoints.restore(STEPS)
    checkpoints.close()
    assert saved.data and pefts.count(saved.state) < 4 * pefts.count(session.state.peft_state)
    sizes = {leaf.shape for leaf in jax.tree.leaves(session.run.params) if leaf.ndim >= 2}
    head = session.run.params["classifier"]["kernel"].shape
    assert not {leaf.shape for leaf in jax.tree.leaves(saved.state)} & (sizes - {head})


def test_resuming_is_bit_identical(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.train(config, tmp_path / "whole")
    values, calls = train._values, []

    def crash(metrics: train.Metrics) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return values(metrics)

    monkeypatch.setattr(train, "_values", crash)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, tmp_path / "broken")
    monkeypatch.undo()
    train.train(config, tmp_path / "broken")
    same(tmp_path / "whole", tmp_path / "broken")


def command(config: ConfigDict, folder: Path, *more: str) -> list[str]:
    fields = {
        "model.source": config.model.source,
        "train.steps": config.train.steps,
        "train.save_every": config.train.save_every,
        "train.eval_every": config.train.eval_every,
    }
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    script = "configs/minilm_stdlib_docs_lora.py:tiny"
    train_py = [sys.executable, "train.py", f"--config={script}", f"--workdir={folder}"]
    return [*train_py, *overrides, *more]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_killed_at_any_moment_it_resumes_to_the_same_bits(
    config: ConfigDict, tmp_path: Path
) -> None:
    config.train.steps, config.train.save_every, config.train.eval_every = 40, 2, 40
    whole = run(*command(config, tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    broken, kills = tmp_path / "broken", 0
    for wanted in (2, 20):
        process = subprocess.Popen(
            command(config, broken), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            steps = [int(p.name) for p in (broken / "checkpoints").glob("*") if p.name.isdigit()]
            if steps and max(steps) >= wanted:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.005)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 1, "the run ended before it could be killed"
    resumed = run(*command(config, broken))
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step" in resumed.stdout
    same(tmp_path / "whole", broken)


def test_another_config_in_the_folder_is_refused(config: ConfigDict, tmp_path: Path) -> None:
    checkpoint.claim(tmp_path, config)
    checkpoint.claim(tmp_path, config)
    config.method.rank, config.seed = 4, 1
    with pytest.raises(ValueError, match=r"method\.rank: 8 there, 4 here; seed: 0 there, 1 here"):
        train.train(config, tmp_path)


def test_plan_writes_nothing(
    config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train.train(config, tmp_path / "run", plan_only=True)
    printed = capsys.readouterr().out
    session = train.prepare(config)
    assert f"{pefts.count(session.state.peft_state.trainable):,} parameters" in printed
    assert f"{session.plan.activation_bytes / 2**20:,.1f} MiB" in printed
    assert session.plan.optimizer_bytes >= 2 * 4 * session.plan.trainable_count
    assert not (tmp_path / "run").exists()


def test_nan_stops_and_keeps_the_checkpoint(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = train.prepare(config)
    seen: list[int] = []

    def poisoned(state: train.TrainState, batch: dict) -> tuple:
        seen.append(1)
        if len(seen) == 5:
            batch = {**batch, "weight": batch["weight"] * np.float32("nan")}
        return session.update(state, batch)

    broken = session._replace(update=poisoned)
    with pytest.raises(FloatingPointError, match=r"step 5: loss nan.*norms were.*step 4 is good"):
        train.loop(broken, tmp_path, evaluate.adapted_forward(session.run))
    checkpoints = checkpoint.manager(tmp_path)
    saved = checkpoints.restore(checkpoints.latest_step())
    checkpoints.close()
    assert int(saved.state["step"]) == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved.state))


def test_eval_merged_and_unmerged_agree(config: ConfigDict, tmp_path: Path) -> None:
    train.train(config, tmp_path)
    done = run(sys.executable, "eval.py", f"--run={tmp_path}", "--split=dev")
    assert done.returncode == 0, done.stderr
    systems = json.loads((tmp_path / "eval_dev.json").read_text())["systems"]
    assert set(systems) == {"adapted", "merged"}
    assert systems["adapted"] == systems["merged"]
    rows = report.read_rows(tmp_path / "metrics.csv")
    assert systems["adapted"]["accuracy"] == pytest.approx(float(rows[-1]["dev_accuracy"]))
    wrong = run(sys.executable, "eval.py", f"--run={tmp_path}", "--split=holdout")
    assert wrong.returncode != 0 and "'holdout' is none of" in wrong.stderr


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("method.method", "lorra", r"method='lorra' is unknown; near names: \['lora'"),
        ("method.rank", 0, "rank=0"),
        ("method.targets", "querry", r"Near names: \['query'\]"),
        ("data.batch_size", 9, "batch_size=9 does not divide over 8 devices"),
        ("model.source", "no/such-model", "no/such-model"),
        ("optimizer.name", "adam", "optimizer.name='adam' is unknown"),
        ("task.name", "stdlib", "'stdlib'"),
    ],
)
def test_bad_input_is_refused_by_name(
    config: ConfigDict, tmp_path: Path, field: str, value: object, message: str
) -> None:
    section, name = field.split(".")
    config[section][name] = value
    # What main turns into a message and an exit status.
    with pytest.raises((ValueError, OSError, ImportError), match=message):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.method.rank=25", "error: rank=25 is out of range"),
        ("--config.method.ranks=4", "ranks"),
    ],
)
def test_bad_input_ends_the_command_with_its_reason(
    config: ConfigDict, tmp_path: Path, override: str, message: str
) -> None:
    done = run(*command(config, tmp_path / "run", override))
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_full_disk_keeps_the_checkpoint_before(config: ConfigDict, tmp_path: Path) -> None:
    checkpoint.claim(tmp_path / "run", config)
    first = config.copy_and_resolve_references()
    first.train.steps = 2
    session = train.prepare(first)
    train.loop(session, tmp_path / "run", evaluate.adapted_forward(session.run))
    before = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    # No file may grow beyond 4 KiB, as if the disk were full.
    arguments = command(config, tmp_path / "run")
    done = run("bash", "-c", 'trap "" XFSZ; ulimit -f 4; exec "$@"', "bash", *arguments)
    assert done.returncode != 0 and "error:" in done.stderr, done.stderr
    assert before == ["2"]
    healthy = run(*command(config, tmp_path / "run"))
    assert healthy.returncode == 0, healthy.stderr
    assert "resuming at step 2" in healthy.stdout


def test_optimizer_patterns_are_strict(config: ConfigDict) -> None:
    config.optimizer.factors = ConfigDict({"no_such_leaf": 2.0})
    trainable = {"0": {"classifier/bias": {"value": np.zeros(3, np.float32)}}}
    with pytest.raises(ValueError, match="no_such_leaf"):
        experiment.optimizer(config, trainable, 10)


def test_learning_rate_factors_scale_updates(config: ConfigDict) -> None:
    config.optimizer.factors = ConfigDict({"/B$": 16.0})
    config.optimizer.weight_decay, config.optimizer.no_decay = 0.0, ()
    leaves = {"k": {"A": np.ones(3, np.float32), "B": np.ones(3, np.float32)}}
    tx = experiment.optimizer(config, leaves, 10)
    state = tx.init(leaves)
    for _ in range(2):
        updates, state = tx.update(leaves, state, leaves)
    np.testing.assert_allclose(updates["k"]["B"], 16 * updates["k"]["A"], rtol=1e-6)
    assert float(np.abs(updates["k"]["A"]).min()) > 0
