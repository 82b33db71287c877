"""Who needs whose tokens: what of a seat's keys some other seat sees at all, before anything is computed.

Under causal, document and sliding-window masks a query sees the tokens from some first one up to itself, and first
never falls along a row.  So the keys that a range of queries sees begin where those of its first query do, and the
queries that see a range of keys end with those that see its last key:

    keys ►         ░ ░ ░ ░ ■ ■ ■ ■ . .       low: the first key that the first query of the range sees
    queries                  └─range─┘
                   low ──────┘

What nobody sees needn't travel.  All ranks know the masks of whole rows, so all find the same, and so does the
planner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stretto.spec.sequence import Range, Ranges, count, joined

Seats = tuple[Ranges, ...]
"""Tokens of each seat of a ring."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """Which tokens of some seats see which of others; hashable, so that what follows of it is found once."""

    seats: Seats
    lows: tuple[tuple[int, ...], ...]
    """Of each range of each seat, the first token of the row that its queries see; none: everybody sees all."""
    highs: tuple[tuple[int, ...], ...]
    """Of each range of each seat, the first token from which on no query sees its keys."""
    piece: tuple[int, int] = (0, 1)
    """(i, n): only the i-th of n equal pieces of what each seat holds counts as an owner's tokens."""

    @classmethod
    def of(cls, seats: Seats, low: Callable[[int], int], high: Callable[[int], int]) -> Reach:
        """What masks make of ``seats``: ``low`` is the first token that a token sees, ``high`` one after the last by
        which it is seen."""
        return cls(
            seats=seats,
            lows=tuple(tuple(low(start) for start, _ in ranges) for ranges in seats),
            highs=tuple(tuple(high(stop - 1) for _, stop in ranges) for ranges in seats),
        )

    @classmethod
    def whole(cls, seats: Seats) -> Reach:
        """Every seat is given everything, as the papers have it where tokens see all that precede them.

        Of what some seats don't see then, a ring's last ones see most.
        """
        return cls(seats=seats, lows=(), highs=())

    @classmethod
    def window(cls, seats: Seats, size: int) -> Reach:
        """Rows of one document, in which a token sees ``size`` tokens, itself among them."""
        length = max((ranges[-1][1] for ranges in seats if ranges), default=0)
        return cls.of(seats, lambda token: max(0, token + 1 - size), lambda token: min(length, token + size))

    def reads(self, seat: int, owner: int) -> Ranges:
        """The tokens of ``owner`` whose keys queries of ``seat``, another, see."""
        tokens = self._of(owner)
        if not self.lows:
            return tokens
        ranges = zip(self.seats[seat], self.lows[seat], strict=True)
        return common(tokens, [(low, start) for (start, _), low in ranges])

    def asks(self, seat: int, owner: int) -> Ranges:
        """The tokens of ``owner`` whose queries see keys of ``seat``, another."""
        tokens = self._of(owner)
        if not self.highs:
            return tokens
        ranges = zip(self.seats[seat], self.highs[seat], strict=True)
        return common(tokens, [(stop, high) for (_, stop), high in ranges])

    def _of(self, owner: int) -> Ranges:
        index, pieces = self.piece
        tokens = self.seats[owner]
        size = count(tokens)
        return part(tokens, size * index // pieces, size * (index + 1) // pieces)


def part(tokens: Ranges, start: int, stop: int) -> Ranges:
    """Those from the ``start``-th up to the ``stop``-th.

    >>> part(((0, 4), (8, 12)), 2, 6)
    ((2, 4), (8, 10))
    """
    found, at = [], 0
    for first, last in tokens:
        low, high = max(first, first + start - at), min(last, first + stop - at)
        found += [(low, high)] if low < high else []
        at += last - first
    return tuple(found)


def common(tokens: Ranges, others: Sequence[Range]) -> Ranges:
    """The tokens that are in both.

    >>> common(((0, 4), (8, 12)), [(2, 9), (8, 10)])
    ((2, 4), (8, 10))
    """
    return joined((max(a, c), min(b, d)) for a, b in tokens for c, d in merged(others) if max(a, c) < min(b, d))


def merged(ranges: Sequence[Range]) -> Ranges:
    """The tokens that are in any of some ranges, which may overlap.

    >>> merged([(8, 9), (0, 4), (2, 6), (5, 5)])
    ((0, 6), (8, 9))
    """
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if found and start <= found[-1][1]:
            start, stop = found[-1][0], max(found.pop()[1], stop)
        found.append((start, stop))
    return tuple(found)
