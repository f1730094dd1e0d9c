"""From a task's examples to batches of a few static shapes.

    rows = tokenise(task.splits["train"], tokenizer, labels=task.labels, max_length=128)
    batches = train_batches(rows, batch_size=32, seed=0)
    iterator = iter(batches)                  # a grain iterator: get_state, set_state
    batch = next(iterator)                    # dict of numpy arrays

A row goes to the shortest bucket that holds it, so a jitted step compiles once per bucket. Every
training batch is a pure function of (rows, batch size, buckets, seed, step): a run that resumes
at a step sees what the uninterrupted run would have seen, on any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import grain
import numpy as np
from numpy.typing import NDArray

from data.task import Example

BUCKETS = (16, 32, 64, 128)
BALANCES = ("none", "sqrt", "uniform")
Batch = dict[str, NDArray[Any]]


class Tokenizer(Protocol):
    """What `tokenise` needs; an `encode_pairs` beside it gives token types too."""

    @property
    def pad_id(self) -> int: ...

    def encode(
        self, texts: list[str], pairs: list[str] | None = None, *, max_length: int
    ) -> list[list[int]]: ...


class Rows(NamedTuple):
    """Encoded examples of one split.

    Attributes:
        ids: token ids, one list per row.
        types: token types, as long as `ids` row by row.
        labels: class indices, int32 (rows,).
        classes: number of classes of the task.
        pad_id: id that fills a batch up to its bucket.
        truncated: rows that were cut at `max_length`.
    """

    ids: list[list[int]]
    types: list[list[int]]
    labels: NDArray[np.int32]
    classes: int
    pad_id: int
    truncated: int


@dataclass(frozen=True)
class Batches:
    """Batches addressed by step; iterating gives a grain iterator that can save its state.

    Attributes:
        dataset: grain dataset of batches; endless for training, one pass for evaluation.
        steps_per_epoch: batches in one pass.
        shapes: the (batch, length) shapes that occur, shortest first: one compilation each.
        dropped: rows left out of each epoch because they do not fill a batch (training only).
    """

    dataset: grain.MapDataset
    steps_per_epoch: int
    shapes: tuple[tuple[int, ...], ...]
    dropped: int

    def __getitem__(self, step: int) -> Batch:
        return cast(Batch, self.dataset[step])

    def longest(self) -> Batch:
        """A batch of the last of the shapes."""
        batches = (self[step] for step in range(self.steps_per_epoch))
        return next(batch for batch in batches if inputs_shape(batch) == self.shapes[-1])

    def __iter__(self) -> grain.DatasetIterator:
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return iter(self.dataset.to_iter_dataset(options))


def inputs_shape(batch: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of what the model reads, (rows, tokens): that of a batch's largest array."""
    return max((tuple(array.shape) for array in batch.values()), key=math.prod)


def tokens(batch: Mapping[str, Any]) -> int:
    """How many tokens a batch holds, padding left out; its rows where it is not of tokens."""
    return int(batch["mask"].sum()) if "mask" in batch else inputs_shape(batch)[0]


def tokenise(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    labels: Sequence[str],
    max_length: int = 128,
) -> Rows:
    """Encode the examples of one split.

    Args:
        examples: what `Task.splits` holds.
        tokenizer: has `pad_id` and `encode(texts, pairs, max_length=...)`. Where it also has
            `encode_pairs`, of the same arguments, that returns (ids, types) and is used; without
            it token types are 0.
        labels: the task's label names, in class order.
        max_length: longest row, in tokens.

    Returns:
        `Rows`, in the order of `examples`.

    Raises:
        ValueError: no examples, `max_length` below 1, an unknown label, or a row that the
            tokenizer encodes to nothing.
    """
    if not examples:
        raise ValueError("examples is empty; tokenise a split that has some")
    if max_length < 1:
        raise ValueError(f"max_length={max_length} must be at least 1 token")
    index = {label: i for i, label in enumerate(labels)}
    for row in examples:
        if row.label not in index:
            raise ValueError(
                f"{row.origin or row.text[:40]!r}: label {row.label!r} is not one of "
                f"labels={tuple(labels)}; pass the task's own labels"
            )
    ids, types = _encode(tokenizer, examples, max_length)
    for row, encoded in zip(examples, ids, strict=True):
        if not encoded:
            raise ValueError(
                f"{row.origin or row.text[:40]!r}: the tokenizer made no tokens of "
                f"{row.text[:40]!r}; remove the example"
            )
    # A row at the limit may just fit: ask for one token more to know.
    full = [i for i, encoded in enumerate(ids) if len(encoded) >= max_length]
    longer = _encode(tokenizer, [examples[i] for i in full], max_length + 1)[0] if full else []
    return Rows(
        ids=[encoded[:max_length] for encoded in ids],
        types=[kinds[:max_length] for kinds in types],
        labels=np.asarray([index[row.label] for row in examples], np.int32),
        classes=len(labels),
        pad_id=int(tokenizer.pad_id),
        truncated=sum(len(encoded) > max_length for encoded in longer),
    )


