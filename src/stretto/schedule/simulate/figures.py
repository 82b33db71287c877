"""The figures that a schedule is judged by.

makespan          from the first operation anywhere to the last
span              the largest per-rank time between first and last operation
lower_bound       what no schedule of this shape can go below
bubble_rate       1 - sum(busy) / (ranks x makespan)
bubble_rate_span  1 - max(busy) / span, what the zero-bubble papers print
busy              per rank, time in operations
peak_activation   per rank, in micro-batches over a rank's whole share of the layers
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate.bound import lower_bound
from stretto.schedule.simulate.clock import run
from stretto.schedule.simulate.costs import Costs
from stretto.schedule.simulate.memory import peak_activation


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What ``stretto simulate --json`` prints; times in the costs' unit."""

    name: str
    """Of the schedule."""
    ranks: int
    """Pipeline ranks."""
    stages: int
    """Stages of one replica."""
    microbatches: int
    """Micro-batches of a step."""
    makespan: float
    """From the first operation anywhere to the last."""
    span: float
    """Largest per-rank time between its first and last operation."""
    lower_bound: float
    """Least makespan of any schedule of this shape."""
    bubble_rate: float
    """Idle share of all ranks over the makespan."""
    bubble_rate_span: float
    """Idle share of the busiest rank over the span."""
    busy: tuple[float, ...]
    """Time in operations, per rank."""
    peak_activation: tuple[float, ...]
    """Largest activation memory, per rank."""


def simulate(schedule: Schedule, costs: Costs | None = None) -> Figures:
    """Time a schedule (unit costs by default).  Raises ScheduleError where it can't finish."""
    costs = costs or Costs()
    timeline = run(schedule, costs)
    durations = costs.of(schedule).durations()
    busy = []
    for rank in range(schedule.num_ranks):
        ops = Counter(row[:2] for row in schedule.rows(rank))
        busy.append(float(sum(durations[op] * count for op, count in sorted(ops.items()))))
    makespan, span = timeline.makespan, max(timeline.spans)
    return Figures(
        name=schedule.name,
        ranks=schedule.num_ranks,
        stages=schedule.num_stages,
        microbatches=schedule.num_microbatches,
        makespan=makespan,
        span=span,
        lower_bound=lower_bound(schedule, costs),
        bubble_rate=1 - sum(busy) / (schedule.num_ranks * makespan),
        bubble_rate_span=1 - max(busy) / span,
        busy=tuple(busy),
        peak_activation=peak_activation(schedule, act_w=float(np.mean(costs.act_w))),
    )
