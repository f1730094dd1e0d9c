"""Continuations and grades: batches change nothing; eval.py writes, grades, merges and exports."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import eval as eval_script
import models
import pefts
import train
from data.written import Written, answered
from training import experiment, writing
from training.objective import Experiment, Opening, Writing


def adapted(config: Any) -> tuple[Experiment, Any]:
    run = experiment.build(config)
    state = pefts.randomize(jax.random.key(1), run.peft.init(jax.random.key(0), run.params))
    return run, (run.params, state)


def greedy(run: Experiment, argument: Any, text: str, count: int) -> str:
    """By whole forward passes of the merged model, one text at a time."""
    merged = run.peft.merge(*argument)
    tokenizer = models.load_tokenizer(run.config.model.source)
    (ids,) = tokenizer.encode([text])
    for _ in range(count):
        logits = run.model.apply({"params": merged}, np.asarray([ids], np.int32))
        ids.append(int(np.argmax(np.asarray(logits)[0, -1])))
    return tokenizer.decode(ids)[len(text) :]


def test_batches_of_any_size_write_what_each_prompt_gets_alone(language_config: Any) -> None:
    language_config.data.eval_batch_size = 2
    run, argument = adapted(language_config)
    texts = ["3 times", "a", "a much longer prompt, of more than 32 tokens", "7 times 7 is", "b"]
    written = writing.write(run, argument, [Opening(text) for text in texts], Writing(5))
    assert written == [greedy(run, argument, text, 5) for text in texts]
    assert len(set(written)) > 1


def test_what_cannot_be_continued_is_refused(language_config: Any) -> None:
    run, argument = adapted(language_config)
    with pytest.raises(ValueError, match="prompt '' has no token"):
        writing.write(run, argument, [Opening("a"), Opening("")], Writing(5))
    with pytest.raises(ValueError, match="has 60 tokens: with new_tokens=5 .* context of 64"):
        writing.write(run, argument, [Opening("a" * 60)], Writing(5))
    assert writing.write(run, argument, [Opening("a" * 60)], Writing(4))
    language_config.method = {"method": "prompt", "length": 2}
    run = experiment.build(language_config)
    with pytest.raises(ValueError, match="prompt adds tokens of its own"):
        writing.write(run, (run.params, None), [Opening("a")], Writing())


def share_of_longer(texts: Sequence[Written], answers: Sequence[str]) -> dict[str, float]:
    pairs = zip(texts, answers, strict=True)
    return {"longer": float(np.mean([len(answer) > len(t.prompt) for t, answer in pairs]))}


def test_answers_are_graded_by_the_tasks_own_measure(language_config: Any, tmp_path: Path) -> None:
    run, argument = adapted(language_config)
    texts = [answered(prompt, "x", "", "x", "y") for prompt in ("ab", "abcdefg", "abc")]
    with pytest.raises(ValueError, match="no answers to grade"):
        writing.grade(run, argument, "dev", Writing())
    task = run.task._replace(splits={"dev": texts}, grade=share_of_longer)
    run = run._replace(task=task)
    grades = writing.grade(run, argument, "dev", Writing(5))
    assert grades.summary() == share_of_longer(texts, grades.answers)
    assert grades.record()["answers"] == 3
    assert grades.answers == [greedy(run, argument, text.prompt, 5) for text in texts]
    assert len(writing.grade(run, argument, "dev", Writing(5), limit=2).answers) == 2
    grades.save(tmp_path / "answers.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["ab", "abcdefg", "abc"]
    assert rows[0]["references"] == ["x", "y"] and rows[0]["answer"] == grades.answers[0]
    with pytest.raises(ValueError, match="split='test' is none of"):
        writing.grade(run, argument, "test", Writing())


def call_eval(folder: Path, *options: str) -> None:
    with flagsaver.flagsaver():
        flags.FLAGS(["eval.py", f"--run={folder}", *options])
        eval_script.main(["eval.py"])


@pytest.mark.usefixtures("optax_promotes_its_step_count")
def test_eval_does_all_that_it_names(
    language_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    language_config.train.steps = language_config.train.eval_every = 2
    train.train(language_config, folder)
    call_eval(folder, "--write=3 times", "--new_tokens=4", "--temperature=1.0")
    assert "3 times" in capsys.readouterr().out
    call_eval(folder, f"--export={tmp_path / 'peft'}", f"--merge={tmp_path / 'whole'}")
    assert (tmp_path / "peft/adapter_model.safetensors").stat().st_size > 100
    run, state = experiment.load_run(folder)
    model, params, _ = models.load(tmp_path / "whole")
    merged = run.peft.merge(run.params, state)
    jax.tree.map(np.testing.assert_array_equal, params, merged)
    assert models.load_tokenizer(tmp_path / "whole").end_id == 0
    assert models.stop_tokens(tmp_path / "whole") == (0,)
    with pytest.raises(SystemExit, match="no answers to grade"):
        call_eval(folder, "--grade", "--split=dev")
    call_eval(folder, "--split=dev")
    systems = json.loads((folder / "eval_dev.json").read_text())["systems"]
    assert systems["merged"]["loss"] == pytest.approx(systems["adapted"]["loss"], rel=1e-4)
    source = language_config.model.source
    with pytest.raises(SystemExit, match="is the base itself"):
        call_eval(folder, f"--merge={source}")
    assert model.config.num_layers == 2


def test_a_merged_folder_opens_in_transformers(language_config: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="it is who has to open it")
    import torch

    run, argument = adapted(language_config)
    merged = run.peft.merge(*argument)
    models.save(tmp_path, language_config.model.source, run.model, merged, run.names)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = np.arange(1, 12, dtype=np.int64)[None]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    ours = run.model.apply({"params": merged}, tokens.astype(np.int32))
    np.testing.assert_allclose(ours, expected, atol=2e-5, rtol=0)
