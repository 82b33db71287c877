"""Lowering for messages that block until they are received.

``communication.lower`` lets a rank send before it receives; where sends block, 1F1B then stands still,
each rank sending to a neighbour that sends to it.  Here all ranks' orders are cut from one order of
the whole schedule, in which a message is a single event that both of its ranks take part in:

    one order   0F0 (0►1) 0F1 1F0 1B0 (1►0) (0►1) ...
    rank 0      0F0 SEND  0F1         RECV  SEND
    rank 1          RECV      1F0 1B0 SEND  RECV

The event that comes first in that order can always happen, so something always can.  The price is that
a message is received when it is sent, not when it is needed.

The one order goes in rounds, in each of which a rank runs at most one operation, rank after rank.
"""

from __future__ import annotations

from stretto.schedule.passes.communication import Messages, ends_of_pairs, operations, with_entries, without_messages
from stretto.schedule.progress import rounds
from stretto.schedule.schedule import Schedule


def lower_rendezvous(schedule: Schedule) -> Schedule:
    """Messages are inserted, operations and their order stay; deadlock-free under rendezvous if the input was at all.

    Messages that the schedule already had are replaced.  Raises ScheduleError where the input can't finish.
    """
    import numpy as np

    bare = without_messages(schedule)
    ranks = bare.num_ranks
    turn = rounds(bare)[ends_of_pairs(bare)[0]].astype(np.int64)
    rank = np.repeat(np.arange(ranks), np.diff(bare.offsets))
    messages = Messages.of(bare)
    event = (turn * ranks + rank) * 2
    message = event[messages.producer] + 1
    entries = np.concatenate([operations(bare), messages.sends(), messages.receives()], axis=1)
    owner = np.concatenate([rank, messages.source, messages.destination])
    order = np.lexsort((np.concatenate([event, message, message]), owner))
    return with_entries(bare, entries[:, order], np.searchsorted(owner[order], np.arange(ranks + 1)))
