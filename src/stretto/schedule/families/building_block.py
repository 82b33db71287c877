"""Building blocks: what one micro-batch does, repeated every period (Qi et al. 2024, Controllable Memory, section 3).

A block says when F, I and W of one micro-batch start on each stage.  Repeated every T it is a schedule, as long as no
rank has two operations at the same time modulo T.  How long a stage holds an activation (its *lifespan*) decides
the memory: a rank keeps the sum of its stages' lifespans / T alive.  Four stages in a V on two ranks, T = 6:

    block    rank 0 │F0-            F3-I3-W3-   I0-W0-
             rank 1 │   F1-F2-            I2-I1-      W2-W1-

    repeated rank 0 │F0-            F3-I3-W3-F0-I0-W0-F3-I3-W3-F0-I0-W0-F3-...
             rank 1 │   F1-F2-            I2-I1-F1-F2-W2-W1-I2-I1-F1-F2-...

``search`` tries blocks that fall behind by different amounts on the way down and up, under the actual costs, in
periods from the busiest rank's work on, as long as they can keep the memory limit.  ``repeat`` makes a schedule of
one: its order is run with every operation as early as it can be (*squeezed*), W in the gaps, always within the
limit; then operations of the critical path are moved.  So a block needs not be exact, and uneven stages, latencies
and the way down and up, of which a block knows nothing, are taken care of there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from stretto.schedule.families.blocks.repeating import Run
    from stretto.schedule.families.blocks.work import Work
    from stretto.schedule.synthesize.problem import Problem

    Values = npt.NDArray[np.float64]
    Numbers = npt.NDArray[np.int64]

Waits = tuple[tuple[float, ...], tuple[float, ...]]
"""By how much F and I fall behind at each step, for the first, second, ... stage of a rank; unit: a sixth of an
average operation's share of the period."""

