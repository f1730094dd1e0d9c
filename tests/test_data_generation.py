"""Public sets to generate answers for, and the scores of what is generated."""

import collections
import gzip
import json
import math
import sys
from pathlib import Path

import pytest

from data import generation_sets
from data.answers import (
    bleu,
    choice_of,
    exact_match,
    last_number_of,
    number_of,
    perplexity,
    rouge,
)
from data.generation_sets import KNOWN, TEMPLATES, Template, load, matches, set_of
from data.written import Written

SHARED = Path(__file__).parents[1] / "../shared/data"
SUITE = "llm_adapters/"


def public(name, **options):
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED}")
    return load(name, SHARED, **options)


def counts(task):
    return {split: len(texts) for split, texts in task.splits.items()}


def question(text: Written) -> str:
    return " ".join(text.prompt.split()).casefold()


# --- the public files --------------------------------------------------------------------------

# Test rows as published; train and dev together are the published train rows without the
# questions of the test split (none but two of ARC-Easy, and those of math_data.json).
SIZES = {
    "gsm8k": (7473, 1319),
    "AddSub": (3260 - 316, 395),
    "MultiArith": (3260 - 480, 600),
    "SingleEq": (3260 - 406, 508),
    "SVAMP": (3260 - 800, 1000),
    "AQuA": (3260 - 203, 254),
    SUITE + "gsm8k": (3260 - 1055, 1319),
    "mawps": (3260 - 54, 238),
    "boolq": (9427, 3270),
    "ARC-Easy": (2251 - 2, 2376),
    "ARC-Challenge": (1119, 1172),
    "openbookqa": (4957, 500),
    "piqa": (0, 1838),
    "social_i_qa": (0, 1954),
    "winogrande": (0, 1267),
}


@pytest.mark.parametrize("name", SIZES)
def test_rows_of_the_question_sets(name):
    train, test = SIZES[name]
    name = name if name in KNOWN else SUITE + name
    task = public(name)
    found = counts(task)
    assert found["test"] == test
    assert found.get("train", 0) + found.get("dev", 0) == train
    assert list(found) == (["train", "dev", "test"] if train else ["test"])
    if train:
        assert abs(found["dev"] / train - 0.1) < 0.005
    questions = {split: set(map(question, texts)) for split, texts in task.splits.items()}
    assert len(set.union(*questions.values())) == sum(map(len, questions.values()))


def test_gsm8k_as_read():
    task = public("gsm8k")
    text = task.splits["test"][0]
    assert text.prompt.startswith("Question: Janet\u2019s ducks lay 16 eggs per day.")
    assert text.prompt.endswith("farmers' market?\nAnswer:")
    assert text.pieces[1].text.startswith(" Janet sells 16 - 3 - 4 = <<")
    assert text.pieces[1].text.endswith("market.\n#### 18")
    assert (text.references, Path(text.origin).name) == (("18",), "test.jsonl:1")
    assert [piece.learned for piece in text.pieces] == [False, True]
    large = [r for texts in task.splits.values() for t in texts for r in t.references]
    assert "109200000" in large and not any("," in reference for reference in large)
    assert public("gsm8k") == task
    found = matches("gsm8k", task.splits["test"][:3], ["#### 18", "so it is 3", "The answer is 7"])
    assert found == (1 / 3, 2 / 3, (True, False, False))


def test_the_split_does_not_depend_on_the_template():
    peft = public("gsm8k", template="step_by_step", learn_prompt=True)
    for split, texts in public("gsm8k").splits.items():
        assert [t.origin for t in texts] == [t.origin for t in peft.splits[split]]
    text = peft.splits["test"][1]
    assert text.text.startswith("Question: A robe takes 2 bolts of blue fiber and half that much")
    assert "does it take? Think step by step.\nAnswer:It takes 2/2=" in text.text
    assert [piece.learned for piece in text.pieces] == [True, True]


def test_the_suites_own_prompt():
    text = public(SUITE + "boolq").splits["test"][0]
    margin = " " * 16
    assert text.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        f"completes the request.  \n\n{margin}### Instruction:\n{margin}"
        "Please answer the following question with true or false, question: does ethanol take "
        "more energy make that produces?\n\nAnswer format: true/false\n"
        f"{margin}\n{margin}### Response:\n{margin}"
    )
    assert text.pieces[1].text == "the correct answer is false"
    assert text.references == ("false",)
    clean = public(SUITE + "boolq", template="alpaca").splits["test"][0]
    assert clean.prompt.endswith("\n\nAnswer format: true/false\n\n### Response:\n")
    assert "request.\n\n### Instruction:\nPlease answer" in clean.prompt
    own = public(SUITE + "boolq", template=Template("Q: {question}\nA:", " ")).splits["test"][0]
    assert own.text.startswith("Q: Please") and own.text.endswith(
        "\nA: the correct answer is false"
    )


