"""How fast any schedule of this shape could be.

On one rank, whatever the order: its F of stage s can't start before the F of all stages before it are
over (its *head*), and after it the rest of the way forward and back must follow (its *tail*).  For each
set of a rank's operations, the earliest head, all their work and the shortest tail follow each other:

    |<-- head -->|<--------- work of the set --------->|<-- tail -->|

The bound is the largest such sum over all ranks and all sets "head at least h, tail at least q" (Jackson's
one-machine bound).  It counts a backward as I and W that may be apart, and it knows no memory limit,
so it holds for every family and is loose where memory is short.
"""

from __future__ import annotations

from stretto.schedule.op import Kind
from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate.costs import Costs

Job = tuple[float, float, float]
"""Head, duration, tail."""


def lower_bound(schedule: Schedule, costs: Costs) -> float:
    """Least makespan of any order of this schedule's work under its placement, in the costs' unit of time."""
    flows: dict[tuple[tuple[int, ...], int], int] = {}
    for microbatch in range(schedule.num_microbatches):
        flow = (tuple(schedule.path(microbatch)), schedule.voice[microbatch])
        flows[flow] = flows.get(flow, 0) + 1
    jobs: list[dict[Job, int]] = [{} for _ in range(schedule.num_ranks)]
    for (path, voice), count in flows.items():
        for rank, job in _jobs(schedule, costs, path, schedule.placement[voice]):
            jobs[rank][job] = jobs[rank].get(job, 0) + count
    return max(_one_machine(machine) for machine in jobs)


def _jobs(schedule: Schedule, costs: Costs, path: tuple[int, ...], holders: tuple[int, ...]) -> list[tuple[int, Job]]:
    """The operations of one micro-batch with the rank that runs each."""
    stage_costs = costs.of(schedule)
    cost, latency = stage_costs.durations(), float(stage_costs.comm.min(initial=0.0))
    chain = [(Kind.F, stage) for stage in path]
    chain += [(Kind.I, stage) for stage in reversed(path) if schedule.has_backward(stage)]
    heads, at = [], 0.0
    for step, (kind, stage) in enumerate(chain):
        if step and holders[chain[step - 1][1]] != holders[stage]:
            at += latency
        heads.append(at)
        at += cost[kind, stage]
    found: list[tuple[int, Job]] = []
    rest = 0.0
    for step in reversed(range(len(chain))):
        kind, stage = chain[step]
        if step + 1 < len(chain) and holders[chain[step + 1][1]] != holders[stage]:
            rest += latency
        if kind is Kind.I:
            found.append((holders[stage], (heads[step] + cost[kind, stage], cost[Kind.W, stage], 0.0)))
            rest = max(rest, cost[Kind.W, stage])
        found.append((holders[stage], (heads[step], cost[kind, stage], rest)))
        rest += cost[kind, stage]
    return found


def _one_machine(jobs: dict[Job, int]) -> float:
    """Largest sum of least head, work and least tail over the sets of one rank's operations."""
    bound = 0.0
    for least_head in {head for head, _, _ in jobs}:
        work = 0.0
        for (head, duration, tail), count in sorted(jobs.items(), key=lambda job: -job[0][2]):
            if head >= least_head:
                work += duration * count
                bound = max(bound, least_head + work + tail)
    return bound
