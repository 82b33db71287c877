"""Which documents of a step are cut over how many ranks: groups of its own for each step (ByteScale, FlexSP).

A static mesh cuts all documents over as many ranks as the longest needs, so short ones pay for messages that they
don't need.  Here each document gets its own group: of sizes R, R/2, ..., 1, aligned, so that groups nest.

    8 ranks   │              a              │   each rank does the documents of its largest groups first;
              │      b      │       c       │   ranks that share a document have shared all before it, so nobody waits
              │   d   │     │   e   │   f   │   and a step takes as long as its fullest rank has work
              │ g │ h │i│ j │   │ k │ l │ m │

A document's work is that of its (query, key) pairs and its tokens; cutting it adds messages, hidden as far as its
attention lasts.  How to choose is scheduling of malleable tasks (Turek, Wolf and Yu 1992): for a wanted time T each
document gets the smallest group that does it within T, and then, largest groups and longest times first, the group
that is free first.  With T near the best possible time, documents in the smallest sufficient groups take no more of the
ranks than in the best placement, hence

    time  <=  work / R  +  longest document  <=  best  +  1.1 best        (T is tried in steps of 1.1)

Smaller T are tried too: more cuts even out better.  All is a pure function of the lengths, equal on every rank.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stretto.planner.document_costs import Costs
from stretto.spec.errors import ConfigError
from stretto.spec.sequence import group_sizes

STEP = 1.1
"""Ratio of wanted times that are tried."""
FINER = tuple(0.5**n for n in range(1, 7))
"""Wanted times below the lower bound, in lower bounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A document and the ranks that it is cut over."""

    document: int
    """Its index in the lengths."""
    first: int
    """First rank of the group."""
    ranks: int
    """Size of the group; divides ``first``."""
    micro_batch: int
    """Which of its ranks' micro-batches it is in, the same on all of them."""
    away: int = 0
    """Blocks whose activations of that micro-batch are on the host between forward and backward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where all documents of a step go."""

    pieces: tuple[Placed, ...]
    """One for each document, in their order."""
    times: tuple[float, ...]
    """Work of each rank, in the unit of the costs."""
    lower_bound: float
    """No placement is faster."""
    micro_batches: int
    """Of the rank that has most."""

    @property
    def makespan(self) -> float:
        """Work of the fullest rank."""
        return max(self.times)


class Option(NamedTuple):
    """A group that a document can have."""

    ranks: int
    time: float
    """How long each of them works on it."""
    away: int
    """Blocks whose activations go to the host, so that its share fits."""


def options(length: int, ranks: int, costs: Costs, memory_tokens: int) -> tuple[Option, ...]:
    """Groups that a document can have, smallest first: its share fits in memory, and each rank gets two pieces of it.

    Where ranks share heads, only those whose ranks can.

    Where memory asks for more ranks than there are pairs of tokens, memory decides.
    """
    found: list[Option] = []
    for size in reversed(group_sizes(ranks)):
        away = costs.away(length, size, memory_tokens) if costs.serves(size) else None
        if away is not None and (not found or 2 * size <= length):
            found.append(Option(size, costs.time(length, size), away))
    return tuple(found)


def assign(lengths: Sequence[int], ranks: int, costs: Costs, *, memory_tokens: int) -> Placement:
    """Place documents of ``lengths`` tokens on ``ranks`` ranks, each with ``memory_tokens`` a micro-batch at most.

    Within 2.1 of the best placement, but for what micro-batches cost, if cutting never makes less work.

    Raises:
        ConfigError: for a document that doesn't fit on all ranks together.
    """
    table = [options(n, ranks, costs, memory_tokens) for n in lengths]
    longest = max((n for n, row in zip(lengths, table, strict=True) if not row), default=0)
    if longest:
        most = next(size for size in group_sizes(ranks) if costs.serves(size))
        kept = "" if most == ranks else f" (heads can't be split over more of the {ranks})"
        more = "use more ranks" if most == ranks else 'set plan.context = "mesh" or "ring"'
        raise ConfigError(
            f"A document of {longest} tokens doesn't fit on {most} ranks{kept} with {memory_tokens} tokens each; "
            f"set plan.context_tokens to at least {-(-longest // most)}, or {more}."
        )
    bound = _lower_bound(table, ranks)
    best: Placement | None = None
    tried: set[tuple[Option, ...]] = set()
    wanted = [bound * factor for factor in FINER]
    at = bound
    while True:
        for limit in (at, *wanted):
            chosen = tuple(_smallest_within(row, limit) for row in table)
            if chosen not in tried:
                tried.add(chosen)
                found = _place(lengths, chosen, ranks, costs, (memory_tokens, bound))
                if best is None or found.makespan < best.makespan:
                    best = found
        wanted, at = [], at * STEP
        assert best is not None
        if at >= best.makespan or not lengths:
            return best


def _lower_bound(table: Sequence[Sequence[Option]], ranks: int) -> float:
    """Work spread evenly, and the document that takes longest."""
    work = sum(min(option.ranks * option.time for option in row) for row in table)
    return max(work / ranks, max((min(option.time for option in row) for row in table), default=0.0))


def _smallest_within(row: Sequence[Option], limit: float) -> Option:
    """The smallest group that does a document within ``limit``; the fastest where none does."""
    return next((option for option in row if option.time <= limit), min(row, key=lambda o: (o.time, o.ranks)))


def _place(
    lengths: Sequence[int], chosen: Sequence[Option], ranks: int, costs: Costs, given: tuple[int, float]
) -> Placement:
    """Largest groups first, longest first, each to the group that is free first; ``given``: memory and lower bound."""
    memory_tokens, bound = given
    times, begun = [0.0] * ranks, [0] * ranks
    pieces: list[Placed | None] = [None] * len(lengths)
    for size in group_sizes(ranks):
        timed = [(-option.time, i) for i, option in enumerate(chosen) if option.ranks == size]
        free = [(times[first], first) for first in range(0, ranks, size)]
        heapq.heapify(free)
        here: dict[int, list[int]] = {}
        for negative, document in sorted(timed):
            time, first = heapq.heappop(free)
            heapq.heappush(free, (time - negative, first))
            here.setdefault(first, []).append(document)
        load = {first: time for time, first in free}
        for first, documents in here.items():
            count = 0
            for away in sorted({chosen[i].away for i in documents}, reverse=True):
                alike = [i for i in documents if chosen[i].away == away]
                bins = first_fit([-(-lengths[i] // size) for i in alike], costs.room(away, memory_tokens))
                for document, number in zip(alike, bins, strict=True):
                    at = begun[first] + count + number
                    pieces[document] = Placed(document=document, first=first, ranks=size, micro_batch=at, away=away)
                count += max(bins) + 1
            begun[first : first + size] = [begun[first] + count] * size
            times[first : first + size] = [load[first] + costs.micro_batch * count] * size
    return Placement(
        pieces=tuple(piece for piece in pieces if piece is not None),
        times=tuple(times),
        lower_bound=bound,
        micro_batches=max(begun),
    )


def first_fit(shares: Sequence[int], room: int) -> list[int]:
    """Micro-batch of each share: the first that has room for it."""
    left: list[int] = []
    found = []
    for share in shares:
        number = next((i for i, free in enumerate(left) if free >= share), len(left))
        if number == len(left):
            left.append(room)
        left[number] -= share
        found.append(number)
    return found
