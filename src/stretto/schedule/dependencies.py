"""Which operation needs which: the arrows that any order must respect.

For a micro-batch that visits stages 0 and 1, with the backward of stage 1 split:

    0F ──► 1F
    │       │
    ▼       ▼
    0B ◄── 1I ──► 1W

In a lowered schedule an arrow between ranks goes through its two messages: 0F ► SEND_F ► RECV_F ► 1F.
"""

from __future__ import annotations

from collections.abc import Iterator

from stretto.schedule.op import PER_BLOCK, Kind
from stretto.schedule.schedule import Schedule

Key = tuple[int, int, int]
"""Kind, stage, micro-batch: what names an operation that occurs once."""

REPEATABLE = PER_BLOCK | {Kind.OPT}
"""Kinds that may occur several times and so have no key."""


class Dependencies:
    """Where each operation of a schedule stands and what it needs."""

    def __init__(self, schedule: Schedule) -> None:
        """Index the schedule.  Where an operation occurs twice the later place wins; validation refuses that."""
        self.schedule = schedule
        self.lowered = schedule.lowered
        self.where: dict[Key, tuple[int, int]] = {}
        """Rank and position of each operation."""
        for rank in range(schedule.num_ranks):
            for position, row in enumerate(schedule.rows(rank)):
                if row[0] not in REPEATABLE:
                    self.where[row[:3]] = (rank, position)

    def needs(self, kind: int, stage: int, microbatch: int) -> Iterator[Key]:
        """Operations that must be over before this one starts."""
        if kind == Kind.F:
            yield from self._operand(Kind.F, stage, microbatch)
        elif kind in (Kind.B, Kind.I):
            yield (Kind.F, stage, microbatch)
            for restored in (Kind.R, Kind.L):
                if (restored, stage, microbatch) in self.where:
                    yield (restored, stage, microbatch)
            yield from self._operand(Kind.B, stage, microbatch)
        elif kind == Kind.W:
            yield (Kind.I, stage, microbatch)
        elif kind in (Kind.R, Kind.O, Kind.SEND_F):
            yield (Kind.F, stage, microbatch)
        elif kind == Kind.L:
            yield (Kind.O, stage, microbatch)
        elif kind == Kind.SEND_B:
            yield self.backward(stage, microbatch)
        elif kind in (Kind.RECV_F, Kind.RECV_B):
            sent = self.counterpart(kind, stage, microbatch)
            if sent is not None:
                yield sent

    def backward(self, stage: int, microbatch: int) -> Key:
        """The operation that gives the gradient of a stage's input: I where the backward is split, else B."""
        split = (Kind.I, stage, microbatch)
        return split if split in self.where else (Kind.B, stage, microbatch)

    def counterpart(self, kind: int, stage: int, microbatch: int) -> Key | None:
        """The receive that meets a send, or the send that meets a receive; None where the flow has none."""
        schedule = self.schedule
        there: int | None
        if kind == Kind.SEND_F:
            other, there = Kind.RECV_F, schedule.next_stage(stage, microbatch)
        elif kind == Kind.RECV_F:
            other, there = Kind.SEND_F, schedule.previous_stage(stage, microbatch)
        elif kind == Kind.SEND_B:
            other, there = Kind.RECV_B, schedule.gradient_target(stage, microbatch)
        else:
            other, there = Kind.SEND_B, schedule.gradient_source(stage, microbatch)
        return None if there is None else (other, there, microbatch)

    def _operand(self, kind: Kind, stage: int, microbatch: int) -> Iterator[Key]:
        """What another stage gives to F (an activation) or to B and I (a gradient)."""
        schedule, forward = self.schedule, kind is Kind.F
        giver = (schedule.previous_stage if forward else schedule.gradient_source)(stage, microbatch)
        if giver is None:
            return
        holders = schedule.placement[schedule.voice[microbatch]]
        if self.lowered and holders[giver] != holders[stage]:
            yield (Kind.RECV_F if forward else Kind.RECV_B, stage, microbatch)
        else:
            yield (Kind.F, giver, microbatch) if forward else self.backward(giver, microbatch)
