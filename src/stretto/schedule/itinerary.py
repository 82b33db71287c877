"""What travels for vocabulary passes, and when, as far as no operation of the schedule says it.

The runtime plays by this (parallel/pipeline/vocabulary), and the simulator counts the memory that it takes
(simulate/vocabulary_memory.py).

**Rows.** When a rank looks up embeddings for the first stage, and takes their gradients, is read off beforehand.

Looking up needs nothing but the tokens, and a gradient may wait until the update, so neither is an operation of the
schedule.  Each is put at a place in a rank's order at which it can't hold anybody up for good: in rounds, in which
every rank runs at most one operation and all that it needs came in an earlier one (schedule/progress.py),

    look up for the j-th forward of stage 0                 before the round of the (j - AHEAD)-th
    send or begin to receive the j-th backward's gradient   behind its round
    take it                                                 behind the round of the (j + AHEAD)-th, or at the end

so that whatever waits at such a place waits for something that an earlier round has seen.  Visits come in the same
order on all ranks, so that both ends of a route name their messages alike.

**Outputs** of the last stage go to all ranks in the order of S, which they share: a rank begins to receive an output
when it scores the one that is OUTPUTS_AHEAD before it, and whatever comes before an output of its own, which it sends
at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from stretto.schedule.arrows import Places
from stretto.schedule.op import Kind
from stretto.schedule.progress import rounds
from stretto.schedule.schedule import Schedule
from stretto.schedule.warm_up import lengths_of

AHEAD = 3
"""Micro-batches by which embeddings are looked up before stage 0 needs them, and gradients taken later."""
LEAVING = 2 * AHEAD
"""Visits of a rank that send rows, behind which what it sent is let go: its receivers have come to it by then."""
OUTPUTS_AHEAD = 2
"""Outputs that a rank may be receiving before it needs them."""


What = Literal["look up", "exchange", "take"]


class Visit(NamedTuple):
    """Something that a rank does before its ``at``-th operation; at the end where there are no more."""

    at: int
    what: What
    microbatch: int


def itinerary(schedule: Schedule, rank: int) -> list[Visit]:
    """The visits of a rank, in order; ``schedule`` is lowered and can finish."""
    return itineraries(schedule)[rank]


def itineraries(schedule: Schedule) -> list[list[Visit]]:
    """The same of all ranks."""
    import numpy as np

    places, turns = Places(schedule), rounds(schedule)
    microbatches = np.arange(schedule.num_microbatches)
    first = np.array([schedule.path(m)[0] for m in range(schedule.num_microbatches)])
    timed: list[tuple[float, What, int]] = []
    forward = _in_order(places.find(Kind.F, first, microbatches), turns)
    for j, (_, m) in enumerate(forward):
        timed.append((forward[j - AHEAD][0] - 0.5 if j >= AHEAD else 0.0, "look up", m))
    backward = _in_order(places.backward(first, microbatches), turns)
    for j, (turn, m) in enumerate(backward):
        timed.append((turn + 0.5, "exchange", m))
        timed.append((backward[j + AHEAD][0] + 0.5 if j + AHEAD < len(backward) else math.inf, "take", m))
    timed.sort(key=lambda each: each[0])
    times = [time for time, _, _ in timed]
    found = []
    for rank in range(schedule.num_ranks):
        at = np.searchsorted(turns[schedule.offsets[rank] : schedule.offsets[rank + 1]], times).tolist()
        found.append([Visit(place, what, m) for place, (_, what, m) in zip(at, timed, strict=True)])
    return found


def _in_order(rows, turns) -> list[tuple[float, int]]:  # type: ignore[no-untyped-def]
    """Round and micro-batch of the rows that are there, in the order of rounds."""
    return sorted((float(turns[row]), m) for m, row in enumerate(rows.tolist()) if row >= 0)


class Outputs:
    """Which outputs a rank begins to move when, in one step.

    Args:
        order: micro-batches in the order of S.
        sources: rank that makes each one's output.
        here: this rank.
        ahead: outputs that it may be receiving before it needs them.
    """

    def __init__(
        self, order: Sequence[int], sources: Mapping[int, int], *, here: int, ahead: int = OUTPUTS_AHEAD
    ) -> None:
        self._order, self._sources, self._here, self._ahead = order, sources, here, ahead
        self._place = {m: at for at, m in enumerate(order)}
        self._at = self._taken = 0
        self._given: set[int] = set()
        self._own = -1
        """Place in the order of the last output given."""

    def begin(self) -> list[int]:
        """The step begins: what is received from now on."""
        return self._started()

    def give(self, microbatch: int) -> list[int]:
        """This rank has made an output: what it sends and receives from now on."""
        self._given.add(microbatch)
        self._own = max(self._own, self._place[microbatch])
        return self._started()

    def take(self) -> list[int]:
        """This rank scores the next output: what it receives from now on."""
        self._taken += 1
        return self._started()

    def _started(self) -> list[int]:
        """All that comes before an output of this rank, and some more."""
        found = []
        while self._at < len(self._order) and self._at <= max(self._own, self._taken + self._ahead - 1):
            microbatch = self._order[self._at]
            if self._sources[microbatch] == self._here and microbatch not in self._given:
                break
            found.append(microbatch)
            self._at += 1
        return found


def begun_in_warm_up(schedule: Schedule) -> tuple[list[int], int]:
    """What any rank has begun before its cut (warm_up.py): micro-batches looked up, in order, and a number of outputs.

    Ranks come to their cuts at different places in these orders.  Where a step is given up there, each goes on as far
    as any has come, so that nothing stays on its way.
    """
    lengths = lengths_of(schedule)
    looked_up: list[int] = []
    outputs = 0
    last = {m: schedule.path(m)[-1] for m in range(schedule.num_microbatches)}
    sources = {m: schedule.rank_of(stage, schedule.voice[m]) for m, stage in last.items()}
    for rank, visits in enumerate(itineraries(schedule)):
        ops = schedule.ops(rank)
        own = [visit.microbatch for visit in visits if visit.what == "look up" and visit.at < lengths[rank]]
        looked_up = max(looked_up, own, key=len)
        order = Outputs([op.microbatch for op in ops if op.kind is Kind.S], sources, here=rank)
        begun = len(order.begin())
        for op in ops[: lengths[rank]]:
            if op.kind is Kind.F and op.stage == last[op.microbatch]:
                begun += len(order.give(op.microbatch))
        outputs = max(outputs, begun)
    return looked_up, outputs


def by_algorithm_2(places: Places) -> frozenset[int]:
    """Micro-batches whose first backward doesn't wait for T: the one before the other, on its rank."""
    import numpy as np

    microbatches = np.arange(places.schedule.num_microbatches)
    turn = places.flows.turn[places.flows.of]
    first = np.where(turn >= 0, places.backward(turn, microbatches), -1)
    gradient = places.find(Kind.T, places.rank[first], microbatches)
    return frozenset(np.flatnonzero((first >= 0) & (gradient >= 0) & (gradient > first)).tolist())
