"""The schedule of a plan as a drawing, timed by the simulator under the plan's own costs.

A long step repeats itself, so of one that is too large the first micro-batches are simulated, and of those the
beginning is drawn: the filling of the pipeline and what it settles into.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stretto.planner.calibration import published
from stretto.planner.communication import boundary_seconds
from stretto.planner.estimate import Estimate
from stretto.planner.profile import ROUNDS, schedule_key, scheduled
from stretto.planner.step import stage_turns

if TYPE_CHECKING:
    from stretto.schedule.simulate import Costs

MOST_SIMULATED = 20_000
"""Stages x micro-batches."""
MOST_DRAWN = 1_500
"""Operations; more would be thinner than a hair."""
LANE_OPERATIONS = 64
"""Operations of a rank that have room beside each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A drawing and what it shows."""

    svg: str
    """The text of an SVG file."""
    words: str
    """What of the step is drawn, and how long the simulated step is."""


def picture(estimate: Estimate) -> Picture:
    """Draw the schedule of a plan; ScheduleError for one that can't be."""
    import numpy as np

    from stretto.schedule.render.svg import draw
    from stretto.schedule.simulate import run

    work = estimate.work
    plan, whole = work.plan, work.num_microbatches
    number = whole if plan.num_stages * whole <= MOST_SIMULATED else min(whole, ROUNDS * plan.pp + whole % plan.pp)
    costs, unit = _costs(estimate)
    timeline = run(scheduled(schedule_key(plan), number), costs)
    starts = np.sort(timeline.start - timeline.start.min())
    room = max(LANE_OPERATIONS, min(MOST_DRAWN, LANE_OPERATIONS * plan.pp))
    until = float(starts[room]) if len(starts) > room * 1.2 else None
    title = f"{plan.schedule}, {plan.pp} pipeline rank{'s' if plan.pp > 1 else ''}, time in {unit}"
    measured = estimate.calibration is not None and estimate.calibration.machine is not None
    words = "Drawn from published rates, not from what was measured. " if measured else ""
    words += f"{number} micro-batches take {timeline.makespan:.3g} {unit} in the simulator"
    if number < whole:
        words += f", of {whole}; a long step repeats itself"
    if until is not None:
        words += f"; drawn are the first {until:.3g} {unit}"
    return Picture(svg=draw(timeline, until=until, title=title), words=words + ".")


def _costs(estimate: Estimate) -> tuple[Costs, str]:
    """The simulator's costs of a plan, and their unit of time."""
    from stretto.schedule.simulate import Costs

    work, calibration = estimate.work, estimate.calibration or published(estimate.work.cluster.name)
    turns = stage_turns(work, estimate.calibration)
    unit, scale = ("s", 1.0) if estimate.seconds >= 1 else ("ms", 1e3)
    shard = scale * sum(turns.head) / work.plan.pp / 2 if work.vocabulary else 0.0
    return Costs(
        F=[scale * seconds for seconds in turns.forward],
        I=[scale * (both - part) for both, part in zip(turns.backward, turns.weights, strict=True)],
        W=[scale * seconds for seconds in turns.weights],
        S=shard,
        T=shard,
        comm=scale * boundary_seconds(work, calibration),
    ), unit
