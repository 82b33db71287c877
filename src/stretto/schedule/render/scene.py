"""What every picture shows of a timeline, as columns: times, causes, messages, memory and the critical path.

    cause    the operation whose end let this one start: the one before it on its rank, or one that it needs
    source   the operation on another rank whose result this one reads; the arrows of a drawing

Following causes back from the operation that ends last gives the critical path: nothing on it can start
earlier, so the makespan is what lies on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stretto.schedule.arrows import Places, arrows
from stretto.schedule.op import PER_BLOCK, Kind
from stretto.schedule.schedule import Schedule

if TYPE_CHECKING:
    import numpy.typing as npt

    from stretto.schedule.simulate import Costs, Timeline

    Rows = npt.NDArray[np.int64]
    Values = npt.NDArray[np.float64]

NONE = -1
BESIDE = frozenset({Kind.O, Kind.L}) | PER_BLOCK
"""Kinds that run beside a rank's arithmetic, on streams of their own."""
SAME = 1e-9
"""Times closer than this share of the makespan count as equal."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scene:
    """A timed schedule, ready to be drawn; N operations in row order."""

    schedule: Schedule
    """What ran, without messages."""
    rank: Rows
    """(N,)"""
    start: Values
    """(N,), in the costs' unit of time, the first operation at 0."""
    end: Values
    """(N,)"""
    cause: Rows
    """(N,) rows; -1 where nothing was waited for."""
    source: Rows
    """(N,) rows; -1 where no message is read."""
    critical: Rows
    """Rows from the start to the operation that ends last."""
    memory_at: Values
    """When activation memory changes, rank after rank, in time within each."""
    memory: Values
    """Activation memory from then on, in micro-batches over a rank's whole share of the layers."""
    memory_offsets: Rows
    """Rank r's changes are ``memory_offsets[r]`` to ``memory_offsets[r + 1]``; R + 1 entries."""

    @property
    def makespan(self) -> float:
        """Time of the end of the last operation."""
        return float(self.end.max(initial=0.0))


def scene(timeline: Timeline, costs: Costs) -> Scene:
    """Derive what is drawn from when things happen."""
    schedule = timeline.schedule
    places = Places(schedule)
    rank = places.rank.astype(np.int64)
    start, end = np.concatenate([*timeline.start]), np.concatenate([*timeline.end])
    first = start.min(initial=np.inf) if len(start) else 0.0
    start, end = start - first, end - first
    needer, needed = _pairs(places)
    cause = _causes(rank, start, end, needer, needed)
    source = np.full(len(rank), NONE)
    crossing = (rank[needer] != rank[needed]) & np.isin(schedule.kind[needer], [Kind.F, Kind.B, Kind.I])
    source[needer[crossing]] = needed[crossing]
    memory_at, memory, memory_offsets = _memory(schedule, costs, rank, start, end)
    return Scene(
        schedule=schedule,
        rank=rank,
        start=start,
        end=end,
        cause=cause,
        source=source,
        critical=_back_from(int(np.argmax(end)), cause) if len(end) else cause,
        memory_at=memory_at,
        memory=memory,
        memory_offsets=memory_offsets,
    )


def _pairs(places: Places) -> tuple[Rows, Rows]:
    """Rows, and the rows that they need."""
    drawn = arrows(places)
    needer = np.repeat(np.arange(len(drawn.start) - 1), np.diff(drawn.start))
    there = drawn.need >= 0
    return needer[there], drawn.need[there].astype(np.int64)


def _causes(rank: Rows, start: Values, end: Values, needer: Rows, needed: Rows) -> Rows:
    """What ended last of all that an operation needs; where its rank was busy until it started, what kept it busy."""
    cause = np.full(len(rank), NONE)
    latest = np.lexsort((end[needed], needer))
    cause[needer[latest]] = needed[latest]  # the last assignment to a row wins
    before = np.arange(len(rank)) - 1
    follows = np.zeros(len(rank), dtype=bool)
    follows[1:] = rank[1:] == rank[:-1]
    slack = SAME * end.max(initial=0.0)
    busy = follows & (end[before] >= start - slack)
    alone = follows & (cause == NONE)
    cause[busy | alone] = before[busy | alone]
    return cause


def _back_from(row: int, cause: Rows) -> Rows:
    """The chain of causes that ends in a row, earliest first."""
    chain = [row]
    while (row := int(cause[row])) != NONE:
        chain.append(row)
    return np.array(chain[::-1])


def _memory(schedule: Schedule, costs: Costs, rank: Rows, start: Values, end: Values) -> tuple[Values, Values, Rows]:
    """Activation memory over time: taken at the start of F, given back at the end of I, W and B."""
    each = costs.of(schedule)
    stage = np.maximum(schedule.stage, 0)
    kept = np.array([schedule.has_backward(number) for number in range(schedule.num_stages)])
    is_kind = {kind: np.flatnonzero(schedule.kind == kind) for kind in (Kind.F, Kind.B, Kind.I, Kind.W)}
    forward = is_kind[Kind.F]
    passing = forward[~kept[stage[forward]]]
    weight = each.activation
    changes = [(forward, start, weight[stage[forward]]), (passing, end, -weight[stage[passing]])]
    for kind, share in ((Kind.B, 1.0), (Kind.I, 1 - each.act_w), (Kind.W, each.act_w)):
        rows = is_kind[kind]
        changes.append((rows, end, -(weight * share)[stage[rows]]))
    rows = np.concatenate([rows for rows, _, _ in changes])
    at = np.concatenate([times[rows] for rows, times, _ in changes])
    change = np.concatenate([values for _, _, values in changes])
    order = np.lexsort((change, at, rank[rows]))
    total = np.cumsum(change[order])
    offsets = np.searchsorted(rank[rows][order], np.arange(schedule.num_ranks + 1))
    below = np.concatenate([[0.0], total])[offsets[:-1]]
    return at[order], total - np.repeat(below, np.diff(offsets)), offsets
