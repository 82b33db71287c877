"""How documents become rows of T + 1 tokens (T inputs, and each one's next token as its label).

``stream``: the documents of a split, laid end to end, are cut every T tokens; rows share one token, so
that every token but the first is predicted exactly once.  The last incomplete row is dropped, unless
it is the only one; then it is padded.

    documents   │ a a a a a E │ b b E │ c c c c c ...
    rows T = 4  [a a a a a)
                        [a E  b b E)
                                [E  c c c c)

``whole``: no document that fits is cut.  They are packed best-fit, within windows of consecutive
documents, and what stays free is padding.  A document longer than T + 1 is cut into rows that share one
token, like a stream of its own.

    rows T = 8  [a a a a a E  b b E] [c c c c c E  . . .]        . padding, its label is IGNORE

Either way a row is a sequence of *pieces*: where it starts in the shard and how long it is.  Padding is a
piece too, with start -1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from stretto.data.tokens import TokenShard
from stretto.spec.contract import IGNORE

WINDOW = 1 << 16
"""Documents that ``whole`` packs at a time: bounds what is open, and keeps a row's documents close together."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """The pieces of some rows, row after row; every row's lengths add up to T + 1."""

    row: np.ndarray
    """int64 [pieces], which of the rows asked for."""
    start: np.ndarray
    """int64 [pieces], first token in the shard, -1 for padding."""
    length: np.ndarray
    """int64 [pieces], all positive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows of one source as arrays [B, T], int64."""

    tokens: np.ndarray
    """The inputs."""
    labels: np.ndarray
    """Each one's next token, or IGNORE."""
    positions: np.ndarray
    """Place within the piece, or within the row where documents aren't isolated."""
    documents: np.ndarray
    """Number of the piece within its row, from 0."""
    mixed: np.ndarray
    """bool [B], whether the row's inputs hold more than one document; padding is none."""


class Packing(Protocol):
    """What both ways of packing answer."""

    num_samples: int

    def pieces(self, samples: np.ndarray) -> Pieces:
        """The pieces of the rows ``samples`` (int64 [B])."""


