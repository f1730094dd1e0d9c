"""Language-model data from a user's files: instructions, chats, prompts with answers, plain texts.

Records are JSON lines or a JSON list, read as data alone; texts are one per file. Every file may be
gzip'ed. Every error names the file and the line.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data import chat
from data.chat import ChatTemplate
from data.files import read_text
from data.task import text_hash
from data.written import LanguageTask, Written, answered, make_language_task, plain

# Format -> the keys that make a record one of it. A record of several formats is of the first:
# the published Alpaca set has a "text" beside the parts it was put together from.
KEYS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "alpaca": (("instruction", "output"), ("instruction", "instances")),
    "prompt": (("prompt", "completion"), ("question", "answer")),
    "text": (("text",),),
}
FORMATS = ("auto", *KEYS)
CHATS = ("messages", "sharegpt")
RECORDS = (".json", ".jsonl", ".ndjson")
TEXTS = (".txt", ".md", ".py")
# Split -> the names that its file may have.
NAMED = {"train": ("train",), "dev": ("dev", "valid", "validation"), "test": ("test",)}
# Role or speaker as written -> as templates know it.
ROLES = {
    "assistant": "assistant",
    "chatgpt": "assistant",
    "developer": "developer",
    "gpt": "assistant",
    "human": "user",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "user": "user",
}


class _Row(NamedTuple):
    """A record and where it was read, as "file:line"."""

    origin: str
    record: dict[str, Any]


class _Reading(NamedTuple):
    """How files are read: arguments of `load` under their names, and who chose the format."""

    format: str
    template: ChatTemplate | None
    encoding: str
    skip_empty: bool
    chosen: str = "by format="


class _Asked(NamedTuple):
    """What an answer answers: as a prompt, as the question of a chat, and what joins the prompt."""

    prompt: str
    question: str
    joint: str = ""


def load(
    path: str | Path,
    *,
    format: str = "auto",
    template: ChatTemplate | str | Path | None = None,
    dev: float = 0.05,
    test: float = 0.05,
    name: str | None = None,
    extensions: tuple[str, ...] = TEXTS,
    encoding: str = "utf-8",
    skip_empty: bool = False,
) -> LanguageTask:
    """Return a task read from a file, or from a folder.

    The formats, of which "auto" takes the one that the first record has the keys of:

    - "alpaca": {"instruction", "input"?, "output"}, written as the Alpaca prompt and the output;
      also {"instruction", "instances": [{"input", "output"}]}, one text per instance.
    - "messages": {"messages": [{"role", "content"}]} and "sharegpt": {"conversations": [{"from",
      "value"}]}, written by `template`; a "system" text and "tools" beside them are used.
    - "prompt": {"prompt", "completion"}, one after the other as they are, or {"question",
      "answer"}, as "Question: ...\\nAnswer: ...".
    - "text": {"text"}, or a file of text, which is one text.

    Args:
        path: a file; or a folder with train, dev (or valid, validation) and test, each .json,
            .jsonl or .ndjson (or .txt, where train.txt has another beside it), or with texts at
            any depth, hidden and blank files left out. Any of them with .gz too.
        format: one of `FORMATS`.
        template: how chats are written, or the checkpoint folder that says so. With it, alpaca
            and prompt records are written as a chat too: a question and an answer.
        dev: share of the distinct texts of train to hold out as "dev" where no file is it; chosen
            by the hash of the text, whatever the order. 0 leaves the split out.
        test: likewise "test".
        name: what reports call the task; None takes the name of the file or folder.
        extensions: which files of a folder are texts.
        encoding: of all files; a leading byte-order mark is dropped from utf-8.
        skip_empty: leave out records without a text to learn instead of raising.

    Returns:
        A checked task with "train" and, where read or held out, "dev" and "test".

    Raises:
        ValueError: an unknown option, an absent, empty or undecodable file, malformed JSON, a
            record that lacks keys, has other than texts in them, is of another format than the
            first or has nothing to learn, a chat without template or that the template refuses,
            or too few texts for a share.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "sums.jsonl"
        >>> _ = path.write_text('{"prompt": "2 + 2 =", "completion": " 4"}\\n')
        >>> load(path, dev=0, test=0).splits["train"][0].text
        '2 + 2 = 4'
    """
    path, extensions = Path(path), _checked_extensions(extensions)
    shares = {"test": test, "dev": dev}
    _check_options(format, encoding, shares)
    if template is not None and not isinstance(template, ChatTemplate):
        template = chat.load(template)
    how = _Reading(format, template, encoding, skip_empty)
    files = _find(path, how, extensions)
    rows = {split: [row for file in found for row in _rows(file, how)] for split, found in files}
    how = _settle(next(row for split in rows.values() for row in split), how)
    splits = {
        split: [text for row in found for text in _write(row, how)] for split, found in rows.items()
    }
    wanted = {split: share for split, share in shares.items() if share and split not in splits}
    splits |= _hold_out(path, splits["train"], wanted)
    ordered = {split: splits[split] for split in NAMED if split in splits}
    return make_language_task(name or _stem(path.resolve()), ordered)


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """The prompt of Stanford Alpaca, which ends where the answer begins.

    Args:
        instruction: what to do.
        context: the record's "input"; where it is empty, the shorter prompt is returned.

    Example:
        >>> alpaca_prompt("Add.", "2, 2").splitlines()[-2:]
        ['', '### Response:']
    """
    paired = ", paired with an input that provides further context" if context else ""
    given = f"### Input:\n{context}\n\n" if context else ""
    return (
        f"Below is an instruction that describes a task{paired}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{given}### Response:"
    )


# --- which files ---


def _check_options(format: str, encoding: str, shares: Mapping[str, float]) -> None:
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; choose from {', '.join(FORMATS)}")
    try:
        codecs.lookup(encoding)
    except LookupError as error:
        raise ValueError(f"encoding={encoding!r} is unknown; most files are 'utf-8'") from error
    for split, share in shares.items():
        if not 0.0 <= share < 1.0:
            raise ValueError(
                f"{split}={share} is outside [0, 1); give the fraction to hold out, 0 for none"
            )
    if sum(shares.values()) >= 1.0:
        raise ValueError(f"dev={shares['dev']} and test={shares['test']} leave nothing to train on")


def _checked_extensions(extensions: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(extensions, str) or not extensions:
        raise ValueError(f"extensions={extensions!r} are no list; give for example ('.txt', '.md')")
    return tuple("." + extension.lstrip(".").lower() for extension in extensions)


def _find(path: Path, how: _Reading, extensions: tuple[str, ...]) -> list[tuple[str, list[Path]]]:
    """The files of each split; all of them "train" where their names say nothing."""
    for file in (path, Path(f"{path}.gz")):
        if file.is_file():
            return [("train", [file])]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder, and none with .gz added; check the path")
    named = _by_split(path, how.format)
    if named:
        return named
    others = sorted(file.name for file in path.iterdir() if _suffix(file) in RECORDS)
    if how.format != "text" and (others or how.format != "auto"):
        raise ValueError(
            f"{path} has no train.jsonl or train.json (or .gz); its files of records are "
            f"{', '.join(others) or '(none)'}. Name them by split, pass one as path=, or set "
            f"format='text' to read the {', '.join(extensions)} files"
        )
    texts = [file for file in sorted(path.rglob("*")) if _suffix(file) in extensions]
    seen = [file for file in texts if not _hidden(file.relative_to(path)) and file.is_file()]
    filled = [file for file in seen if _read(file, how.encoding).strip()]
    if not filled:
        raise ValueError(
            f"{path} has neither files named by split (train.jsonl, dev.jsonl, test.jsonl) nor "
            f"texts in {', '.join(extensions)} files; pass a file, or other extensions="
        )
    return [("train", filled)]


def _by_split(folder: Path, format: str) -> list[tuple[str, list[Path]]]:
    """The files named train, dev and test: of records, else of text, else none."""
    inside = sorted(file for file in folder.iterdir() if file.is_file())
    found = _named(inside, RECORDS)
    # Among texts a test.json is no split, and one text named train may be about trains.
    if not found or (format == "text" and "train" not in found):
        found = _named(inside, (".txt",))
        found = found if "train" in found and len(found) > 1 else {}
    if not found:
        return []
    if "train" not in found:
        have = ", ".join(file.name for files in found.values() for file in files)
        raise ValueError(f"{folder} has {have} but no train.jsonl or train.json; add it")
    for split, files in found.items():
        if len(files) > 1:
            raise ValueError(
                f"{folder}: {' and '.join(file.name for file in files)} are both split {split!r}; "
                "leave one of them"
            )
    return list(found.items())


def _named(inside: list[Path], suffixes: tuple[str, ...]) -> dict[str, list[Path]]:
    named = {
        split: [file for file in inside if _suffix(file) in suffixes and _stem(file) in names]
        for split, names in NAMED.items()
    }
    return {split: files for split, files in named.items() if files}


def _suffix(file: Path) -> str:
    """The last suffix besides .gz, in lower case."""
    return _unzipped(file).suffix.lower()


def _stem(file: Path) -> str:
    """The name without that suffix and .gz."""
    return _unzipped(file).stem


def _unzipped(file: Path) -> Path:
    return file.with_suffix("") if file.suffix == ".gz" else file


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


# --- files to records ---


def _rows(file: Path, how: _Reading) -> list[_Row]:
    text = _read(file, how.encoding)
    if not text.strip():
        raise ValueError(f"{file}: the file is empty; fill it or remove it")
    if _suffix(file) not in RECORDS and how.format in ("auto", "text"):
        return [_Row(f"{file}:1", {"text": text})]
    values = _list_values(file, text) if text.lstrip()[0] == "[" else _line_values(file, text)
    rows = []
    for line, value in values:
        if not isinstance(value, dict):
            raise ValueError(
                f"{file}:{line}: expected an object, found {str(value)[:60]!r}; write one object "
                "per line, or a list of objects"
            )
        # A table exported as JSON has every key in every record, null where it has no value.
        filled = {key: item for key, item in value.items() if item is not None}
        rows.append(_Row(f"{file}:{line}", filled))
    if not rows:
        raise ValueError(f"{file}: the list is empty; every file needs records")
    return rows


def _read(file: Path, encoding: str) -> str:
    try:
        return read_text(file, encoding)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: not a whole gzip file ({error}); copy it again") from error


def _line_values(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    # str.splitlines would also split at control characters inside the texts.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _parse(file, line, number)


def _list_values(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    """The values of a JSON list, each with the line it begins on."""
    if not _parse(file, text, 1):
        return
    decoder, space = json.JSONDecoder(), re.compile(r"[\s,]*")
    # The list as a whole is well formed, so commas and blanks alone are between its values.
    end, line, counted = text.index("[") + 1, 1, 0
    while True:
        start = space.match(text, end).end()  # pyright: ignore[reportOptionalMemberAccess]
        if text[start] == "]":
            return
        line, counted = line + text.count("\n", counted, start), start
        value, end = decoder.raw_decode(text, start)
        yield line, value


def _parse(file: Path, text: str, line: int) -> Any:
    """The value of JSON text that begins on the given line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file}:{line + error.lineno - 1}: malformed JSON ({error.msg} at column "
            f"{error.colno}); write one object per line, or a list of objects"
        ) from error
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits, or thousands of brackets.
        raise ValueError(f"{file}:{line}: JSON beyond what is read ({error})") from error


