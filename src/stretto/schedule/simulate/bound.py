"""How fast any schedule of this shape could be.

On one rank, whatever the order: its F of stage s can't start before the F of all stages before it are
over (its *head*), and after it the rest of the way forward and back must follow (its *tail*).  For each
set of a rank's operations, the earliest head, all their work and the shortest tail follow each other:

    |<-- head -->|<--------- work of the set --------->|<-- tail -->|

The bound is the largest such sum over all ranks and all sets (Jackson's one-machine bound): it is what the rank would
need if work could be interrupted, the most urgent operation (of the longest tail) always going first.  It
counts a backward as I and W that may be apart, and it knows no memory limit, so it holds for every family and
is loose where memory is short.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stretto.schedule.op import Kind
from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate.costs import Costs

if TYPE_CHECKING:
    from stretto.schedule.simulate.stage_costs import StageCosts

Job = tuple[float, float]
"""Head and tail."""


def lower_bound(schedule: Schedule, costs: Costs) -> float:
    """Least makespan of any order of this schedule's work under its placement, in the costs' unit of time.

    The work is F, I and W of all stages, the schedule's R, S and T, and the optimizer step that the costs give.
    """
    import numpy as np

    of_stages = costs.of(schedule)
    steps = [0.0 if schedule.forward_only else time for time in of_stages.OPT.tolist()]
    machines: list[dict[Job, float]] = [defaultdict(float) for _ in steps]
    flows = Counter((tuple(schedule.path(m)), voice) for m, voice in enumerate(schedule.voice))
    for (path, voice), count in flows.items():
        way = _Way(costs=of_stages, path=path, holders=schedule.placement[voice], steps=steps)
        for rank, job, work in way.jobs([stage for stage in reversed(path) if schedule.has_backward(stage)]):
            machines[rank][job] += work * count
    ranks = np.repeat(np.arange(schedule.num_ranks), np.diff(schedule.offsets))
    for kind in (Kind.R, Kind.S, Kind.T):
        rows = np.flatnonzero(schedule.kind == kind)
        for rank, stage in zip(ranks[rows].tolist(), schedule.stage[rows].tolist(), strict=True):
            machines[rank][0.0, steps[rank]] += float(getattr(of_stages, kind.name)[stage])
    return max(map(_one_machine, machines))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    """Where a micro-batch goes."""

    costs: StageCosts
    path: tuple[int, ...]
    """Its stages, in order."""
    holders: tuple[int, ...]
    """Rank of each stage."""
    steps: list[float]
    """Optimizer step of each rank."""

    def jobs(self, back: list[int]) -> Iterator[tuple[int, Job, float]]:
        """Rank, job and duration of each F, I and W; ``back`` are the stages that it passes on its way back."""
        F, I, W = self.costs.F.tolist(), self.costs.I.tolist(), self.costs.W.tolist()  # noqa: E741
        heads = self._heads(self.path, F, 0.0)
        heads_back = self._heads(back, I, heads[back[0]] + F[back[0]]) if back else {}
        rest = 0.0
        for stage, after in zip(reversed(back), [None, *reversed(back)], strict=False):
            rank = self.holders[stage]
            rest = max(rest + self._latency(stage, after), W[stage] + self.steps[rank])
            yield rank, (heads_back[stage], rest), I[stage]
            yield rank, (heads_back[stage] + I[stage], self.steps[rank]), W[stage]
            rest += I[stage]
        way_back, rest = rest, 0.0
        for stage, after in zip(reversed(self.path), [None, *reversed(self.path)], strict=False):
            rank = self.holders[stage]
            rest = max(rest + self._latency(stage, after), self.steps[rank])
            rest = max(rest, way_back) if back[:1] == [stage] else rest
            yield rank, (heads[stage], rest), F[stage]
            rest += F[stage]

    def _heads(self, stages: Sequence[int], duration: list[float], at: float) -> dict[int, float]:
        """When each stage is reached at the earliest."""
        heads = {}
        for before, stage in zip([None, *stages], stages, strict=False):
            heads[stage] = at + self._latency(stage, before)
            at = heads[stage] + duration[stage]
        return heads

    def _latency(self, stage: int, other: int | None) -> float:
        """Latency between two stages, 0 where there is no other."""
        if other is None or self.holders[stage] == self.holders[other]:
            return 0.0
        return float(self.costs.comm[min(stage, other) : max(stage, other)].max())


def _one_machine(jobs: dict[Job, float]) -> float:
    """Least time to be through with all tails, where work may be interrupted; ``jobs`` gives the work of each."""
    coming = sorted(jobs, reverse=True)
    waiting: list[tuple[float, float]] = []
    now = bound = 0.0
    while coming or waiting:
        if not waiting:
            now = max(now, coming[-1][0])
        while coming and coming[-1][0] <= now:
            job = coming.pop()
            heapq.heappush(waiting, (-job[1], jobs[job]))
        minus_tail, work = heapq.heappop(waiting)
        until = coming[-1][0] if coming else math.inf
        if now + work > until:
            heapq.heappush(waiting, (minus_tail, now + work - until))
            now = until
        else:
            now += work
            bound = max(bound, now - minus_tail)
    return bound
