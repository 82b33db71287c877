"""A schedule and its costs as arrays that a clock can walk through.

Nodes are operations (the row of an operation is its number) and, where links are modelled, the messages behind
them.  Each stands in one *queue*, which runs its nodes in order, one at a time: a rank's arithmetic, one of
its streams, a link.  An *arrow* with a lag says that its reader starts no earlier than the end of another
node plus the lag:

    queue of rank 0   │0F0│0F1│    │0B0│
                        └──── lag ─┐  ▲ lag
    queue of rank 1              │1F0│1B0│

Nothing else is left of what an operation means: what can be said as queues and arrows (a message that
waits for a link, a send that waits for its receive) is timed by the same clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from stretto.schedule.arrows import Places, arrows
from stretto.schedule.op import Kind
from stretto.schedule.progress import check_progress
from stretto.schedule.simulate.stage_costs import stages_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from stretto.schedule.schedule import Schedule
    from stretto.schedule.simulate.stage_costs import StageCosts, Values

    Nodes = npt.NDArray[np.integer[Any]]

STREAMS = 5
"""Queues of a rank: arithmetic, then those of ``streams.STREAM_OF``."""


@dataclass(kw_only=True, eq=False)
class Graph:
    """Queues and arrows of a schedule; N nodes, E arrows.  Streams and links are added to it before it runs."""

    schedule: Schedule
    """What the first nodes are rows of."""
    places: Places
    """Where its operations stand."""
    costs: StageCosts
    """What they cost."""
    queue: Nodes
    """Queue of each node (N,); within a queue, nodes run in ascending order."""
    duration: Values
    """Time of each node (N,)."""
    reader: Nodes
    """Node that each arrow points at (E,)."""
    need: Nodes
    """Node that it comes from (E,)."""
    lag: Values
    """Time between the end of the one and the start of the other (E,)."""

    def add_arrows(self, reader: Nodes, need: Nodes, lag: Values | float = 0.0) -> None:
        """Each ``reader`` needs the ``need`` of the same place."""
        import numpy as np

        self.reader = np.concatenate([self.reader, reader]).astype(np.int32)
        self.need = np.concatenate([self.need, need]).astype(np.int32)
        self.lag = np.concatenate([self.lag, np.broadcast_to(lag, len(reader))])

    def add_nodes(self, queue: Nodes, duration: Values) -> None:
        """Nodes behind the last."""
        import numpy as np

        self.queue = np.concatenate([self.queue, queue]).astype(np.int32)
        self.duration = np.concatenate([self.duration, duration])

    @cached_property
    def order(self) -> tuple[Nodes, Nodes]:
        """Where each queue starts among all nodes sorted by queue, and those nodes."""
        import numpy as np

        nodes = np.arange(len(self.queue), dtype=np.int32)
        if np.any(np.diff(self.queue) < 0):
            nodes = np.argsort(self.queue, kind="stable").astype(np.int32)
        return _starts(self.queue, int(self.queue.max()) + 1), nodes

    @cached_property
    def arrows(self) -> tuple[Nodes, Nodes, Values]:
        """Where each node's arrows start, and their ``need`` and ``lag`` sorted by reader."""
        import numpy as np

        need, lag = self.need, self.lag
        if np.any(np.diff(self.reader) < 0):
            by_reader = np.argsort(self.reader, kind="stable")
            need, lag = need[by_reader], lag[by_reader]
        return _starts(self.reader, len(self.queue)), need, lag

    @cached_property
    def before(self) -> Nodes:
        """The node before each one in its queue, -1 for the first (N,)."""
        import numpy as np

        nodes = self.order[1]
        found = np.full(len(nodes), -1, dtype=np.int32)
        same = self.queue[nodes[1:]] == self.queue[nodes[:-1]]
        found[nodes[1:][same]] = nodes[:-1][same]
        return found

    @property
    def arithmetic(self) -> npt.NDArray[np.bool_]:
        """Which rows stand in the main queue of their rank."""
        return self.queue[: self.schedule.num_ops] % STREAMS == 0


def graph(schedule: Schedule, costs: StageCosts) -> Graph:
    """The schedule with all operations of a rank in one queue, and its messages as pure latency.

    Raises ScheduleError where an operation needs one that no rank runs.
    """
    import numpy as np

    places = Places(schedule)
    drawn = arrows(places)
    if drawn.missing:
        check_progress(schedule)
    reader = np.repeat(np.arange(schedule.num_ops, dtype=np.int32), np.diff(drawn.start))
    return Graph(
        schedule=schedule,
        places=places,
        costs=costs,
        queue=places.rank * STREAMS,
        duration=_durations(places, costs),
        reader=reader,
        need=drawn.need,
        lag=_latencies(places, costs, reader, drawn.need),
    )


def _starts(sorted_by: Nodes, count: int) -> Nodes:
    """Where the entries for 0, 1, ... start; ``count`` + 1 entries."""
    import numpy as np

    starts = np.zeros(count + 1, dtype=np.int32)
    np.cumsum(np.bincount(sorted_by, minlength=count), out=starts[1:])
    return starts


def _durations(places: Places, costs: StageCosts) -> Values:
    """Time of each row; messages take none."""
    import numpy as np

    schedule = places.schedule
    found: Values = costs.durations()[schedule.kind, stages_of(schedule)]
    steps = np.flatnonzero(schedule.kind == Kind.OPT)
    found[steps] = costs.OPT[places.rank[steps]]
    return found


def _latencies(places: Places, costs: StageCosts, reader: Nodes, need: Nodes) -> Values:
    """Latency of each arrow: that of the boundary where it crosses ranks, 0 inside a rank.

    Where it passes over stages, or is one of the collectives of S and T, it is that of the largest boundary
    on the way.
    """
    import numpy as np

    schedule = places.schedule
    found = np.zeros(len(reader))
    if not costs.comm.any():
        return found
    crossing = np.flatnonzero(places.rank[reader] != places.rank[need])
    ends = schedule.stage[reader[crossing]], schedule.stage[need[crossing]]
    low, high = np.minimum(*ends), np.maximum(*ends)
    if places.has(Kind.S):
        collective = np.isin(schedule.kind[reader[crossing]], (Kind.S, Kind.T))
        collective |= np.isin(schedule.kind[need[crossing]], (Kind.S, Kind.T))
        low, high = np.where(collective, 0, low), np.where(collective, schedule.num_stages - 1, high)
    found[crossing] = largest_between(costs.comm, low, high)
    return found


def largest_between(boundary: Values, low: Nodes, high: Nodes) -> Values:
    """The largest entry of ``boundary`` (S - 1,) between each pair of stages, ``low`` below ``high``."""
    import numpy as np

    found: Values = boundary[low]
    far = np.flatnonzero(high - low > 1)
    if len(far):
        base = len(boundary) + 1
        pairs, which = np.unique(low[far].astype(np.int64) * base + high[far], return_inverse=True)
        found[far] = np.array([boundary[pair // base : pair % base].max() for pair in pairs.tolist()])[which]
    return found
