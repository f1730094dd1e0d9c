"""Batches of few shapes that resume, and scores of predictions."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score

from data import metrics, pipeline
from data.task import Example

ROOT = Path(__file__).resolve().parent.parent


class WordTokenizer:
    """One id per word, between 1 and 2; pads with 9."""

    pad_id = 9

    def encode(self, texts, pairs=None, *, max_length):
        seconds = [""] * len(texts) if pairs is None else pairs
        rows = [
            [1, *(int(w) for w in f"{a} {b}".split()), 2]
            for a, b in zip(texts, seconds, strict=True)
        ]
        return [row if len(row) <= max_length else [*row[: max_length - 1], 2] for row in rows]


class TypedTokenizer(WordTokenizer):
    def encode_pairs(self, texts, pairs=None, *, max_length):
        ids = self.encode(texts, pairs, max_length=max_length)
        first = [len(text.split()) + 1 for text in texts]
        return ids, [
            [int(i >= n) for i in range(len(row))] for n, row in zip(first, ids, strict=True)
        ]


def numbered_rows(count: int, seed: int = 0) -> pipeline.Rows:
    """Rows that carry their own number as first word; a row's label is its number modulo 3."""
    lengths = np.random.default_rng(seed).integers(1, 30, count)
    examples = [
        Example(" ".join(str(100 + i) for _ in range(n)), "abc"[i % 3])
        for i, n in enumerate(lengths)
    ]
    return pipeline.tokenise(examples, WordTokenizer(), labels="abc", max_length=32)


def numbers(batch) -> list[int]:
    return [int(token) - 100 for token in batch["tokens"][:, 1]]


def equal(one, two) -> bool:
    return one.keys() == two.keys() and all(
        np.array_equal(one[key], two[key]) and one[key].dtype == two[key].dtype for key in one
    )


OPTIONS = {"batch_size": 8, "buckets": (8, 16, 32)}


def test_tokenise_counts_what_it_cuts():
    examples = [Example("3 " * n, "a") for n in (1, 2, 3, 4)]
    rows = pipeline.tokenise(examples, WordTokenizer(), labels=("a", "b"), max_length=4)
    assert rows.ids == [[1, 3, 2], [1, 3, 3, 2], [1, 3, 3, 2], [1, 3, 3, 2]]
    assert rows.truncated == 2 and rows.types[1] == [0, 0, 0, 0]
    assert rows.labels.tolist() == [0, 0, 0, 0] and rows.labels.dtype == np.int32
    pairs = [Example("3 4", "b", "5")]
    rows = pipeline.tokenise(pairs, TypedTokenizer(), labels=("a", "b"))
    assert rows.ids == [[1, 3, 4, 5, 2]] and rows.types == [[0, 0, 0, 1, 1]]
    assert rows.labels.tolist() == [1]


def test_tokenise_refuses_bad_input():
    good = [Example("3", "a")]
    with pytest.raises(ValueError, match="examples is empty"):
        pipeline.tokenise([], WordTokenizer(), labels="ab")
    with pytest.raises(ValueError, match="max_length=0"):
        pipeline.tokenise(good, WordTokenizer(), labels="ab", max_length=0)
    with pytest.raises(ValueError, match=r"f.tsv:3.*label 'a' is not one of labels=\('x', 'y'\)"):
        pipeline.tokenise([Example("3", "a", None, "f.tsv:3")], WordTokenizer(), labels="xy")

    class Silent(WordTokenizer):
        def encode(self, texts, pairs=None, *, max_length):
            return [[] for _ in texts]

    with pytest.raises(ValueError, match="'3': the tokenizer made no tokens"):
        pipeline.tokenise(good, Silent(), labels="ab")


def test_train_batches_are_aligned_and_of_known_shapes():
    rows = numbered_rows(203)
    batches = pipeline.train_batches(rows, seed=1, balance="uniform", **OPTIONS)
    assert batches.steps_per_epoch == 25 and batches.dropped == 3
    assert batches.shapes == ((8, 8), (8, 16), (8, 32))
    weights = pipeline.class_weights(rows.labels, "uniform", 3)
    for step in range(60):
        batch = batches[step]
        assert batch["tokens"].shape in batches.shapes
        for i, number in enumerate(numbers(batch)):
            ids = rows.ids[number]
            assert batch["tokens"][i].tolist() == ids + [9] * (batch["tokens"].shape[1] - len(ids))
            assert batch["mask"][i].tolist() == [
                int(t < len(ids)) for t in range(len(batch["mask"][i]))
            ]
            assert batch["label"][i] == number % 3
            assert batch["weight"][i] == weights[number % 3]
        kinds = {key: array.dtype for key, array in batch.items()}
        assert kinds.pop("weight") == np.float32 and set(kinds.values()) == {np.dtype(np.int32)}


