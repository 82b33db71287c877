"""2BP: the backward of any schedule in two stages, the second as late as wanted (Rae et al. 2024, 2BP).

    0B0 0B1 0B2   ──►   0I0 0I1 0I2 0W0 0W1 0W2        when=end
    0B0 0B1 0B2   ──►   0I0 0I1 0W0 0I2 0W1 0W2        when=idle, where the rank waits for the gradient of 0I2
    0B0 0B1 0B2   ──►   0I0 0I1 0W0 0I2 0W1 0W2        when=late, behind=1: each W comes after one more I

Nothing but W waits longer, so gradients travel as fast as they can.  *end* is the paper's first variant (all W at
the end of the step, where they may be run as one), *idle* its second (W in the time in which a rank would wait, the
rest at the end); *late* bounds what is kept by a number instead.  A W keeps its activation alive: under a memory limit
the oldest run before an F that would come above it.

A W stands before whatever ends its stage's or its rank's step: REDUCE_GRAD of the stage, OPT.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from stretto.schedule.op import Kind, Op
from stretto.schedule.passes.communication import lower, without_messages
from stretto.schedule.passes.split_backward import split_backward
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError

if TYPE_CHECKING:
    from stretto.schedule.simulate.clock import Timeline
    from stretto.schedule.simulate.costs import Costs
    from stretto.schedule.simulate.stage_costs import StageCosts

WHEN = ("idle", "end", "late")
TOLERANCE = 1e-6
"""How far above its limit memory may come out, for the sake of rounding."""


def two_stage_backward(
    schedule: Schedule,
    *,
    when: str = "idle",
    behind: int | str | None = None,
    limit: float | str | None = None,
    costs: Costs | None = None,
) -> Schedule:
    """W of every backward moves later, all else keeps its order; under ``costs`` no F or I starts later for it.

    ``behind`` is by how many I of its rank a W comes later, where ``when`` is late (1 if left out).  ``limit`` is the
    memory of a rank, in micro-batches over a rank's whole share of the layers; where it makes a W come before an F,
    that F waits for it.  Raises ScheduleError for options that can't be, and for a limit that the schedule doesn't keep
    with W at once.
    """
    from stretto.schedule.simulate.clock import run
    from stretto.schedule.simulate.costs import Costs

    least, most = _least(1 if behind is None else behind), _limit(limit)
    if when not in WHEN:
        raise ScheduleError(f"W can't come {when!r}; when is one of {', '.join(WHEN)}.")
    if behind is not None and when != "late":
        raise ScheduleError(f"behind={behind} says how late W comes where when=late, not where when={when}.")
    costs = costs or Costs()
    bare = split_backward(without_messages(schedule))
    if most < float("inf"):
        _check_limit(bare, most, costs)
    of_stages = costs.of(bare)
    waiting = least if when == "late" else bare.num_ops
    delayed = bare.with_orders([_delay(bare.ops(rank), waiting, most, of_stages) for rank in range(bare.num_ranks)])
    if when == "idle":
        timeline = run(delayed, costs)
        delayed = delayed.with_orders(
            [_fill(delayed.ops(rank), _times(timeline, rank), of_stages) for rank in range(bare.num_ranks)]
        )
    return lower(delayed) if schedule.lowered else delayed


def _least(behind: int | str) -> int:
    """``behind`` as a number."""
    if isinstance(behind, bool) or not str(behind).isdecimal():
        raise ScheduleError(f"W can't come {behind!r} I later; behind is a whole number, 0 or more.")
    return int(behind)


def _limit(limit: float | str | None) -> float:
    """``limit`` as a number."""
    try:
        value = float("inf") if limit is None else float(limit)
    except (TypeError, ValueError):
        value = 0.0
    if not value > 0:
        raise ScheduleError(f"2bp can't keep a limit of {limit!r}; a rank that computes needs memory above 0.")
    return value


def _check_limit(schedule: Schedule, limit: float, costs: Costs) -> None:
    """Raise ScheduleError where even W at once takes more than the limit, or memory isn't only F's, I's and W's."""
    from stretto.schedule.simulate.memory import peak_activation

    others = {kind for kind in (Kind.R, Kind.O) if (schedule.kind == kind).any()}
    if others:
        raise ScheduleError(f"{schedule.name} has {others.pop().name} already; with a limit 2bp comes before that.")
    peaks = peak_activation(schedule, costs)
    if max(peaks) > limit + TOLERANCE:
        raise ScheduleError(
            f"{schedule.name} keeps {max(peaks):g} micro-batches of activations on rank {peaks.index(max(peaks))} even "
            f"with W at once; the memory limit is {limit:g}."
        )


def _delay(order: list[Op], behind: int, limit: float, costs: StageCosts) -> list[Op]:
    """One rank's order with each W so many I later, at the end of its step at the latest, before an F without room."""
    result: list[Op] = []
    waiting: deque[Op] = deque()
    held = 0.0

    def give_back() -> None:
        nonlocal held
        op = waiting.popleft()
        held -= float(costs.activation[op.stage] * costs.act_w[op.stage])
        result.append(op)

    for op in order:
        if op.kind is Kind.W:
            waiting.append(op)
            while len(waiting) > behind:
                give_back()
            continue
        if op.kind is Kind.F:
            while waiting and held + costs.activation[op.stage] > limit + TOLERANCE:
                give_back()
            held += float(costs.activation[op.stage])
        elif op.kind is Kind.I:
            held -= float(costs.activation[op.stage] * (1 - costs.act_w[op.stage]))
        elif op.kind is Kind.OPT or (op.kind is Kind.REDUCE_GRAD and any(w.stage == op.stage for w in waiting)):
            while waiting:
                give_back()
        result.append(op)
    return result + list(waiting)


def _times(timeline: Timeline, rank: int) -> list[tuple[float, float]]:
    """Start and end of each operation of a rank."""
    rows = timeline.rows(rank)
    return list(zip(timeline.start[rows].tolist(), timeline.end[rows].tolist(), strict=True))


def _fill(order: list[Op], times: list[tuple[float, float]], costs: StageCosts) -> list[Op]:
    """One rank's order with W moved forward into the gaps that are long enough."""
    result: list[Op] = []
    ready: deque[Op] = deque()
    moved: set[Op] = set()
    free = 0.0
    for op, (start, end) in zip(order, times, strict=False):
        while ready and free + costs.W[ready[0].stage] <= start + TOLERANCE * (end - start) and not _inside(result):
            moved.add(ready[0])
            free += float(costs.W[ready[0].stage])
            result.append(ready.popleft())
        if op.kind is Kind.I:
            ready.append(Op(Kind.W, stage=op.stage, microbatch=op.microbatch))
        elif op.kind is Kind.W:
            if op in moved:
                continue
            ready.remove(op)
        result.append(op)
        free = max(free, end)
    return result


def _inside(result: list[Op]) -> bool:
    """Whether the last operation overlaps with the one that is to follow."""
    return bool(result) and result[-1].joined
