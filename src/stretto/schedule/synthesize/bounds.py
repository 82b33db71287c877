"""What no schedule of a problem can go below, memory limit included.

Micro-batches are alike, so exchanging their names changes nothing: whatever order a schedule has, calling the
n-th F, I and W of each stage those of micro-batch n gives a schedule with the same times and the same memory.
Every bound may therefore take micro-batches to pass each stage in turn.

    one machine   a rank's work fits between the earliest that it can arrive and the least that must follow it
    windows       a rank can't hold enough activations to stay busy until its first I, nor from its last F on:

                    rank 3  ····FFFF·····IWFIWF ... WFIWFIIWIW·W··    V, 4 ranks, memory for 4 chunks
                            └─ first I ─┘               └ after ┘     dots: idle that no order avoids
                                                        last F
    area          memory x time is at least what all micro-batches hold it, and a rank has only its limit
    round trips   with k micro-batches in flight, each k-th one starts a whole round trip after the one before

The largest counts.  In the time that it is given, ``lower_bound`` looks at all schedules of one rank and of more
(``relax``), and what that proves counts too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stretto.schedule.synthesize.chain import Chain
from stretto.schedule.synthesize.problem import TOLERANCE
from stretto.schedule.synthesize.replay import Durations

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from stretto.schedule.synthesize.problem import Problem

GRID = 2000
"""Steps that a memory limit is cut into where its activations have no common measure."""
ROUNDING = 1e-9
"""Relative; what floating point may have added to a quotient."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Bound:
    """A makespan that no schedule goes below, and why; bounds compare by value."""

    value: float
    """In the costs' unit of time; infinite where no schedule fits the memory limit."""
    reason: str
    """What makes it so, in a few words."""


def least_memory(problem: Problem) -> npt.NDArray[np.float64]:
    """Least limit of each rank that admits any schedule (R,): one micro-batch on all of the rank's stages.

    A micro-batch passes all of a rank's stages forward before the first of them gives anything back, so at
    that moment it holds them all; and taking micro-batches one at a time needs no more.
    """
    import numpy as np

    least = np.bincount(problem.placement, weights=problem.activation, minlength=problem.ranks)
    return least.astype(np.float64)


def lower_bound(problem: Problem, *, time_budget: float = 2.0, upper: float = math.inf) -> Bound:
    """The best bound that is proven within about ``time_budget`` seconds; 0 takes closed forms alone.

    ``upper`` is the makespan of a schedule that is known, if any: the search need not look at slower ones, and ends
    where it proves that there is no faster one.
    """
    if bool((least_memory(problem) > problem.limit + TOLERANCE).any()):
        return Bound(value=math.inf, reason="the memory limit admits no schedule")
    chain = Chain.along(Durations.of(problem))
    ranks = [Rank.of(problem, chain, number) for number in range(problem.ranks)]
    best = {rank.number: max(_of_rank(rank)) for rank in ranks}
    bound = max(best.values())
    if time_budget <= 0:
        return bound
    from stretto.schedule.synthesize.relax import tighten

    order = sorted((rank for rank in ranks if rank.stages), key=lambda rank: -best[rank.number].value)
    return tighten(problem, order, bound, time_budget=time_budget, upper=upper)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of a rank with the least times around its operations."""

    F: float
    I: float  # noqa: E741
    W: float
    before_F: float
    before_I: float
    after_F: float
    after_I: float
    held: float
    """Least time from the start of F to the end of I."""
    whole: int
    """Memory from F to I, in the rank's grid."""
    rest: int
    """Memory kept between I and W, in the rank's grid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """What one rank sees of a problem; memory in whole steps of a grid, rounded so that no schedule is lost."""

    number: int
    microbatches: int
    stages: tuple[Stage, ...]
    """Ascending."""
    capacity: int | None
    """Memory limit in steps of the grid, None where all activations fit."""

    @classmethod
    def of(cls, problem: Problem, chain: Chain[float], number: int) -> Rank:
        """Collect the rank's stages and cut its memory into steps."""
        held = problem.chunks[number]
        memory = [(float(problem.activation[s]), float(problem.activation[s] * problem.act_w[s])) for s in held]
        limit = float(problem.limit[number]) + TOLERANCE
        free = problem.microbatches * sum(whole for whole, _ in memory) <= limit
        step = common_measure([value for pair in memory for value in pair]) or (1.0 if free else limit / GRID)
        stages = tuple(
            Stage(
                F=float(problem.F[s]),
                I=float(problem.I[s]),
                W=float(problem.W[s]),
                before_F=chain.before_F[s],
                before_I=chain.before_I[s],
                after_F=chain.after_F[s],
                after_I=chain.after_I[s],
                held=chain.held[s],
                whole=math.floor(whole / step + 1e-6),
                rest=math.floor(rest / step + 1e-6),
            )
            for s, (whole, rest) in zip(held, memory, strict=True)
        )
        capacity = None if free else math.floor(limit / step * (1 + ROUNDING))
        return cls(number=number, microbatches=problem.microbatches, stages=stages, capacity=capacity)

    @property
    def work(self) -> float:
        """Time that the rank computes."""
        return self.microbatches * sum(stage.F + stage.I + stage.W for stage in self.stages)

    @property
    def last(self) -> float:
        """Length of the stretch before the end in which the rank can run no F any more."""
        return min(stage.after_F for stage in self.stages)

    @property
    def last_idle(self) -> float:
        """Time that the rank stands still in it, at the least."""
        return self.last - _busy_last(self)