def test_an_epoch_has_each_row_once_and_the_next_is_reshuffled():
    batches = pipeline.train_batches(numbered_rows(203), seed=1, **OPTIONS)
    epochs = [[numbers(batches[e * 25 + i]) for i in range(25)] for e in range(8)]
    flat = [[n for batch in epoch for n in batch] for epoch in epochs]
    assert all(len(epoch) == len(set(epoch)) == 200 for epoch in flat)
    assert flat[0] != flat[1]
    assert len({frozenset(range(203)) - frozenset(epoch) for epoch in flat}) > 4
    lengths = [batches[i]["tokens"].shape[1] for i in range(25)]
    assert lengths != sorted(lengths)
    other = pipeline.train_batches(numbered_rows(203), seed=2, **OPTIONS)
    assert numbers(other[0]) != epochs[0][0]


def test_rows_of_a_small_bucket_are_trained_on():
    short = [Example("105", "a")] * 3
    long = [Example("107 " * 20, "b")] * 29
    rows = pipeline.tokenise(short + long, WordTokenizer(), labels="ab")
    batches = pipeline.train_batches(rows, seed=0, **OPTIONS)
    assert batches.shapes == ((8, 32),) and batches.steps_per_epoch == 4
    assert sum(int((batches[i]["label"] == 0).sum()) for i in range(4)) == 3


def test_a_row_as_long_as_a_bucket_fits_it():
    examples = [Example("103 " * (length - 2), "ab"[i % 2]) for i, length in enumerate((16, 8, 32))]
    rows = pipeline.tokenise(examples, WordTokenizer(), labels="ab")
    for batches in (
        pipeline.train_batches(rows, seed=0, batch_size=1, buckets=(8, 16, 32)),
        pipeline.eval_batches(rows, batch_size=1, buckets=(8, 16, 32)),
    ):
        found = [batches[i] for i in range(batches.steps_per_epoch)]
        assert sorted(batch["tokens"].shape[1] for batch in found) == [8, 16, 32]
        assert all(batch["mask"].all() for batch in found)


def test_iteration_resumes_from_a_saved_state():
    rows = numbered_rows(100)
    iterator = iter(pipeline.train_batches(rows, seed=3, **OPTIONS))
    for _ in range(17):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(20)]
    again = pipeline.train_batches(rows, seed=3, **OPTIONS)
    resumed = iter(again)
    resumed.set_state(state)
    assert all(equal(next(resumed), batch) for batch in expected)
    assert all(equal(again[17 + i], batch) for i, batch in enumerate(expected))


def test_processes_share_each_global_batch():
    rows = numbered_rows(100)
    whole = pipeline.train_batches(rows, seed=4, **OPTIONS)
    parts = [
        pipeline.train_batches(rows, seed=4, process_index=i, process_count=4, **OPTIONS)
        for i in range(4)
    ]
    assert {part.steps_per_epoch for part in parts} == {whole.steps_per_epoch}
    assert parts[0].shapes == tuple((2, length) for _, length in whole.shapes)
    for step in (0, 5, 30):
        for key, array in whole[step].items():
            assert np.array_equal(np.concatenate([part[step][key] for part in parts]), array)


def test_token_dropout_hides_tokens_and_nothing_else():
    rows = numbered_rows(203)
    plain = pipeline.train_batches(rows, seed=1, **OPTIONS)
    noisy = pipeline.train_batches(rows, seed=1, token_dropout=0.25, **OPTIONS)
    hidden, real = 0, 0
    for step in range(60):
        one, two = plain[step], noisy[step]
        for name in one.keys() - {"mask"}:
            assert np.array_equal(one[name], two[name]), name
        assert (two["mask"] <= one["mask"]).all() and (two["mask"][:, 0] == 1).all()
        hidden += int((one["mask"] - two["mask"])[:, 1:].sum())
        real += int(one["mask"][:, 1:].sum())
    # A binomial share of 0.25: five standard deviations around it.
    assert abs(hidden / real - 0.25) < 5 * (0.25 * 0.75 / real) ** 0.5
    assert equal(noisy[7], noisy[7]) and not equal(noisy[7], plain[7])
    halves = [
        pipeline.train_batches(
            rows, seed=1, token_dropout=0.25, process_index=p, process_count=2, **OPTIONS
        )[7]["mask"]
        for p in range(2)
    ]
    np.testing.assert_array_equal(np.concatenate(halves), noisy[7]["mask"])
    with pytest.raises(ValueError, match="token_dropout=1.0"):
        pipeline.train_batches(rows, seed=1, token_dropout=1.0, **OPTIONS)


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_sees_every_row_once(processes):
    rows = numbered_rows(101)
    values, indices, weight = [], [], 0.0
    for index in range(processes):
        batches = pipeline.eval_batches(
            rows, process_index=index, process_count=processes, **OPTIONS
        )
        found = list(batches)
        assert len(found) == batches.steps_per_epoch == 13
        assert {batch["tokens"].shape for batch in found} <= set(batches.shapes)
        for batch in found:
            real = batch["index"] >= 0
            assert np.array_equal(batch["weight"], real.astype(np.float32))
            assert (batch["mask"].sum(axis=1) > 0).all()
            assert np.array_equal(batch["label"][real], rows.labels[batch["index"][real]])
            values.append(np.asarray(numbers(batch))[:, None])
            indices.append(batch["index"])
            weight += float(batch["weight"].sum())
    assert weight == 101.0
    assert pipeline.in_order(values, indices)[:, 0].tolist() == list(range(101))
    with pytest.raises(ValueError, match="each once; pass every batch"):
        pipeline.in_order(values[1:], indices[1:])


