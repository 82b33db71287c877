"""Where a step's time went, in sentences a person can act on.

slow stage   its operations take longer than those of the others: the schedule waits for it, simulated or not
slow rank    its operations take longer than those of the rank that holds the same stages elsewhere, or all of
             its stages are slower than all others
the rest     what makes the measured step differ from the simulated one (overlay.py)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from stretto.schedule.flow import flows
from stretto.schedule.measured.medians import LEAST
from stretto.schedule.measured.overlay import Cause, Difference, Overlay
from stretto.schedule.op import COMPUTE, text
from stretto.schedule.simulate import Attribution, Costs, run
from stretto.spec.units import format_seconds as shown

if TYPE_CHECKING:
    from stretto.schedule.measured.trace import Played, Trace
    from stretto.schedule.schedule import Schedule

SLOWER = 1.1
"""Times as long as the others that count as slow."""
STRAGGLES = 5.0
"""Times its median from which on an operation counts as a straggler."""
STRAGGLES_OF_STEP = 0.25
"""Share of a step that it must have cost besides."""
WORTH = 0.02
"""Share of the measured step from which on a cause is named."""
OUTSIDE = 0.1
"""Share of the whole step from which on what lies outside the schedule is named."""


def slow_stages(schedule: Schedule, costs: Costs, ranks: Sequence[int]) -> Iterator[str]:
    """The stage, or the rank, that all others wait for; ``ranks``: of the world, by the schedule's."""
    count = _pipeline_stages(schedule)
    weights = [sum(parts) for parts in zip(*_per_stage(costs, ("F", "I", "W")), strict=True)][:count]
    if len(weights) < 2:
        return
    slowest = max(range(len(weights)), key=weights.__getitem__)
    others = [weight for stage, weight in enumerate(weights) if stage != slowest]
    typical = sum(others) / len(others)
    if weights[slowest] < SLOWER * typical:
        return
    now = run(schedule, replace(costs, OPT=0.0)).makespan
    equal = run(schedule, replace(_equal(costs, count), OPT=0.0)).makespan
    if now - equal < WORTH * now:
        return
    gain = f"with equal stages the simulated step would take {shown(equal)} instead of {shown(now)}"
    holder = schedule.placement[0][slowest]
    mine = [weight for stage, weight in enumerate(weights) if schedule.placement[0][stage] == holder]
    rest = [weight for stage, weight in enumerate(weights) if schedule.placement[0][stage] != holder]
    one = len({replica[:count] for replica in schedule.placement}) == 1
    if one and len(mine) > 1 and rest and min(mine) > SLOWER * max(rest):
        times = sum(mine) / len(mine) / (sum(rest) / len(rest))
        yield f"Rank {ranks[holder]} is slow: its {len(mine)} stages take {times:.2f} x as long as the others; {gain}."
        return
    yield (
        f"Stage {slowest} (rank {ranks[holder]}) is slow: forward and backward of a micro-batch take "
        f"{shown(weights[slowest])}, {weights[slowest] / typical:.2f} x the others' average; {gain} (plan.stages says "
        "which stage has how many layers)."
    )


def stragglers(trace: Trace, pipeline: int) -> Iterator[str]:
    """Operations that took much longer than the same one of other micro-batches and steps, the worst of each rank."""
    import numpy as np

    steps = [trace.played(pipeline, step) for step in trace.steps]
    schedule, taken = trace.schedule, np.array([step.end - step.start for step in steps])
    makespan = float(np.median([step.makespan for step in steps]))
    works = np.isin(schedule.kind, list(COMPUTE))
    worst: dict[int, tuple[float, str]] = {}
    for kind, stage in sorted(set(zip(schedule.kind[works].tolist(), schedule.stage[works].tolist(), strict=True))):
        rows = np.flatnonzero((schedule.kind == kind) & (schedule.stage == stage))
        typical = max(float(np.median(taken[:, rows])), LEAST)
        step, column = np.unravel_index(int(taken[:, rows].argmax()), (len(steps), len(rows)))
        row, seconds = rows[column], float(taken[step, rows[column]])
        rank = int(steps[0].ranks()[row])
        if seconds < STRAGGLES * typical or seconds - typical < STRAGGLES_OF_STEP * makespan:
            continue
        name = text(kind, stage, int(schedule.microbatch[row]))
        told = f"{name} of step {steps[step].step} took {shown(seconds)}, {seconds / typical:.0f} x its median"
        worst[rank] = max(worst.get(rank, (0.0, "")), (seconds, told))
    for rank, (_, told) in sorted(worst.items(), key=lambda item: -item[1][0]):
        yield f"Rank {trace.pipelines[pipeline][rank]} was slow for a moment: {told}."


def slow_ranks(trace: Trace, steps: Sequence[int]) -> Iterator[str]:
    """Ranks whose operations take longer than those of the ranks with the same stages in other pipelines."""
    import numpy as np

    if len(trace.pipelines) < 2:
        return
    work = np.array(
        [np.median([_work(trace.played(pipeline, step)) for step in steps], axis=0)
         for pipeline in range(len(trace.pipelines))]
    )  # fmt: skip
    for position in range(trace.schedule.num_ranks):
        column = work[:, position]
        slowest = int(column.argmax())
        typical = float(np.median(np.delete(column, slowest)))
        if column[slowest] > SLOWER * typical:
            ranks = [pipeline[position] for pipeline in trace.pipelines]
            peers = ", ".join(str(rank) for rank in ranks if rank != ranks[slowest])
            yield (
                f"Rank {ranks[slowest]} is slow: its operations take {shown(float(column[slowest]))} a step, "
                f"{column[slowest] / typical:.2f} x as long as those of rank {peers} with the same stages."
            )


