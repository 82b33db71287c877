"""Activation memory of a schedule.

One rank's curve for ``0F0 0F1 0I0 0W0 0B1`` with act_w = 1/4:

    2 ┤     ┌───┐
    1 ┤ ┌───┘   └1.25┐       taken at the start of F, 1 - act_w given back at the end of I, the rest at
    0 ┤─┘            └─      the end of W; all of it at the end of B

Besides: where a stage has no backward, or recomputes (R), F gives back at its end what it took; R takes it
again at its start, both but for the stage's input where the costs say what that is (``input_bytes``).  B and I
hold ``rerun_bytes`` besides, from their start to their end.  O gives back at its end what F took, and L takes it
again at its start; where the stage recomputes there is nothing of that to move.  What vocabulary passes keep is
told in ``vocabulary_memory``, and what waits for the next step in ``landing_memory``.

Unit: what one micro-batch keeps alive over one rank's whole share of the layers, so that a chunk of V
counts 1/V (``costs`` says what a unit is where stages differ).

Arithmetic of a rank runs in order: without O and L its peak depends on that order alone, not on any time.
O and L run beside it, so with them ``peak_activation`` (by order: they act where they stand) is what the
schedule asks for, and ``memory_curve`` what happens under given costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stretto.schedule.op import Kind
from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate.costs import Cost, Costs
from stretto.schedule.simulate.landing_memory import landing_changes
from stretto.schedule.simulate.stage_costs import stages_of
from stretto.schedule.simulate.vocabulary_memory import vocabulary_changes

if TYPE_CHECKING:
    from stretto.schedule.arrows import Places
    from stretto.schedule.simulate.clock import Timeline
    from stretto.schedule.simulate.stage_costs import StageCosts, Values

DIGITS = 9
"""Decimals that are kept of a memory figure: sums of thirds over thousands of operations aren't exact beyond."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """What a rank keeps alive over time: ``values[i]`` from ``times[i]`` on; 0 before the first."""

    times: Values
    """Ascending, in the costs' unit of time."""
    values: Values
    """In micro-batches over a rank's whole share of the layers."""


def peak_activation(schedule: Schedule, costs: Costs | None = None, *, act_w: Cost | None = None) -> tuple[float, ...]:
    """Largest activation memory of each rank, by the order of its operations.

    ``act_w``, the fraction kept between I and W, stands for costs of which nothing else is known.
    """
    from stretto.schedule.arrows import Places

    if costs is None:
        costs = Costs() if act_w is None else Costs(act_w=act_w)
    return _peaks_by_order(Places(schedule), costs.of(schedule))


def peaks_over_time(timeline: Timeline) -> tuple[float, ...]:
    """Largest activation memory of each rank, as it comes out under the timeline's costs."""
    import numpy as np

    if np.isin(timeline.schedule.kind, (Kind.O, Kind.L)).any():
        return tuple(_peak(curve.values) for curve in memory_curve(timeline))
    return _peaks_by_order(timeline.graph.places, timeline.graph.costs)


def memory_curve(timeline: Timeline) -> tuple[Curve, ...]:
    """What each rank keeps alive over time."""
    import numpy as np

    changes = _changes(timeline.graph.places, timeline.graph.costs)
    times = np.column_stack([timeline.start, timeline.end])
    curves = []
    for rank in range(timeline.schedule.num_ranks):
        change, time = changes[timeline.rows(rank)].ravel(), times[timeline.rows(rank)].ravel()
        acts = np.flatnonzero(change)
        acts = acts[np.lexsort((change[acts] > 0, time[acts]))]  # at the same time, first what is given back
        curves.append(Curve(times=time[acts], values=np.cumsum(change[acts]).round(DIGITS)))
    return tuple(curves)


def _peaks_by_order(places: Places, costs: StageCosts) -> tuple[float, ...]:
    """Largest activation memory of each rank where every operation acts in its place in the order."""
    import numpy as np

    changes = _changes(places, costs)
    ranks = np.split(changes, places.schedule.offsets[1:-1])
    return tuple(_peak(np.cumsum(rank.ravel())) for rank in ranks)


def _peak(values: Values) -> float:
    """Largest of a rank's values."""
    return round(float(values.max(initial=0.0)), DIGITS)


def _changes(places: Places, costs: StageCosts) -> Values:
    """What each row takes at its start and gives back (negative) at its end (N, 2)."""
    import numpy as np

    schedule, whole, kept = places.schedule, costs.activation, costs.act_w
    taken, given = np.zeros((2, len(Kind), schedule.num_stages))
    taken[[Kind.F, Kind.R, Kind.L]] = whole
    given[Kind.F] = whole * ~places.flows.backward
    given[Kind.O] = whole
    taken[[Kind.B, Kind.I]] = costs.rerun
    given[Kind.B] = whole + costs.rerun
    given[Kind.I], given[Kind.W] = whole * (1 - kept) + costs.rerun, whole * kept
    stage = stages_of(schedule)
    changes = np.column_stack([taken[schedule.kind, stage], -given[schedule.kind, stage]])
    if places.has(Kind.R):
        rows = np.flatnonzero(np.isin(schedule.kind, (Kind.F, Kind.O, Kind.L)))
        rows = rows[places.find(Kind.R, stage[rows], schedule.microbatch[rows]) >= 0]
        forward = schedule.kind[rows] == Kind.F
        taken_again, held = whole[stage[rows]], np.minimum(costs.input, whole)[stage[rows]]
        changes[rows] = forward[:, None] * np.column_stack([taken_again, held - taken_again])
        again = schedule.kind == Kind.R
        changes[again, 0] -= np.minimum(costs.input, whole)[stage[again]]
    if places.has(Kind.S):
        changes += vocabulary_changes(places, costs)
    return changes + landing_changes(places, costs) if schedule.paths and schedule.frozen else changes