BAD_BATCHES = {
    "batch_size": ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    "too large": ({"batch_size": 64}, "batch_size=64 is larger than the 20 rows"),
    "descending": ({"buckets": (32, 16)}, r"buckets=\(32, 16\) must be.*ascending"),
    "repeated": ({"buckets": (16, 16, 32)}, "ascending"),
    "no bucket": ({"buckets": ()}, "one or more positive lengths"),
    "too short": ({"buckets": (4, 8)}, r"row \d+ has \d+ tokens.*max_length=8"),
    "seed": ({"seed": -1}, "seed=-1"),
    "balance": ({"balance": "root"}, "balance='root' is unknown; choose from none, sqrt, uniform"),
    "index": ({"process_index": 2, "process_count": 2}, "process_index=2"),
    "division": ({"process_count": 3}, "batch_size=8 does not divide among process_count=3"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batching_is_refused(case):
    options, message = BAD_BATCHES[case]
    with pytest.raises(ValueError, match=message):
        pipeline.train_batches(numbered_rows(20), **{**OPTIONS, "seed": 0, **options})


def test_class_weights_have_mean_one_over_the_rows():
    labels = np.asarray([0] * 16 + [1] * 4 + [3])
    counts = np.asarray([16, 4, 0, 1])
    for mode, ratio in (("none", [1, 1, 1]), ("sqrt", [1, 2, 4]), ("uniform", [1, 4, 16])):
        weights = pipeline.class_weights(labels, mode, 4)
        assert weights.dtype == np.float32 and weights[2] == 0
        np.testing.assert_allclose(weights[[0, 1, 3]] / weights[0], ratio, rtol=1e-6)
        np.testing.assert_allclose((weights * counts).sum() / 21, 1.0, rtol=1e-6)
    with pytest.raises(ValueError, match="labels must be 2 classes"):
        pipeline.class_weights(labels, "none", 2)


def test_batches_do_not_depend_on_the_hash_seed():
    code = textwrap.dedent("""
        import hashlib, sys
        sys.path[:0] = [".", "tests"]
        from test_data_batches import numbered_rows, OPTIONS, pipeline
        batches = pipeline.train_batches(numbered_rows(100), seed=3, **OPTIONS)
        content = b"".join(a.tobytes() for i in range(30) for a in batches[i].values())
        print(hashlib.sha256(content).hexdigest())
    """)
    digests = set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, check=True
        )
        digests.add(result.stdout)
    assert len(digests) == 1


# --- metrics.py ------------------------------------------------------------------------------


def test_scores_of_a_worked_example():
    labels, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 0]
    scores = metrics.score(labels, predicted, classes=4)
    assert scores.confusion.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert scores.accuracy == 0.5
    # F1 = 2 TP / (2 TP + FP + FN): 4/7, 1/2, 0, and 0 for the class that never occurs.
    np.testing.assert_allclose(scores.macro_f1, (4 / 7 + 1 / 2) / 4)
    # Matthews for K classes: (c s - sum p_k t_k) / sqrt((s^2 - sum p_k^2)(s^2 - sum t_k^2)).
    np.testing.assert_allclose(
        scores.matthews, (3 * 6 - (4 * 3 + 2 * 2)) / np.sqrt((36 - 20) * (36 - 14))
    )
    logits = np.eye(4)[predicted]
    assert metrics.score(labels, logits, classes=4)[:3] == scores[:3]


def test_macro_f1_is_scikit_learns():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 5, 200), rng.integers(0, 6, 200)
    expected = f1_score(labels, predicted, average="macro")
    np.testing.assert_allclose(metrics.score(labels, predicted, classes=6).macro_f1, expected)


def test_majority_baseline():
    scores = metrics.majority_baseline([2, 2, 0], [2, 0, 1, 2], classes=3)
    assert scores.accuracy == 0.5 and scores.matthews == 0.0
    np.testing.assert_allclose(scores.macro_f1, (2 / 3) / 3)
    with pytest.raises(ValueError, match="train_labels is empty"):
        metrics.majority_baseline([], [0], classes=2)


@pytest.mark.parametrize(
    ("labels", "predicted", "message"),
    [
        ([], [], "at least one"),
        ([0, 1], [0], "same number of rows"),
        ([0, 1], [0, 2], r"predicted reaches from 0 to 2, outside 0..1"),
        ([-1, 1], [0, 1], "labels reaches from -1"),
        ([0, 1], [0.0, 1.0], "predicted has dtype float64"),
        ([0, 1], [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]], "2 wide"),
        ([0, 1], [[0.0, np.nan], [0.0, 1.0]], "finite"),
    ],
)
def test_scores_refuse_what_is_no_prediction(labels, predicted, message):
    with pytest.raises(ValueError, match=message):
        metrics.score(labels, predicted, classes=2)
