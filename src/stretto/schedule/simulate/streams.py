"""What runs beside a rank's arithmetic: gathering and reducing parameters, moving activations to the host and back.

    arithmetic   │0F0│0F1│ 1F0 │                  F of stage 1 waits for its parameters; 0F1 doesn't wait for
    sharding         │1UNSHARD0│                  the offload of what 0F0 kept
    offload          │0O0 │

Each stream of a rank is a queue in the order of the rank.  An operation on a stream starts when the
arithmetic operation before it in that order is over and its stream is free, so a pass decides by the place
of an UNSHARD or L how far ahead of its use it begins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stretto.schedule.op import Kind

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from stretto.schedule.simulate.graph import Graph, Nodes

STREAM_OF = {Kind.UNSHARD: 1, Kind.REDUCE_GRAD: 1, Kind.RESHARD: 2, Kind.O: 3, Kind.L: 4}
"""Stream of each kind that has one; all others are arithmetic, stream 0."""
READS_PARAMETERS = (Kind.F, Kind.B, Kind.I, Kind.R)
"""Kinds that need their stage's parameters gathered."""


def add_streams(graph: Graph) -> None:
    """Put the operations that have a stream on it."""
    import numpy as np

    schedule = graph.schedule
    stream = np.zeros(len(Kind), dtype=np.int32)
    stream[list(STREAM_OF)] = list(STREAM_OF.values())
    stream_of = stream[schedule.kind]
    aside = stream_of > 0
    if not aside.any():
        return
    graph.queue = graph.queue + stream_of
    _follow(graph, np.flatnonzero(aside), ~aside)
    _follow(graph, np.flatnonzero(schedule.kind == Kind.OPT), schedule.kind == Kind.REDUCE_GRAD)
    _gather(graph, np.flatnonzero(np.isin(schedule.kind, READS_PARAMETERS)))


def _follow(graph: Graph, rows: Nodes, what: npt.NDArray[np.bool_]) -> None:
    """Each row needs the latest row of ``what`` before it on its rank."""
    import numpy as np

    latest = np.maximum.accumulate(np.where(what, np.arange(len(what)), -1))[rows]
    there = latest >= graph.schedule.offsets[graph.places.rank[rows]]
    graph.add_arrows(rows[there], latest[there])


def _gather(graph: Graph, rows: Nodes) -> None:
    """Each row needs the latest UNSHARD of its stage before it on its rank; the stream's order brings earlier ones."""
    import numpy as np

    schedule, rank = graph.schedule, graph.places.rank
    unshards = np.flatnonzero(schedule.kind == Kind.UNSHARD)
    if not len(unshards):
        return

    def held(rows: Nodes) -> npt.NDArray[np.int64]:
        """A number for the rank and the stage of each row."""
        return rank[rows].astype(np.int64) * schedule.num_stages + schedule.stage[rows]

    unshards = unshards[np.argsort(held(unshards), kind="stable")]
    keys = held(unshards) * schedule.num_ops + unshards
    at = np.searchsorted(keys, held(rows) * schedule.num_ops + rows) - 1
    there = (at >= 0) & (held(unshards)[at] == held(rows))
    graph.add_arrows(rows[there], unshards[at[there]])
