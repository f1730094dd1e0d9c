"""Continuations of prompts by the adapted model, in batches of few shapes, and their grades."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import models
import pefts
from data.written import LanguageTask, Written
from models import generate as generation
from models.tokenizer import Tokenizer
from training.checkpoint import write_atomically
from training.objective import Experiment, Opening, Writing

STRIDE = 32  # prompts are padded to multiples of it: one compilation each


class Grades(NamedTuple):
    """How good the continuations of a split's prompts are.

    Attributes:
      values: by the task's own measures.
      texts: the task's texts, with their prompts and references.
      answers: what was written behind each prompt.
    """

    values: dict[str, float]
    texts: Sequence[Written]
    answers: Sequence[str]

    def summary(self) -> dict[str, float]:
        """The figures that tables and curves show, by name."""
        return self.values

    def record(self) -> dict[str, Any]:
        """The figures and their number, for a JSON file."""
        return {**self.values, "answers": len(self.answers)}

    def save(self, file: Path) -> None:
        """Write every prompt with its answer and references, one JSON object a line."""
        rows = [
            {"prompt": text.prompt, "answer": answer, "references": list(text.references)}
            for text, answer in zip(self.texts, self.answers, strict=True)
        ]
        write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))


def grade(run: Experiment, argument: Any, split: str, how: Writing, limit: int = 0) -> Grades:
    """Let the adapted model answer the prompts of a split, and grade what it writes.

    Args:
      run: of a language task that says how answers are graded.
      argument: (params, peft_state).
      split: whose prompts.
      how: length and sampling.
      limit: of prompts, the first ones; 0: all.

    Raises:
      ValueError: a task whose answers nobody grades, no such split, or see `write`.
    """
    task = run.task
    if not isinstance(task, LanguageTask) or task.grade is None:
        raise ValueError(f"the task {task.name!r} has no answers to grade; score it without.")
    if split not in task.splits:
        raise ValueError(f"split={split!r} is none of {sorted(task.splits)}.")
    texts = task.splits[split][: limit or None]
    prompts = [Opening(text.prompt, text.marked) for text in texts]
    answers = write(run, argument, prompts, how)
    return Grades(task.grade(texts, answers), texts, answers)


def write(run: Experiment, argument: Any, prompts: Sequence[Opening], how: Writing) -> list[str]:
    """A continuation of every prompt by the adapted model.

    Prompts of like length share a batch of `data.eval_batch_size`, padded on the left.

    Args:
      run: its config names the tokenizer.
      argument: (params, peft_state).
      prompts: texts.
      how: length and sampling.

    Raises:
      ValueError: an empty prompt without a token, one that leaves no room for the new tokens in the
        model's context, or a method that cannot decode token by token.
    """
    if not run.peft.traits.decodes:
        raise ValueError(
            f"{run.config.method.method} adds tokens of its own to every call, so it cannot "
            "continue a text token by token; take another method."
        )
    source = run.config.model.source
    tokenizer = models.load_tokenizer(source)
    rows = [_encode(tokenizer, prompt) for prompt in prompts]
    _check(rows, prompts, how, run.model.config.max_positions)
    ends = {tokenizer.end_id, *models.stop_tokens(source)} - {None}
    generate = _generator(run, how, tuple(sorted(ends)))
    size = min(run.config.data.eval_batch_size, len(rows))
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    new: dict[int, list[int]] = {}
    for number, (members, batch) in enumerate(filled(order, size)):
        length = _length([rows[index] for index in members], run.model.config.max_positions, how)
        key = jax.random.fold_in(jax.random.key(how.seed), number)
        found = generate(argument, *left_padded([rows[index] for index in batch], length), key)
        tokens, lengths = np.asarray(found.tokens), np.asarray(found.lengths)
        for index, ids, count in zip(members, tokens, lengths, strict=False):
            new[index] = ids[:count].tolist()
    return [behind(tokenizer, row, new[index]) for index, row in enumerate(rows)]


def filled(order: Sequence[int], size: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Row numbers in batches: those that count, and with the last one repeated up to `size`.

    >>> list(filled([2, 0, 1], 2))
    [([2, 0], [2, 0]), ([1], [1, 1])]
    """
    for start in range(0, len(order), size):
        members = list(order[start : start + size])
        yield members, members + members[-1:] * (size - len(members))


def left_padded(rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """The last tokens of the rows, int32 (B, length), padded on the left, and their mask.

    >>> [array.tolist() for array in left_padded([[5, 6]], 3)]
    [[[0, 5, 6]], [[0, 1, 1]]]
    """
    tokens, mask = np.zeros((2, len(rows), length), np.int32)
    for i, row in enumerate(rows):
        held = row[-length:]
        tokens[i, length - len(held) :] = held
        mask[i, length - len(held) :] = 1
    return tokens, mask


def behind(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> str:
    """The new text; decoded with its prompt, since its first token may hold half a character."""
    return tokenizer.decode([*prompt, *new])[len(tokenizer.decode(prompt)) :]


def _encode(tokenizer: Tokenizer, prompt: Opening) -> list[int]:
    ((ids, _),) = tokenizer.encode_spans([prompt.text], special=not prompt.marked)
    # A tokenizer that ends every text has ended this one too, which is to go on.
    if not prompt.marked and ids and ids[-1] == tokenizer.end_id:
        ids = ids[:-1]
    return ids


def _check(
    rows: Sequence[list[int]], prompts: Sequence[Opening], how: Writing, positions: int
) -> None:
    for prompt, ids in zip(prompts, rows, strict=True):
        if not len(ids):
            raise ValueError(f"prompt {prompt.text!r} has no token; give some text")
        if len(ids) + how.new_tokens > positions:
            raise ValueError(
                f"prompt {prompt.text[:40]!r} has {len(ids)} tokens: with "
                f"new_tokens={how.new_tokens} that is more than the model's context of {positions};"
                " shorten it, or ask for fewer"
            )


def _length(rows: Sequence[list[int]], positions: int, how: Writing) -> int:
    """What a batch is padded to: a multiple of STRIDE where there is room."""
    longest = max(map(len, rows))
    return min(-(-longest // STRIDE) * STRIDE, positions - how.new_tokens)


def _generator(run: Experiment, how: Writing, stop: tuple[int, ...]) -> Any:
    sampling = generation.Sampling(how.temperature, how.top_k, how.top_p)

    @jax.jit
    def generate(argument: Any, tokens: Any, mask: Any, key: jax.Array) -> generation.Generated:
        return generation.generate(
            pefts.apply(run.model.apply),
            run.model.config,
            {"params": run.peft.bind(*argument)},
            tokens,
            mask,
            key,
            new_tokens=how.new_tokens,
            stop=stop,
            sampling=sampling,
        )

    return generate
