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
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
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
    flows = Counter((tuple(schedule.path(m)), voice) for m, voice in enumerate(schedule.voice))
    machines: list[dict[Job, float]] = [defaultdict(float) for _ in range(schedule.num_ranks)]
    for (path, voice), count in flows.items():
        for rank, job, work in _jobs(schedule, of_stages, path, schedule.placement[voice]):
            machines[rank][job] += work * count
    ranks = np.repeat(np.arange(schedule.num_ranks), np.diff(schedule.offsets))
    for kind in (Kind.R, Kind.S, Kind.T):
        rows = np.flatnonzero(schedule.kind == kind)
        for rank, stage in zip(ranks[rows].tolist(), schedule.stage[rows].tolist(), strict=True):
            machines[rank][0.0, float(of_stages.OPT[rank])] += float(getattr(of_stages, kind.name)[stage])
    return max(map(_one_machine, machines))


def _jobs(
    schedule: Schedule, costs: StageCosts, path: tuple[int, ...], holders: tuple[int, ...]
) -> Iterator[tuple[int, Job, float]]:
    """The F, I and W of one micro-batch: rank, head and tail, duration."""
    duration = {Kind.F: costs.F.tolist(), Kind.I: costs.I.tolist()}
    chain = [(Kind.F, stage) for stage in path]
    chain += [(Kind.I, stage) for stage in reversed(path) if schedule.has_backward(stage)]
    latency = [0.0]
    for (_, stage), (_, other) in itertools.pairwise(chain):
        crosses = holders[stage] != holders[other]
        latency.append(float(costs.comm[min(stage, other) : max(stage, other)].max()) if crosses else 0.0)
    heads, at = [], 0.0
    for (kind, stage), wait in zip(chain, latency, strict=True):
        heads.append(at + wait)
        at += wait + duration[kind][stage]
    rest = 0.0
    for (kind, stage), head, wait in reversed(list(zip(chain, heads, latency, strict=True))):
        rank, takes = holders[stage], duration[kind][stage]
        rest = max(rest, float(costs.OPT[rank]))
        if kind is Kind.I:
            weights = float(costs.W[stage])
            yield rank, (head + takes, float(costs.OPT[rank])), weights
            rest = max(rest, weights + float(costs.OPT[rank]))
        yield rank, (head, rest), takes
        rest += takes + wait


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
