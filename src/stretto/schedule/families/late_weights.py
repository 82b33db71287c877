"""W moved to where a rank would wait: I is what others need soon, W can come any time after it.

    rank 0   F0 F1 ..... I0 W0 I1 W1           F0 F1 ..... I0 I1 W0 W1
    rank 1      F0 I0 W0 F1 I1 W1       ──►       F0 I0 F1 I1 W0 W1

All other operations keep their order.  A rank that waits for a message runs the oldest W that is due and
would be over in time; one that lacks memory for an F runs as many as it takes; the rest come at the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stretto.schedule.compiled import for_size
from stretto.schedule.op import Kind
from stretto.schedule.schedule import Schedule

if TYPE_CHECKING:
    from stretto.schedule.simulate.costs import Costs

SLACK = 1e-9
"""Times and amounts of memory closer than this count as equal."""


def late_weights(schedule: Schedule, costs: Costs, *, limit: float) -> Schedule:
    """W runs where its rank would wait under ``costs``, all else keeps its order; memory stays within ``limit``.

    ``limit`` is in micro-batches over a rank's whole share of the layers, and at least what the order needs with
    each W right behind its I.
    """
    import numpy as np

    from stretto.schedule.arrows import Places, arrows

    places = Places(schedule)
    drawn, per_stage = arrows(places), costs.of(schedule)
    stage, kind = schedule.stage, schedule.kind
    reader = np.repeat(np.arange(schedule.num_ops), np.diff(drawn.start))
    crosses = places.rank[reader] != places.rank[drawn.need]
    lag = np.zeros(len(reader))
    lag[crosses] = per_stage.comm[np.minimum(stage[reader], stage[drawn.need])[crosses]]
    held = per_stage.activation[stage]
    change = np.select(
        [kind == Kind.F, kind == Kind.I, kind == Kind.W],
        [held, -held * (1 - per_stage.act_w[stage]), -held * per_stage.act_w[stage]],
        0.0,
    )
    weights = np.full(schedule.num_ops, -1, dtype=np.int32)  # the W of each I, and -2 on each W itself
    of_inputs = np.flatnonzero(kind == Kind.I)
    weights[of_inputs] = places.find(Kind.W, stage[of_inputs], schedule.microbatch[of_inputs])
    weights[kind == Kind.W] = -2
    columns = (schedule.offsets, drawn.start, drawn.need, lag, per_stage.durations()[kind, stage], change, weights)
    place = for_size(_place, schedule.num_ops)
    order = np.zeros(schedule.num_ops, dtype=np.int32)
    if place is _place:  # plain Python is quicker over lists
        placed = order.tolist()
        place([column.tolist() for column in columns], limit, placed)
        order = np.array(placed, dtype=np.int32)
    else:
        place(columns, limit, order)
    return schedule.with_columns(
        kind=kind[order], stage=stage[order], microbatch=schedule.microbatch[order], offsets=schedule.offsets
    )


def _place(columns, limit, order):  # type: ignore[no-untyped-def]
    """Fill ``order`` with the rows of each rank, in turn.

    Each rank goes as far as it goes; one that must wait for a row that has no time yet is parked there.
    """
    offsets, start, need, lag, duration, change, weights = columns
    ranks = len(offsets) - 1
    at = [offsets[rank] for rank in range(ranks)]
    placed = [offsets[rank] for rank in range(ranks)]
    due = [0] * len(duration)
    first = [offsets[rank] for rank in range(ranks)]
    last = [offsets[rank] for rank in range(ranks)]
    free, memory = [0.0] * ranks, [0.0] * ranks
    end, parked, behind = [-1.0] * len(duration), [-1] * len(duration), [-1] * ranks
    ready = [ranks - 1 - rank for rank in range(ranks)]
    while len(ready) > 0:
        rank = ready.pop()
        while placed[rank] < offsets[rank + 1]:
            while at[rank] < offsets[rank + 1] and weights[at[rank]] == -2:
                at[rank] += 1
            row = at[rank] if at[rank] < offsets[rank + 1] else -1
            begin, missing = free[rank], -1
            if row >= 0:
                for arrow in range(start[row], start[row + 1]):
                    if end[need[arrow]] < 0:
                        missing = need[arrow]
                        break
                    begin = max(begin, end[need[arrow]] + lag[arrow])
            if missing >= 0:
                behind[rank] = parked[missing]
                parked[missing] = rank
                break
            waits = row < 0
            if first[rank] < last[rank] and row >= 0:
                in_time = free[rank] + duration[due[first[rank]]] <= begin + SLACK
                waits = in_time or (change[row] > 0 and memory[rank] + change[row] > limit + SLACK)
            if waits:
                row, begin = due[first[rank]], free[rank]
                first[rank] += 1
            else:
                at[rank] += 1
                if weights[row] >= 0:
                    due[last[rank]] = weights[row]
                    last[rank] += 1
            order[placed[rank]] = row
            placed[rank] += 1
            free[rank] = end[row] = begin + duration[row]
            memory[rank] += change[row]
            waiter = parked[row]
            while waiter >= 0:
                ready.append(waiter)
                waiter = behind[waiter]
