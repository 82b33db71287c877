"""Which documents of a step are cut over how many ranks: groups of its own for each step (ByteScale S9, FlexSP S10).

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

from stretto.spec.errors import ConfigError

STEP = 1.1
"""Ratio of wanted times that are tried."""
FINER = tuple(0.5**n for n in range(1, 7))
"""Wanted times below the lower bound, in lower bounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a step's work costs, forward and backward, in any one unit (seconds, FLOP)."""

    pair: float
    """A query that sees a key."""
    token: float
    """What is linear in the tokens."""
    exchange: float = 0.0
    """Keys and values of a token passed to a rank, and their gradients passed back; hidden under attention."""
    micro_batch: float = 0.0
    """What each micro-batch costs beside its tokens."""
    window: int | None = None
    """Keys that a query sees at most; None: all before it."""

    def pairs(self, length: int) -> int:
        """Pairs of a document under a causal mask."""
        seen = min(self.window or length, length)
        return seen * (seen + 1) // 2 + (length - seen) * seen

    def time(self, length: int, ranks: int) -> float:
        """How long each of ``ranks`` ranks works on a document that is cut over them."""
        attention = self.pair * self.pairs(length) / ranks
        messages = self.exchange * length * (ranks - 1) / ranks
        return self.token * -(-length // ranks) + max(attention, messages)


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


def group_sizes(ranks: int) -> tuple[int, ...]:
    """Sizes of groups, each dividing the one before.

    >>> group_sizes(8), group_sizes(6), group_sizes(7)
    ((8, 4, 2, 1), (6, 3, 1), (7, 1))
    """
    sizes = [ranks]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // next(n for n in range(2, sizes[-1] + 1) if sizes[-1] % n == 0))
    return tuple(sizes)


def allowed(length: int, ranks: int, memory_tokens: int) -> tuple[int, ...]:
    """Groups that a document can have, smallest first: its share fits in memory, and each rank gets two pieces of it.

    Where memory asks for more ranks than there are pairs of tokens, memory decides.
    """
    fitting = [size for size in reversed(group_sizes(ranks)) if -(-length // size) <= memory_tokens]
    return tuple(size for size in fitting if size == fitting[0] or 2 * size <= length)


def assign(lengths: Sequence[int], ranks: int, costs: Costs, *, memory_tokens: int) -> Placement:
    """Place documents of ``lengths`` tokens on ``ranks`` ranks, each with ``memory_tokens`` a micro-batch at most.

    Within 2.1 of the best placement, but for what micro-batches cost, if cutting never makes less work.

    Raises:
        ConfigError: for a document that doesn't fit on all ranks together.
    """
    longest = max(lengths, default=0)
    if longest > ranks * memory_tokens:
        raise ConfigError(
            f"A document of {longest} tokens doesn't fit on {ranks} ranks with {memory_tokens} tokens each; "
            f"set plan.context_tokens to at least {-(-longest // ranks)}, or use more ranks."
        )
    table = [[(size, costs.time(n, size)) for size in allowed(n, ranks, memory_tokens)] for n in lengths]
    bound = _lower_bound(table, ranks)
    best: Placement | None = None
    tried: set[tuple[int, ...]] = set()
    wanted = [bound * factor for factor in FINER]
    at = bound
    while True:
        for limit in (at, *wanted):
            sizes = tuple(_smallest_within(options, limit) for options in table)
            if sizes not in tried:
                tried.add(sizes)
                found = _place(lengths, sizes, ranks, costs, (memory_tokens, bound))
                if best is None or found.makespan < best.makespan:
                    best = found
        wanted, at = [], at * STEP
        assert best is not None
        if at >= best.makespan or not lengths:
            return best


def _lower_bound(table: Sequence[Sequence[tuple[int, float]]], ranks: int) -> float:
    """Work spread evenly, and the document that takes longest."""
    work = sum(min(size * time for size, time in options) for options in table)
    return max(work / ranks, max((min(time for _, time in options) for options in table), default=0.0))


def _smallest_within(options: Sequence[tuple[int, float]], limit: float) -> int:
    """The smallest group that does a document within ``limit``; the fastest where none does."""
    return next((size for size, time in options if time <= limit), min(options, key=lambda o: (o[1], o[0]))[0])


def _place(
    lengths: Sequence[int], sizes: Sequence[int], ranks: int, costs: Costs, given: tuple[int, float]
) -> Placement:
    """Largest groups first, longest first, each to the group that is free first; ``given``: memory and lower bound."""
    memory_tokens, bound = given
    times, begun = [0.0] * ranks, [0] * ranks
    pieces: list[Placed | None] = [None] * len(lengths)
    for size in group_sizes(ranks):
        timed = [(-costs.time(n, size), i) for i, n in enumerate(lengths) if sizes[i] == size]
        free = [(times[first], first) for first in range(0, ranks, size)]
        heapq.heapify(free)
        here: dict[int, list[int]] = {}
        for negative, document in sorted(timed):
            time, first = heapq.heappop(free)
            heapq.heappush(free, (time - negative, first))
            here.setdefault(first, []).append(document)
        load = {first: time for time, first in free}
        for first, documents in here.items():
            shares = [-(-lengths[i] // size) for i in documents]
            bins = _first_fit(shares, memory_tokens)
            for document, number in zip(documents, bins, strict=True):
                pieces[document] = Placed(document=document, first=first, ranks=size, micro_batch=begun[first] + number)
            count = max(bins) + 1
            begun[first : first + size] = [begun[first] + count] * size
            times[first : first + size] = [load[first] + costs.micro_batch * count] * size
    return Placement(
        pieces=tuple(piece for piece in pieces if piece is not None),
        times=tuple(times),
        lower_bound=bound,
        micro_batches=max(begun),
    )


def _first_fit(shares: Sequence[int], room: int) -> list[int]:
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
