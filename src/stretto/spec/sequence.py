"""How a sequence is cut over context-parallel ranks: which tokens each holds, and who sits where.

    contiguous   │ 0 │ 0 │ 1 │ 1 │ 2 │ 2 │ 3 │ 3 │      under a causal mask rank 3 has seven times rank 0's work
    zigzag       │ 0 │ 1 │ 2 │ 3 │ 3 │ 2 │ 1 │ 0 │      rank i holds chunks i and 2n-1-i: all have the same

Lengths that don't divide are cut unevenly, by at most one unit, so that no message carries padding.  The ranks
form ``seats`` of a ring, at each of which the ``ulysses`` ranks that share heads sit together (USP); the
ring may have an inner level (LoongTrain's double ring).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stretto.spec.plan import PlanSpec

Range = tuple[int, int]
"""Tokens ``[start, stop)`` of a row, counted over the whole row."""
Ranges = tuple[Range, ...]
"""Ascending ranges that don't touch each other."""

VISITS = 16
"""Messages in which all seats' keys go round a short ring, at most."""


def cut_sequence(length: int, ranks: int, layout: str, *, unit: int = 1) -> tuple[Ranges, ...]:
    """The ranges of each rank when ``length`` tokens are cut by ``layout`` in whole units.

    ``unit`` divides ``length`` (under tensor parallelism each rank's share is cut again, over tp).

    >>> cut_sequence(8, 2, "zigzag"), cut_sequence(7, 2, "contiguous")
    ((((0, 2), (6, 8)), ((2, 6),)), (((0, 4),), ((4, 7),)))
    """
    assert length % unit == 0, (length, unit)
    pieces = 2 * ranks if layout == "zigzag" else ranks
    size, rest = divmod(length // unit, pieces)
    stops = [unit * (size * (i + 1) + min(i + 1, rest)) for i in range(pieces)]
    chunks = list(zip([0, *stops[:-1]], stops, strict=True))
    if layout == "zigzag":
        return tuple(joined([chunks[i], chunks[pieces - 1 - i]]) for i in range(ranks))
    return tuple((chunk,) for chunk in chunks)


def joined(ranges: Iterable[Range]) -> Ranges:
    """The same tokens as ascending ranges, neighbours made one and empty ones left out.

    >>> joined([(4, 6), (0, 2), (2, 4), (9, 9)])
    ((0, 6),)
    """
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if start == stop:
            continue
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, stop))
    return tuple(found)


def count(ranges: Iterable[Range]) -> int:
    """How many tokens they hold."""
    return sum(stop - start for start, stop in ranges)


def group_sizes(ranks: int) -> tuple[int, ...]:
    """Sizes of the groups that documents can have of so many ranks, each dividing the one before.

    >>> group_sizes(8), group_sizes(6), group_sizes(7)
    ((8, 4, 2, 1), (6, 3, 1), (7, 1))
    """
    sizes = [ranks]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // next(n for n in range(2, sizes[-1] + 1) if sizes[-1] % n == 0))
    return tuple(sizes)


def pool_of(plan: PlanSpec) -> int:
    """Ranks that can share a document: those of cp, or in dynamic groups all that read data."""
    return plan.cp if plan.context_groups == "static" else plan.cp * plan.dp


