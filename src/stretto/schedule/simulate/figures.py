"""The figures that a schedule is judged by.

makespan          from the first operation anywhere to the last
span              the largest per-rank time between first and last operation, of those that occupy the rank
lower_bound       what no schedule of this shape can go below
bubble_rate       1 - sum(busy) / (ranks x makespan)
bubble_rate_span  1 - max(busy) / span, what the zero-bubble papers print
busy              per rank, time in operations that occupy its arithmetic, and in OPT
peak_activation   per rank, in micro-batches over a rank's whole share of the layers
"""

from __future__ import annotations

from dataclasses import dataclass

from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate.attribution import busy_of
from stretto.schedule.simulate.bound import lower_bound
from stretto.schedule.simulate.clock import Timeline, run
from stretto.schedule.simulate.costs import Costs
from stretto.schedule.simulate.memory import peaks_over_time
from stretto.schedule.simulate.network import Network


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


def simulate(schedule: Schedule, costs: Costs | None = None, network: Network | None = None) -> Figures:
    """Time a schedule (unit costs, messages of pure latency by default).

    Raises ScheduleError where it can't finish, and where the costs are for another shape.
    """
    costs = costs or Costs()
    return figures_of(run(schedule, costs, network), lower_bound(schedule, costs))


def figures_of(timeline: Timeline, bound: float) -> Figures:
    """The figures of a schedule that has been timed; ``bound`` is its lower bound."""
    schedule = timeline.schedule
    makespan, span, busy = timeline.makespan, max(timeline.spans), busy_of(timeline)
    return Figures(
        name=schedule.name,
        ranks=schedule.num_ranks,
        stages=schedule.num_stages,
        microbatches=schedule.num_microbatches,
        makespan=makespan,
        span=span,
        lower_bound=bound,
        bubble_rate=1 - sum(busy) / (schedule.num_ranks * makespan),
        bubble_rate_span=1 - max(busy) / span,
        busy=busy,
        peak_activation=peaks_over_time(timeline),
    )