def train_batches(
    rows: Rows,
    *,
    batch_size: int,
    seed: int,
    buckets: Sequence[int] = BUCKETS,
    balance: str = "none",
    token_dropout: float = 0.0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Return endless shuffled batches, reshuffled in every epoch from (seed, epoch).

    In each epoch the rows of a bucket are shuffled and cut into batches; a rest that fills no
    batch joins the next longer bucket, and the order of all batches is shuffled. Only what the
    last bucket cannot fill is left out, less than one batch, other rows in every epoch.

    Args:
        rows: encoded split.
        batch_size: rows in a batch over all processes.
        seed: non-negative; the same seed gives the same batches.
        buckets: batch lengths, ascending; the last holds the longest row.
        balance: weights of the classes, see `class_weights`.
        token_dropout: probability of hiding a token (mask 0; never a row's first), so that no
            single word decides; drawn from (seed, step).
        process_index: which slice of every global batch to yield.
        process_count: number of slices; divides `batch_size`.

    Returns:
        `Batches` of {"tokens", "mask", "token_types": int32 (B, T), "label": int32 (B,),
        "weight": float32 (B,)}.

    Raises:
        ValueError: an argument out of range, a row longer than the last bucket, or fewer rows
            than a batch. The message says what to change.
    """
    _check(rows, batch_size, buckets, process_index, process_count)
    if not 0 <= token_dropout < 1:
        raise ValueError(f"token_dropout={token_dropout} must be a probability in [0, 1)")
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative; NumPy's generators take none")
    if len(rows.ids) < batch_size:
        raise ValueError(
            f"batch_size={batch_size} is larger than the {len(rows.ids)} rows of the split; "
            "lower it"
        )
    weight = class_weights(rows.labels, balance, rows.classes)[rows.labels]
    part = process_part(batch_size, process_index, process_count)
    members = _members(rows, buckets)
    source = _Source(rows, weight, members, batch_size, part, seed, token_dropout)
    return _batches(source, dropped=len(rows.ids) % batch_size)


def eval_batches(
    rows: Rows,
    *,
    batch_size: int,
    buckets: Sequence[int] = BUCKETS,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Return one pass over the rows, every row once, in a fixed order.

    Args:
        rows: encoded split.
        batch_size: rows in a batch over all processes.
        buckets: batch lengths, ascending; the last holds the longest row.
        process_index: which slice of every global batch to yield.
        process_count: number of slices; divides `batch_size`.

    Returns:
        `Batches` with one more array, "index": int32 (B,), the row's position in the split; use
        `in_order` to put predictions back. A batch that is not full repeats its last row with
        weight 0 and index -1, so that no row is all padding.

    Raises:
        ValueError: an argument out of range, or a row longer than the last bucket.
    """
    _check(rows, batch_size, buckets, process_index, process_count)
    weight = np.ones(len(rows.ids), np.float32)
    part = process_part(batch_size, process_index, process_count)
    return _batches(_Source(rows, weight, _members(rows, buckets), batch_size, part, None), 0)


def in_order(values: Sequence[NDArray[Any]], indices: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Put the values of evaluation batches back into the order of the split.

    Args:
        values: one array per batch, leading axis B: predictions, logits, losses.
        indices: the batches' "index" arrays; -1 marks padding.

    Returns:
        One array (rows, ...).

    Raises:
        ValueError: the indices are not 0 .. rows-1, each once.
    """
    stacked, index = np.concatenate(values), np.concatenate(indices)
    stacked, index = stacked[index >= 0], index[index >= 0]
    order = np.argsort(index, kind="stable")
    if not np.array_equal(index[order], np.arange(len(index))):
        raise ValueError(
            f"indices hold {len(index)} entries that are not 0..{len(index) - 1} each once; pass "
            "every batch of one pass (of all processes)"
        )
    return stacked[order]


def class_weights(labels: NDArray[Any], mode: str, classes: int) -> NDArray[np.float32]:
    """Return one weight per class whose mean over the rows is 1.

    w_c is proportional to n_c^-p for n_c rows of class c, with p = 0 for "none", 1/2 for "sqrt"
    and 1 for "uniform" (every class then has the same total weight). An absent class has weight 0.

    Args:
        labels: class indices (rows,).
        mode: "none", "sqrt" or "uniform".
        classes: number of classes.

    Raises:
        ValueError: an unknown mode, no labels, or a label outside 0 .. classes-1.
    """
    if mode not in BALANCES:
        raise ValueError(f"balance={mode!r} is unknown; choose from {', '.join(BALANCES)}")
    if not len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels must be {classes} classes, 0..{classes - 1}, and not empty; "
            "pass the number of the task's labels"
        )
    counts = np.bincount(labels, minlength=classes).astype(np.float64)
    power = {"none": 0.0, "sqrt": 0.5, "uniform": 1.0}[mode]
    weights = np.where(counts > 0, np.maximum(counts, 1.0) ** -power, 0.0)
    return (weights * counts.sum() / (weights * counts).sum()).astype(np.float32)


@dataclass
class _Source:
    """Random access to batches by step, as grain reads it. `seed` None means one pass in order."""

    rows: Rows
    weight: NDArray[np.float32]
    members: dict[int, NDArray[np.int64]]
    batch_size: int
    part: slice
    seed: int | None
    token_dropout: float = 0.0

    def __post_init__(self) -> None:
        self._epoch: tuple[int, list[tuple[int, NDArray[np.int64]]]] | None = None

    def __len__(self) -> int:
        # Training has no end of its own; 2**40 steps stay within every integer grain uses.
        return len(self.plan(0)) if self.seed is None else 2**40

    def __getitem__(self, index: int) -> Batch:
        epoch, position = divmod(int(index), len(self.plan(0)))
        length, members = self.plan(epoch)[position]
        batch = self._batch(length, members)
        if self.token_dropout:
            batch["mask"] &= self._visible(int(index), length)
        return batch

    def _visible(self, index: int, length: int) -> NDArray[np.int32]:
        # Drawn for the whole batch: the same tokens are hidden on any number of processes.
        draw = np.random.default_rng((self.seed or 0, 1, index)).random((self.batch_size, length))
        visible = draw >= self.token_dropout
        visible[:, 0] = True
        return visible[self.part].astype(np.int32)

    def plan(self, epoch: int) -> list[tuple[int, NDArray[np.int64]]]:
        """Return the (length, row indices) of an epoch's batches; the last one is kept."""
        kept = self._epoch
        if kept is None or kept[0] != epoch:
            kept = (epoch, self._plan(epoch))
            self._epoch = kept
        return kept[1]

    def _plan(self, epoch: int) -> list[tuple[int, NDArray[np.int64]]]:
        rng = None if self.seed is None else np.random.default_rng((self.seed, epoch))
        size, length = self.batch_size, 0
        batches, rest = [], np.zeros(0, np.int64)
        for length, members in self.members.items():
            shuffled = members if rng is None else rng.permutation(members)
            # The shorter bucket's rest goes first, or it could fall off the end once more.
            pool = np.concatenate([rest, shuffled])
            full = len(pool) - len(pool) % size
            batches += [(length, pool[start : start + size]) for start in range(0, full, size)]
            rest = pool[full:]
        if rng is None:
            return batches + ([(length, rest)] if len(rest) else [])
        return [batches[i] for i in rng.permutation(len(batches))]

    def _batch(self, length: int, members: NDArray[np.int64]) -> Batch:
        missing = self.batch_size - len(members)
        real = np.arange(self.batch_size) < len(members)
        chosen = np.concatenate([members, np.repeat(members[-1:], missing)])
        chosen, real = chosen[self.part], real[self.part]
        shape = (len(chosen), length)
        tokens, types = np.full(shape, self.rows.pad_id, np.int32), np.zeros(shape, np.int32)
        mask = np.zeros(shape, np.int32)
        for i, row in enumerate(chosen):
            ids = self.rows.ids[row]
            tokens[i, : len(ids)], types[i, : len(ids)] = ids, self.rows.types[row]
            mask[i, : len(ids)] = 1
        batch = {
            "tokens": tokens,
            "mask": mask,
            "token_types": types,
            "label": self.rows.labels[chosen],
            "weight": np.where(real, self.weight[chosen], np.float32(0)),
        }
        if self.seed is None:
            batch["index"] = np.where(real, chosen, -1).astype(np.int32)
        return batch


def _encode(
    tokenizer: Tokenizer, examples: Sequence[Example], max_length: int
) -> tuple[list[list[int]], list[list[int]]]:
    texts = [row.text for row in examples]
    paired = examples[0].pair is not None
    pairs = [row.pair or "" for row in examples] if paired else None
    encode_pairs = getattr(tokenizer, "encode_pairs", None)
    if encode_pairs is not None:
        ids, types = encode_pairs(texts, pairs, max_length=max_length)
        return [list(row) for row in ids], [list(row) for row in types]
    ids = [list(row) for row in tokenizer.encode(texts, pairs, max_length=max_length)]
    return ids, [[0] * len(row) for row in ids]


def _members(rows: Rows, buckets: Sequence[int]) -> dict[int, NDArray[np.int64]]:
    """Return the rows of each bucket that has any, shortest first."""
    lengths = np.asarray([len(row) for row in rows.ids])
    bucket = np.searchsorted(np.asarray(buckets), lengths)
    found = {length: np.flatnonzero(bucket == i) for i, length in enumerate(buckets)}
    return {length: members for length, members in found.items() if len(members)}


def _batches(source: _Source, dropped: int) -> Batches:
    # The batches of a bucket are as many in every epoch, so the first plan stands for all.
    plan = source.plan(0)
    local = source.part.stop - source.part.start
    shapes = tuple((local, length) for length in sorted({length for length, _ in plan}))
    return Batches(grain.MapDataset.source(source), len(plan), shapes, dropped)


def _check(
    rows: Rows, batch_size: int, buckets: Sequence[int], process_index: int, process_count: int
) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    buckets = tuple(buckets)
    if not buckets or buckets[0] < 1 or sorted(set(buckets)) != list(buckets):
        raise ValueError(
            f"buckets={buckets} must be one or more positive lengths in ascending order"
        )
    if not rows.ids:
        raise ValueError("rows is empty; tokenise a split that has examples")
    longest = max(range(len(rows.ids)), key=lambda i: len(rows.ids[i]))
    if len(rows.ids[longest]) > buckets[-1]:
        raise ValueError(
            f"row {longest} has {len(rows.ids[longest])} tokens but the last bucket holds "
            f"{buckets[-1]}; add a longer bucket or tokenise with max_length={buckets[-1]}"
        )
    if process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index={process_index} must be in 0..process_count-1, "
            f"process_count={process_count}"
        )
    if batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} does not divide among process_count={process_count}; "
            "give a multiple of it"
        )


def process_part(batch_size: int, process_index: int, process_count: int) -> slice:
    """Return the rows of a global batch that one process yields."""
    local = batch_size // process_count
    return slice(process_index * local, (process_index + 1) * local)