def test_the_joint_arithmetic_set_tests_on_what_it_did_not_train_on():
    task = public(SUITE + "arithmetic")
    assert counts(task) == {"train": 2933, "dev": 327, "test": 989}
    assert collections.Counter(set_of(t).removeprefix(SUITE) for t in task.splits["test"]) == {
        "AddSub": 79,
        "MultiArith": 109,
        "SingleEq": 102,
        "SVAMP": 200,
        "AQuA": 51,
        "gsm8k": 264,
        "mawps": 184,
    }
    trained = {question(t) for split in ("train", "dev") for t in task.splits[split]}
    assert not trained & {question(t) for t in task.splits["test"]}
    # Numbers and letters side by side, each read by its own rule.
    answers = [text.references[0] for text in task.splits["test"]]
    assert matches(SUITE + "arithmetic", task.splits["test"], answers).accuracy == 1.0
    with pytest.raises(ValueError, match=r"math_data.json:record \d+' is in no set's own folder"):
        set_of(task.splits["train"][0])


def test_the_joint_commonsense_set():
    task = public(SUITE + "commonsense")
    assert counts(task)["test"] == 3270 + 2376 + 1172 + 500 + 1838 + 1954 + 1267
    assert counts(task)["train"] + counts(task)["dev"] == 9427 + 2251 - 2 + 1119 + 4957
    texts = task.splits["test"]
    found = matches(SUITE + "commonsense", texts, [text.pieces[1].text for text in texts])
    assert (found.accuracy, found.answered) == (1.0, 1.0)


def test_the_suites_rationales_score_as_its_rule_says():
    """Those of its test files are another model's, counted here once by hand-written rules."""
    for name, right in (("AddSub", 370), ("SVAMP", 803), ("AQuA", 109)):
        texts = public(SUITE + name).splits["test"]
        found = matches(SUITE + name, texts, [text.pieces[1].text for text in texts])
        assert sum(found.right) == right


def test_e2e_scores_with_all_references_of_its_data():
    task = public("e2e")
    assert {s: len(texts) for s, texts in task.splits.items()} == {
        "train": 4167,
        "dev": 55,
        "test": 630,
    }
    references = {s: sum(len(t.references) for t in texts) for s, texts in task.splits.items()}
    assert references == {"train": 4167, "dev": 4672 - 4167, "test": 4693}
    text = task.splits["test"][0]
    assert text.prompt == "name : Blue Spice | Type : coffee shop | area : city centre||"
    assert text.references == (
        "A coffee shop in the city centre area called Blue Spice .",
        "Blue Spice is a coffee shop in city centre .",
    )
    assert text.pieces[1].text == " " + text.references[0]
    prompts = {split: {t.prompt for t in texts} for split, texts in task.splits.items()}
    assert [len(prompts[split]) for split in ("train", "dev", "test")] == [547 - 55, 55, 630]
    assert len(set.union(*prompts.values())) == 547 + 630


def test_webnlg_entries_become_lines_of_triples():
    task = public("webnlg")
    found = {s: sum(len(t.references) for t in texts) for s, texts in task.splits.items()}
    # 2268 sentences, ten of them marked "toFix". 872 entries, 226 of them of one triple, among
    # which two have equal triples and one has no good sentence.
    assert sum(found.values()) == 2258
    prompts = {split: {t.prompt for t in texts} for split, texts in task.splits.items()}
    assert [len(prompts[split]) for split in ("train", "dev", "test")] == [696, 87, 87]
    everything = {text.prompt: text for texts in task.splits.values() for text in texts}
    text = everything["Aarhus : leaderName : Jacob_Bundsgaard||"]
    assert text.references == ("The leader of Aarhus is Jacob Bundsgaard.",)
    assert text.origin.endswith("dev.json:entry 1")
    assert sum(" | " in prompt for prompt in everything) == 872 - 226


# --- files of one's own, and the errors of reading -----------------------------------------------


