"""Lowering: put the messages between ranks into the order of each rank.

    rank 0   0F0 0F1 0B0                  0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0
                              ──►
    rank 1   1F0 1B0 1F1                  1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1

A channel is (source rank, destination rank, forward or backward); its messages arrive in the order in
which they were sent.  A send stands right after its producer.  A receive stands right before its
consumer, or earlier where the channel brings it before a message that is consumed first; the runtime
posts receives further ahead itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from stretto.schedule.op import MESSAGES, Kind, Op
from stretto.schedule.schedule import Schedule

Channel = tuple[int, int, bool]
"""Source rank, destination rank, whether it carries activations (else gradients)."""


def lower(schedule: Schedule) -> Schedule:
    """Messages are inserted, operations and their order stay; deadlock-free with buffered sends if the input was.

    A receive that stands earlier than its own consumer waits for a message sent before one that is
    needed there anyway, so it adds no wait.  Messages that the schedule already had are replaced.
    """
    bare = without_messages(schedule)
    orders = [bare.ops(rank) for rank in range(bare.num_ranks)]
    if bare.num_ranks == 1:
        return bare
    incoming: dict[Channel, deque[Op]] = {}
    for rank, order in enumerate(orders):
        for op in order:
            for send, receive in messages_after(bare, op, rank):
                incoming.setdefault((rank, send.peer, send.kind is Kind.SEND_F), deque()).append(receive)
    return bare.with_orders([_lower_rank(bare, rank, orders[rank], incoming) for rank in range(bare.num_ranks)])


def without_messages(schedule: Schedule) -> Schedule:
    """All operations but the messages, in their order; the inverse of ``lower``."""
    if not schedule.lowered:
        return schedule
    return schedule.with_orders(
        [[op for op in schedule.ops(rank) if op.kind not in MESSAGES] for rank in range(schedule.num_ranks)]
    )


def _lower_rank(schedule: Schedule, rank: int, order: list[Op], incoming: dict[Channel, deque[Op]]) -> list[Op]:
    """One rank's order with its messages."""
    lowered: list[Op] = []
    arrived: set[Op] = set()
    for op in order:
        needed = _message_before(schedule, op, rank)
        if needed is not None:
            channel = incoming.get((needed.peer, rank, needed.kind is Kind.RECV_F), deque())
            while needed not in arrived and channel:
                message = channel.popleft()
                arrived.add(message)
                lowered.append(message)
        lowered.append(op)
        lowered.extend(send for send, _ in messages_after(schedule, op, rank))
    return lowered


def messages_after(schedule: Schedule, op: Op, rank: int) -> Iterator[tuple[Op, Op]]:
    """The send that follows ``op`` and the receive that meets it, where there is one."""
    if op.kind is Kind.F:
        reader, send, receive = schedule.next_stage(op.stage, op.microbatch), Kind.SEND_F, Kind.RECV_F
    elif op.kind in (Kind.B, Kind.I):
        reader, send, receive = schedule.gradient_target(op.stage, op.microbatch), Kind.SEND_B, Kind.RECV_B
    else:
        return
    if reader is None:
        return
    peer = schedule.rank_of(reader, schedule.voice[op.microbatch])
    if peer != rank:
        yield (
            Op(send, stage=op.stage, microbatch=op.microbatch, peer=peer),
            Op(receive, stage=reader, microbatch=op.microbatch, peer=rank),
        )


def _message_before(schedule: Schedule, op: Op, rank: int) -> Op | None:
    """The receive that ``op`` needs, where its operand comes from another rank."""
    if op.kind is Kind.F:
        writer, receive = schedule.previous_stage(op.stage, op.microbatch), Kind.RECV_F
    elif op.kind in (Kind.B, Kind.I):
        writer, receive = schedule.gradient_source(op.stage, op.microbatch), Kind.RECV_B
    else:
        return None
    if writer is None:
        return None
    peer = schedule.rank_of(writer, schedule.voice[op.microbatch])
    return None if peer == rank else Op(receive, stage=op.stage, microbatch=op.microbatch, peer=peer)
