"""Public sets of questions and of data to put into words, read from their published files.

The table `KNOWN` says where each file is below the root and how it is scored; `load` reads one.
The data itself is not part of this project: several of the licences allow research use only.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from data.answers import Extract, Matches, choice_of, exact_match, last_number_of, number_of
from data.files import lines, read_text
from data.task import Example, carve, text_hash
from data.written import (
    Grade,
    LanguageTask,
    Piece,
    Written,
    make_language_task,
    sentence_scores,
)


class Template(NamedTuple):
    """How a question becomes a prompt.

    Attributes:
        prompt: has "{question}" where the question goes; a model continues it.
        lead: begins every answer. A blank is better here than at the prompt's end, since
            tokenizers join it to the word after it.
    """

    prompt: str
    lead: str = ""


# "llm_adapters" is that suite's training prompt to the last blank, its indentation included.
# "step_by_step" is the prompt of the MetaMathQA comparison of Hugging Face PEFT. "bars" is how the
# LoRA paper's files separate data from text.
_TASK = "Below is an instruction that describes a task. "
_REQUEST = "Write a response that appropriately completes the request."
_MARGIN = " " * 16
TEMPLATES: dict[str, Template] = {
    "alpaca": Template(
        f"{_TASK}{_REQUEST}\n\n### Instruction:\n{{question}}\n\n### Response:\n",
    ),
    "bars": Template("{question}||", " "),
    "llm_adapters": Template(
        f"{_TASK}{_REQUEST}  \n\n{_MARGIN}### Instruction:\n{_MARGIN}{{question}}\n{_MARGIN}\n"
        f"{_MARGIN}### Response:\n{_MARGIN}"
    ),
    "question_answer": Template("Question: {question}\nAnswer:", " "),
    "step_by_step": Template("Question: {question} Think step by step.\nAnswer:"),
}

# A reference of the LLM-Adapters suite is a word of one of these, or else a number.
CHOICES: tuple[tuple[str, ...], ...] = (
    ("true", "false"),
    ("A", "B", "C", "D", "E"),
    ("answer1", "answer2", "answer3", "answer4", "answer5"),
    ("ending1", "ending2", "ending3", "ending4"),
    ("option1", "option2"),
    ("solution1", "solution2"),
)
SPLITS = ("train", "dev", "test")
SHARE = 0.1
# Characters of query, blank and response: the MetaMathQA comparison of Hugging Face PEFT drops
# longer records, a fifteenth of all, so that the rest fit into its 768 tokens.
METAMATHQA_LONGEST = 1300


class Known(NamedTuple):
    """A public set: its files below a root, and how it is made into splits and scored.

    Attributes:
        kinds: split -> how its files are written: a key of the table of readers.
        files: split -> paths below the root.
        template: name of the prompt it is published with.
        carved: splits to take from train where no file has them, a tenth of it each.
        yields: "train" or "test": which of them loses the questions that both have.
        number: reads a number from an answer; None for sets that BLEU and ROUGE score.
        tolerance: how far apart two equal numbers may be.
        sampled: split -> how many of its questions are kept, the first by their hash. Its questions
            may be in train as well.
    """

    kinds: dict[str, str]
    files: dict[str, tuple[str, ...]]
    template: str
    carved: tuple[str, ...] = ("dev",)
    yields: str = "train"
    number: Callable[[str], float | None] | None = None
    tolerance: float = 0.0
    sampled: dict[str, int] = {}


def _all(kind: str) -> dict[str, str]:
    return dict.fromkeys(SPLITS, kind)


def _suite(train: Sequence[str], test: Sequence[str], yields: str = "train") -> Known:
    files = {"train": tuple(train), "test": tuple(f"llm_adapters/{n}/test.json" for n in test)}
    files = {split: paths for split, paths in files.items() if paths}
    number, tolerance = last_number_of, 1e-3  # its own rule and tolerance
    return Known(_all("suite"), files, "llm_adapters", ("dev",), yields, number, tolerance)


_ARITHMETIC = ("AddSub", "MultiArith", "SingleEq", "SVAMP", "AQuA", "gsm8k", "mawps")
_MATHS = ("llm_adapters/math_data.json",)
_TRAINED = ("boolq", "ARC-Easy", "ARC-Challenge", "openbookqa")
_UNTRAINED = ("piqa", "social_i_qa", "winogrande", "hellaswag")
_TRAIN_OF = {name: f"llm_adapters/{name}/train.json" for name in _TRAINED}

# Every question of math_data.json is in a test set of the suite. A single arithmetic set keeps its
# whole test set, and trains on the rest; "arithmetic" keeps the whole of math_data.json, and tests
# on the fifth of the test sets that is not in it. The rationales that are learned were written by
# another model: of math_data.json's, more than a fifth end in another answer than the record's.
# hellaswag's, piqa's, social_i_qa's and
# winogrande's train files are too large to be passed around: name yours in files=.
# "metamathqa" has the splits of the comparison of Hugging Face PEFT. MetaMathQA re-phrases the
# questions of GSM8K's training file and repeats many word for word, so the dev split, 50 of these,
# overlaps train by construction: it shows how training goes, and only test scores new questions.
KNOWN: dict[str, Known] = {
    "e2e": Known(
        _all("e2e"), {"train": ("e2e/lora_valid.txt",), "test": ("e2e/lora_test.txt",)}, "bars"
    ),
    "gsm8k": Known(
        _all("gsm8k"),
        {"train": ("gsm8k/train.jsonl",), "test": ("gsm8k/test.jsonl",)},
        "question_answer",
        number=number_of,
    ),
    **{f"llm_adapters/{name}": _suite(_MATHS, (name,)) for name in _ARITHMETIC},
    **{f"llm_adapters/{name}": _suite((_TRAIN_OF[name],), (name,)) for name in _TRAINED},
    **{f"llm_adapters/{name}": _suite((), (name,)) for name in _UNTRAINED},
    "llm_adapters/arithmetic": _suite(_MATHS, _ARITHMETIC, "test"),
    "llm_adapters/commonsense": _suite(tuple(_TRAIN_OF.values()), (*_TRAINED, *_UNTRAINED[:3])),
    "metamathqa": Known(
        {**_all("gsm8k"), "train": "metamathqa"},
        {
            "train": ("metamathqa/MetaMathQA-395K.json",),
            "dev": ("gsm8k/train.jsonl",),
            "test": ("gsm8k/test.jsonl",),
        },
        "step_by_step",
        number=number_of,
        sampled={"dev": 50},
    ),
    "webnlg": Known(_all("webnlg"), {"train": ("webnlg/dev.json",)}, "bars", ("test", "dev")),
}


def load(
    name: str,
    root: str | Path | None = None,
    *,
    template: str | Template | None = None,
    files: Mapping[str, str | Path] | None = None,
    learn_prompt: bool = False,
) -> LanguageTask:
    """Return a set of the table `KNOWN`, with splits "train", "dev" and "test" where it has them.

    Splits that have no file are carved from train by the hash of the question, the same for
    everyone. No question is in two splits: see `Known.yields`; but those of the dev split of
    "metamathqa" are in train too, as in the published comparison. In the dev and test splits of
    "e2e" and "webnlg" a text has all references of its data, and the first is the one to learn.

    Args:
        name: a key of `KNOWN`.
        root: folder that holds the sets' own folders (`gsm8k`, `llm_adapters`, ...). "metamathqa"
            needs two, `metamathqa` and `gsm8k`.
        template: a key of `TEMPLATES` or a `Template`; None takes the one of the set.
        files: split -> path, absolute or below the root, to read in place of the table's, in the
            format of that split: {"train": "llm_adapters/commonsense_170k.json"}.
        learn_prompt: the prompt's tokens are targets of training as well, as in the published
            runs of the LLM-Adapters suite and of the MetaMathQA comparison.

    Returns:
        The task. References are final numbers, choices or whole texts; in train of "metamathqa"
            also formulas, which no score reads. Its `grade` gives "accuracy" and "answered" (see
            `matches`), or of "e2e" and "webnlg" "bleu" and "rougeL".

    Raises:
        ValueError: an unknown name, template or split; no root, or the set's folder is absent
            below it; an absent, empty or damaged file; malformed JSON; a record without what it
            must have, or with an answer that is neither a number nor a choice; each with file and
            line (or record); a split whose every question is in another one.

    Example:
        task = load("gsm8k", "../shared/data", template="step_by_step")
    """
    spec = _known(name)
    form = _template(spec.template if template is None else template)
    rows = {
        split: [row for path in paths for row in _read(spec.kinds[split], path)]
        for split, paths in _paths(name, spec, root, files or {}).items()
    }
    _separate(rows, name, spec)
    written = {split: _written(rows[split], split, spec, form, learn_prompt) for split in rows}
    return make_language_task(name, {s: written[s] for s in SPLITS if s in written}, _grade(name))


def matches(name: str, texts: Sequence[Written], predictions: Sequence[str]) -> Matches:
    """Score generated answers as the set's publishers do.

    Args:
        name: a key of `KNOWN`, not "e2e" or "webnlg": score those with `data.answers.bleu`.
        texts: of the task; what they were continued from.
        predictions: what a model wrote after `text.prompt`, for each of `texts`.

    Returns:
        `Matches`. A reference that is a choice is compared with the first choice named; a number
        with the last number (LLM-Adapters) or the announced one (GSM8K).

    Raises:
        ValueError: an unknown name, a set that has no final answers, or see
            `data.answers.exact_match`.

    Example:
        share = matches("gsm8k", task.splits["test"], generated).accuracy
    """
    spec = _known(name)
    if spec.number is None:
        raise ValueError(f"name={name!r}: its answers are sentences; score them with answers.bleu")
    rules = [_extract(spec, next(iter(text.references), "")) for text in texts]
    references = [text.references for text in texts]
    return exact_match(predictions, references, rules, tolerance=spec.tolerance)


def set_of(text: Written) -> str:
    """Return the name of the set whose test file a text was read from.

    Args:
        text: of the test split of a set that joins several, such as "llm_adapters/arithmetic".

    Raises:
        ValueError: the text's origin is not in a set's folder.

    Example:
        >>> set_of(Written((), origin="data/llm_adapters/AQuA/test.json:record 3"))
        'llm_adapters/AQuA'
    """
    folder = Path(text.origin.rpartition(":")[0]).parent
    for name in (f"{folder.parent.name}/{folder.name}", folder.name):
        if name in KNOWN:
            return name
    raise ValueError(
        f"origin={text.origin!r} is in no set's own folder; only texts of a test split always are"
    )


@cache  # one function for each set: tasks that are equal then compare as equal
def _grade(name: str) -> Grade:
    return sentence_scores if KNOWN[name].number is None else partial(_answer_scores, name)


def _answer_scores(
    name: str, texts: Sequence[Written], predictions: Sequence[str]
) -> dict[str, float]:
    found = matches(name, texts, predictions)
    return {"accuracy": found.accuracy, "answered": found.answered}


# ------------------------------------------------------------------------------------- the splits


class _Row(NamedTuple):
    question: str
    answer: str
    reference: str
    origin: str


def _known(name: str) -> Known:
    if name not in KNOWN:
        raise ValueError(f"name={name!r} is not in the table; choose from {', '.join(KNOWN)}")
    return KNOWN[name]


def _template(template: str | Template) -> Template:
    if isinstance(template, str):
        if template not in TEMPLATES:
            raise ValueError(
                f"template={template!r} is unknown; choose from {', '.join(TEMPLATES)} or pass a "
                "Template"
            )
        return TEMPLATES[template]
    if "{question}" not in template.prompt:
        raise ValueError(f"template.prompt={template.prompt!r} has no {{question}}; add it")
    return template


def _paths(
    name: str, spec: Known, root: str | Path | None, own: Mapping[str, str | Path]
) -> dict[str, list[Path]]:
    if root is None:
        raise ValueError(f"root=None: pass the folder that holds the files of {name!r} as root=")
    if unknown := sorted(set(own) - set(SPLITS)):
        raise ValueError(f"files has the split {unknown[0]!r}; choose from {', '.join(SPLITS)}")
    chosen = {**spec.files, **{split: (path,) for split, path in own.items()}}
    paths = {split: [Path(root) / path for path in chosen[split]] for split in chosen}
    for path in (path for group in paths.values() for path in group):
        if not path.parent.is_dir():
            raise ValueError(
                f"root={str(root)!r}: set {name!r} expects the folder {str(path.parent)!r} with "
                f"{path.name} (or .gz); pass the folder that contains it as root="
            )
    return paths


def _separate(rows: dict[str, list[_Row]], name: str, spec: Known) -> None:
    """Leave every question in one split, but for sampled ones, and add the splits to carve."""
    order = ("test", "dev", "train") if spec.yields == "train" else ("dev", "train", "test")
    taken: set[str] = set()
    for split in [split for split in order if split in rows]:
        if split in spec.sampled:
            rows[split] = _sample(rows[split], spec.sampled[split], split)
            continue
        rows[split] = [row for row in rows[split] if _key(row) not in taken]
        taken |= {_key(row) for row in rows[split]}
        if not rows[split]:
            raise ValueError(
                f"set {name!r}: every question of split {split!r} is in another split too; give "
                "other files="
            )
    total = len(rows.get("train", ()))
    for split in spec.carved if total else ():
        if split not in rows:
            share = SHARE * total / len(rows["train"])
            rows["train"], rows[split] = _carve(rows["train"], share, split)


def _key(row: _Row) -> str:
    return " ".join(row.question.split()).casefold()


def _sample(rows: list[_Row], count: int, split: str) -> list[_Row]:
    return sorted(rows, key=lambda row: text_hash(split, _key(row)))[:count]


def _carve(rows: list[_Row], share: float, split: str) -> tuple[list[_Row], list[_Row]]:
    numbered = [Example(_key(row), str(number)) for number, row in enumerate(rows)]
    rest, held = carve(numbered, share, name=split)
    return [rows[int(row.label)] for row in rest], [rows[int(row.label)] for row in held]


def _written(
    rows: list[_Row], split: str, spec: Known, form: Template, learn_prompt: bool
) -> list[Written]:
    together: dict[str, list[_Row]] = {}
    for number, row in enumerate(rows):
        # Several texts say the same data: to train on one by one, to score with all of them.
        joined = spec.number is None and split != "train"
        together.setdefault(_key(row) if joined else str(number), []).append(row)
    return [
        Written(
            (
                Piece(form.prompt.replace("{question}", group[0].question), learn_prompt),
                Piece(form.lead + group[0].answer),
            ),
            tuple(row.reference for row in group),
            group[0].origin,
        )
        for group in together.values()
    ]


def _extract(spec: Known, reference: str) -> Extract:
    family = next((words for words in CHOICES if reference in words), None)
    return partial(choice_of, choices=family) if family else spec.number or str.strip


# ------------------------------------------------------------------------------------ the readers


def _read(kind: str, path: Path) -> list[_Row]:
    rows = list(_READERS[kind](path, _content(path)))
    if not rows:
        raise ValueError(f"{path}: no records; every split needs some")
    return rows


def _content(path: Path) -> str:
    try:
        return read_text(path, "utf-8")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error}); download it again") from error


def _gsm8k(path: Path, text: str) -> Iterator[_Row]:
    for line, written in enumerate(lines(text), start=1):
        if not written.strip():
            continue
        origin = f"{path}:{line}"
        record = _json(path, written, line)
        question, answer = (_field(record, key, str, origin) for key in ("question", "answer"))
        reference = answer.rpartition("#### ")[2].strip().replace(",", "")
        if "#### " not in answer or number_of(reference) is None:
            raise ValueError(f"{origin}: the answer must end in '#### ' and a number: {answer!r}")
        yield _Row(question, answer, reference, origin)


def _records(path: Path, text: str) -> Iterator[tuple[Any, str]]:
    """The records of a JSON list, each with its origin."""
    records = _json(path, text)
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a list of records, found {type(records).__name__}")
    for number, record in enumerate(records, start=1):
        yield record, f"{path}:record {number}"


def _metamathqa(path: Path, text: str) -> Iterator[_Row]:
    for record, origin in _records(path, text):
        query, response = (_field(record, key, str, origin) for key in ("query", "response"))
        if len(f"{query} {response}") <= METAMATHQA_LONGEST:
            yield _Row(query, response, response.rpartition("The answer is: ")[2].strip(), origin)


def _suite_rows(path: Path, text: str) -> Iterator[_Row]:
    for record, origin in _records(path, text):
        question, answer = (_field(record, key, str, origin) for key in ("instruction", "answer"))
        output = record.get("output", "")
        if record.get("input") or not isinstance(output, str):
            raise ValueError(
                f"{origin}: 'input' must be empty and 'output' a text, as in every set of the "
                "suite; move what 'input' says into 'instruction'"
            )
        if number_of(answer) is None and not any(answer in words for words in CHOICES):
            raise ValueError(
                f"{origin}: the answer {answer!r} is no number and no choice; correct it"
            )
        # A few records have no rationale: their answer alone is learned.
        output = output if output.strip() else answer
        yield _Row(question, output, answer, origin)


def _e2e(path: Path, text: str) -> Iterator[_Row]:
    for line, written in enumerate(lines(text), start=1):
        if not written.strip():
            continue
        parts = [part.strip() for part in written.split("||")]
        if len(parts) != 2 or not all(parts):
            raise ValueError(
                f"{path}:{line}: {written[:60]!r} is not 'data||text'; write the data, two bars "
                "and the text"
            )
        yield _Row(parts[0], parts[1], parts[1], f"{path}:{line}")


def _webnlg(path: Path, text: str) -> Iterator[_Row]:
    entries = _field(_json(path, text), "entries", list, str(path))
    for number, wrapped in enumerate(entries, start=1):
        origin = f"{path}:entry {number}"
        if not isinstance(wrapped, dict) or len(wrapped) != 1:
            raise ValueError(f"{origin}: expected an object with the entry's number as only key")
        (entry,) = wrapped.values()
        triples = [
            " : ".join(_field(triple, key, str, origin) for key in _TRIPLE)
            for triple in _field(entry, "modifiedtripleset", list, origin)
        ]
        for said in _field(entry, "lexicalisations", list, origin):
            sentence = _field(said, "lex", str, origin).strip()
            # The others are marked "toFix" by the publishers.
            if _field(said, "comment", str, origin) == "good":
                yield _Row(" | ".join(triples), sentence, sentence, origin)


_TRIPLE = ("subject", "property", "object")
_READERS: dict[str, Callable[[Path, str], Iterator[_Row]]] = {
    "e2e": _e2e,
    "gsm8k": _gsm8k,
    "metamathqa": _metamathqa,
    "suite": _suite_rows,
    "webnlg": _webnlg,
}


def _json(path: Path, text: str, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        reason = getattr(error, "msg", str(error))
        raise ValueError(f"{path}:{line}: malformed JSON ({reason}); correct the line") from error


def _field(record: Any, key: str, kind: type, origin: str) -> Any:
    if not isinstance(record, dict):
        raise ValueError(f"{origin}: expected an object, found {str(record)[:60]!r}")
    value = record.get(key)
    if not isinstance(value, kind) or not (value.strip() if isinstance(value, str) else value):
        wanted, found = {str: "text", list: "list"}[kind], str(value)[:60]
        raise ValueError(
            f"{origin}: {key!r} must be a {wanted} that is not empty, found {found!r}; "
            f"the object has {', '.join(map(str, record)) or 'no keys'}"
        )
    return value
