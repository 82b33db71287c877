"""Where the time of each rank goes, and which operations the makespan hangs on.

    rank 1 │      │0F0 . │1F0 1B0│              busy           F B I W R S T and OPT
             idle   waits for 1F0's operand     communication  the part of a wait in which the operand was there,
                    (made, on its way)                         at the other end; time in sends and receives
                                                bubble         the rest; the three add up to the makespan

Waiting for a stream of the rank itself (parameters that are being gathered, activations that are being
loaded) counts as communication too: nothing that is computed elsewhere would end it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stretto.schedule.op import COMPUTE, Kind, Op

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from stretto.schedule.simulate.clock import Timeline
    from stretto.schedule.simulate.stage_costs import Values

BUSY = COMPUTE | {Kind.OPT}
"""Kinds that count as work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """The makespan of each rank in three parts, in the costs' unit of time."""

    busy: tuple[float, ...]
    """In operations."""
    communication: tuple[float, ...]
    """Waiting for what exists already and is on its way; sending and receiving where that occupies the rank."""
    bubble: tuple[float, ...]
    """The rest."""


def attribution(timeline: Timeline) -> Attribution:
    """Where each rank's time goes."""
    import numpy as np

    busy = busy_of(timeline)
    apart = np.where(_works(timeline), 0.0, timeline.end - timeline.start) + _on_the_way(timeline)
    apart[~timeline.graph.arithmetic] = 0.0
    ranks = range(timeline.schedule.num_ranks)
    communication = tuple(float(apart[timeline.rows(rank)].sum()) for rank in ranks)
    return Attribution(
        busy=busy,
        communication=communication,
        bubble=tuple(timeline.makespan - busy[rank] - communication[rank] for rank in ranks),
    )


def busy_of(timeline: Timeline) -> tuple[float, ...]:
    """Time that each rank works: operations counted and multiplied, so that whole costs give exact sums."""
    import numpy as np

    schedule, graph = timeline.schedule, timeline.graph
    table = np.where([[kind in COMPUTE] for kind in Kind], graph.costs.durations(), 0.0)
    found = []
    for rank in range(schedule.num_ranks):
        rows = timeline.rows(rank)
        stage = np.maximum(schedule.stage[rows], 0)
        counts = np.bincount(schedule.kind[rows] * table.shape[1] + stage, minlength=table.size)
        steps = int(np.count_nonzero(schedule.kind[rows] == Kind.OPT))
        found.append(float(counts[: table.size] @ table.ravel()) + steps * float(graph.costs.OPT[rank]))
    return tuple(found)


def critical_path(timeline: Timeline) -> tuple[int, ...]:
    """Rows of a chain of operations that leaves no gap but latencies, from the start to the end of the makespan.

    No operation on it can take longer without the whole taking longer.  Where several chains do, the one
    that stays on its rank.  Messages on links are passed through and not named.
    """
    graph = timeline.graph
    start, end = timeline.nodes
    first, need, lag = graph.arrows
    node, path = int(timeline.end.argmax()), []
    while node >= 0:
        if node < timeline.schedule.num_ops:
            path.append(node)
        arrows = slice(int(first[node]), int(first[node + 1]))
        waits = [(int(graph.before[node]), 0.0), *zip(need[arrows].tolist(), lag[arrows].tolist(), strict=True)]
        binding = (giver for giver, wait in waits if giver >= 0 and end[giver] + wait == start[node])
        node = next(binding, -1)
    return tuple(reversed(path))


def ops_of(timeline: Timeline, rows: Iterable[int]) -> list[Op]:
    """The operations that rows stand for."""
    schedule = timeline.schedule
    return [
        Op(
            Kind(int(schedule.kind[row])),
            stage=int(schedule.stage[row]),
            microbatch=int(schedule.microbatch[row]),
            peer=int(schedule.peer[row]),
        )
        for row in rows
    ]


def _works(timeline: Timeline) -> npt.NDArray[np.bool_]:
    """Which rows count as work."""
    import numpy as np

    return np.isin(timeline.schedule.kind, list(BUSY))


def _on_the_way(timeline: Timeline) -> Values:
    """Time that each row waited although its rank was free and all that it needs was made (N,)."""
    import numpy as np

    return np.maximum(lateness(timeline), 0.0)


def lateness(timeline: Timeline) -> Values:
    """From when each row could have started to when it did (N,); below 0 where a measured one waited in itself."""
    import numpy as np

    graph, num_rows = timeline.graph, timeline.schedule.num_ops
    first, need, _ = graph.arrows
    made = timeline.nodes[1].copy()
    made[:num_rows][~graph.arithmetic] = 0.0
    made[num_rows:] = made[need[first[num_rows:-1]]]  # a message is made when its sender is over: its first arrow
    before = graph.before[:num_rows]
    ready = np.where(before >= 0, timeline.end[before], timeline.start.min())
    waits = np.flatnonzero(np.diff(first[: num_rows + 1]))
    if len(waits):
        end_of_rows = int(first[num_rows])
        latest = np.maximum.reduceat(made[need[:end_of_rows]], first[waits])
        ready[waits] = np.maximum(ready[waits], latest)
    return timeline.start - ready