LIMIT_ROUNDING = 1e-7
CLOSE = 1e-9
"""Fraction of a time within which times are equal."""
FINE = {False: tuple(range(16)), True: (0, 1, 2, 3, 4, 6)}
COARSE = {False: tuple(range(0, 12, 2)), True: (0, 2, 4)}
SLOW = {False: (0, 2, 4), True: (0, 3)}
"""How far to fall behind, with several stages per rank or with one: in the shortest period, in others, and where the
loops aren't compiled."""
FEW_OPERATIONS = 20_000
"""Schedules below are run with all policies."""
TRIED_OPERATIONS = 1_500_000
POLISHED, MOST_ROUNDS, ROUND_OPERATIONS = 3, 8_000, 5_000_000
STEP = 1.04
"""Ratio of one period that is tried to the one before."""
QUICK = ((0.0, 0.0, 8.0), (1.0, 0.5, 8.0))
"""Policies that every block is run with: W only where it fits; or W at once and others half overdue."""
THOROUGH = tuple((w, early, look) for w in (0.0, 0.5, 1.0) for early in (0.0, 0.5) for look in (0.0, 8.0))
"""Policies that the best blocks are run with."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """When the operations of one micro-batch start, in the unit of the costs."""

    period: float
    """Time from one micro-batch to the next."""
    starts: Values
    """Of F, I and W on each stage (3, S)."""
    peak: float
    """Memory of the fullest rank."""
    fits: bool
    """Whether every rank keeps its limit; where not, it does if each W follows its I at once."""


def search(problem: Problem, *, waits: Sequence[Waits] | None = None) -> Block:
    """The block whose repetition takes the least time within the limit.

    ``waits``: how far to fall behind; left out, all that is worth trying.  Raises ScheduleError where a single
    micro-batch doesn't fit in the limit.
    """
    return _ranked(problem, waits)[0]


def repeat(block: Block, problem: Problem, *, name: str = "building-block", rounds: int = 0) -> Schedule:
    """Repeat a block for the problem's micro-batches, squeeze it and polish it for so many rounds.

    Raises ScheduleError where the block can't keep the limit.
    """
    return _best(problem, [block], name=name, rounds=rounds, span_weight=0.0)


def search_and_repeat(
    problem: Problem,
    *,
    name: str = "building-block",
    waits: Sequence[Waits] | None = None,
    rounds: int | None = None,
    span_weight: float = 0.0,
) -> Schedule:
    """Search for blocks, repeat the best few, polish the best of these.

    ``rounds`` left out is as many as take about half a second.  ``span_weight`` is the share of the span (the largest
    time between a rank's first and last operation) in what is made small; the makespan has the rest.
    """
    if rounds is None:
        rounds = min(MOST_ROUNDS, ROUND_OPERATIONS // (3 * problem.stages * problem.microbatches)) if _fast() else 0
    most = 12 if 3 * problem.stages * problem.microbatches < FEW_OPERATIONS else 3
    return _best(
        problem,
        _ranked(problem, waits, span_weight=span_weight)[:most],
        name=name,
        rounds=rounds,
        span_weight=span_weight,
    )


def _fast() -> bool:
    """Whether the loops are compiled."""
    from stretto.schedule.families.blocks.running import run_order

    return hasattr(run_order, "py_func")


def _ranked(problem: Problem, waits: Sequence[Waits] | None, *, span_weight: float = 0.0) -> list[Block]:
    """Blocks that can keep the limit, the best first, judged by repeating them under the quick policies."""
    from stretto.schedule.families.blocks.repeating import Repeating

    _check_limit(problem)
    few = min(problem.microbatches, max(16, 4 * problem.ranks))
    repeating = Repeating(problem, few, span_weight=span_weight)
    most = max(12, min(600, TRIED_OPERATIONS // (3 * problem.stages * few))) if _fast() else 12
    blocks = list(_blocks(problem, waits))
    spread = [blocks[index * len(blocks) // most] for index in range(most)] if len(blocks) > most else blocks
    best: dict[bytes, tuple[float, int, Block]] = {}
    for number, block in enumerate(spread):
        order = repeating.order(block.period, block.starts)
        if order.tobytes() not in best:
            figure = min((run.figure for run in repeating.runs(order, QUICK)), default=math.inf)
            best[order.tobytes()] = (figure, number, block)
    return [block for figure, _, block in sorted(best.values(), key=lambda entry: entry[:2]) if figure < math.inf]


def _best(problem: Problem, blocks: Sequence[Block], *, name: str, rounds: int, span_weight: float) -> Schedule:
    """Repeat blocks, polish the best runs, and make a schedule of the best."""
    from stretto.schedule.families.blocks.repeating import Repeating

    repeating = Repeating(problem, problem.microbatches, span_weight=span_weight)
    small = 3 * problem.stages * problem.microbatches < FEW_OPERATIONS and _fast()
    policies, passes = (THOROUGH, 3) if small else (QUICK, 2)
    runs: list[Run] = []
    for block in blocks:
        order = repeating.order(block.period, block.starts)
        runs += repeating.runs(order, policies, passes=passes)
    runs = sorted({round(run.figure, 9): run for run in reversed(runs)}.values(), key=lambda run: run.figure)[:POLISHED]
    if not runs:
        raise ScheduleError("The block can't keep the memory limit; search for one that can.")
    if rounds:  # the plain runs stand first, so that polishing changes nothing where it gains nothing
        runs += [repeating.polished(run, rounds=rounds) for run in runs]
    best = min(run.figure for run in runs)
    return repeating.schedule(next(run for run in runs if run.figure <= best * (1 + CLOSE)), name=name)


def _check_limit(problem: Problem) -> None:
    """Raise ScheduleError where some rank can't hold even one micro-batch."""
    for rank, stages in enumerate(problem.chunks):
        least = float(problem.activation[list(stages)].sum())
        if least > problem.limit[rank] + LIMIT_ROUNDING:
            raise ScheduleError(
                f"The memory limit of rank {rank} is {problem.limit[rank]:g}, but one micro-batch keeps {least:g} "
                f"alive there until its backward; the least limit that is possible is {least:g}."
            )


def _blocks(problem: Problem, waits: Sequence[Waits] | None) -> Iterator[Block]:
    """All blocks that are worth a try, those in the shortest period first."""
    from stretto.schedule.families.blocks import work as arrays

    work = arrays.of(problem)
    flat = arrays.flattened(work)
    yield from _in_periods(work, problem.microbatches, waits)
    if (flat.duration != work.duration).any() or work.comm.any():
        yield from _in_periods(flat, problem.microbatches, waits)


def _in_periods(work: Work, microbatches: int, waits: Sequence[Waits] | None) -> Iterator[Block]:
    """Blocks in the shortest period, and in a few about the shortest in which one without waits keeps the limit."""
    several = work.stages_on.shape[1] > 1
    fine, coarse = (FINE[several], COARSE[several]) if _fast() else (SLOW[several], SLOW[several])
    period = work.busiest
    yield from _make(work, period, microbatches, waits or _combinations(fine, several=several))
    while not any(block.fits for block in _make(work, period, microbatches, _combinations((0,), several=False))):
        period *= STEP
    for power in range(-2, 4):
        stretched = period * STEP**power
        if stretched > work.busiest:
            yield from _make(work, stretched, microbatches, waits or _combinations(coarse, several=several))


def _combinations(levels: Sequence[int], *, several: bool) -> list[Waits]:
    """F and I of a rank's first, third, ... and, where there are several, its second, fourth, ... stage fall behind."""
    pairs: list[tuple[float, ...]] = [
        (first, second) for first in levels for second in levels if several or first == second
    ]
    return [(forward, backward) for forward in pairs for backward in pairs]


def _make(work: Work, period: float, microbatches: int, waits: Sequence[Waits]) -> list[Block]:
    """The blocks with these waits that could keep the limit."""
    import numpy as np

    from stretto.schedule.families.blocks.making import make_blocks

    ranks, chunks = work.stages_on.shape
    rows = np.array(waits, dtype=np.float64)[:, :, np.arange(chunks) % 2] * (work.busiest / (6 * chunks))
    starts, peaks = np.empty((len(rows), 3, len(work.rank_of))), np.empty((2, len(rows), ranks))
    make_blocks(work, period, microbatches, rows, starts, peaks)
    kept = peaks <= work.limit + LIMIT_ROUNDING
    can, fits = kept[0].all(axis=1), kept[1].all(axis=1)
    return [
        Block(period=period, starts=starts[row], fits=bool(fits[row]), peak=float(peaks[1, row].max()))
        for row in np.flatnonzero(can)
    ]