# --- records to texts ---


def _settle(first: _Row, how: _Reading) -> _Reading:
    """Choose the format by the first record; a chat's needs a template, a text's has no use."""
    if how.format == "auto":
        how = how._replace(format=_format_of(first), chosen=f"by the first record, {first.origin}")
    form = how.format
    if form in CHATS and how.template is None:
        raise ValueError(
            f"{first.origin}: format {form!r} is written by the model's chat template; pass "
            "template= with the checkpoint's folder or a data.chat.ChatTemplate"
        )
    if form == "text" and how.template is not None:
        raise ValueError(
            f"{first.origin}: format 'text' has no turns for template= to write; leave it out"
        )
    return how


def _format_of(row: _Row) -> str:
    for form, choices in KEYS.items():
        if any(all(key in row.record for key in keys) for keys in choices):
            return form
    raise ValueError(f"{row.origin}: {_lacks(row)} no format. {_formats()}")


def _lacks(row: _Row) -> str:
    return f"the record's keys {', '.join(map(repr, row.record)) or '(none)'} are those of"


def _formats() -> str:
    each = (f"{form}: {' or '.join('+'.join(k) for k in keys)}" for form, keys in KEYS.items())
    return f"The formats are {'; '.join(each)}"


def _write(row: _Row, how: _Reading) -> Iterator[Written]:
    """The texts of a record: one, but several for several instances, and none if it is skipped."""
    form = how.format
    if not any(all(key in row.record for key in keys) for keys in KEYS[form]):
        raise ValueError(
            f"{row.origin}: {_lacks(row)} no {form!r} record, the format chosen {how.chosen}; all "
            f"records have one format. {_formats()}"
        )
    writer = {"alpaca": _alpaca, "prompt": _pair, "text": _text}.get(form, _chat)
    for written in writer(row, how):
        try:
            written.text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{row.origin}: character {written.text[error.start]!r} is half of a pair and no "
                "text; correct the escape"
            ) from error
        yield written


