"""What of a block sees what, as rectangles that kernels without masks take.

Fused kernels know two kinds of blocks: all see all, and the square under the diagonal.  A block of a causal row is made
of a few of these, whatever its corners are, and so is one of documents, each of which is a square and nothing else:

    keys ►                           keys ►
    q  ■ ■ ■ ◣ . .     full          q  ◣ . . . . .    two documents of a packed row: two squares
    ▼  ■ ■ ■ ■ ◣ .     causal        ▼  ■ ◣ . . . .
       ■ ■ ■ ■ ■ ◣                      . . ◣ . . .
                                        . . ■ ◣ . .
       . ◥ ■ ■ ■ ◣     a window, strip by strip: masked, full, causal
         ◥ ■ ■ ■ ■ ◣   (◥: of each strip's oldest keys some queries see some)

Only where the first token that is seen changes from query to query, as in a window, or in documents too short to be
worth a kernel each, is a mask made: of a strip of queries and the keys that some of them don't see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum

import numpy as np

from stretto.parallel.sequence.sight import Sight
from stretto.spec.reach import merged
from stretto.spec.sequence import Range, Ranges, joined

STRIP = 256
"""Queries of a strip."""
SHORTEST = 128
"""Queries that see from the same token on and are worth a kernel of their own; fewer share a strip."""


class Kind(Enum):
    """Who sees whom in a rectangle."""

    FULL = "full"
    CAUSAL = "causal"
    """As many queries as keys, each sees those up to its own place."""
    MASKED = "masked"


Rectangle = tuple[Range, Range, Kind]
"""Queries, keys, by position in the row."""


def rectangles(queries: Range, keys: Range, sight: Sight) -> Iterator[Rectangle]:
    """Cut what ``queries`` see of ``keys``; every pair that sees each other is in one rectangle.

    ``sight`` is that of one row, or of rows in which the same holds.
    """
    for (start, stop), oldest, newest in _stretches(queries, sight):
        low, full, high = max(keys[0], oldest), max(keys[0], newest), min(keys[1], stop)
        if low < full and newest > start:  # the window is narrower than the strip
            if low < high:
                yield (start, stop), (low, high), Kind.MASKED
            continue
        if low < min(full, high):
            yield (start, stop), (low, min(full, high)), Kind.MASKED
        if full < min(start, high):
            yield (start, stop), (full, min(start, high)), Kind.FULL
        corner = max(start, full)
        if corner < high:
            yield (corner, high), (corner, high), Kind.CAUSAL
            if high < stop:
                yield (high, stop), (corner, high), Kind.FULL


def without_gaps(*sets: Ranges) -> Callable[[Ranges], Ranges]:
    """Count tokens over those that are in any of ``sets``: what two seats have no part in leaves no gap between theirs.

    The order stays, and with it who sees whom under a plain causal mask.

    >>> count = without_gaps(((0, 2), (8, 9)), ((4, 6),))
    >>> count(((0, 2), (8, 9))), count(((4, 6),)), count(((5, 6), (8, 9)))
    (((0, 2), (4, 5)), ((2, 4),), ((3, 5),))
    """
    held = merged([part for one in sets for part in one])

    def place(token: int) -> int:
        return sum(min(token, stop) - start for start, stop in held if start < token)

    return lambda ranges: joined((place(start), place(stop)) for start, stop in ranges)


def _stretches(queries: Range, sight: Sight) -> Iterator[tuple[Range, int, int]]:
    """Neighbouring queries, and the first token that their first and their last one sees."""
    first = sight.first_seen(queries)
    if first is None:
        yield queries, 0, 0
        return
    edges = np.concatenate(([0], np.flatnonzero(np.diff(first)) + 1, [len(first)]))
    at = 0
    for run in np.flatnonzero(np.diff(edges) >= SHORTEST).tolist():
        start, stop = int(edges[run]), int(edges[run + 1])
        yield from _strips(queries[0], first, at, start)
        yield (queries[0] + start, queries[0] + stop), int(first[start]), int(first[start])
        at = stop
    yield from _strips(queries[0], first, at, len(first))


def _strips(offset: int, first: np.ndarray, start: int, stop: int) -> Iterator[tuple[Range, int, int]]:
    for at in range(start, stop, STRIP):
        end = min(at + STRIP, stop)
        yield (offset + at, offset + end), int(first[at]), int(first[end - 1])
