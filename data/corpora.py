"""Running text as a language-model task: a file, or the public corpora by name."""

from __future__ import annotations

import re
from pathlib import Path

from data.files import read_text
from data.written import LanguageTask, Written, make_language_task, plain

# Name -> split -> path below the root. A single "train" file is divided by position.
KNOWN: dict[str, dict[str, str]] = {
    "tinyshakespeare": {"train": "tinyshakespeare/input.txt"},
    "wikitext2": {"train": "wikitext2/valid.txt", "test": "wikitext2/test.txt"},
}
SHARES = {"dev": 0.05, "test": 0.05}


def load(
    name: str | None = None,
    *,
    root: str | Path | None = None,
    path: str | Path | None = None,
    block: int = 2000,
) -> LanguageTask:
    """Return running text, in blocks that end at blank lines.

    Splits that have no file of their own are the end of the training text: its last tenth, half of
    it dev and half of it test.

    Args:
        name: a key of `KNOWN`, with `root`, the folder that holds its files.
        root: see `name`.
        path: a UTF-8 text file instead, plain or gzip.
        block: characters of a block, about; longer paragraphs stay whole.

    Returns:
        The task, with splits "train", "dev" and "test".

    Raises:
        ValueError: not exactly one of `name` and `path`, an unknown name, a missing or unreadable
            file, or too little text for three splits.

    Example:
        >>> task = load(path=__file__, block=200)
        >>> sorted(task.splits)
        ['dev', 'test', 'train']
    """
    if (name is None) == (path is None):
        raise ValueError(f"name={name!r} and path={path!r}: give one of the two")
    if block < 1:
        raise ValueError(f"block={block} must be at least 1 character")
    if name is not None and name not in KNOWN:
        raise ValueError(f"name={name!r} is not a corpus; choose from {', '.join(KNOWN)}")
    files = {"train": Path(path)} if path is not None else _files(name or "", root)
    texts = {split: _blocks(file, block) for split, file in files.items()}
    for split in [split for split in SHARES if split not in texts]:
        texts[split] = _tail(texts["train"], SHARES[split], files["train"])
    order = ("train", "dev", "test")
    return make_language_task(name or files["train"].stem, {split: texts[split] for split in order})


def _files(name: str, root: str | Path | None) -> dict[str, Path]:
    if root is None:
        raise ValueError(f"root is needed for name={name!r}: the folder that holds its files")
    return {split: Path(root) / file for split, file in KNOWN[name].items()}


def _blocks(file: Path, size: int) -> list[Written]:
    text = read_text(file, "utf-8")
    blocks, start, line = [], 0, 1
    # A paragraph and the blank lines behind it, which stay with it: nothing of the text is lost.
    ends = [match.end() for match in re.finditer(r"\n\s*\n", text)] + [len(text)]
    for end in ends:
        if end - start >= size or end == len(text):
            if text[start:end].strip():
                blocks.append(plain(text[start:end], origin=f"{file}:{line}"))
            line += text.count("\n", start, end)
            start = end
    return blocks


def _tail(texts: list[Written], share: float, file: Path) -> list[Written]:
    """Takes the last blocks off `texts`, about so much of what was there at first."""
    count = round(share * len(texts))
    if count < 1 or count >= len(texts):
        raise ValueError(
            f"{file} has {len(texts)} blocks, too few to set {share:.0%} aside: lower block="
        )
    tail = texts[-count:]
    del texts[-count:]
    return tail
