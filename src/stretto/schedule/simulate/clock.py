"""When each operation starts and ends.

Every rank runs its operations in its order, each as soon as the rank is free and what it needs is there:

    rank 0 │0F0│0F1│                │0B0    │
                └─comm─┐        ┌─comm─┘
    rank 1             │1F0│1B0    │            start = max(rank free, needs ended + comm if elsewhere)

Messages are pure latency: they occupy no rank, and inside a rank they take no time.  A lowered schedule
is timed as the same schedule without its messages.
"""

from __future__ import annotations

from dataclasses import dataclass

from stretto.schedule.dependencies import REPEATABLE, Dependencies, Key
from stretto.schedule.passes.communication import without_messages
from stretto.schedule.progress import check_progress
from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate.costs import Costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Start and end of each operation."""

    schedule: Schedule
    """What ran, without messages."""
    start: tuple[tuple[float, ...], ...]
    """``start[rank][i]`` of the i-th operation of the rank, in the costs' unit of time."""
    end: tuple[tuple[float, ...], ...]
    """Likewise."""

    @property
    def makespan(self) -> float:
        """From the first operation anywhere to the last."""
        return max(map(max, filter(None, self.end))) - min(map(min, filter(None, self.start)))

    @property
    def spans(self) -> tuple[float, ...]:
        """Time between each rank's first and last operation."""
        return tuple(max(end) - min(start) if start else 0.0 for start, end in zip(self.start, self.end, strict=True))


def run(schedule: Schedule, costs: Costs) -> Timeline:
    """Time a schedule.  Raises ScheduleError where it can't finish, saying why."""
    schedule = without_messages(schedule)
    dependencies = Dependencies(schedule)
    stage_costs = costs.of(schedule)
    durations, latency = stage_costs.durations().tolist(), float(stage_costs.comm.max(initial=0.0))
    orders = [[row[:3] for row in schedule.rows(rank)] for rank in range(schedule.num_ranks)]
    starts: list[list[float]] = [[] for _ in orders]
    ends: list[list[float]] = [[] for _ in orders]
    ended: dict[Key, tuple[float, int]] = {}
    waiting: dict[Key, list[int]] = {}
    ready = list(range(len(orders)))
    while ready:
        rank = ready.pop()
        free = ends[rank][-1] if ends[rank] else 0.0
        while len(ends[rank]) < len(orders[rank]):
            op = orders[rank][len(ends[rank])]
            start = free
            missing = None
            for need in dependencies.needs(*op):
                if need not in ended:
                    missing = need
                    break
                at, giver = ended[need]
                start = max(start, at + latency if giver != rank else at)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            free = start + durations[op[0]][op[1]]
            starts[rank].append(start)
            ends[rank].append(free)
            if op[0] not in REPEATABLE:
                ended[op] = (free, rank)
                ready += waiting.pop(op, [])
    if any(len(order) != len(end) for order, end in zip(orders, ends, strict=True)):
        check_progress(schedule)
    return Timeline(schedule=schedule, start=tuple(map(tuple, starts)), end=tuple(map(tuple, ends)))
