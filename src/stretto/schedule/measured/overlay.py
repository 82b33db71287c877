"""A measured step laid over the simulated one, and where the difference comes from.

The measured step is a chain of operations in which each waited for the one before it, on its own rank or on another:

    0F0 ──0F1──► 1F1 ─── 1B1 ──► 0B1 ...        measured = Σ durations + Σ times between them
         gap    message

Every duration is its median plus what this one took longer, every message its usual latency plus how late it was, so

    measured - simulated = slower operations + late messages + gaps between operations + late start
                           - how much shorter than the simulated step the chain would be under medians (slack)

without a rest.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from stretto.schedule.op import COMPUTE, MESSAGES, Kind, text
from stretto.schedule.render.scene import scene
from stretto.schedule.simulate import Attribution, Costs, attribution, run
from stretto.schedule.simulate.attribution import lateness

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from stretto.schedule.measured.trace import Played
    from stretto.schedule.schedule import Schedule
    from stretto.schedule.simulate import Timeline

READERS = (Kind.F, Kind.B, Kind.I)
"""Kinds that read a message."""


@dataclass(slots=True, kw_only=True)
class Cause:
    """One way in which a step took longer."""

    seconds: float = 0.0
    """All together."""
    where: dict[tuple[int, ...], float] = field(default_factory=lambda: defaultdict(float))
    """By rank, or by sender and receiver."""
    worst: tuple[float, str] = (0.0, "")
    """The largest single one, and its operation."""

    def add(self, seconds: float, where: tuple[int, ...], name: str) -> None:
        """One more."""
        self.seconds += seconds
        self.where[where] += seconds
        self.worst = max(self.worst, (seconds, name))

    @property
    def place(self) -> tuple[int, ...]:
        """Where most of it happened."""
        return max(self.where, key=lambda place: self.where[place])


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Measured minus simulated step in parts; seconds."""

    operations: Cause
    """On the chain, operations that took longer than the median of their kind and stage (or shorter)."""
    messages: Cause
    """Messages that came later than their boundary's usual latency (or earlier)."""
    gaps: Cause
    """Time between two operations of a rank."""
    start: float
    """How much later than the first operation of all the chain began."""
    slack: float
    """How much shorter than the simulated step the chain is under medians; counts against the others."""

    @property
    def total(self) -> float:
        """Measured minus simulated."""
        return self.operations.seconds + self.messages.seconds + self.gaps.seconds + self.start - self.slack


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Overlay:
    """Both timelines of a step; the same rows, without messages."""

    measured: Timeline
    """As it was."""
    simulated: Timeline
    """As it would be under median costs."""
    spent: Attribution
    """Of the measured ranks."""
    predicted: Attribution
    """Of the simulated ranks."""
    difference: Difference
    """Why they differ."""


def overlay(played: Played, costs: Costs) -> Overlay:
    """Lay a step over its simulation under ``costs``, the optimizer's update apart."""
    import numpy as np

    simulated = run(played.schedule, replace(costs, OPT=0.0))
    rows = np.flatnonzero(~np.isin(played.schedule.kind, list(MESSAGES)))
    times = (played.start[rows], played.end[rows])
    assert len(rows) == len(simulated.nodes[0]), "the simulation has rows of its own"
    measured = replace(simulated, start=times[0], end=times[1], nodes=times)
    return Overlay(
        measured=measured,
        simulated=simulated,
        spent=_spent(measured),
        predicted=attribution(simulated),
        difference=_difference(measured, simulated, _waits(played, measured.schedule)),
    )


def _waits(played: Played, bare: Schedule) -> list[float]:
    """How long each row of the schedule without messages had its rank wait in the receive of what it reads."""
    waited: dict[tuple[bool, int, int], float] = {}
    rows = zip(
        *(column.tolist() for column in _columns(played.schedule)), (played.end - played.start).tolist(), strict=True
    )
    for kind, stage, microbatch, seconds in rows:
        if kind in (Kind.RECV_F, Kind.RECV_B):
            waited[kind == Kind.RECV_F, stage, microbatch] = seconds
    bare_rows = zip(*(column.tolist() for column in _columns(bare)), strict=True)
    return [
        waited.get((kind == Kind.F, stage, microbatch), 0.0) if kind in READERS else 0.0
        for kind, stage, microbatch in bare_rows
    ]


def _columns(schedule: Schedule) -> tuple[npt.NDArray[np.int32], ...]:
    return schedule.kind, schedule.stage, schedule.microbatch


def _spent(measured: Timeline) -> Attribution:
    """Where the time of each rank went; work is what was measured, not counted times its cost."""
    import numpy as np

    works = np.isin(measured.schedule.kind, list(COMPUTE))
    taken = np.where(works, measured.end - measured.start, 0.0)
    # The vocabulary passes begin at once and wait in themselves for the other shards; that part is no work.
    waiting = np.isin(measured.schedule.kind, (Kind.S, Kind.T))
    taken[waiting] -= np.clip(-lateness(measured)[waiting], 0.0, taken[waiting])
    ranks = range(measured.schedule.num_ranks)
    busy = tuple(float(taken[measured.rows(rank)].sum()) for rank in ranks)
    communication = attribution(measured).communication
    bubble = tuple(measured.makespan - busy[rank] - communication[rank] for rank in ranks)
    return Attribution(busy=busy, communication=communication, bubble=bubble)


def _difference(measured: Timeline, simulated: Timeline, waits: Sequence[float]) -> Difference:
    """Walk the measured step back from its last operation, each time to what was waited for.

    A message that should have been there in time has its rank wait between two operations; so much of the gap is its.
    """
    shown, graph = scene(measured), measured.graph
    first, need, lags = graph.arrows
    operations, messages, gaps = Cause(), Cause(), Cause()
    row, under_medians = int(measured.end.argmax()), 0.0
    while True:
        name = _name(measured, row)
        rank, usual = int(shown.rank[row]), float(graph.duration[row])
        operations.add(float(measured.end[row] - measured.start[row]) - usual, (rank,), name)
        under_medians += usual
        cause = int(shown.cause[row])
        if cause < 0:
            break
        gap, giver = float(measured.start[row] - measured.end[cause]), int(shown.rank[cause])
        if giver == rank:
            sender = int(shown.source[row])
            late = min(gap, waits[row]) if sender >= 0 else 0.0
            if late > 0:
                messages.add(late, (int(shown.rank[sender]), rank), name)
            gaps.add(gap - late, (rank,), name)
        else:
            arrows = range(int(first[row]), int(first[row + 1]))
            lag = max(float(lags[arrow]) for arrow in arrows if int(need[arrow]) == cause)
            messages.add(gap - lag, (giver, rank), name)
            under_medians += lag
        row = cause
    return Difference(
        operations=operations,
        messages=messages,
        gaps=gaps,
        start=float(measured.start[row] - measured.start.min()),
        slack=simulated.makespan - under_medians,
    )


def _name(timeline: Timeline, row: int) -> str:
    schedule = timeline.schedule
    return text(Kind(int(schedule.kind[row])), int(schedule.stage[row]), int(schedule.microbatch[row]))
