"""Messages that do more than arrive late: they wait for a link, for room on a channel, or for each other's ranks.

Overlapped messages become nodes of their own, in the queue of their link; the reader's arrow then comes from the
message, and keeps the latency:

    queue of rank 0   │0F0│0F1│ ...
    link 0 to 1           │0F0 │0F1 │        as long as the bytes take
    queue of rank 1            latency │1F0│ ...

In the other two manners the schedule itself holds the messages (``passes.communication``, ``passes.rendezvous``) and
they stand in the queues of their ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stretto.schedule.op import Kind
from stretto.schedule.simulate.graph import largest_between

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from stretto.schedule.simulate.graph import Graph, Nodes
    from stretto.schedule.simulate.network import Network
    from stretto.schedule.simulate.stage_costs import Values

COMPUTED = (Kind.F, Kind.B, Kind.I)
"""Kinds between which activations and gradients travel."""
SENDS, RECEIVES = (Kind.SEND_F, Kind.SEND_B), (Kind.RECV_F, Kind.RECV_B)


def add_messages(graph: Graph, network: Network) -> None:
    """Let messages travel as the network says."""
    if network.manner == "overlapped":
        if network.links:
            _overlapped(graph, network)
    elif network.manner == "blocking":
        _blocking(graph, network)
    else:
        _rendezvous(graph, network)


def _overlapped(graph: Graph, network: Network) -> None:
    """A node per message, in the queue of its link."""
    import numpy as np

    schedule, rank = graph.schedule, graph.places.rank
    kind = schedule.kind
    travels = np.isin(kind[graph.reader], COMPUTED) & np.isin(kind[graph.need], COMPUTED)
    travels &= rank[graph.reader] != rank[graph.need]
    arrow = np.flatnonzero(travels)
    link = _channel(graph, graph.need[arrow], graph.reader[arrow])
    arrow = arrow[np.lexsort((graph.need[arrow], link))]
    sender, reader = graph.need[arrow], graph.reader[arrow]
    _, link = np.unique(_channel(graph, sender, reader), return_inverse=True)
    message = np.arange(len(arrow), dtype=np.int32) + len(graph.queue)
    graph.need = graph.need.copy()
    graph.need[arrow] = message
    graph.add_nodes(link + int(graph.queue.max()) + 1, _seconds(graph, network, sender, reader))
    graph.add_arrows(message, sender)
    _limit(graph, network, sent=message, received=reader, channel=2 * link + (kind[reader] == Kind.F))


def _blocking(graph: Graph, network: Network) -> None:
    """Sends take the time of their bytes; receives wait in their rank's queue."""
    import numpy as np

    _, send, receive = _pairs(graph)
    graph.duration[send] = _seconds(graph, network, send, receive)
    channel = 2 * _channel(graph, send, receive) + (graph.schedule.kind[send] == Kind.SEND_F)
    order = np.lexsort((send, channel))
    _limit(graph, network, sent=send[order], received=receive[order], channel=channel[order])


def _rendezvous(graph: Graph, network: Network) -> None:
    """A send and its receive start when both ranks are free, and take bytes and latency."""
    import numpy as np

    arrow, send, receive = _pairs(graph)
    together = _seconds(graph, network, send, receive) + graph.lag[arrow]
    graph.duration[send] = graph.duration[receive] = together
    before = graph.before
    keep = np.ones(len(graph.reader), dtype=bool)
    keep[arrow] = False
    graph.reader, graph.need, graph.lag = graph.reader[keep], graph.need[keep], graph.lag[keep]
    for one, other in ((send, receive), (receive, send)):
        there = before[other] >= 0
        graph.add_arrows(one[there], before[other][there])


def _pairs(graph: Graph) -> tuple[Nodes, Nodes, Nodes]:
    """The arrows from a send to its receive, and both."""
    import numpy as np

    kind = graph.schedule.kind
    arrow = np.flatnonzero(np.isin(kind[graph.reader], RECEIVES) & np.isin(kind[graph.need], SENDS))
    return arrow, graph.need[arrow], graph.reader[arrow]


def _channel(graph: Graph, sender: Nodes, reader: Nodes) -> npt.NDArray[np.int64]:
    """A number for the two ranks of each message."""
    import numpy as np

    rank = graph.places.rank
    return rank[sender].astype(np.int64) * graph.schedule.num_ranks + rank[reader]


def _seconds(graph: Graph, network: Network, sender: Nodes, reader: Nodes) -> Values:
    """Time that each message keeps its link busy: that of the largest message of the boundaries it passes."""
    import numpy as np

    ends = graph.schedule.stage[sender], graph.schedule.stage[reader]
    return largest_between(network.seconds(graph.schedule.num_stages), np.minimum(*ends), np.maximum(*ends))


def _limit(graph: Graph, network: Network, *, sent: Nodes, received: Nodes, channel: npt.NDArray[np.int64]) -> None:
    """A message leaves when all but ``in_flight`` - 1 of those before it on its channel are received.

    ``sent`` in the order of each channel; they may be received in another.
    """
    import numpy as np

    if network.in_flight is None:
        return
    leaving, coming = np.argsort(channel, kind="stable"), np.lexsort((received, channel))
    later, earlier = leaving[network.in_flight :], coming[: -network.in_flight]
    same = channel[later] == channel[earlier]
    graph.add_arrows(sent[later[same]], received[earlier[same]])
