"""Language-model data: learned tokens, packing, batches; corpora; a run from end to end."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import data
import models
import train
from data import corpora, language
from data.language import LanguageRows
from data.written import Piece, Written, answered, make_language_task, plain
from models import create
from models.tokenizer import Tokenizer
from training import evaluate, experiment, report

SHARED = Path(__file__).parents[1] / "../shared/data"


@pytest.fixture(scope="module")
def tokenizer(decoder_base: Path) -> Tokenizer:
    """One token a byte; 0 ends a text."""
    return models.load_tokenizer(decoder_base)


def rows_of(*lengths: int, max_length: int = 8) -> LanguageRows:
    ids = [np.arange(n, dtype=np.int32) + 100 * i for i, n in enumerate(lengths, start=1)]
    return LanguageRows(ids, [np.ones(n, bool) for n in lengths], 0, max_length, 0)


# ---------------------------------------------------------------------------- tokens


def test_answers_are_learned_with_their_end_and_prompts_are_not(tokenizer: Tokenizer) -> None:
    rows = language.tokenise([answered("2+2=", "4!")], tokenizer, max_length=9)
    assert tokenizer.decode(rows.ids[0].tolist()) == "2+2=4!"
    assert rows.ids[0][-1] == tokenizer.end_id == 0
    assert rows.learned[0].tolist() == [False] * 4 + [True] * 3
    turns = (Piece("a", False), Piece("bc"), Piece("d", False))
    rows = language.tokenise([Written(turns)], tokenizer, max_length=9)
    assert rows.learned[0].tolist() == [False, True, True, False]
    assert len(rows.ids[0]) == 4  # the text ends in a piece that is not learned


def test_marked_texts_get_no_special_tokens(tokenizer: Tokenizer) -> None:
    texts = [answered("a", "b"), answered("a", f"b{create.END}c")._replace(marked=True), plain("d")]
    rows = language.tokenise(texts, tokenizer, max_length=9)
    assert [len(ids) for ids in rows.ids] == [3, 4, 2]
    assert rows.ids[1][2] == tokenizer.end_id and rows.ids[1][-1] != tokenizer.end_id
    assert rows.learned[1].tolist() == [False, True, True, True]


def test_characters_of_several_tokens_belong_to_their_piece(tokenizer: Tokenizer) -> None:
    rows = language.tokenise([answered("ü", "ß")], tokenizer, max_length=9)
    assert rows.learned[0].tolist() == [False, False, True, True, True]


def test_long_texts_are_continued_and_long_answers_cut(tokenizer: Tokenizer) -> None:
    rows = language.tokenise([plain("abcdefghij")], tokenizer, max_length=4)
    assert [len(ids) for ids in rows.ids] == [4, 4, 4, 2] and rows.cut == 0
    targets = np.concatenate([ids[1:] for ids in rows.ids])
    assert tokenizer.decode(targets.tolist()) == "bcdefghij" and targets[-1] == 0
    for before, after in zip(rows.ids, rows.ids[1:], strict=False):
        assert before[-1] == after[0]
    rows = language.tokenise([answered("ab", "cdefghij")], tokenizer, max_length=5)
    assert [len(ids) for ids in rows.ids] == [5] and rows.cut == 1
    with pytest.raises(ValueError, match=r"file:3: none of its first 4 tokens .* is learned"):
        texts = [answered("abcdef", "g", "file:3")]
        language.tokenise(texts, tokenizer, max_length=4)


# ---------------------------------------------------------------------------- packing


def test_rows_are_packed_where_they_fit() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 17, 500).tolist()
    packed = language.pack(lengths, 16)
    assert sorted(i for row in packed for i in row) == list(range(500))
    fill = [sum(lengths[i] for i in row) for row in packed]
    assert max(fill) <= 16 and np.mean(fill) > 0.9 * 16


def test_a_batch_says_what_follows_what() -> None:
    batch = language.eval_batches(rows_of(3, 4, 8), length=8, batch_size=2)[0]
    assert batch["segments"].tolist() == [[1] * 3 + [2] * 4 + [0], [1] * 8]
    assert batch["mask"].tolist() == [[1] * 7 + [0], [1] * 8]
    assert batch["tokens"][0].tolist() == [100, 101, 102, 200, 201, 202, 203, 0]
    assert batch["targets"][0].tolist() == [101, 102, 0, 201, 202, 203, 0, 0]
    assert batch["weight"][0].tolist() == [1, 1, 0, 1, 1, 1, 0, 0]


def test_a_weight_is_that_of_the_target(tokenizer: Tokenizer) -> None:
    rows = language.tokenise([answered("ab", "cd")], tokenizer, max_length=8)
    batch = language.eval_batches(rows, length=8, batch_size=1)[0]
    assert tokenizer.decode(batch["targets"][0, :3].tolist()) == "bcd"
    assert batch["weight"][0].tolist() == [0, 1, 1, 1, 0, 0, 0, 0]  # c, d and the end


def test_every_token_is_a_target_once_in_evaluation() -> None:
    rows = rows_of(*range(2, 9), *range(2, 9))
    batches = language.eval_batches(rows, length=8, batch_size=4)
    seen = [batches[n] for n in range(batches.steps_per_epoch)]
    assert all(batch["tokens"].shape == (4, 8) for batch in seen)
    targets = np.concatenate([batch["targets"][batch["weight"] > 0] for batch in seen])
    assert sorted(targets) == sorted(t for ids in rows.ids for t in ids[1:])


def test_training_batches_are_a_function_of_seed_and_step() -> None:
    rows = rows_of(*np.random.default_rng(1).integers(2, 9, 60))
    options: dict[str, Any] = {"length": 8, "batch_size": 4}
    one, same, other = (language.train_batches(rows, seed=s, **options) for s in (3, 3, 4))
    steps = one.steps_per_epoch
    for step in (0, steps - 1, steps, 5 * steps + 1):
        np.testing.assert_array_equal(one[step]["tokens"], same[step]["tokens"])
        halves = [
            language.train_batches(rows, seed=3, process_index=i, process_count=2, **options)[step][
                "tokens"
            ]
            for i in range(2)
        ]
        np.testing.assert_array_equal(np.concatenate(halves), one[step]["tokens"])
        assert one[step]["mask"].any(axis=1).all()
    assert (one[0]["tokens"] != other[0]["tokens"]).any()
    assert (one[0]["tokens"] != one[steps]["tokens"]).any()
    epoch = [one[n] for n in range(steps)]
    targets = np.concatenate([batch["targets"][batch["weight"] > 0] for batch in epoch])
    assert len(set(targets)) == len(targets) > 0.8 * sum(len(ids) - 1 for ids in rows.ids)
    iterator = iter(one)
    first = next(iterator)
    position = iterator.get_state()
    second = next(iterator)
    iterator.set_state(position)
    np.testing.assert_array_equal(next(iterator)["tokens"], second["tokens"])
    np.testing.assert_array_equal(first["tokens"], one[0]["tokens"])


def test_bad_arguments_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="texts is empty"):
        language.tokenise([], tokenizer, max_length=4)
    with pytest.raises(ValueError, match="max_length=1"):
        language.tokenise([plain("ab")], tokenizer, max_length=1)
    rows = rows_of(3, 4)
    with pytest.raises(ValueError, match="length=7 is shorter than max_length=8"):
        language.eval_batches(rows, length=7, batch_size=1)
    with pytest.raises(ValueError, match="batch_size=2 is larger than the 1 packed rows"):
        language.train_batches(rows, length=8, batch_size=2, seed=0)
    with pytest.raises(ValueError, match="must divide the batch"):
        language.eval_batches(rows, length=8, batch_size=3, process_count=2)
    with pytest.raises(ValueError, match="seed=-1"):
        language.train_batches(rows, length=8, batch_size=1, seed=-1)
    with pytest.raises(ValueError, match="a.json:7: nothing is learned"):
        make_language_task("x", {"train": [answered("prompt", "", "a.json:7")]})
    with pytest.raises(ValueError, match="split 'dev' .* has no text"):
        make_language_task("x", {"dev": []})


# ---------------------------------------------------------------------------- corpora


def test_no_character_of_a_corpus_is_lost(tmp_path: Path) -> None:
    text = "".join(f"Line {n}.\nMore.\n\n" for n in range(200)) + "End"
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    task = data.load("text", path=tmp_path / "a.txt.gz", block=50)
    texts = [written for split in ("train", "test", "dev") for written in task.splits[split]]
    ordered = sorted(texts, key=lambda written: int(written.origin.rpartition(":")[2]))
    assert "".join(written.text for written in ordered) == text
    assert {split: len(rows) for split, rows in task.splits.items()} == {
        "train": len(ordered) - len(task.splits["dev"]) - len(task.splits["test"]),
        "dev": round(0.05 * len(ordered)),
        "test": len(task.splits["test"]),
    }
    few = data.load("text", path=tmp_path / "a.txt.gz", block=50, examples=2)
    assert [len(rows) for rows in few.splits.values()] == [2, 2, 2]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the corpora (../shared/data) are not here")
def test_the_public_corpora_are_read() -> None:
    plays = data.load("tinyshakespeare", root=SHARED)
    size = sum(len(written.text) for rows in plays.splits.values() for written in rows)
    assert size == 1_115_394
    articles = data.load("wikitext2", root=SHARED)
    assert articles.splits["test"][0].text.lstrip().startswith("= Robert <unk> =")


def test_bad_corpora_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give one of the two"):
        corpora.load()
    with pytest.raises(ValueError, match="name='bible' is not a corpus"):
        corpora.load("bible", root=tmp_path)
    with pytest.raises(ValueError, match="root is needed"):
        corpora.load("wikitext2")
    with pytest.raises(ValueError, match="no such file"):
        corpora.load("wikitext2", root=tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not utf-8"):
        corpora.load(path=tmp_path / "bad.txt")
    (tmp_path / "short.txt").write_text("one\n\ntwo")
    with pytest.raises(ValueError, match="too few to set 5% aside"):
        corpora.load(path=tmp_path / "short.txt")
    with pytest.raises(ValueError, match="block=0"):
        corpora.load(path=tmp_path / "short.txt", block=0)


# ---------------------------------------------------------------------------- runs


@pytest.mark.usefixtures("optax_promotes_its_step_count")
def test_a_run_lowers_the_perplexity_and_says_so(language_config: Any, tmp_path: Path) -> None:
    train.train(language_config, tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    base, adapted = (results["systems"][name] for name in ("base", "adapted"))
    assert adapted["loss"] < base["loss"] - 0.2 and adapted["tokens"] == base["tokens"] > 100
    np.testing.assert_allclose(adapted["perplexity"], np.exp(adapted["loss"]))
    for name in ("adapter.safetensors", "figure.png", "metrics.csv"):
        assert (tmp_path / "run" / name).stat().st_size > 100, name
    rows = report.read_rows(tmp_path / "run" / "metrics.csv")
    assert float(rows[-1]["dev_perplexity"]) == pytest.approx(
        np.exp(float(rows[-1]["dev_loss"])), rel=1e-5
    )


def test_perplexity_is_that_of_the_texts_one_by_one(language_config: Any) -> None:
    run = experiment.build(language_config)
    scores = evaluate.score(run, evaluate.forward(run), run.params, "dev")
    total, tokens = 0.0, 0
    for ids in run.rows["dev"].ids:
        logits = np.asarray(run.model.apply({"params": run.params}, ids[None, :-1]), np.float64)[0]
        logits -= np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
        total -= logits[np.arange(len(ids) - 1), ids[1:]].sum()
        tokens += len(ids) - 1
    assert scores.record()["tokens"] == tokens
    assert scores.summary()["loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_a_head_has_no_place_here(language_config: Any) -> None:
    language_config.head = True
    with pytest.raises(ValueError, match="no classification head"):
        experiment.build(language_config)
