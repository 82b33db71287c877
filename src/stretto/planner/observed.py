"""What a trace says of a run, in the planner's terms: seconds of operations, messages and of what lies around them.

rank 0  │F│F│ │RECV│B│F│ ...  │settle      │OPT│        operations   means of each step, medians over steps
rank 1    │RECV│F│B│ ...   │settle         │OPT│        gap          what is neither an operation nor a wait for
        └──────── schedule ──┘└ around it ──────┘                    a message, for each operation
                                                        settling     of the rank that waits least
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stretto.schedule.measured.medians import messages_of
from stretto.schedule.measured.trace import Played, Trace
from stretto.schedule.op import COMPUTE, Kind

WAITS = (Kind.RECV_F, Kind.RECV_B)
"""Where a rank waits for others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Of all pipelines and steps of a run, in seconds."""

    operations: Mapping[tuple[Kind, int], float]
    """By kind and stage."""
    gap: float
    """Between two operations of a rank."""
    message: float
    """From a send until it has arrived; 0 where nobody waited for one."""
    makespan: float
    """From the first operation to the last, of the pipeline that takes longest."""
    settling: float
    """After the schedule: what is left of the reduction of gradients, the norm, and what ranks agree on."""
    optimizer: float
    """Of the slowest rank's update."""
    rest: float
    """Of a step, what is none of these."""
    step: float
    """All of it."""
    spread: Mapping[str, float]
    """Relative spread of what a refinement is made of, by its kind: over steps, and over stages."""


def observe(trace: Trace) -> Observed:
    """Read every step that all ranks recorded."""
    steps = [[trace.played(pipeline, step) for pipeline in range(len(trace.pipelines))] for step in trace.steps]
    means = [_means(played) for played in steps]
    operations = {key: statistics.median(one[key] for one in means) for key in means[0]}
    around = [_around(played) for played in steps]
    settling, optimizer, rest, whole, makespan = (statistics.median(column) for column in zip(*around, strict=True))
    gaps = [_gap(one) for played in steps for one in played]
    arrivals = [seconds for played in steps for one in played for seconds in _arrivals(one)]
    columns = dict(zip(("collectives", "optimizer", "step"), zip(*around, strict=True), strict=False))
    spread = {name: _spread(column) for name, column in columns.items()}
    work = [sum(one.values()) for one in means]
    return Observed(
        operations=operations,
        gap=statistics.median(gaps),
        message=statistics.median(arrivals) if arrivals else 0.0,
        makespan=makespan,
        settling=settling,
        optimizer=optimizer,
        rest=rest,
        step=whole,
        spread=spread | dict.fromkeys(("forward", "inputs", "weights", "head", "exchange"), _spread(work)),
    )


def _means(pipelines: Sequence[Played]) -> dict[tuple[Kind, int], float]:
    """Of one step; the average, since what is longest now and then is waited for, too."""
    found: dict[tuple[Kind, int], list[float]] = {}
    for played in pipelines:
        columns = played.schedule.kind.tolist(), played.schedule.stage.tolist()
        for kind, stage, seconds in zip(*columns, (played.end - played.start).tolist(), strict=True):
            if kind in COMPUTE:
                found.setdefault((Kind(kind), stage), []).append(seconds)
    return {key: statistics.fmean(some) for key, some in found.items()}


def _gap(played: Played) -> float:
    """For each operation, what its rank spent on neither operations nor waits."""
    import numpy as np

    taken, kinds, offsets = played.end - played.start, played.schedule.kind, played.schedule.offsets
    told = np.isin(kinds, [*COMPUTE, *WAITS])
    between = count = 0.0
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        rows = slice(first, last)
        between += float(played.end[rows].max() - played.start[rows].min() - taken[rows][told[rows]].sum())
        count += int(np.isin(kinds[rows], list(COMPUTE)).sum())
    return max(0.0, between / count)


def _arrivals(played: Played) -> list[float]:
    """Seconds of the messages that their receivers waited for."""
    send, receive = messages_of(played.schedule)
    waited = played.start[receive] <= played.start[send]
    return [float(seconds) for seconds in (played.end[receive] - played.start[send])[waited]]


def _around(pipelines: Sequence[Played]) -> tuple[float, float, float, float, float]:
    """Settling, update, the rest of a step, all of it, and of its schedule; pipelines settle together."""
    settling = min(float(played.settling.min()) for played in pipelines)
    optimizer = max(float(played.optimizer.max()) for played in pipelines)
    whole = max(played.whole for played in pipelines)
    last = max(played.makespan for played in pipelines)
    return settling, optimizer, max(0.0, whole - last - settling - optimizer), whole, last


def _spread(values: Sequence[float]) -> float:
    """Relative uncertainty of a median of so many values."""
    mean = statistics.fmean(values)
    return statistics.pstdev(values) / mean / max(1, len(values) - 1) ** 0.5 if mean > 0 else 0.0