def common_measure(values: list[float]) -> float | None:
    """Largest step that all values are multiples of, None where it would be too fine to count in."""
    positive = [value for value in values if value > 0]
    if not positive:
        return None
    largest = max(positive)
    for parts in range(1, 65):
        step = largest / parts
        if all(abs(value / step - round(value / step)) < 1e-7 for value in positive):
            return step
    return None


def _of_rank(rank: Rank) -> list[Bound]:
    """All closed-form bounds of one rank."""
    if not rank.stages:
        return [Bound(value=0.0, reason=f"rank {rank.number} holds no stage")]
    bounds = [Bound(value=one_machine(rank), reason=f"work of rank {rank.number} and the way to and from it")]
    if rank.capacity is not None:
        name = f"memory of rank {rank.number}"
        bounds += [
            Bound(value=windows(rank), reason=f"{name}: idle until its first I and after its last F"),
            Bound(value=area(rank), reason=f"{name}: what all micro-batches hold, over time"),
            Bound(value=round_trips(rank), reason=f"{name}: round trips with few micro-batches in flight"),
        ]
    return bounds


def one_machine(rank: Rank) -> float:
    """Earliest arrival, work and least remainder of the rank's operations, for the worst set of them.

    For any h and q, the operations that can't start before h and leave at least q after them run one at a
    time between h and makespan - q (Jackson 1955).
    """
    jobs = []
    for stage in rank.stages:
        jobs.append((stage.before_F, stage.F, stage.after_F))
        jobs.append((stage.before_I, stage.I, stage.after_I))
        jobs.append((stage.before_I + stage.I, stage.W, 0.0))
    bound = 0.0
    for least_head in {head for head, _, _ in jobs}:
        work = 0.0
        for head, duration, tail in sorted(jobs, key=lambda job: -job[2]):
            if head >= least_head:
                work += duration * rank.microbatches
                bound = max(bound, least_head + work + tail)
    return bound


