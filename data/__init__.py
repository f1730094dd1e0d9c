"""Tasks to fine-tune on: `data.load(name)` returns a `Task`, a `LanguageTask` or an `ImageTask`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

from data import (
    corpora,
    files,
    generation_sets,
    image_sets,
    images,
    instruct,
    kshot,
    public_sets,
    python_sources,
    stdlib_docs,
    tfds_source,
)
from data.images import ImageTask, make_image_task
from data.task import Example, Task, limit, make_task
from data.written import LanguageTask, Written, first, make_language_task

__all__ = [
    "TASKS",
    "Example",
    "ImageTask",
    "LanguageTask",
    "Task",
    "Written",
    "limit",
    "load",
    "make_image_task",
    "make_language_task",
    "make_task",
]

AnyTask = Task | LanguageTask | ImageTask
_LOADERS: dict[str, Callable[..., AnyTask]] = {
    "cifar10": image_sets.load_cifar10,
    "cola": partial(public_sets.load, "cola"),
    "digits": image_sets.load_digits,
    "docstrings": python_sources.load_docstrings,
    "files": files.load,
    "instruct": instruct.load,
    "kshot": kshot.load,
    "mnist": image_sets.load_mnist,
    "mpqa": partial(public_sets.load, "mpqa"),
    "mr": partial(public_sets.load, "mr"),
    "mrpc": partial(public_sets.load, "mrpc"),
    "python_sources": python_sources.load_sources,
    "rte": partial(public_sets.load, "rte"),
    "sick": partial(public_sets.load, "sick"),
    "sst2": partial(public_sets.load, "sst2"),
    "sst5": partial(public_sets.load, "sst5"),
    "stdlib_docs": stdlib_docs.load,
    "subj": partial(public_sets.load, "subj"),
    "text": corpora.load,
    "tfds": tfds_source.load,
    "tinyshakespeare": partial(corpora.load, "tinyshakespeare"),
    "trec": partial(public_sets.load, "trec"),
    "wikitext2": partial(corpora.load, "wikitext2"),
    **{name: partial(generation_sets.load, name) for name in generation_sets.KNOWN},
}
TASKS = dict(sorted(_LOADERS.items()))


def load(name: str, *, examples: int | None = None, **options: Any) -> AnyTask:
    """Return a task by name.

    Args:
        name: a key of `TASKS`.
        examples: keep at most so many examples per split (see `limit`; of a `LanguageTask` the
            first texts, of an `ImageTask` see `data.images.first`); None keeps all.
        **options: arguments of the task's own loader, such as `root=` of the public data sets.

    Returns:
        The checked task.

    Raises:
        ValueError: `name` is unknown (the message lists near names), or what the loader raises.

    Example:
        >>> import data
        >>> task = data.load("stdlib_docs", examples=40)
        >>> {split: len(rows) for split, rows in task.splits.items()}
        {'train': 40, 'dev': 40, 'test': 40}
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"name={name!r} is not a task; {hint}Choose from {', '.join(TASKS)}")
    task = TASKS[name](**options)
    if examples is None:
        return task
    if isinstance(task, ImageTask):
        return images.first(task, examples)
    return first(task, examples) if isinstance(task, LanguageTask) else limit(task, examples)