def suite_file(path: Path, *rows: tuple[str, str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = ("instruction", "output", "answer")
    records = [{**dict(zip(keys, row, strict=True)), "input": ""} for row in rows]
    path.write_text(json.dumps(records))
    return path


def test_own_files_take_the_place_of_the_tables(tmp_path):
    ending = "the correct answer is ending2"
    suite_file(tmp_path / SUITE / "hellaswag" / "test.json", ("A man", ending, "ending2"))
    assert counts(load(SUITE + "hellaswag", tmp_path)) == {"test": 1}
    rows = [(f"A man number {n}", ending, "ending2") for n in range(20)]
    own = suite_file(tmp_path / "own.json", *rows, ("a  man", ending, "ending2"))
    task = load(SUITE + "hellaswag", tmp_path, files={"train": "own.json"})
    assert counts(task) == {"train": 18, "dev": 2, "test": 1}
    with pytest.raises(ValueError, match="every question of split 'train' is in another split too"):
        load(SUITE + "hellaswag", tmp_path, files={"train": own, "dev": own})


def test_an_absent_rationale_leaves_the_answer_to_learn(tmp_path):
    path = suite_file(tmp_path / SUITE / "piqa" / "test.json", ("1 + 1 ?", " ", "2.0"))
    (text,) = load(SUITE + "piqa", tmp_path).splits["test"]
    assert (text.pieces[1].text, text.references) == ("2.0", ("2.0",))
    assert text.origin == f"{path}:record 1"


def line(**fields: object) -> str:
    return json.dumps(fields)


def entry(**fields: object) -> str:
    triple = {"subject": "a", "property": "b", "object": "c"}
    whole = {"modifiedtripleset": [triple], "lexicalisations": [{"lex": "d", "comment": "good"}]}
    return json.dumps({"entries": [{"1": {**whole, **fields}}]})


BAD_FILES = {
    "gsm8k/test.jsonl": {
        "blank": ("\n", "no records"),
        "json": (line(question="q", answer="#### 1") + "\n{", r"test.jsonl:2: malformed JSON \("),
        "deep": ("[" * 100_000, r"test.jsonl:1: malformed JSON \(maximum recursion depth"),
        "list": ("[1]", r"test.jsonl:1: expected an object, found '\[1\]'"),
        "no answer": (line(question="q"), "'answer' must be a text.*found 'None'.*has question"),
        "number": (line(question=1, answer="#### 1"), "'question' must be a text.*found '1'"),
        "no mark": (line(question="q", answer="1"), "jsonl:1: the answer must end in '#### ' and"),
        "no number": (line(question="q", answer="#### one"), "must end in '#### ' and a number"),
    },
    SUITE + "piqa/test.json": {
        "json": ('[\n{"instruction": "a"}\n', r"test.json:3: malformed JSON \(Expecting"),
        "object": ("{}", "test.json: expected a list of records, found dict"),
        "row": ('[{"instruction": "q", "answer": "1"}, 3]', "record 2: expected an object"),
        "blank": (
            '[{"instruction": " ", "answer": "1"}]',
            "record 1: 'instruction' must be a text",
        ),
        "input": ('[{"instruction": "q", "input": "i", "answer": "1"}]', "'input' must be empty"),
        "output": ('[{"instruction": "q", "output": 3, "answer": "1"}]', "and 'output' a text"),
        "answer": ('[{"instruction": "q", "answer": "F"}]', "'F' is no number and no choice"),
        "nothing": ("[]", "test.json: no records; every split needs some"),
        "empty": ("", r"test.json:1: malformed JSON"),
    },
    "e2e/lora_test.txt": {
        "no bars": ("name : A||b\nname : A\n", "lora_test.txt:2: 'name : A' is not 'data..text'"),
        "more bars": ("a||b||c", "two bars and the text"),
        "no text": ("a|| \n", "lora_test.txt:1: 'a.. ' is not"),
        "bytes": (b"a||\xff", "lora_test.txt:1: byte 0xff is not utf-8"),
    },
    "webnlg/dev.json": {
        "list": ("[]", r"dev.json: expected an object, found '\[\]'"),
        "no entries": ("{}", "'entries' must be a list.*the object has no keys"),
        "two keys": ('{"entries": [{"1": {}, "2": {}}]}', "entry 1: expected an object with the"),
        "no triples": (entry(modifiedtripleset=[]), "entry 1: 'modifiedtripleset' must be a list"),
        "no object": (entry(modifiedtripleset=[{"subject": "s"}]), "'property' must be a text"),
        "no text": (entry(lexicalisations=[{"lex": ""}]), "entry 1: 'lex' must be a text"),
        "no mark": (entry(lexicalisations=[{"lex": "a"}]), "entry 1: 'comment' must be a text"),
        "text": (entry(lexicalisations=["a"]), "entry 1: expected an object, found 'a'"),
    },
}


@pytest.mark.parametrize(
    ("path", "case"), [(path, case) for path, cases in BAD_FILES.items() for case in cases]
)
def test_bad_files_are_named_with_the_place(path, case, tmp_path):
    content, message = BAD_FILES[path][case]
    for file in (path, "gsm8k/train.jsonl", "e2e/lora_valid.txt"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "gsm8k/train.jsonl").write_text(line(question="q", answer="#### 1"))
    (tmp_path / "e2e/lora_valid.txt").write_text("name : B||b")
    (tmp_path / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    name = {"gsm8k": "gsm8k", "e2e": "e2e", "webnlg": "webnlg"}.get(path.split("/")[0])
    with pytest.raises(ValueError, match=message):
        load(name or SUITE + "piqa", tmp_path)


def test_damaged_archives_are_named(tmp_path):
    (tmp_path / SUITE / "piqa").mkdir(parents=True)
    whole = gzip.compress(b"[]" * 1000)
    for content in (b"not gzip", whole[:-12], whole[:14] + b"\xff" * 9):
        (tmp_path / SUITE / "piqa" / "test.json.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"piqa/test.json: cannot be read \(.*download it"):
            load(SUITE + "piqa", tmp_path)


def test_options_are_checked(tmp_path):
    with pytest.raises(ValueError, match="name='nope' is not in the table; choose from e2e, gsm8k"):
        load("nope", tmp_path)
    with pytest.raises(ValueError, match="root=None: pass the folder.*'e2e' as root="):
        load("e2e")
    with pytest.raises(ValueError, match=r"expects the folder '.*gsm8k' with train.jsonl \(or .gz"):
        load("gsm8k", tmp_path)
    with pytest.raises(ValueError, match="template='chat' is unknown; choose from alpaca, bars"):
        load("e2e", tmp_path, template="chat")
    with pytest.raises(ValueError, match=r"template.prompt='Q:' has no \{question\}; add it"):
        load("e2e", tmp_path, template=Template("Q:"))
    with pytest.raises(ValueError, match="files has the split 'valid'; choose from train, dev"):
        load("e2e", tmp_path, files={"valid": "a"})
    (tmp_path / "gsm8k").mkdir()
    with pytest.raises(ValueError, match="train.jsonl: no such file, and none with .gz added"):
        load("gsm8k", tmp_path)
    with pytest.raises(ValueError, match="its answers are sentences; score them with answers.bleu"):
        matches("e2e", [], [])
    with pytest.raises(ValueError, match="not in the table"):
        matches("nope", [], [])
    with pytest.raises(ValueError, match="0 predictions and 0 references"):
        matches("gsm8k", [], [])
    with pytest.raises(ValueError, match="origin='' is in no set's own folder"):
        set_of(Written(()))


def test_every_set_has_a_prompt_and_a_reader():
    for name, known in KNOWN.items():
        assert known.template in TEMPLATES, name
        assert set(known.kinds.values()) <= set(generation_sets._READERS), name
        assert set(known.kinds) == {"train", "dev", "test"}, name
        assert "train" in known.files or "test" in known.files, name


# --- answers.py --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48 + 24 = 72\n#### 72", 72.0),
        ("#### 1,080", 1080.0),
        ("#### 109,200,000.", 109_200_000.0),
        ("#### -3", -3.0),
        ("#### $12.50", 12.5),
        ("#### -$5", -5.0),
        ("#### \u22125", -5.0),
        ("#### .5", 0.5),
        ("#### +5", 5.0),
        ("The answer is: 16", 16.0),
        ("The answer is 16.", 16.0),
        ("so $4^2 = 16$.The answer is: $16$.", 16.0),
        ("The final answer is: 50%!", 50.0),
        ("The final answer is 7?\n", 7.0),
        ("The answer is: 3/4", 0.75),
        ("The answer is: 20/35", 0.5714285714285714),
        ("The answer is: 1 / 4", 0.25),
        # The first phrase in the order of ANNOUNCED wins; of one phrase, the last occurrence.
        ("#### 5\nThe answer is 6", 6.0),
        ("The answer is 6\nThe answer is: 7", 7.0),
        ("#### 5\n#### 6", 6.0),
        ("The answer is: 5\n\nQuestion: how many are 3 and 4?", 5.0),
        # A text that is nothing but a number.
        ("18", 18.0),
        (" 1,000. ", 1000.0),
        ("1.8333333333333335", 1.8333333333333335),
        # No single number, or nothing announced.
        ("3 + 4 = 7", None),
        ("The answer is 18 eggs", None),
        ("The answer is: x", None),
        ("The answer is:", None),
        ("#### 1,00", None),
        ("#### 1/0", None),
        ("#### 1/2/3", None),
        ("#### 1/", None),
        ("#### NaN", None),
        ("#### Infinity", None),
        ("#### 1_000", None),
        ("#### \u0661", None),
        ("#### " + "9" * 400, None),
        ("#### " + "9" * 400 + "/" + "9" * 400, None),
        ("#### -", None),
        ("#### .", None),
        ("", None),
    ],
)
def test_announced_numbers(text, number):
    assert number_of(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("\nA: 7 - 3 = 4 crayons. The answer is 4.", 4.0),
        ("It is 1,234.5 in all", 1234.5),
        ("9 and then -2.", -2.0),
        ("from 10-5", -5.0),
        ("none", None),
        ("9" * 400, None),
    ],
)
def test_last_numbers(text, number):
    assert last_number_of(text) == number


def test_first_choices():
    answers = ("answer1", "answer2", "answer10")
    assert choice_of("not answer2 but answer1", answers) == "answer2"
    assert choice_of("answer10", answers) == "answer10"
    assert choice_of("Answer1", answers) is None
    assert choice_of("Rationale: it is 15.The answer is (D).", "A B C D E".split()) == "D"
    assert choice_of("An egg. The answer is (D).", "A B C D E".split()) == "A"
    assert choice_of("a.b", ("a+b", "a.b")) == "a.b"
    assert choice_of("", ("true", "false")) is None
    for bad in ((), "AB", ("a", "")):
        with pytest.raises(ValueError, match="choices=.*at least one, none empty"):
            choice_of("a", bad)


def test_exact_match_counts_right_and_answered():
    found = exact_match(
        ["The answer is 7.", "#### 1,000", "no idea", "The answer is 3"],
        ["7", ["999", "1000"], "5", "#### 4"],
    )
    assert found == (0.5, 0.75, (True, True, False, False))
    assert exact_match([" a "], ["a"], str.strip).accuracy == 1.0
    rules = [number_of, lambda text: choice_of(text, ("true", "false"))]
    assert exact_match(["#### 2", "true"], ["2", "true"], rules).right == (True, True)
    third = ["The answer is 0.333"]
    assert exact_match(third, ["1/3"]).accuracy == 0.0
    assert exact_match(third, ["1/3"], tolerance=1e-3).accuracy == 1.0


def test_exact_match_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match=r"references\[1\]=\['four'\] has no answer"):
        exact_match(["1", "4"], ["1", "four"])
    with pytest.raises(ValueError, match="extract has 1 functions for 2 predictions"):
        exact_match(["1", "4"], ["1", "4"], [number_of])
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="tolerance=.* must not be negative"):
            exact_match(["1"], ["1"], tolerance=bad)


