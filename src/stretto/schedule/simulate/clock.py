"""When each operation starts and ends.

Every rank runs its operations in its order, each as soon as the rank is free and what it needs is there:

    rank 0 │0F0│0F1│                │0B0    │
                └─comm─┐        ┌─comm─┘
    rank 1             │1F0│1B0    │            start = max(rank free, needs ended + comm if elsewhere)

By default messages are pure latency: they occupy no rank, and inside a rank they take no time.  A lowered
schedule is then timed as the same schedule without its messages.  ``Network`` says otherwise.

Where the costs give an optimizer step, a rank of a schedule that trains ends with its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stretto.schedule.compiled import for_size
from stretto.schedule.op import Kind, text
from stretto.schedule.passes.communication import lower, without_messages
from stretto.schedule.passes.rendezvous import lower_rendezvous
from stretto.schedule.progress import check_progress
from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate.costs import Costs
from stretto.schedule.simulate.graph import Graph, graph
from stretto.schedule.simulate.links import add_messages
from stretto.schedule.simulate.network import Network
from stretto.schedule.simulate.streams import add_streams
from stretto.spec.errors import ScheduleError

if TYPE_CHECKING:
    from stretto.schedule.simulate.stage_costs import StageCosts, Values


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Timeline:
    """Start and end of each operation."""

    schedule: Schedule
    """What ran: without messages where they occupy no rank, with them where they do."""
    start: Values
    """Of each row of the schedule, in the costs' unit of time."""
    end: Values
    """Likewise."""
    graph: Graph = field(repr=False)
    """What each row waited for."""
    nodes: tuple[Values, Values] = field(repr=False)
    """Start and end of each node of the graph: the rows, then the messages on links."""

    @property
    def makespan(self) -> float:
        """From the first operation anywhere to the last."""
        return float(self.end.max() - self.start.min())

    @property
    def spans(self) -> tuple[float, ...]:
        """Time between each rank's first and last operation, of those that occupy it; its streams don't count."""
        main = self.graph.arithmetic
        spans = []
        for rows in map(self.rows, range(self.schedule.num_ranks)):
            start, end = (times[rows][main[rows]] for times in (self.start, self.end))
            spans.append(float(end.max() - start.min()) if len(end) else 0.0)
        return tuple(spans)

    def rows(self, rank: int) -> slice:
        """Rows of a rank."""
        return slice(int(self.schedule.offsets[rank]), int(self.schedule.offsets[rank + 1]))


def run(schedule: Schedule, costs: Costs | None = None, network: Network | None = None) -> Timeline:
    """Time a schedule (unit costs and messages of pure latency by default).

    Raises ScheduleError where it can't finish, saying why, and where the costs are for another shape.
    """
    import numpy as np

    network = network or Network()
    of_stages = (costs or Costs()).of(schedule)
    schedule = _with_optimizer(_with_manner(schedule, network), of_stages)
    drawn = graph(schedule, of_stages)
    add_streams(drawn)
    add_messages(drawn, network)
    start, end = np.full((2, len(drawn.queue)), -1.0)
    walk = for_size(advance, len(drawn.queue))
    if walk is advance:  # plain Python is quicker over lists
        start, end = start.tolist(), end.tolist()
        queues, arrows = ([array.tolist() for array in arrays] for arrays in (drawn.order, drawn.arrows))
        walk(queues, arrows, drawn.duration.tolist(), start, end)
        start, end = np.array(start), np.array(end)
    else:
        walk(drawn.order, drawn.arrows, drawn.duration, start, end)
    if end.min() < 0:
        raise _stuck(schedule, network, end)
    for times in (start, end):
        times.setflags(write=False)
    rows = slice(schedule.num_ops)
    return Timeline(schedule=schedule, start=start[rows], end=end[rows], graph=drawn, nodes=(start, end))


def advance(queues, arrows, duration, start, end):  # type: ignore[no-untyped-def]
    """Fill ``start`` and ``end``, -1 where not known yet, of all nodes that can run.

    ``queues`` and ``arrows`` are ``Graph.order`` and ``Graph.arrows``, as arrays or lists.  Each queue goes as far as
    it can; one that must wait is parked at the node it waits for, and goes on when that has run.
    """
    stops, nodes = queues
    first, need, lag = arrows
    count = len(stops) - 1
    at = [stops[queue] for queue in range(count)]
    free = [0.0] * count
    ready = [count - 1 - queue for queue in range(count)]
    parked = [-1] * len(duration)
    behind = [-1] * count
    while len(ready) > 0:
        queue = ready.pop()
        while at[queue] < stops[queue + 1]:
            node = nodes[at[queue]]
            time = free[queue]
            missing = -1
            for arrow in range(first[node], first[node + 1]):
                giver = need[arrow]
                if end[giver] < 0:
                    missing = giver
                    break
                time = max(time, end[giver] + lag[arrow])
            if missing >= 0:
                behind[queue] = parked[missing]
                parked[missing] = queue
                break
            start[node] = time
            free[queue] = end[node] = time + duration[node]
            at[queue] += 1
            waiter = parked[node]
            while waiter >= 0:
                ready.append(waiter)
                waiter = behind[waiter]


def _with_manner(schedule: Schedule, network: Network) -> Schedule:
    """With messages where they occupy ranks, without them elsewhere."""
    if network.manner == "overlapped":
        return without_messages(schedule)
    if schedule.lowered:
        return schedule
    return lower(schedule) if network.manner == "blocking" else lower_rendezvous(schedule)


def _with_optimizer(schedule: Schedule, costs: StageCosts) -> Schedule:
    """OPT at the end of each rank that has none, where it takes time and the schedule trains."""
    import numpy as np

    if schedule.forward_only or not costs.OPT.any():
        return schedule
    ranks = np.repeat(np.arange(schedule.num_ranks), np.diff(schedule.offsets))
    lacks = np.bincount(ranks[schedule.kind == Kind.OPT], minlength=schedule.num_ranks) == 0
    ends = schedule.offsets[1:][lacks]
    return schedule.with_columns(
        kind=np.insert(schedule.kind, ends, Kind.OPT),
        stage=np.insert(schedule.stage, ends, -1),
        microbatch=np.insert(schedule.microbatch, ends, -1),
        peer=np.insert(schedule.peer, ends, -1),
        offsets=schedule.offsets + np.append(0, np.cumsum(lacks)),
        joined=None if schedule.joined is None else np.insert(schedule.joined, ends, 0),
    )


def _stuck(schedule: Schedule, network: Network, end: Values) -> ScheduleError:
    """Why a schedule can't finish."""
    import numpy as np

    try:
        check_progress(schedule, semantics="rendezvous" if network.manner == "rendezvous" else "buffered")
    except ScheduleError as error:
        return error
    row = int(np.argmax(end < 0))
    rank = int(np.searchsorted(schedule.offsets, row, side="right")) - 1
    op = text(int(schedule.kind[row]), int(schedule.stage[row]), int(schedule.microbatch[row]))
    return ScheduleError(
        f"{schedule.name}: rank {rank} waits for ever in {op}; with at most {network.in_flight} messages in flight on "
        "a channel, ranks wait for each other in a circle. Allow more."
    )
