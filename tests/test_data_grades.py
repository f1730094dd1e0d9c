"""The scores that a task brings along for what a model generates."""

import doctest
import json
import pickle
import sys
from pathlib import Path

import pytest

import data
from data import generation_sets, instruct, python_sources, written
from data.generation_sets import KNOWN, matches
from data.written import (
    LanguageTask,
    Written,
    answered,
    first,
    make_language_task,
    sentence_scores,
)

FILES = {
    "e2e/lora_valid.txt": "".join(f"name : {n}||It is {n} .\n" for n in range(30)),
    "e2e/lora_test.txt": "name : A||The cat sat on the mat .\nname : A||A cat is there .\n",
    "gsm8k/train.jsonl": "".join(
        json.dumps({"question": f"q{n}", "answer": f"#### {n}"}) + "\n" for n in range(30)
    ),
    "gsm8k/test.jsonl": "".join(
        json.dumps({"question": q, "answer": a}) + "\n"
        for q, a in (("a", "#### 7"), ("b", "#### 8"))
    ),
    "llm_adapters/piqa/test.json": json.dumps(
        [{"instruction": "q", "answer": "solution1"}, {"instruction": "r", "answer": "3.0"}]
    ),
    "metamathqa/MetaMathQA-395K.json": '[{"query": "q", "response": "r"}]',
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for file, content in FILES.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(content)
    return tmp_path


def language_task(name: str, **options) -> LanguageTask:
    task = data.load(name, **options)
    assert isinstance(task, LanguageTask)
    return task


def scored(task: LanguageTask, texts: list[Written], predictions: list[str]) -> dict[str, float]:
    assert task.grade is not None
    return task.grade(texts, predictions)


@pytest.mark.parametrize("name", ["gsm8k", "metamathqa"])
def test_final_answers(name, root) -> None:
    task = language_task(name, root=root)
    texts = task.splits["test"]
    assert scored(task, texts, ["So\n#### 7", "The answer is 9"]) == {
        "accuracy": 0.5,
        "answered": 1,
    }
    assert scored(task, texts, ["none", "The answer is: 8"]) == {"accuracy": 0.5, "answered": 0.5}
    with pytest.raises(ValueError, match="1 predictions and 2 references"):
        scored(task, texts, ["7"])


def test_each_set_has_its_own_rule(root) -> None:
    suite = language_task("llm_adapters/piqa", root=root)
    texts, said = suite.splits["test"], ["it is solution1 or solution2", "3 or 3.0005"]
    assert scored(suite, texts, said) == {"accuracy": 1.0, "answered": 1.0}
    found = matches("llm_adapters/piqa", texts, said[::-1])
    wrong = scored(suite, texts, said[::-1])
    assert (
        wrong
        == {"accuracy": found.accuracy, "answered": found.answered}
        != scored(suite, texts, said)
    )


def test_sentences(root) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    task = language_task("e2e", root=root)
    assert task.grade is sentence_scores
    (text,) = task.splits["test"]
    assert text.references == ("The cat sat on the mat .", "A cat is there .")
    for reference in text.references:
        assert scored(task, [text], [" " + reference]) == {
            "bleu": pytest.approx(100.0),
            "rougeL": pytest.approx(1.0),
        }
    # Of six words against five: the, sat, on, the, mat are a common subsequence.
    found = scored(task, [text], ["the dog sat on the mat"])
    assert found["rougeL"] == pytest.approx(2 * 5 / (6 + 6)) and 0 < found["bleu"] < 100


@pytest.mark.parametrize("module", ["sacrebleu.metrics", "rouge_score.rouge_scorer"])
def test_libraries_are_needed_only_for_scoring(module, root, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    task = language_task("e2e", root=root)
    with pytest.raises(ImportError, match="this score needs .*; run: pip install"):
        scored(task, task.splits["test"], ["a"])


def test_every_set_has_a_grade() -> None:
    for name, known in KNOWN.items():
        grade = generation_sets._grade(name)
        assert (grade is sentence_scores) == (known.number is None), name
        assert grade is generation_sets._grade(name)


def test_a_grade_stays_with_its_task(root) -> None:
    task = language_task("gsm8k", root=root)
    assert first(task, 1).grade is task.grade is not None
    assert language_task("gsm8k", root=root, examples=1).grade is task.grade
    assert task._replace(name="other").grade is task.grade
    assert language_task("gsm8k", root=root) == task
    copy = pickle.loads(pickle.dumps(task))
    assert scored(copy, copy.splits["test"], ["7", "8"]) == {"accuracy": 1.0, "answered": 1.0}


def test_a_grade_of_ones_own() -> None:
    texts = [answered("2 + 2 = ", "4")]
    assert make_language_task("toy", {"train": texts}).grade is None
    assert LanguageTask("toy", {"train": texts}).grade is None

    def share(texts, predictions):
        return {
            "right": sum(p in t.references for t, p in zip(texts, predictions, strict=True))
            / len(texts)
        }

    task = make_language_task("toy", {"train": texts}, grade=share)
    assert scored(task, texts, ["4"]) == {"right": 1.0}


def test_where_nothing_is_to_be_generated(tmp_path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"instruction": "Add.", "output": "4"}\n')
    assert instruct.load(file, dev=0, test=0).grade is None
    assert python_sources.load_sources(packages=False, characters=1).grade is None


def test_docstring_examples() -> None:
    failed, tried = doctest.testmod(written)
    assert tried >= 3 and not failed