def windows(rank: Rank) -> float:
    """Work plus the idle time of the rank's first and of its last stretch.

    *First*: nothing is given back before the first I, which can't start before t1 = before_I of the last
    stage.  Until then the rank runs only F, as many as its memory holds, those of each stage not before
    they can arrive.  *Last*: every F is over t2 = after_F of the last stage before the end.  In the stretch
    after that run only I and W whose activations were held at its beginning.

    With i1 and i2 the idle time of both, C the makespan: where the stretches don't overlap, C >= work + i1 + i2.
    Where they do, cutting them so that they just meet takes t1 + t2 - C off both sides at most, so that
    C >= work + i1 + i2 - (t1 + t2 - C), which can't be if work + i1 + i2 > t1 + t2.  Returns 0 where it isn't.
    """
    first = min(stage.before_I for stage in rank.stages)
    bound = rank.work + (first - _busy_first(rank, first)) + rank.last_idle
    return bound if bound > (first + rank.last) * (1 + ROUNDING) else 0.0


def _busy_first(rank: Rank, until: float) -> float:
    """Most time that the rank can spend in F by then: F of a stage and of later ones only once they arrive."""
    assert rank.capacity is not None
    best = [0.0] * (rank.capacity + 1)
    for stage in reversed(rank.stages):
        most = until - stage.before_F
        best = [min(most, value) for value in _filled(best, [(stage.whole, stage.F)])]
    return best[-1]


def _busy_last(rank: Rank) -> float:
    """Most time that the rank can spend in I and W in its last stretch.

    Both of an activation that is whole at its beginning, W alone of one that is past its I; and I not
    later than its remainder allows.
    """
    pairs = [(stage.whole, stage.I + stage.W) for stage in rank.stages]
    alone = [(stage.rest, stage.W) for stage in rank.stages]
    total = rank.microbatches * sum(stage.I + stage.W for stage in rank.stages)
    if rank.capacity is None:
        return min(rank.last, total)
    empty = [0.0] * (rank.capacity + 1)
    most_I = rank.last - min(stage.after_I for stage in rank.stages)
    return min(rank.last, total, _filled(empty, pairs + alone)[-1], most_I + _filled(empty, alone)[-1])


def _filled(best: list[float], items: list[tuple[int, float]]) -> list[float]:
    """Most value within each weight when any number of the items may be added to what was best without them."""
    best = list(best)
    for weight, value in items:
        if weight == 0:
            return [math.inf] * len(best)
        for room in range(weight, len(best)):
            best[room] = max(best[room], best[room - weight] + value)
    return best


def area(rank: Rank) -> float:
    """Time that the rank's memory needs for all activations, held no longer than a micro-batch that never waits.

    The memory is not full from the start: it fills no faster than F can run, one operation ahead; nor to the
    end: what is held x before it takes at least x of I and W to give back, but for one operation under way.
    Both triangles are lost; where they would overlap, the larger.
    """
    assert rank.capacity is not None
    need = rank.microbatches * sum(stage.whole * stage.held + stage.rest * stage.W for stage in rank.stages)
    capacity = min(rank.capacity, rank.microbatches * sum(stage.whole for stage in rank.stages))
    largest = max(stage.whole for stage in rank.stages)
    filling = max(stage.whole / stage.F for stage in rank.stages)
    emptying = max(max(stage.rest / stage.W, stage.whole / (stage.I + stage.W)) for stage in rank.stages)
    rise = max(0, capacity - largest)
    ramps = (rise / filling, rise / emptying)
    apart = (need + rise * sum(ramps) / 2) / capacity
    joined = (need + rise * max(ramps) / 2) / capacity
    return rank.stages[0].before_F + (apart if apart >= sum(ramps) else joined)


def round_trips(rank: Rank) -> float:
    """Round trips that a stage needs when its rank holds at most k of its activations.

    F of micro-batch n + k waits for I of micro-batch n, and for its W where that keeps the whole activation; a
    round trip after its own F.  The last micro-batches follow one F apart.
    """
    assert rank.capacity is not None
    bound = 0.0
    for stage in rank.stages:
        in_flight = rank.capacity // stage.whole if stage.whole else rank.microbatches
        trips, more = divmod(rank.microbatches - 1, in_flight)
        trip = stage.held + (stage.W if stage.rest == stage.whole else 0.0)
        bound = max(bound, stage.before_F + trips * trip + (more + 1) * stage.F + stage.after_F)
    return bound