def differences(over: Overlay, ranks: Sequence[int]) -> Iterator[str]:
    """What makes the measured step longer than the simulated one, largest first."""
    found, measured = over.difference, over.measured.makespan
    told = [
        (found.operations.seconds, _slow_operations(found, ranks)),
        (found.messages.seconds, _late_messages(found, ranks)),
        (found.gaps.seconds, _gaps(found, ranks)),
    ]
    if found.start > 0:
        told.append((found.start, f"The step began {shown(found.start)} late on the rank that ended it."))
    for seconds, sentence in sorted(told, key=lambda each: -each[0]):
        if seconds > WORTH * measured:
            yield sentence
    yield from _idle(over, ranks)


def _slow_operations(found: Difference, ranks: Sequence[int]) -> str:
    cause = found.operations
    (rank,) = cause.place
    return (
        f"Operations slower than their median cost {shown(cause.seconds)}, {_most(cause)} on rank {ranks[rank]}; "
        f"the worst is {_worst(cause.worst)}."
    )


def _late_messages(found: Difference, ranks: Sequence[int]) -> str:
    cause = found.messages
    if not cause.where:
        return ""
    giver, reader = cause.place
    return (
        f"Late messages cost {shown(cause.seconds)}, {_most(cause)} from rank {ranks[giver]} to rank {ranks[reader]}; "
        f"the latest is the one that {_worst(cause.worst)} waited for."
    )


def _gaps(found: Difference, ranks: Sequence[int]) -> str:
    cause = found.gaps
    if not cause.where:
        return ""
    (rank,) = cause.place
    return (
        f"Ranks were idle between two operations with nothing to wait for, {shown(cause.seconds)} in all, "
        f"{_most(cause)} on rank {ranks[rank]}, the longest before {_worst(cause.worst)}: "
        "time of the host, of messages being posted, or of another process on its cores."
    )


def _most(cause: Cause) -> str:
    """The place that cost most; it may have cost more than all together where others were faster than simulated."""
    there = cause.where[cause.place]
    if there <= cause.seconds:
        return f"most of it ({shown(there)})"
    return f"what is left of {shown(there)} after gains elsewhere,"


def _worst(worst: tuple[float, str]) -> str:
    seconds, name = worst
    return f"{name} ({shown(seconds)})"


def _idle(over: Overlay, ranks: Sequence[int]) -> Iterator[str]:
    """The rank that idles most beyond what was simulated."""
    pairs = zip(_idleness(over.spent), _idleness(over.predicted), strict=True)
    more = [mine - predicted for mine, predicted in pairs]
    rank = max(range(len(more)), key=more.__getitem__)
    if more[rank] > WORTH * over.measured.makespan:
        yield f"Rank {ranks[rank]} waits {shown(more[rank])} longer than simulated, the most of all ranks."


def _idleness(spent: Attribution) -> list[float]:
    communication, bubble = spent.communication, spent.bubble
    return [one + other for one, other in zip(communication, bubble, strict=True)]


def outside(played: Played) -> Iterator[str]:
    """What the whole step has besides the schedule."""
    rest = played.whole - played.makespan
    if rest > OUTSIDE * played.whole:
        settling, optimizer = float(played.settling.max()), float(played.optimizer.max())
        yield (
            f"{rest / played.whole:.0%} of the whole step ({shown(played.whole)}) lies outside the schedule: up to "
            f"{shown(settling)} in the last reductions, {shown(optimizer)} in the optimizer, the rest in reading "
            "data and elsewhere."
        )


def _per_stage(costs: Costs, names: Sequence[str]) -> list[tuple[float, ...]]:
    return [tuple(getattr(costs, name)) for name in names]


def _pipeline_stages(schedule: Schedule) -> int:
    """Stages of the pipeline: all but those of frozen work that stand behind it and have paths of their own."""
    tables = flows(schedule)
    visited = (tables.position >= 0) & (tables.turn >= 0)[:, None]
    return 1 + max((stage for stage in range(schedule.num_stages) if visited[:, stage].any()), default=-1)


def _equal(costs: Costs, count: int) -> Costs:
    """The same work, spread evenly over the first ``count`` stages."""
    names = ("F", "I", "W", "R")
    columns = {name: value for name in names if isinstance(value := getattr(costs, name), tuple)}
    means = {name: (sum(value[:count]) / count,) * count + value[count:] for name, value in columns.items()}
    return replace(costs, **means)  # type: ignore[arg-type]


def _work(played: Played) -> list[float]:
    """Time in operations that compute, by rank."""
    import numpy as np

    works = np.isin(played.schedule.kind, list(COMPUTE))
    taken = np.where(works, played.end - played.start, 0.0)
    return np.bincount(played.ranks(), weights=taken, minlength=played.schedule.num_ranks).tolist()  # type: ignore[no-any-return]
