"""MetaMathQA to learn from, GSM8K to be scored by: files of its published format, made up."""

import json
from pathlib import Path

import pytest

import data
from data.generation_sets import METAMATHQA_LONGEST, load
from data.written import LanguageTask, Written

SHARED = Path(__file__).parents[1] / "../shared/data"
FILE = "metamathqa/MetaMathQA-395K.json"
HELD = ("gsm8k/train.jsonl", "gsm8k/test.jsonl")


def record(query: str, response: object = "It is 3 - 1. The answer is: 2") -> dict[str, object]:
    whole = {"type": "GSM_AnsAug", "original_question": query}
    return {"query": query, "response": response, **whole}


def write(root: Path, records: object, dev: int = 60, test: int = 5) -> Path:
    """Files below a root; the questions of dev are "dev number 0" and so on."""
    for folder in ("metamathqa", "gsm8k"):
        (root / folder).mkdir(exist_ok=True)
    content = records if isinstance(records, str) else json.dumps(records)
    (root / FILE).write_text(content)
    for file, split, count in zip(HELD, ("dev", "test"), (dev, test), strict=True):
        rows = [
            {"question": f"{split} number {n}?", "answer": f"So\n#### {n}"} for n in range(count)
        ]
        (root / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def questions(task: LanguageTask, split: str) -> list[str]:
    ends = ("Question: ", " Think step by step.\nAnswer:")
    return [t.prompt.removeprefix(ends[0]).removesuffix(ends[1]) for t in task.splits[split]]


def test_records_as_they_are_learned(tmp_path) -> None:
    task = load("metamathqa", write(tmp_path, [record("How many?"), record("Why?", "As x = 1.")]))
    assert tuple(task.splits) == ("train", "dev", "test")
    text, other = task.splits["train"]
    assert text.text == (
        "Question: How many? Think step by step.\nAnswer:It is 3 - 1. The answer is: 2"
    )
    assert [piece.learned for piece in text.pieces] == [False, True]
    assert (text.references, text.origin) == (("2",), f"{tmp_path / FILE}:record 1")
    assert (other.references, other.origin) == (("As x = 1.",), f"{tmp_path / FILE}:record 2")
    whole = load("metamathqa", tmp_path, learn_prompt=True)
    assert all(piece.learned for text in whole.splits["train"] for piece in text.pieces)
    assert whole.splits["test"][0].text == (
        "Question: test number 0? Think step by step.\nAnswer:So\n#### 0"
    )
    assert whole.splits["test"][4].references == ("4",)
    assert data.load("metamathqa", root=tmp_path) == task


def test_long_records_are_dropped(tmp_path) -> None:
    # The published filter counts a blank between the two.
    response = "r" * 1000
    queries = ["q" * 298, "q" * 299, "q" * 300]
    task = load("metamathqa", write(tmp_path, [record(query, response) for query in queries]))
    assert METAMATHQA_LONGEST == 1300
    assert questions(task, "train") == queries[:2]
    with pytest.raises(ValueError, match="MetaMathQA-395K.json: no records"):
        load("metamathqa", write(tmp_path, [record(queries[2], response)]))


def test_dev_is_a_fixed_sample_that_train_may_have(tmp_path) -> None:
    overlap = [record(f"dev number {n}?") for n in range(60)]
    task = load("metamathqa", write(tmp_path, overlap))
    assert sorted(questions(task, "train")) == sorted(str(row["query"]) for row in overlap)
    chosen = questions(task, "dev")
    assert len(chosen) == len(set(chosen)) == 50 and set(chosen) <= set(questions(task, "train"))
    # By the hash of the question: neither the file's order nor other questions decide.
    assert chosen != sorted(chosen, key=lambda question: int(question.split()[2].rstrip("?")))
    lines = (tmp_path / HELD[0]).read_text().splitlines(keepends=True)
    (tmp_path / HELD[0]).write_text("".join(reversed(lines)))
    assert questions(load("metamathqa", tmp_path), "dev") == chosen
    gone = [line for line in lines if json.loads(line)["question"] != chosen[7]]
    (tmp_path / HELD[0]).write_text("".join(gone))
    fewer = questions(load("metamathqa", tmp_path), "dev")
    assert fewer[:49] == chosen[:7] + chosen[8:] and fewer[49] not in chosen
    few = load("metamathqa", write(tmp_path, overlap, dev=20))
    assert len(few.splits["dev"]) == 20


def test_train_has_no_question_of_test(tmp_path) -> None:
    rows = [record("Test  NUMBER 3?"), record("test number 3"), record("dev number 3?")]
    task = load("metamathqa", write(tmp_path, rows))
    assert questions(task, "train") == ["test number 3", "dev number 3?"]
    assert len(task.splits["test"]) == 5
    with pytest.raises(ValueError, match="every question of split 'train' is in another split too"):
        load("metamathqa", write(tmp_path, rows[:1]))


BAD = {
    "object": ({"query": "q"}, r"395K.json: expected a list of records, found dict"),
    "empty": ([], "395K.json: no records; every split needs some"),
    "json": ('[\n{"query": "q",}\n]', r"395K.json:2: malformed JSON \(.*correct the line"),
    "lines": ('{"query": "q"}\n{"query": "q"}\n', r"395K.json:2: malformed JSON \(Extra data"),
    "number": ([record("q"), 3], "395K.json:record 2: expected an object, found '3'"),
    "no query": (
        [record("q"), record("q"), {"response": "r"}],
        "395K.json:record 3: 'query' must be a text that is not empty, found 'None'; the object has"
        " response",
    ),
    "blank query": ([record(" ")], "record 1: 'query' must be a text that is not empty"),
    "list": ([record("q", response=["r"])], r"1: 'response' must be a text.*found \"\['r'\]\""),
    "no response": ([record("q", response="")], "record 1: 'response' must be a text that is not"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_named(case, tmp_path) -> None:
    records, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        load("metamathqa", write(tmp_path, records))


def test_absent_and_bad_files_are_named(tmp_path) -> None:
    with pytest.raises(
        ValueError, match="'metamathqa' expects the folder '.*metamathqa' with Meta"
    ):
        load("metamathqa", tmp_path)
    (tmp_path / "metamathqa").mkdir()
    with pytest.raises(ValueError, match="'metamathqa' expects the folder '.*gsm8k' with train.js"):
        load("metamathqa", tmp_path)
    write(tmp_path, [record("q")])
    (tmp_path / FILE).unlink()
    with pytest.raises(ValueError, match="395K.json: no such file, and none with .gz added"):
        load("metamathqa", tmp_path)
    write(tmp_path, [record("q")])
    (tmp_path / HELD[0]).write_text(json.dumps({"question": "q", "answer": "2"}))
    with pytest.raises(ValueError, match="train.jsonl:1: the answer must end in '#### ' and"):
        load("metamathqa", tmp_path)


def test_own_files_have_the_format_of_their_split(tmp_path) -> None:
    write(tmp_path, [record("q")])
    (tmp_path / "own.json").write_text(json.dumps([record("mine")]))
    (tmp_path / "own.jsonl").write_text(json.dumps({"question": "d", "answer": "#### 4"}))
    own = {"train": "own.json", "dev": tmp_path / "own.jsonl"}
    task = load("metamathqa", tmp_path, files=own)
    assert (questions(task, "train"), questions(task, "dev")) == (["mine"], ["d"])
    with pytest.raises(ValueError, match=r"own.jsonl: expected a list of records, found dict"):
        load("metamathqa", tmp_path, files={"train": "own.jsonl"})


def test_the_public_files_of_gsm8k_are_dev_and_test(tmp_path) -> None:
    if not (SHARED / "gsm8k").is_dir():
        pytest.skip(f"no folder {SHARED / 'gsm8k'}")
    write(tmp_path, [record("q")])
    held = {"dev": SHARED / HELD[0], "test": SHARED / HELD[1]}
    task = load("metamathqa", tmp_path, files=held)
    assert {split: len(texts) for split, texts in task.splits.items()} == {
        "train": 1,
        "dev": 50,
        "test": 1319,
    }
    plain = load("gsm8k", SHARED, template="step_by_step")
    assert task.splits["test"] == plain.splits["test"]
    known = {text.prompt: text for split in ("train", "dev") for text in plain.splits[split]}
    assert all(_same(known[text.prompt], text) for text in task.splits["dev"])
    # A change of the sample would change every published dev curve.
    numbers = [int(text.origin.rpartition(":")[2]) for text in task.splits["dev"]]
    assert numbers[:5] == [139, 1714, 4962, 2915, 789]


def _same(one: Written, other: Written) -> bool:
    return one.pieces == other.pieces and one.references == other.references
