"""When a rank looks up embeddings for the first stage, and takes their gradients: read off the schedule beforehand.

Looking up needs nothing but the tokens, and a gradient may wait until the update, so neither is an operation of the
schedule.  Each is put at a place in a rank's order at which it can't hold anybody up for good: in rounds, in which
every rank runs at most one operation and all that it needs came in an earlier one (schedule/progress.py),

    look up for the j-th forward of stage 0                 before the round of the (j - AHEAD)-th
    send or begin to receive the j-th backward's gradient   behind its round
    take it                                                 behind the round of the (j + AHEAD)-th, or at the end

so that whatever waits at such a place waits for something that an earlier round has seen.  Visits come in the same
order on all ranks, so that both ends of a route name their messages alike.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from stretto.schedule.arrows import Places
from stretto.schedule.op import Kind
from stretto.schedule.progress import rounds
from stretto.schedule.schedule import Schedule

AHEAD = 3
"""Micro-batches by which embeddings are looked up before stage 0 needs them, and gradients taken later."""


class Visit(NamedTuple):
    """Something that a rank does before its ``at``-th operation; at the end where there are no more."""

    at: int
    what: Literal["look up", "exchange", "take"]
    microbatch: int


def itinerary(schedule: Schedule, rank: int) -> list[Visit]:
    """The visits of a rank, in order; ``schedule`` is lowered and can finish."""
    import numpy as np

    places, turns = Places(schedule), rounds(schedule)
    microbatches = np.arange(schedule.num_microbatches)
    first = np.array([schedule.path(m)[0] for m in range(schedule.num_microbatches)])
    timed: list[tuple[float, int, Visit]] = []

    def add(time: float, what: Literal["look up", "exchange", "take"], microbatch: int) -> None:
        own = turns[schedule.offsets[rank] : schedule.offsets[rank + 1]]
        timed.append((time, len(timed), Visit(int(np.searchsorted(own, time)), what, microbatch)))

    forward = _in_order(places.find(Kind.F, first, microbatches), turns)
    for j, (_, m) in enumerate(forward):
        add(forward[j - AHEAD][0] - 0.5 if j >= AHEAD else 0.0, "look up", m)
    backward = _in_order(places.backward(first, microbatches), turns)
    for j, (turn, m) in enumerate(backward):
        add(turn + 0.5, "exchange", m)
        add(backward[j + AHEAD][0] + 0.5 if j + AHEAD < len(backward) else math.inf, "take", m)
    return [visit for _, _, visit in sorted(timed)]


def _in_order(rows, turns) -> list[tuple[float, int]]:  # type: ignore[no-untyped-def]
    """Round and micro-batch of the rows that are there, in the order of rounds."""
    return sorted((float(turns[row]), m) for m, row in enumerate(rows.tolist()) if row >= 0)
