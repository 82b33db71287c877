"""Offload: activations that wait long for their backward spend the time in the host's memory (PipeOffload, Wan et al.
2025).

    0F0 0O0 0F1 0F2 ... 0L0 0B0          O moves what 0F0 kept to the host, L brings it back for 0B0

O and L run on streams of their own (one per direction and rank, each a queue in the order of the rank) and
occupy no arithmetic: the rank goes on at once.  One starts when the operation before it in the rank's order that does
occupy arithmetic has ended and its stream is free.

**Arrows**: sOm needs sFm; sLm needs sOm; sBm or sIm (and sRm) needs sLm.
**Memory**: what F took is given back at the end of O and taken again at the start of L.  Counted by order alone,
without times, O gives back and L takes where they stand.
**Complete**: O and L come in pairs, on the rank of the stage, once each.

**What moves.**  The longest-lived first: what lives twice as long frees twice the memory for the same traffic, so
that half of the traffic saves more than half of the memory where lives differ, as they do between the chunks
of a rank.  An O stands right behind its F.  An L stands as late as it can for its backward and all later loads to
be in time: behind the last operation on the arithmetic that ends before that.  An activation whose O and L don't
both fit into its life stays.

Under a limit as few move as must: where a rank would come above it, what is due last of the activations that could
be gone by then (Belady's rule, the best there is for equal sizes).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stretto.schedule.op import COMPUTE, Kind, Op
from stretto.schedule.passes.chosen import Stages, chosen_stages, together
from stretto.schedule.passes.communication import lower, without_messages
from stretto.schedule.passes.host import TOLERANCE, Host, Kept, Unit
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError

if TYPE_CHECKING:
    from stretto.schedule.simulate.clock import Timeline
    from stretto.schedule.simulate.costs import Costs
    from stretto.schedule.simulate.stage_costs import StageCosts


def offload(
    schedule: Schedule,
    *,
    stages: Stages | None = None,
    fraction: float | None = None,
    limit: float | None = None,
    costs: Costs | None = None,
) -> Schedule:
    """O and L come in, all else keeps its order; under ``costs`` no operation starts later than it did.

    ``stages`` (default: all) is what may be moved.  ``fraction`` moves at most so much of each rank's
    activations; ``limit`` (in micro-batches over a rank's whole share of the layers) as few as keep every rank
    below it; with neither, all that fit.  Where ``costs`` give O and L no time, each is planned as long as the
    stage's forward.
    Raises ScheduleError for options that can't be, a limit that can't be kept, and a schedule that offloads already.
    """
    from stretto.schedule.simulate.clock import run
    from stretto.schedule.simulate.costs import Costs

    _check(schedule, fraction, limit)
    bare = without_messages(schedule)
    costs = costs or Costs()
    timeline, stage_costs = run(bare, costs), costs.of(bare)
    movable = chosen_stages(bare, stages)
    orders = []
    for rank in range(bare.num_ranks):
        host = _host(timeline, stage_costs, rank, bare.ops(rank), movable)
        if limit is None:
            host.move(host.longest(1.0 if fraction is None else fraction))
        elif (least := host.keep_below(limit)) > limit + TOLERANCE:
            raise ScheduleError(
                f"{bare.name} can't keep the activations of rank {rank} below {limit:.9g} micro-batches by "
                f"offloading: the least that it reaches is {least:.9g}. Allow that, or recompute."
            )
        orders.append(host.order())
    result = bare.with_orders(orders)
    return lower(result) if schedule.lowered else result


def _check(schedule: Schedule, fraction: float | None, limit: float | None) -> None:
    """Raise ScheduleError for options that can't be and for a schedule that has what must come later."""
    if fraction is not None and limit is not None:
        raise ScheduleError("Offload takes a fraction or a limit, not both.")
    if fraction is not None and not (isinstance(fraction, (int, float)) and 0 < fraction <= 1):
        raise ScheduleError(f"Offload can't move a fraction of {fraction!r}; it is a number above 0 and at most 1.")
    if limit is not None and not (isinstance(limit, (int, float)) and limit > 0):
        raise ScheduleError(f"Offload can't keep a limit of {limit!r}; a rank that computes needs memory above 0.")
    if (schedule.kind == Kind.O).any():
        raise ScheduleError(f"{schedule.name} has O and L already; offload comes once.")


def _units(timeline: Timeline, rank: int, order: list[Op]) -> list[Unit]:
    """A rank's operations with their times."""
    rows = timeline.rows(rank)
    times = iter(zip(timeline.start[rows].tolist(), timeline.end[rows].tolist(), strict=True))
    units: list[Unit] = []
    aside: list[Op] = []
    for group in together(order):
        spans = [next(times) for _ in group]
        if group[0].kind in COMPUTE:
            units.append(Unit(start=spans[0][0], end=max(end for _, end in spans), ops=[*aside, *group]))
            aside = []
        elif units:
            units[-1].ops += group
        else:
            aside += group
    return units


def _host(timeline: Timeline, costs: StageCosts, rank: int, order: list[Op], movable: frozenset[int]) -> Host:
    """A rank's operations with their times, and what it keeps between them."""
    units = _units(timeline, rank, order)
    recomputed = {(op.stage, op.microbatch) for unit in units for op in unit.ops if op.kind is Kind.R}
    kept, held = [], []
    forwards: dict[tuple[int, int], int] = {}
    for index, unit in enumerate(units):
        for op in unit.ops:
            key = (op.stage, op.microbatch)
            held += _changes(timeline.schedule, op, unit, costs, recomputed=key in recomputed)
            if op.kind is Kind.F:
                forwards[key] = index
            elif op.kind in (Kind.B, Kind.I) and op.stage in movable and key not in recomputed:
                kept.append(_kept(op, units, forwards[key], index, costs))
    return Host(units, kept, held)


def _kept(op: Op, units: list[Unit], forward: int, backward: int, costs: StageCosts) -> Kept:
    """What a backward needs of its forward."""
    forward_time = float(costs.F[op.stage])
    timed = bool(costs.O.any() or costs.L.any())
    return Kept(
        stage=op.stage,
        microbatch=op.microbatch,
        amount=float(costs.activation[op.stage]),
        forward=forward,
        backward=backward,
        made=units[forward].end,
        due=units[backward].start,
        offload=float(costs.O[op.stage]) if timed else forward_time,
        load=float(costs.L[op.stage]) if timed else forward_time,
    )


def _changes(
    schedule: Schedule, op: Op, unit: Unit, costs: StageCosts, *, recomputed: bool
) -> list[tuple[float, float]]:
    """Times and amounts by which an operation changes what its rank keeps."""
    if op.kind not in (Kind.F, Kind.B, Kind.I, Kind.W, Kind.R):
        return []
    amount, later = float(costs.activation[op.stage]), float(costs.act_w[op.stage])
    if op.kind is Kind.F:
        passing = recomputed or not schedule.has_backward(op.stage)
        return [(unit.start, amount), (unit.end, -amount)] if passing else [(unit.start, amount)]
    if op.kind is Kind.R:
        return [(unit.start, amount)]
    given = {Kind.B: 1.0, Kind.I: 1.0 - later, Kind.W: later}[op.kind]
    return [(unit.end, -amount * given)]
