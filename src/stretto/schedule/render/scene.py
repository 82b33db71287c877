"""What every picture shows of a timeline, as columns: times, causes, messages, memory and the critical path.

cause    the operation whose end let this one start: the one before it on its rank, or one that it needs
source   the operation on another rank whose result this one reads; the arrows of a drawing
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stretto.schedule.op import Kind
from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate import critical_path, memory_curve

if TYPE_CHECKING:
    import numpy.typing as npt

    from stretto.schedule.simulate import Timeline

    Rows = npt.NDArray[np.int64]
    Values = npt.NDArray[np.float64]

NONE = -1
READERS = (Kind.F, Kind.B, Kind.I, Kind.RECV_F, Kind.RECV_B)
"""Kinds that may read a message."""


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


def scene(timeline: Timeline) -> Scene:
    """Derive what is drawn from when things happen."""
    schedule, rank = timeline.schedule, timeline.graph.places.rank.astype(np.int64)
    first = timeline.start.min(initial=np.inf) if schedule.num_ops else 0.0
    start, end = timeline.start - first, timeline.end - first
    curves = memory_curve(timeline)
    return Scene(
        schedule=schedule,
        rank=rank,
        start=start,
        end=end,
        cause=_causes(timeline),
        source=_sources(timeline, rank),
        critical=np.array(critical_path(timeline), dtype=np.int64),
        memory_at=np.concatenate([curve.times for curve in curves]) - first,
        memory=np.concatenate([curve.values for curve in curves]),
        memory_offsets=np.cumsum([0, *(len(curve.times) for curve in curves)]),
    )


def _causes(timeline: Timeline) -> Rows:
    """What came last of all that an operation waits for; its own rank before others where they come together."""
    drawn, end = timeline.graph, timeline.nodes[1]
    starts, need, lag = drawn.arrows
    nodes = np.arange(len(drawn.queue))
    reader = np.concatenate([np.repeat(nodes, np.diff(starts)), nodes])
    giver = np.concatenate([need, drawn.before]).astype(np.int64)
    arrival = np.concatenate([end[need] + lag, end[drawn.before]])
    own = np.arange(len(reader)) >= len(need)
    known = giver >= 0
    latest = np.flatnonzero(known)[np.lexsort((own[known], arrival[known], reader[known]))]
    cause = np.full(len(nodes), NONE)
    cause[reader[latest]] = giver[latest]  # the last assignment to a node wins
    return _rows_behind(cause, timeline.schedule.num_ops)


def _rows_behind(cause: Rows, num_rows: int) -> Rows:
    """Causes of rows where a message on a link stands between them left out."""
    found = cause[:num_rows].copy()
    while (links := found >= num_rows).any():
        found[links] = cause[found[links]]
    return found


def _sources(timeline: Timeline, rank: Rows) -> Rows:
    """For each row the one on another rank whose message it reads, by way of links where they are modelled."""
    drawn, rows = timeline.graph, timeline.schedule.num_ops
    carried = np.arange(len(drawn.queue))
    onto_link = (drawn.reader >= rows) & (drawn.need < rows)
    carried[drawn.reader[onto_link]] = drawn.need[onto_link]
    read = np.isin(timeline.schedule.kind, READERS)
    kept = drawn.reader < rows
    reader, need = drawn.reader[kept], carried[drawn.need[kept]]
    kept = (need < rows) & read[reader]
    reader, need = reader[kept], need[kept]
    crossing = (rank[reader] != rank[need]) & ~np.isin(timeline.schedule.kind[need], (Kind.S, Kind.T))
    source = np.full(rows, NONE)
    source[reader[crossing]] = need[crossing]
    return source