@pytest.mark.parametrize("score", [exact_match, bleu, rouge])
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "0 predictions and 0 references; give the same number"),
        (["a"], ["a", "b"], "1 predictions and 2 references"),
        ("a", ["a"], "must be lists of texts, not one text"),
        (["a"], "a", "must be lists of texts, not one text"),
        (["a", "b"], ["a", []], r"references\[1\]=\[\]: every prediction needs a reference"),
        (["a"], [["a", " "]], "none may be blank"),
    ],
)
def test_predictions_and_references_are_paired(score, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        score(predictions, references)


def test_bleu_by_hand():
    pytest.importorskip("sacrebleu")
    same = bleu(["the cat sat on the mat"], ["the cat sat on the mat"])
    assert same.score == pytest.approx(100.0)
    # All n-grams are there, and the reference nearer in length is two words longer.
    short = bleu(["a b c d"], [["a b c d e f", "q r s t u v w x y z"]])
    assert short.precisions == (100.0, 100.0, 100.0, 100.0)
    assert short.brevity_penalty == pytest.approx(math.exp(1 - 6 / 4))
    assert short.score == pytest.approx(100 * math.exp(-0.5))
    # Of "a b c d e": words 5/5, pairs 3/4, threes 1/3 ("c d e"), and 0 of 2 fours, which sacrebleu
    # smooths to 1/(2 * 2).
    found = bleu(["a b c d e"], [["a b", "c d e", "a x y z w"]])
    assert found.precisions == pytest.approx((100.0, 75.0, 100 / 3, 25.0))
    assert found.score == pytest.approx(100 * (1 * 3 / 4 * 1 / 3 * 1 / 4) ** 0.25)
    assert found.brevity_penalty == 1.0
    assert bleu(["A b c d"], ["a b c d"]).score < 99.0
    assert bleu(["A b c d"], ["a b c d"], lowercase=True).score == pytest.approx(100.0)


def test_bleu_with_differing_numbers_of_references():
    library = pytest.importorskip("sacrebleu")
    predictions = ["the cat is on the mat", "hello there world how are you", "it is"]
    references = [
        ["the cat sat on the mat", "there is a cat on the mat"],
        "hello there world how do you do",
        ["this is it", "it is", "is it"],
    ]
    found = bleu(predictions, references)
    columns = [
        ["the cat sat on the mat", "hello there world how do you do", "this is it"],
        ["there is a cat on the mat", None, "it is"],
        [None, None, "is it"],
    ]
    expected = library.corpus_bleu(predictions, columns)
    assert found.score == expected.score
    assert found.precisions == tuple(expected.precisions)
    assert found.signature.startswith("nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    # A further reference of one text changes no other: repeating one changes nothing.
    repeated = [references[0], [references[1]] * 3, references[2]]
    assert bleu(predictions, repeated).score == found.score
    assert bleu(predictions[::-1], references[::-1]).score == pytest.approx(found.score)


def test_bleu_tokenizers():
    pytest.importorskip("sacrebleu")
    assert bleu(["a b , c d"], ["a b, c d"]).score == pytest.approx(100.0)
    assert bleu(["a b , c d"], ["a b, c d"], tokenize="none").score < 99.0
    with pytest.raises(ValueError, match="tokenize='moses' is unknown; choose from 13a,"):
        bleu(["a"], ["a"], tokenize="moses")


def test_rouge_by_hand():
    pytest.importorskip("rouge_score")
    # Words: 3 of 3 and 3 of 4; pairs: 1 of 2 and 1 of 3; longest common subsequence: 2.
    found = rouge(["on the cat"], ["the cat sat on"])
    assert found.rouge1 == pytest.approx(2 * 3 / 7)
    assert found.rouge2 == pytest.approx(2 * 1 / 5)
    assert found.rougeL == pytest.approx(2 * 2 / 7)
    assert rouge(["on the cat", "a b"], ["the cat sat on", "c d"]).rouge1 == pytest.approx(3 / 7)
    assert rouge(["cats"], ["cat"]).rouge1 == 0.0
    assert rouge(["cats"], ["cat"], stemmer=True).rouge1 == 1.0
    assert rouge(["", "a b"], [["a"], ["x y", "a b"]]) == (0.5, 0.5, 0.5)


def test_each_rouge_takes_its_best_reference():
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    prediction, references = "the cat is here", ["here is the cat", "the cat sat", "is"]
    library = scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    rows = [library.score(reference, prediction) for reference in references]
    found = rouge([prediction], [references])
    for kind in found._fields:
        assert getattr(found, kind) == max(row[kind].fmeasure for row in rows)


@pytest.mark.parametrize(
    ("score", "module", "package"),
    [(bleu, "sacrebleu.metrics", "sacrebleu"), (rouge, "rouge_score.rouge_scorer", "rouge-score")],
)
def test_absent_libraries_are_named(score, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"needs {package}; run: pip install {package}"):
        score(["a"], ["a"])


def test_perplexity():
    assert perplexity(0.0, 3) == 1.0
    assert perplexity(100 * math.log(7), 100) == pytest.approx(7.0)
    assert perplexity(1e9, 1) == math.inf
    assert perplexity(math.inf, 2) == math.inf
    with pytest.raises(ValueError, match="tokens=0: the perplexity of no token"):
        perplexity(1.0, 0)
    for bad in (math.nan, -1.0):
        with pytest.raises(ValueError, match="total_negative_log_likelihood=.*not negative"):
            perplexity(bad, 1)
