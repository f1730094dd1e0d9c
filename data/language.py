"""From texts to packed batches of token ids: several texts a row, none seeing another.

    rows = tokenise(task.splits["train"], tokenizer, max_length=512)
    batches = train_batches(rows, length=512, batch_size=8, seed=0)

A batch is {"tokens", "targets", "segments", "mask": int32 (B, T), "weight": float32 (B, T)}: the
target is the next token of the same text, the weight is 1 where it is learned, segments count from
1 and are 0 at padding. Every batch is a pure function of (rows, sizes, seed, step).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import grain
import numpy as np
from numpy.typing import NDArray

from data.pipeline import Batch, Batches, process_part
from data.written import Written


class Tokenizer(Protocol):
    """What `tokenise` needs."""

    @property
    def pad_id(self) -> int: ...

    @property
    def end_id(self) -> int | None: ...

    def encode_spans(
        self, texts: list[str], special: bool
    ) -> list[tuple[list[int], list[tuple[int, int]]]]: ...


class LanguageRows(NamedTuple):
    """Encoded texts of one split.

    Attributes:
        ids: token ids, one array per text or piece of a long one, none longer than `max_length`.
        learned: whether a token is a target, as long as `ids` row by row.
        pad_id: fills what no text does.
        max_length: of a row.
        cut: prompts with answers that were cut at `max_length`.
    """

    ids: list[NDArray[np.int32]]
    learned: list[NDArray[np.bool_]]
    pad_id: int
    max_length: int
    cut: int


def tokenise(texts: Sequence[Written], tokenizer: Tokenizer, *, max_length: int) -> LanguageRows:
    """Encode the texts of one split.

    A token is learned if any of its characters is. The end token follows a text whose last piece is
    learned, unless the text is marked: that has its own. A text of which all is learned and that is
    longer than `max_length` becomes several rows, each of which starts with the last token of the
    one before; any other is cut.

    Args:
        texts: what `LanguageTask.splits` holds.
        tokenizer: has `pad_id`, `end_id` (None: texts have no end) and `encode_spans`, which
            returns the ids of each text and where in it they lie.
        max_length: longest row, in tokens.

    Returns:
        `LanguageRows`, in the order of `texts`.

    Raises:
        ValueError: no texts, `max_length` below 2, or a text of which no token is left to learn:
            its prompt fills the row.
    """
    if not texts:
        raise ValueError("texts is empty; tokenise a split that has some")
    if max_length < 2:
        raise ValueError(f"max_length={max_length} must be at least 2: a token and its target")
    ids, learned, cut = [], [], 0
    for written, row, spans in _encoded(texts, tokenizer):
        end_id = None if written.marked else tokenizer.end_id
        row_ids, row_learned = _with_end(written, row, spans, end_id)
        if len(row_ids) > max_length and not all(piece.learned for piece in written.pieces):
            row_ids, row_learned, cut = row_ids[:max_length], row_learned[:max_length], cut + 1
        if not row_learned[1:].any():
            raise ValueError(
                f"{written.origin or repr(written.text[:40])}: none of its first {max_length} "
                "tokens behind the first is learned; raise max_length or shorten the prompt"
            )
        # The last token of a piece is the first of the next, so that every token is a target once.
        for start in range(0, max(len(row_ids) - 1, 1), max_length - 1):
            ids.append(row_ids[start : start + max_length])
            learned.append(row_learned[start : start + max_length])
    return LanguageRows(ids, learned, int(tokenizer.pad_id), max_length, cut)


def _encoded(
    texts: Sequence[Written], tokenizer: Tokenizer
) -> Iterator[tuple[Written, list[int], list[tuple[int, int]]]]:
    both = {
        marked: iter(
            tokenizer.encode_spans([w.text for w in texts if w.marked == marked], not marked)
        )
        for marked in {written.marked for written in texts}
    }
    for written in texts:
        yield written, *next(both[written.marked])


def _with_end(
    written: Written, ids: list[int], spans: list[tuple[int, int]], end_id: int | None
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    characters = np.concatenate(
        [np.full(len(piece.text), piece.learned, bool) for piece in written.pieces]
    )
    # Special tokens lie nowhere in the text: (0, 0).
    learned = [bool(characters[start:end].any()) for start, end in spans]
    if end_id is not None and written.pieces[-1].learned and (not ids or ids[-1] != end_id):
        ids, learned = [*ids, end_id], [*learned, True]
    elif end_id is not None and ids and ids[-1] == end_id:
        learned[-1] = written.pieces[-1].learned
    return np.asarray(ids, np.int32), np.asarray(learned, bool)


def train_batches(
    rows: LanguageRows,
    *,
    length: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Return endless batches of packed rows, shuffled anew in every epoch from (seed, epoch).

    Args:
        rows: encoded split.
        length: T, tokens of a packed row; at least `rows.max_length`.
        batch_size: rows in a batch over all processes.
        seed: non-negative; the same seed gives the same batches.
        process_index: which slice of every global batch to yield.
        process_count: number of slices; divides `batch_size`.

    Returns:
        `Batches`, each of `batch_size` rows; the packed rows of an epoch that fill no batch are
        left out, other texts in every epoch.

    Raises:
        ValueError: an argument out of range, or fewer packed rows than a batch.
    """
    _check(rows, length, batch_size, process_index, process_count)
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative; NumPy's generators take none")
    part = process_part(batch_size, process_index, process_count)
    source = _Packed(rows, length, batch_size, part, seed)
    packed = len(source.plan(0))
    if packed < batch_size:
        raise ValueError(
            f"batch_size={batch_size} is larger than the {packed} packed rows of {length} tokens "
            "that the split fills; lower it, or the length"
        )
    return _batches(source, packed // batch_size, packed % batch_size)


def eval_batches(
    rows: LanguageRows,
    *,
    length: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Return one pass over all rows, in order; a batch that is not full ends in padding.

    Args and Raises: as `train_batches`, without a seed.
    """
    _check(rows, length, batch_size, process_index, process_count)
    source = _Packed(
        rows, length, batch_size, process_part(batch_size, process_index, process_count)
    )
    return _batches(source, -(-len(source.plan(0)) // batch_size), 0)


def pack(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Indices of rows, packed in order: each goes to the first open row that has room.

    Args:
        lengths: of the rows; none above `length`.
        length: of a packed row.

    Returns:
        Lists of indices; a row is closed when 64 later ones have been opened.

    Example:
        >>> pack([5, 4, 3, 3], 8)
        [[0, 2], [1, 3]]
    """
    packed: list[list[int]] = []
    room: dict[int, int] = {}
    for index, size in enumerate(lengths):
        place = next((row for row, free in room.items() if free >= size), None)
        if place is None:
            place = len(packed)
            packed.append([])
            room[place] = length
            room.pop(place - 64, None)
        packed[place].append(index)
        room[place] -= size
    return packed


@dataclass
class _Packed:
    """Random access to batches by step, as grain reads it. `seed` None means one pass in order."""

    rows: LanguageRows
    length: int
    batch_size: int
    part: slice
    seed: int | None = None

    def __post_init__(self) -> None:
        self._epoch: tuple[int, list[list[int]]] | None = None

    def __len__(self) -> int:
        # Training has no end of its own; 2**40 steps stay within every integer grain uses.
        return -(-len(self.plan(0)) // self.batch_size) if self.seed is None else 2**40

    def __getitem__(self, index: int) -> Batch:
        epoch, step = (0, int(index)) if self.seed is None else self._position(int(index))
        first, plan = step * self.batch_size, self.plan(epoch)
        members = plan[first : first + self.batch_size]
        # An epoch may pack into a few rows less than the first did: it starts over.
        rest = plan if self.seed is not None else [[]] * self.batch_size
        members += rest[: self.batch_size - len(members)]
        built = [self._row(texts) for texts in members[self.part]]
        return {name: np.stack([row[name] for row in built]) for name in built[0]}

    def _position(self, index: int) -> tuple[int, int]:
        return divmod(index, len(self.plan(0)) // self.batch_size)

    def plan(self, epoch: int) -> list[list[int]]:
        """Return the texts of each packed row of an epoch; the last one is kept."""
        kept = self._epoch
        if kept is None or kept[0] != epoch:
            kept = (epoch, self._plan(epoch))
            self._epoch = kept
        return kept[1]

    def _plan(self, epoch: int) -> list[list[int]]:
        count = len(self.rows.ids)
        if self.seed is None:
            return pack([len(ids) for ids in self.rows.ids], self.length)
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(count)
        packed = pack([len(self.rows.ids[i]) for i in order], self.length)
        return [[int(order[i]) for i in packed[row]] for row in rng.permutation(len(packed))]

    def _row(self, texts: list[int]) -> Batch:
        size = self.length
        tokens = np.full(size, self.rows.pad_id, np.int32)
        targets, segments = np.zeros(size, np.int32), np.zeros(size, np.int32)
        weight, start = np.zeros(size, np.float32), 0
        for number, index in enumerate(texts, start=1):
            ids, learned = self.rows.ids[index], self.rows.learned[index]
            end = start + len(ids)
            tokens[start:end], segments[start:end] = ids, number
            targets[start : end - 1], weight[start : end - 1] = ids[1:], learned[1:]
            start = end
        mask = (segments > 0).astype(np.int32)
        return {
            "tokens": tokens,
            "targets": targets,
            "segments": segments,
            "mask": mask,
            "weight": weight,
        }


def _batches(source: _Packed, steps: int, dropped: int) -> Batches:
    dataset = grain.MapDataset.source(source)  # pyright: ignore[reportArgumentType]
    rows = len(range(*source.part.indices(source.batch_size)))
    return Batches(dataset, steps, ((rows, source.length),), dropped)


def _check(rows: LanguageRows, length: int, batch: int, index: int, count: int) -> None:
    if length < rows.max_length:
        raise ValueError(
            f"length={length} is shorter than max_length={rows.max_length} of the rows; raise it"
        )
    if batch < 1 or count < 1 or batch % count or not 0 <= index < count:
        raise ValueError(
            f"batch_size={batch} rows for process_index={index} of process_count={count}: the "
            "number of processes must divide the batch, and the index be below it"
        )
