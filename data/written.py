"""The record every source of language-model data returns: texts, and which parts are learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from data.answers import bleu, rouge


class Piece(NamedTuple):
    """A stretch of text.

    Attributes:
        text: may be empty.
        learned: whether its tokens are targets of training; a prompt's are not.
    """

    text: str
    learned: bool = True


class Written(NamedTuple):
    """One text to learn from, or a prompt to continue.

    Attributes:
        pieces: in order; together they are the text.
        references: acceptable continuations of the pieces before the last, for scoring what a
            model generates; empty where nothing is to be generated.
        origin: where it was read, as "file:line"; used in errors.
        marked: whether special tokens, the end among them, are written out in the text, as chat
            templates do; none are added then.
    """

    pieces: tuple[Piece, ...]
    references: tuple[str, ...] = ()
    origin: str = ""
    marked: bool = False

    @property
    def text(self) -> str:
        """All pieces."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def prompt(self) -> str:
        """All pieces but the last."""
        return "".join(piece.text for piece in self.pieces[:-1])


# (texts, what a model wrote after the prompt of each) -> scores by name.
Grade = Callable[[Sequence[Written], Sequence[str]], dict[str, float]]


class LanguageTask(NamedTuple):
    """A language-model task; build it with `make_language_task`, which checks it.

    Attributes:
        name: what reports call the task.
        splits: split name -> texts.
        grade: scores of what a model generated for texts, by name; None where nothing is to be
            generated.
    """

    name: str
    splits: dict[str, list[Written]]
    grade: Grade | None = None


def plain(text: str, origin: str = "") -> Written:
    """A text of which every token is learned."""
    return Written((Piece(text),), origin=origin)


def answered(prompt: str, answer: str, origin: str = "", *references: str) -> Written:
    """A prompt and the answer to learn; `references` default to the answer."""
    return Written((Piece(prompt, False), Piece(answer)), references or (answer,), origin)


def sentence_scores(texts: Sequence[Written], predictions: Sequence[str]) -> dict[str, float]:
    """Return "bleu", from 0 to 100, and "rougeL", from 0 to 1: a `Grade` for answers in words.

    Args:
        texts: their references are what the predictions are compared with.
        predictions: what a model wrote after `text.prompt`, for each of `texts`.

    Raises:
        ValueError: a text without references, or see `data.answers.bleu`.
        ImportError: sacrebleu or rouge-score is not installed.

    Example:
        >>> sentence_scores([answered("A word? ", "the cat")], ["the dog"])["rougeL"]
        0.5
    """
    references = [text.references for text in texts]
    return {
        "bleu": bleu(predictions, references).score,
        "rougeL": rouge(predictions, references).rougeL,
    }


def make_language_task(
    name: str, splits: Mapping[str, Iterable[Written]], grade: Grade | None = None
) -> LanguageTask:
    """Return a checked `LanguageTask`.

    Args:
        name: what reports call the task.
        splits: split name -> texts, at least one split and one text in each.
        grade: see `LanguageTask`.

    Raises:
        ValueError: no split, an empty split, or a text of which nothing is learned. The message
            names the text's origin.

    Example:
        >>> task = make_language_task("toy", {"train": [answered("2 + 2 = ", "4")]})
        >>> task.splits["train"][0].text
        '2 + 2 = 4'
    """
    if not splits:
        raise ValueError(f"splits of task {name!r} is empty; give at least a 'train' split")
    lists = {split: list(texts) for split, texts in splits.items()}
    for split, texts in lists.items():
        if not texts:
            raise ValueError(f"split {split!r} of task {name!r} has no text; drop the split")
        for number, written in enumerate(texts):
            if not any(piece.learned and piece.text for piece in written.pieces):
                where = written.origin or f"text {number} of split {split!r}"
                raise ValueError(f"{where}: nothing is learned of it: {written.text[:40]!r}")
    return LanguageTask(name, lists, grade)


def first(task: LanguageTask, count: int) -> LanguageTask:
    """Keep the first `count` texts of each split.

    Raises:
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"examples={count} must be at least 1 text a split")
    return task._replace(splits={split: texts[:count] for split, texts in task.splits.items()})