def _alpaca(row: _Row, how: _Reading) -> Iterator[Written]:
    instruction = _string(row, "instruction")
    instances = [row.record] if "output" in row.record else row.record["instances"]
    if not _are_objects(instances):
        raise ValueError(f"{row.origin}: 'instances' is no list of objects; give input and output")
    for instance in instances:
        case = _Row(row.origin, instance)
        context = _string(case, "input") if instance.get("input") is not None else ""
        question = f"{instruction}\n\n{context}" if context else instruction
        asked = _Asked(alpaca_prompt(instruction, context), question)
        yield from _exchange(case, "output", asked, how)


def _pair(row: _Row, how: _Reading) -> Iterator[Written]:
    if "prompt" in row.record and "completion" in row.record:
        prompt = _string(row, "prompt")
        yield from _exchange(row, "completion", _Asked(prompt, prompt), how)
        return
    question = _string(row, "question")
    # The space goes with the answer, as tokens of words begin with theirs.
    asked = _Asked(f"Question: {question}\nAnswer:", question, " ")
    yield from _exchange(row, "answer", asked, how)


def _exchange(row: _Row, key: str, asked: _Asked, how: _Reading) -> Iterator[Written]:
    answer = _string(row, key)
    if _skip(row, key, answer, how):
        return
    if how.template is None:
        yield answered(asked.prompt, asked.joint + answer, row.origin, answer)
        return
    question = {"role": "user", "content": asked.question}
    yield how.template.written([question, {"role": "assistant", "content": answer}], row.origin)