def memory_tokens(plan: PlanSpec, length: int) -> int:
    """Tokens of a micro-batch on a rank of dynamic groups, at most: what the plan says, else those of the static mesh.

    ``length``: of a row.
    """
    static = plan.micro_batch_size * -(-length // plan.cp)
    return static if plan.context_tokens is None else plan.context_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A rank's part of a document that has a group of ranks of its own."""

    first: int
    """First rank of the group; the others follow it."""
    shares: tuple[Ranges, ...]
    """Tokens of each rank of the group, counted over the document."""
    start: int
    """Where this rank's part begins among its tokens."""
    sample: int = -1
    """The document's; -1: it only fills up."""
    place: int = 0
    """Where in the sample's row the document begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """Who sits where among the context-parallel ranks of a plan."""

    ranks: int
    """Context-parallel degree."""
    ulysses: int = 1
    """Ranks at each seat of the ring; they share the heads of the seat's tokens between them."""
    outside: str = "ring"
    """What circulates between the seats: ``ring``, ``token-ring`` or ``all-gather``."""
    ring_outside: bool = True
    """Whether the ranks of a seat are neighbours (the ring then spans the slower links), or those of the ring are."""
    inner_ring: int = 1
    """Seats of the inner level of a double ring; 1 or all of them: a plain ring."""
    keep: bool = False
    """Whether keys and values that came from other seats are kept for backward, or sent again."""

    @classmethod
    def of(cls, plan: PlanSpec) -> Arrangement:
        """The arrangement that a plan asks for."""
        return cls.of_group(plan, plan.cp)

    @classmethod
    def of_group(cls, plan: PlanSpec, ranks: int) -> Arrangement:
        """The plan's arrangement of some ranks that have a document to themselves.

        Of a mesh they share heads as the plan's ``ulysses`` ranks do, or as many of them as divide the group; likewise
        an inner ring.
        """
        ulysses = {"ulysses": ranks, "mesh": math.gcd(plan.ulysses, ranks)}.get(plan.context, 1)
        return cls(
            ranks=ranks,
            ulysses=ulysses,
            outside=plan.context if plan.context in ("token-ring", "all-gather") else "ring",
            ring_outside=plan.context_inner == "ulysses",
            inner_ring=math.gcd(plan.inner_ring, ranks // ulysses),
            keep=plan.context_keep,
        )

    @property
    def seats(self) -> int:
        """Seats of the ring."""
        return self.ranks // self.ulysses

    @property
    def pieces(self) -> int:
        """In how many messages the tokens of a seat go round the ring.

        Where ranks share seats the ring is short and its messages are long.  In pieces, two for each rank of a seat,
        attention starts with the first of them and gradients leave before the last.  Where the ring lies inside, its
        links are the fast ones and nothing is gained.
        """
        if self.seats == 1 or self.outside != "ring" or not self.ring_outside:
            return 1
        return min(2 * self.ulysses if self.ulysses > 1 else 1, max(1, VISITS // self.seats))

    def place(self, rank: int) -> tuple[int, int]:
        """Seat of ``rank``, and which of those who sit there it is."""
        return divmod(rank, self.ulysses) if self.ring_outside else divmod(rank, self.seats)[::-1]

    def sharers(self, rank: int) -> tuple[int, ...]:
        """Ranks at the seat of ``rank``, in order."""
        seat = self.place(rank)[0]
        return tuple(other for other in range(self.ranks) if self.place(other)[0] == seat)

    def ring(self, rank: int) -> tuple[int, ...]:
        """Ranks with which ``rank`` makes a ring, by seat: those with the same heads."""
        share = self.place(rank)[1]
        return tuple(other for other in range(self.ranks) if self.place(other)[1] == share)

    def seated(self, shares: tuple[Ranges, ...]) -> tuple[Ranges, ...]:
        """Tokens of each seat, given those of each rank."""
        held: list[list[Range]] = [[] for _ in range(self.seats)]
        for rank, ranges in enumerate(shares):
            held[self.place(rank)[0]] += ranges
        return tuple(map(joined, held))


def heads_of(heads: int, kv_heads: int, parts: int, index: int) -> tuple[Range, Range]:
    """Query heads of part ``index`` of ``parts``, and the key/value heads that those read.

    Parts overlap in their key/value heads where there are fewer of these than parts.

    >>> heads_of(8, 2, 4, 1), heads_of(8, 8, 4, 1)
    (((2, 4), (0, 1)), ((2, 4), (2, 4)))
    """
    start, stop = heads // parts * index, heads // parts * (index + 1)
    group = heads // kv_heads
    return (start, stop), (start // group, -(-stop // group))


def uneven_reads(heads: int, kv_heads: int, parts: int, index: int) -> list[int] | None:
    """Which of a part's key/value heads each of its query heads reads, where groups of unequal size come of the cut.

    None where all its key/value heads serve equally many of its query heads, in order.

    >>> uneven_reads(8, 2, 4, 1), uneven_reads(12, 3, 4, 1)
    (None, [0, 1, 1])
    """
    (start, stop), (first, last) = heads_of(heads, kv_heads, parts, index)
    reads = [head // (heads // kv_heads) - first for head in range(start, stop)]
    size, rest = divmod(stop - start, last - first)
    return None if not rest and reads == [i // size for i in range(stop - start)] else reads
