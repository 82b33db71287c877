"""Lowering for messages that block until they are received.

``communication.lower`` lets a rank send before it receives; where sends block, 1F1B then stands still,
each rank sending to a neighbour that sends to it.  Here all ranks' orders are cut from one order of
the whole schedule, in which a message is a single event that both of its ranks take part in:

    one order   0F0 (0►1) 0F1 1F0 1B0 (1►0) (0►1) ...
    rank 0      0F0 SEND  0F1         RECV  SEND
    rank 1          RECV      1F0 1B0 SEND  RECV

The event that comes first in that order can always happen, so something always can.  The price is that
a message is received when it is sent, not when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator

from stretto.schedule.dependencies import REPEATABLE, Dependencies, Key
from stretto.schedule.op import Op
from stretto.schedule.passes.communication import messages_after, without_messages
from stretto.schedule.progress import check_progress
from stretto.schedule.schedule import Schedule


def lower_rendezvous(schedule: Schedule) -> Schedule:
    """Messages are inserted, operations and their order stay; deadlock-free under rendezvous if the input was at all.

    Messages that the schedule already had are replaced.  Raises ScheduleError where the input can't finish.
    """
    bare = without_messages(schedule)
    check_progress(bare)
    lowered: list[list[Op]] = [[] for _ in range(bare.num_ranks)]
    for rank, op in _one_order(bare):
        lowered[rank].append(op)
        for send, receive in messages_after(bare, op, rank):
            lowered[rank].append(send)
            lowered[send.peer].append(receive)
    return bare.with_orders(lowered)


def _one_order(schedule: Schedule) -> Iterator[tuple[int, Op]]:
    """All operations with their ranks, nothing before what it needs; at most one per rank in each round."""
    dependencies = Dependencies(schedule)
    orders = [schedule.ops(rank) for rank in range(schedule.num_ranks)]
    at = [0] * schedule.num_ranks
    done: set[Key] = set()
    while any(at[rank] < len(order) for rank, order in enumerate(orders)):
        over: list[Key] = []
        for rank, order in enumerate(orders):
            if at[rank] == len(order):
                continue
            op = order[at[rank]]
            key = (int(op.kind), op.stage, op.microbatch)
            if all(need in done for need in dependencies.needs(*key)):
                at[rank] += 1
                yield rank, op
                if op.kind not in REPEATABLE:
                    over.append(key)
        done.update(over)
