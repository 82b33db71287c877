"""Lowering: put the messages between ranks into the order of each rank.

    rank 0   0F0 0F1 0B0                  0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0
                              ──►
    rank 1   1F0 1B0 1F1                  1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1

A channel is (source rank, destination rank, forward or backward); its messages arrive in the order in
which they were sent.  A send stands right after its producer.  A receive stands right before its
consumer, or earlier where the channel brings it before a message that is consumed first; the runtime
posts receives further ahead itself.  Around an overlapped pair (``2F7+5B3``) both receives stand before
it and both sends behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stretto.schedule.arrows import Places
from stretto.schedule.op import Kind
from stretto.schedule.schedule import Schedule

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows = npt.NDArray[np.int64]

BEFORE, ITSELF, AFTER = 0, 1, 2
"""Where an entry stands relative to the row that it is put at."""


def lower(schedule: Schedule) -> Schedule:
    """Messages are inserted, operations and their order stay; deadlock-free with buffered sends if the input was.

    A receive that stands earlier than its own consumer waits for a message sent before one that is
    needed there anyway, so it adds no wait.  Messages that the schedule already had are replaced.
    """
    import numpy as np

    bare = without_messages(schedule)
    messages = Messages.of(bare)
    at, fed = _receive_at(bare, messages)
    receives = messages.receives()[:, fed]
    rows = np.arange(bare.num_ops)
    _, last = ends_of_pairs(bare)
    entries = np.concatenate([receives, operations(bare), messages.sends()], axis=1)
    anchor = np.concatenate([at * 3 + BEFORE, rows * 3 + ITSELF, last[messages.producer] * 3 + AFTER])
    order = np.argsort(anchor, kind="stable")
    return with_entries(bare, entries[:, order], np.searchsorted(anchor[order], bare.offsets * 3))


def without_messages(schedule: Schedule) -> Schedule:
    """All operations but the messages, in their order; the inverse of ``lower``."""
    import numpy as np

    if not schedule.lowered:
        return schedule
    kept = (schedule.kind < Kind.SEND_F) | (schedule.kind > Kind.RECV_B)
    offsets = np.append(0, np.cumsum(kept))[schedule.offsets]
    return with_entries(schedule, operations(schedule)[:, kept], offsets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Messages:
    """The messages that a schedule needs, in the order of the rows that make them; arrays of one entry each."""

    producer: Rows
    """Row of the F, B or I whose result is sent."""
    consumer: Rows
    """Row of the operation that reads it, -1 where no rank runs one."""
    backward: Rows
    """1 for a gradient, 0 for an activation."""
    stage: Rows
    """Stage of the producer."""
    reader: Rows
    """Stage of the consumer."""
    microbatch: Rows
    """Micro-batch of both."""
    source: Rows
    """Rank that sends."""
    destination: Rows
    """Rank that receives."""

    @classmethod
    def of(cls, schedule: Schedule) -> Messages:
        """The messages of a schedule that has none yet."""
        import numpy as np

        places, kind = Places(schedule), schedule.kind
        gives = {Kind.F: places.flows.after, Kind.B: places.flows.target, Kind.I: places.flows.target}
        producer = np.flatnonzero(np.isin(kind, list(gives)))
        flow = places.flows.of[schedule.microbatch[producer]]
        stage, source = schedule.stage[producer], places.rank[producer]
        forward = kind[producer] == Kind.F
        reader = np.where(forward, gives[Kind.F][flow, stage], gives[Kind.B][flow, stage])
        destination = places.flows.holder[flow, reader]
        crosses = (reader >= 0) & (destination != source)
        producer, forward, stage, reader = producer[crosses], forward[crosses], stage[crosses], reader[crosses]
        microbatch = schedule.microbatch[producer]
        consumer = np.where(forward, places.find(Kind.F, reader, microbatch), places.backward(reader, microbatch))
        return cls(
            producer=producer,
            consumer=consumer.astype(np.int64),
            backward=1 - forward.astype(np.int64),
            stage=stage.astype(np.int64),
            reader=reader.astype(np.int64),
            microbatch=microbatch.astype(np.int64),
            source=source[crosses].astype(np.int64),
            destination=destination[crosses].astype(np.int64),
        )

    def sends(self) -> Rows:
        """Entries of the sends."""
        import numpy as np

        kind = np.where(self.backward, Kind.SEND_B, Kind.SEND_F)
        return np.stack([kind, self.stage, self.microbatch, self.destination, np.zeros_like(kind)])

    def receives(self) -> Rows:
        """Entries of the receives that meet them, in the same order."""
        import numpy as np

        kind = np.where(self.backward, Kind.RECV_B, Kind.RECV_F)
        return np.stack([kind, self.reader, self.microbatch, self.source, np.zeros_like(kind)])


def operations(schedule: Schedule) -> Rows:
    """Entries of a schedule: kind, stage, micro-batch, peer and whether it is joined, one column each (5, N)."""
    import numpy as np

    joined = np.zeros(schedule.num_ops) if schedule.joined is None else schedule.joined
    return np.stack([schedule.kind, schedule.stage, schedule.microbatch, schedule.peer, joined]).astype(np.int64)


def with_entries(schedule: Schedule, entries: Rows, offsets: Rows) -> Schedule:
    """The schedule with other entries."""
    kind, stage, microbatch, peer, joined = entries
    return schedule.with_columns(
        kind=kind, stage=stage, microbatch=microbatch, peer=peer, joined=joined, offsets=offsets
    )


def ends_of_pairs(schedule: Schedule) -> tuple[Rows, Rows]:
    """For each row the first and the last row of the pair that it is in: itself, where it is in none."""
    import numpy as np

    rows = np.arange(schedule.num_ops)
    if schedule.joined is None:
        return rows, rows
    return rows - np.append(0, schedule.joined[:-1]), rows + schedule.joined


def _receive_at(schedule: Schedule, messages: Messages) -> tuple[Rows, Rows]:
    """Row before which each message is received, and which message that is, channel after channel.

    That is the earliest row that consumes it or one that the channel brings later.
    """
    import numpy as np

    first, _ = ends_of_pairs(schedule)
    never = schedule.num_ops
    needed = np.where(messages.consumer >= 0, first[messages.consumer], never) if len(first) else messages.consumer
    channel = (messages.source * schedule.num_ranks + messages.destination) * 2 + messages.backward
    by_channel = np.argsort(channel, kind="stable")
    floor = channel[by_channel] * (never + 1)  # keeps a channel's rows above those of the channels before it
    earliest = np.minimum.accumulate((needed[by_channel] + floor)[::-1])[::-1] - floor
    consumed = earliest < never
    return earliest[consumed], by_channel[consumed]