def spans(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For items with so many parts each: the item of every part, and the part's number within the item."""
    item = np.repeat(np.arange(len(lengths)), lengths)
    number = np.arange(len(item)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return item, number


class Stream:
    """Rows cut from the documents laid end to end."""

    def __init__(self, sequence_length: int, start: np.ndarray, cumulative: np.ndarray) -> None:
        """``start`` int64 [n]: documents in the shard; ``cumulative`` int64 [n + 1]: in the stream."""
        self.start, self.cumulative, self.length = start, cumulative, sequence_length
        self.total = int(cumulative[-1])
        self.num_samples = max(1, (self.total - 1) // sequence_length)

    def pieces(self, samples: np.ndarray) -> Pieces:
        """See Packing."""
        begin = samples * self.length
        end = np.minimum(begin + self.length + 1, self.total)
        first = np.searchsorted(self.cumulative, begin, side="right") - 1
        last = np.searchsorted(self.cumulative, end, side="left") - 1
        row, number = spans(last - first + 1)
        document = first[row] + number
        left = self.cumulative[document]
        piece_begin = np.maximum(left, begin[row])
        piece_end = np.minimum(self.cumulative[document + 1], end[row])
        return padded(
            row,
            self.start[document] + piece_begin - left,
            piece_end - piece_begin,
            rows=len(samples),
            width=self.length + 1,
        )


class Whole:
    """Rows that were put together beforehand."""

    def __init__(self, sequence_length: int, start: np.ndarray, length: np.ndarray, rows: np.ndarray) -> None:
        """``start``, ``length`` int64 [pieces], row after row; ``rows`` int64 [rows + 1]: each row's first piece."""
        self.start, self.length, self.rows, self.width = start, length, rows, sequence_length + 1
        self.num_samples = len(rows) - 1

    def pieces(self, samples: np.ndarray) -> Pieces:
        """See Packing."""
        first = self.rows[samples]
        row, number = spans(self.rows[samples + 1] - first)
        piece = first[row] + number
        return padded(row, self.start[piece], self.length[piece], rows=len(samples), width=self.width)


def padded(row: np.ndarray, start: np.ndarray, length: np.ndarray, *, rows: int, width: int) -> Pieces:
    """Add a piece of padding to every row that is shorter than ``width``."""
    free = width - np.bincount(row, weights=length, minlength=rows).astype(np.int64)
    short = np.flatnonzero(free)
    if short.size:
        row = np.concatenate([row, short])
        order = np.argsort(row, kind="stable")
        start = np.concatenate([start, np.full(len(short), -1)])[order]
        length = np.concatenate([length, free[short]])[order]
        row = row[order]
    return Pieces(row, start, length)


def pack_stream(start: np.ndarray, length: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays of a Stream over documents at ``start`` with ``length`` tokens."""
    return {"start": start, "cumulative": np.concatenate([[0], np.cumsum(length)]).astype(np.int64)}


def pack_whole(start: np.ndarray, length: np.ndarray, sequence_length: int) -> dict[str, np.ndarray]:
    """Arrays of a Whole over documents at ``start`` with ``length`` tokens (at least 2 each)."""
    cuts = np.maximum(1, -(-(length - 1) // sequence_length))
    document, number = spans(cuts)
    piece_start = start[document] + number * sequence_length
    piece_length = np.minimum(length[document] - number * sequence_length, sequence_length + 1)
    row = np.empty(len(piece_start), dtype=np.int64)
    num_rows = 0
    for at in range(0, len(row), WINDOW):
        found = best_fit(piece_length[at : at + WINDOW], sequence_length + 1)
        row[at : at + WINDOW] = found + num_rows
        num_rows += int(found.max()) + 1
    order = np.argsort(row, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=num_rows))])
    return {"start": piece_start[order], "length": piece_length[order], "rows": first.astype(np.int64)}


def best_fit(lengths: np.ndarray, width: int) -> np.ndarray:
    """Row of each piece, int64 [pieces]: the one with the least room that still suffices, else a new one.

    Rows with equal room wait in a list; an integer's bits say which lists aren't empty, so that the
    search for enough room is a shift and a lowest set bit.
    """
    rows: list[int] = []
    waiting: list[list[int]] = [[] for _ in range(width + 1)]
    rooms = 0
    count = 0
    for length in lengths.tolist():
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = waiting[room].pop()
            if not waiting[room]:
                rooms ^= 1 << room
        else:
            room, row, count = width, count, count + 1
        rows.append(row)
        room -= length
        if room > 1:  # a piece has at least two tokens
            waiting[room].append(row)
            rooms |= 1 << room
    return np.array(rows, dtype=np.int64)


def fill(shard: TokenShard, pieces: Pieces, *, rows: int, pad: int, isolate: bool) -> Rows:
    """Read the pieces from the shard.

    A label is IGNORE in padding, where the mask says so, and, if ``isolate``, where it would be the first
    token of the next piece.  Positions restart with each piece if ``isolate``, else with each row.
    """
    begin = np.cumsum(pieces.length) - pieces.length
    flat = np.arange(begin[-1] + pieces.length[-1])
    at = flat + np.repeat(pieces.start - begin, pieces.length)
    width = len(flat) // rows
    first = np.searchsorted(pieces.row, np.arange(rows))
    number = np.repeat(np.arange(len(pieces.row)) - first[pieces.row], pieces.length).reshape(rows, width)
    counts: np.ndarray | None = None
    if (pieces.start < 0).any():
        counts = np.repeat(pieces.start >= 0, pieces.length)
        at = np.where(counts, at, 0)
        tokens = np.where(counts, shard.tokens[at], pad).astype(np.int64)
    else:
        tokens = shard.tokens[at].astype(np.int64)
    if shard.mask is not None:
        counted = shard.counts(at)
        counts = counted if counts is None else counts & counted
    tokens = tokens.reshape(rows, width)
    labels = tokens[:, 1:].copy()
    if counts is not None:
        labels[~counts.reshape(rows, width)[:, 1:]] = IGNORE
    if isolate:
        labels[number[:, 1:] != number[:, :-1]] = IGNORE
        positions = (flat - np.repeat(begin, pieces.length)).reshape(rows, width)[:, :-1]
    else:
        positions = np.broadcast_to(np.arange(width - 1), (rows, width - 1))
    second = (pieces.start >= 0) & (begin % width > 0) & (begin % width < width - 1)
    mixed = np.bincount(pieces.row[second], minlength=rows) > 0
    return Rows(
        tokens=np.ascontiguousarray(tokens[:, :-1]),
        labels=labels,
        positions=np.ascontiguousarray(positions),
        documents=np.ascontiguousarray(number[:, :-1]),
        mixed=mixed,
    )