def _text(row: _Row, how: _Reading) -> Iterator[Written]:
    text = _string(row, "text")
    if not _skip(row, "text", text, how):
        yield plain(text, row.origin)


def _chat(row: _Row, how: _Reading) -> Iterator[Written]:
    key = KEYS[how.format][0][0]
    turns, tools = row.record[key], row.record.get("tools") or None
    if not _are_objects(turns):
        raise ValueError(f"{row.origin}: {key!r} is no list of objects; give one object per turn")
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"{row.origin}: 'tools' is no list; give the functions' JSON schemas")
    messages = [_message(row, number, turn) for number, turn in enumerate(turns)]
    for number, message in enumerate(messages):
        answer = message["role"] == "assistant" and not message.get("tool_calls")
        if answer and _skip(row, f"{key}[{number}]", message["content"], how):
            return
    if row.record.get("system"):
        messages.insert(0, {"role": "system", "content": _string(row, "system")})
    if how.template is not None:
        yield how.template.written(messages, row.origin, tools)


def _message(row: _Row, number: int, turn: dict[str, Any]) -> dict[str, Any]:
    """A turn under the names that templates read, its other keys as they are."""
    speaker, said = ("role", "content") if "role" in turn else ("from", "value")
    if speaker not in turn:
        raise ValueError(
            f"{row.origin}: turn {number} has the keys {', '.join(map(repr, turn)) or '(none)'}; "
            "give role and content, or from and value"
        )
    role, content = turn[speaker], turn.get(said)
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(
            f"{row.origin}: turn {number} has {speaker} {role!r}; known are {', '.join(ROLES)}"
        )
    if not isinstance(content, str) and (content is not None or not turn.get("tool_calls")):
        raise ValueError(
            f"{row.origin}: {said!r} of turn {number} is {str(content)[:40]!r}; give one text"
        )
    rest = {key: value for key, value in turn.items() if key not in (speaker, said)}
    return {**rest, "role": ROLES[role], "content": content}


def _are_objects(value: Any) -> bool:
    filled = isinstance(value, list) and bool(value)
    return filled and all(isinstance(item, dict) for item in value)


def _string(row: _Row, key: str) -> str:
    value = row.record.get(key)
    if isinstance(value, str):
        return value
    hint = "; chats are under 'messages'" if isinstance(value, list) else ""
    raise ValueError(f"{row.origin}: {key!r} is {str(value)[:40]!r}; give a text{hint}")


def _skip(row: _Row, key: str, text: str, how: _Reading) -> bool:
    """Whether to leave out a record because there is nothing in it to learn."""
    if text.strip():
        return False
    if how.skip_empty:
        return True
    raise ValueError(
        f"{row.origin}: {key!r} is empty; fill it, remove the record or set skip_empty=True"
    )


# --- splits ---


def _hold_out(
    path: Path, train: list[Written], shares: Mapping[str, float]
) -> dict[str, list[Written]]:
    """Divide texts into "train" and a split per share, equal texts together."""
    if not shares:
        return {"train": train}
    ordered = sorted({written.text for written in train}, key=text_hash)
    counts = {split: round(share * len(ordered)) for split, share in shares.items()}
    if not all(counts.values()) or sum(counts.values()) >= len(ordered):
        given = " and ".join(f"{split}={share}" for split, share in shares.items())
        raise ValueError(
            f"{path}: {given} of {len(ordered)} distinct texts leaves a split empty; give more "
            "texts or other shares, 0 for a split that is not wanted"
        )
    assigned, start = {}, 0
    for split, count in counts.items():
        assigned |= dict.fromkeys(ordered[start : start + count], split)
        start += count
    divided: dict[str, list[Written]] = {"train": [], **{split: [] for split in shares}}
    for written in train:
        divided[assigned.get(written.text, "train")].append(written)
    return divided
