"""Step time against memory: every plan that was estimated, and those that nothing beats in both.

A search for the fastest plan passes over slow plans that need little memory.  The front has them: all cores are gone
through again in the order of their bounds, and a sharding is estimated unless some plan is already below its bounds in
both, or it can't fit.  With even stages and 1f1b (or the pinned one of the two closed forms) the front is therefore
complete; other schedules and uneven stages are on it where the search looked at them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace

from stretto.planner.candidates import cores, shardings, worlds
from stretto.planner.estimate import Turns, least_peak_bytes, least_seconds, least_state_bytes, turns
from stretto.planner.groups import limits
from stretto.planner.memory import Margin, memory
from stretto.planner.plan import Answer
from stretto.planner.request import Request
from stretto.planner.step import FAMILIES, step_time
from stretto.planner.workload import Workload
from stretto.spec.errors import ScheduleError, UnsupportedError
from stretto.spec.plan import PlanSpec
from stretto.spec.stages import balanced
from stretto.spec.states import StateSharding, written

SLOWEST = 8.0
"""Times the best step up to which the front is followed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A plan by its two figures."""

    plan: PlanSpec
    seconds: float
    """Of a step."""
    peak: float
    """Bytes of its fullest rank."""
    fits: bool
    """Whether every rank stays within its device."""


def points(answer: Answer) -> tuple[Point, ...]:
    """All plans that were estimated, each once: those of the list, of the search, and of the way along the front."""
    request = answer.request
    found = {
        plan.plan: Point(plan=plan.plan, seconds=plan.seconds, peak=plan.peak_bytes, fits=plan.fits)
        for plan in answer.plans
    }
    for seen, seconds in () if request.cluster.groups else answer.seen:  # the order of groups isn't in the plan
        even = seen.stages == balanced(request.model.num_layers, seen.num_stages)
        plan = replace(seen, stages=None) if even else seen
        if plan not in found:
            found[plan] = _point(request, plan, seconds)
    for point in _along(request, found.values(), SLOWEST * answer.best.seconds):
        found.setdefault(point.plan, point)
    return tuple(found.values())


def front(points: Iterable[Point]) -> tuple[Point, ...]:
    """Those that no other is below in both figures, from the least memory to the fastest.

    >>> some = [Point(plan=PlanSpec(), seconds=t, peak=b, fits=True) for t, b in [(3, 1), (2, 2), (2, 3), (1, 5)]]
    >>> [(point.seconds, point.peak) for point in front(some)]
    [(3, 1), (2, 2), (1, 5)]
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.peak, point.seconds)):
        if not best or point.seconds < best[-1].seconds * (1 - 1e-9):
            best.append(point)
    return tuple(best)


class _Below:
    """What has been reached, to ask whether a plan with certain bounds could still be on the front."""

    def __init__(self, points: Iterable[Point]) -> None:
        self.line = [(point.peak, point.seconds) for point in front(points)]

    def beats(self, seconds: float, peak: float) -> bool:
        """Whether some plan is at least as fast and as small."""
        at = bisect_right(self.line, (peak, float("inf")))
        return at > 0 and self.line[at - 1][1] <= seconds

    def add(self, seconds: float, peak: float) -> None:
        """Put a plan on the line, and take those off it that it beats."""
        if not self.beats(seconds, peak):
            kept = [one for one in self.line if one[0] < peak or one[1] < seconds]
            self.line = sorted([*kept, (peak, seconds)])


def _along(request: Request, known: Iterable[Point], slowest: float) -> list[Point]:
    """Plans of closed form that might be on the front and take up to ``slowest`` seconds, fastest bound first."""
    below, seen, found = _Below(known), dict[object, Turns](), []
    bounded = []
    for ranks in worlds(request):
        for core in cores(request, ranks):
            if not core.offload:
                work = request.work(core)
                key = (core.tp, core.cp, core.micro_batch_size, core.recompute, work.cluster)
                if key not in seen:
                    seen[key] = turns(work, request.calibration)
                bounded.append((least_seconds(work, seen[key]), core))
    schedule = request.pins.get("schedule", FAMILIES[0])
    if schedule not in FAMILIES or request.pins.get("chunks", 1) != 1:
        return []

    def hopeless(bound: float, plan: PlanSpec) -> bool:
        work = request.work(plan)
        peak = _least_bytes(work, request.margin)
        return peak > work.cluster.memory_bytes or below.beats(bound, peak)

    for bound, core in sorted(bounded, key=lambda pair: pair[0]):
        if bound > slowest:
            break
        if hopeless(bound, _most_divided(core)):
            continue
        for plan in shardings(request, core):
            if hopeless(bound, plan):
                continue
            try:
                point = _point(request, replace(plan, schedule=schedule))
            except (ScheduleError, UnsupportedError):
                continue
            below.add(point.seconds, point.peak)
            found.append(point)
    return found


def _most_divided(core: PlanSpec) -> PlanSpec:
    """The core with each state over all data ranks, whatever is pinned."""
    ranks = core.dp * core.cp
    states = StateSharding(parameters=ranks, gradients=ranks, optimizer=ranks)
    return written(replace(core, dp_replicate=1, dp_shard=core.dp), states)


def _least_bytes(work: Workload, margin: Margin) -> float:
    """Below the fullest rank's bytes: what comes and goes has its fragments, and every rank its context."""
    kept = least_peak_bytes(work, share=1 + margin.fragmentation)
    return margin.context_bytes + max(least_state_bytes(work), kept)


def _point(request: Request, plan: PlanSpec, seconds: float | None = None) -> Point:
    work: Workload = request.work(plan)
    if seconds is None:
        seconds = step_time(work, request.calibration).total
    ranks = [rank.total for rank in memory(work, request.margin)]
    fits = all(total <= limit for total, limit in zip(ranks, limits(work), strict=True))
    return Point(plan=plan, seconds=seconds, peak=max(ranks), fits=fits)
