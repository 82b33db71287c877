"""What each operation of a schedule does on its rank, looked up once before the first step.

An operation finds its operand where an earlier one left it and leaves its result where a later one looks:

    RECV_F ─► values ─► F ─► values ─► SEND_F        RECV_B ─► values ─► B or I ─► values ─► SEND_B
                          └► F of the next stage, where that lies on the same rank
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from stretto.parallel.pipeline.channel import Channel, Message
from stretto.parallel.pipeline.delivery import arrivals
from stretto.parallel.pipeline.landing import Land, Landing, Taking
from stretto.parallel.pipeline.offloading import Beside, Load, NotingForward, Offload, offloader_of
from stretto.parallel.pipeline.play import END_B, END_F, Play, Slot
from stretto.parallel.pipeline.segment import Value
from stretto.parallel.pipeline.stage import Stage, scalar
from stretto.parallel.pipeline.vocabulary.passes import Passes
from stretto.parallel.unit import Unit
from stretto.schedule.op import COMPUTE, PER_BLOCK, Kind, Op
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import UnsupportedError
from stretto.spec.sharding import split_evenly

Action = Callable[[Play], None]


@dataclass(frozen=True, slots=True)
class Forward:
    """F: run the stage on its input and leave the output, or add it to the loss."""

    run: Callable[[int, Value, object, object], Value]
    microbatch: int
    source: Slot | None
    """Where the input lies; None for the first stage."""
    target: Slot | None
    """Where the output goes; None where it is the loss."""

    def __call__(self, play: Play) -> None:
        """Play it."""
        m = self.microbatch
        x = None if self.source is None else play.values.pop(self.source)
        y = self.run(m, x, play.context(m), play.batches[m])
        if self.target is None:
            play.add_loss(scalar(y))
        else:
            play.values[self.target] = y


@dataclass(frozen=True, slots=True)
class Backward:
    """B or I: differentiate the stage and leave the gradient of its input."""

    run: Callable[[int, Value, object, object], Value]
    microbatch: int
    source: Slot | None
    """Where the gradient of the output lies; None where the output is the loss."""
    target: Slot | None
    """Where the gradient of the input goes; None where nobody needs it."""

    def __call__(self, play: Play) -> None:
        """Play it."""
        m = self.microbatch
        dy = play.seed() if self.source is None else play.values.pop(self.source)
        dx = self.run(m, dy, play.context(m), play.batches[m])
        if self.target is not None:
            play.values[self.target] = dx


@dataclass(frozen=True, slots=True)
class Weights:
    """W: hand the gradients of the stage's parameters to its units."""

    stage: Stage
    microbatch: int

    def __call__(self, play: Play) -> None:
        """Play it."""
        self.stage.backward_weights(self.microbatch)


@dataclass(frozen=True, slots=True)
class Recompute:
    """R: run the forward of which the input alone was kept."""

    stage: Stage
    microbatch: int
    split: bool

    def __call__(self, play: Play) -> None:
        """Play it."""
        m = self.microbatch
        self.stage.rerun(m, play.context(m), play.batches[m], split=self.split)


@dataclass(frozen=True, slots=True)
class Send:
    """SEND_F or SEND_B."""

    channel: Channel
    message: Message
    source: Slot

    def __call__(self, play: Play) -> None:
        """Play it."""
        self.channel.send(self.message, play.values.pop(self.source))


@dataclass(frozen=True, slots=True)
class Receive:
    """RECV_F or RECV_B."""

    channel: Channel
    message: Message
    target: Slot

    def __call__(self, play: Play) -> None:
        """Play it."""
        play.values[self.target] = self.channel.receive(self.message)


@dataclass(frozen=True, slots=True)
class OnUnits:
    """UNSHARD, RESHARD or REDUCE_GRAD of a block of a stage."""

    calls: tuple[Callable[[], None], ...]
    """``hold``, ``release`` or ``reduce_gradients`` of the block's units."""

    def __call__(self, play: Play) -> None:
        """Play it."""
        for call in self.calls:
            call()


class Actions:
    """Makes the actions of one rank.

    Args:
        schedule: lowered (with messages).
        rank: position along pp.
        stages: the rank's stages by number.
        channel: carries its messages; None where it has none.
        vocabulary: plays S and T; None where there are none.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        *,
        stages: Mapping[int, Stage],
        channel: Channel | None,
        vocabulary: Passes | None = None,
    ) -> None:
        self._schedule, self._rank, self._stages, self._channel = schedule, rank, stages, channel
        self._vocabulary = vocabulary
        self._landing = next((stage for stage in stages.values() if isinstance(stage, Landing)), None)
        _check_frozen(schedule)
        present = [(op.kind, op.stage, op.microbatch) for op in schedule.ops(rank)]
        self._split = {(stage, m) for kind, stage, m in present if kind is Kind.I}
        self._recomputed = {(stage, m) for kind, stage, m in present if kind is Kind.R}
        self.offloader = offloader_of(schedule, rank)
        self._arrivals = arrivals(schedule, rank)
        self._blocks: dict[int, int] = {}
        for kind, stage, block in present:
            if kind in PER_BLOCK:
                self._blocks[stage] = max(self._blocks.get(stage, 0), block + 1)

    def action(self, op: Op) -> Action:
        """What ``op`` does.  Raises UnsupportedError for a kind that can't be played."""
        make = _MAKERS.get(op.kind)
        if make is None:
            played = ", ".join(kind.name for kind in PLAYED)
            raise UnsupportedError(
                f"schedule {self._schedule.name} has {op}, which the runtime can't play; it plays {played}."
            )
        action = make(self, op)
        if self.offloader is None or op.kind not in COMPUTE:
            return action
        return Beside(action, self.offloader, op)

    def message(self, op: Op) -> Message:
        """The message of an operation; a boundary is numbered by the stage below it."""
        forward = op.kind in (Kind.SEND_F, Kind.RECV_F)
        boundary: int | None = op.stage
        if op.kind is Kind.RECV_F:
            boundary = self._schedule.previous_stage(op.stage, op.microbatch)
        elif op.kind is Kind.SEND_B:
            boundary = self._schedule.gradient_target(op.stage, op.microbatch)
        assert boundary is not None
        arrived = self._arrivals.get((op.kind, op.stage, op.microbatch), (0, 0))
        return Message("F" if forward else "B", boundary, op.microbatch, op.peer, arrived)

    def _slot(self, direction: str, op: Op, reader: int | None) -> Slot | None:
        """Where a value for ``reader`` goes: its own slot on this rank, or that of the send on this one's."""
        if reader is None:
            return None if self._vocabulary is None else (END_F if direction == "F" else END_B, op.stage, op.microbatch)
        here = self._schedule.rank_of(reader, self._schedule.voice[op.microbatch]) == self._rank
        return (direction, reader, op.microbatch) if here else _sent(direction, op)

    def _forward(self, op: Op) -> Action:
        schedule, stage, key = self._schedule, self._stages[op.stage], (op.stage, op.microbatch)
        run: Callable[[int, Value, object, object], Value]
        if isinstance(stage, Landing):
            return Land(stage, op.microbatch, ("F", *key))
        if not schedule.has_backward(op.stage):
            run = _evaluating(stage)
        elif key in self._recomputed:
            run = stage.forward_lightly
        elif self.offloader is not None and key in self.offloader.keys:
            run = NotingForward(self.offloader, stage, split=key in self._split)
        else:
            run = _splitting(stage) if key in self._split else stage.forward
        first = schedule.previous_stage(*key) is None
        if first and op.stage == 0 and self._landing is not None:
            run = Taking(self._landing, run)
        return Forward(
            run=run,
            microbatch=op.microbatch,
            source=None if first and self._vocabulary is None else ("F", *key),
            target=self._slot("F", op, schedule.next_stage(*key)),
        )

    def _backward(self, op: Op) -> Action:
        schedule, stage, key = self._schedule, self._stages[op.stage], (op.stage, op.microbatch)
        last = schedule.gradient_source(*key) is None
        return Backward(
            run=stage.backward_inputs if op.kind is Kind.I else stage.backward,
            microbatch=op.microbatch,
            source=None if last and self._vocabulary is None else ("B", *key),
            target=self._slot("B", op, schedule.gradient_target(*key)),
        )

    def _weights(self, op: Op) -> Action:
        return Weights(self._stages[op.stage], op.microbatch)

    def _recompute(self, op: Op) -> Action:
        key = (op.stage, op.microbatch)
        return Recompute(self._stages[op.stage], op.microbatch, split=key in self._split)

    def _offload(self, op: Op) -> Action:
        assert self.offloader is not None
        return Offload(self.offloader, self._stages[op.stage], op.microbatch)

    def _load(self, op: Op) -> Action:
        assert self.offloader is not None
        return Load(self.offloader, op.stage, op.microbatch)

    def _vocabulary_pass(self, op: Op) -> Action:
        if self._vocabulary is None:
            raise UnsupportedError(
                f"schedule {self._schedule.name} has {op}, but this rank has no shard of the vocabulary to play it on."
            )
        return self._vocabulary.action(op)

    def _on_units(self, op: Op) -> Action:
        """A stage of more segments than blocks has several of them in a block."""
        segments = self._stages[op.stage].segments
        start, count = split_evenly(len(segments), self._blocks[op.stage], op.microbatch)
        units = {id(unit): unit for segment in segments[start : start + count] for unit in segment.units}
        return OnUnits(tuple(_call_of(op.kind, unit) for unit in units.values()))

    def _optimize(self, op: Op) -> Action:
        """What the stages say of it: nothing, where the step that the schedule is part of updates (trainer)."""
        return OnUnits(tuple(stage.update for stage in self._stages.values()))

    def _send(self, op: Op) -> Action:
        assert self._channel is not None
        return Send(self._channel, self.message(op), _sent("F" if op.kind is Kind.SEND_F else "B", op))

    def _receive(self, op: Op) -> Action:
        assert self._channel is not None
        direction = "F" if op.kind is Kind.RECV_F else "B"
        return Receive(self._channel, self.message(op), (direction, op.stage, op.microbatch))


_MAKERS: Mapping[Kind, Callable[[Actions, Op], Action]] = {
    Kind.F: Actions._forward,
    Kind.B: Actions._backward,
    Kind.I: Actions._backward,
    Kind.W: Actions._weights,
    Kind.R: Actions._recompute,
    Kind.O: Actions._offload,
    Kind.L: Actions._load,
    Kind.SEND_F: Actions._send,
    Kind.RECV_F: Actions._receive,
    Kind.SEND_B: Actions._send,
    Kind.RECV_B: Actions._receive,
    Kind.UNSHARD: Actions._on_units,
    Kind.RESHARD: Actions._on_units,
    Kind.REDUCE_GRAD: Actions._on_units,
    Kind.OPT: Actions._optimize,
    Kind.S: Actions._vocabulary_pass,
    Kind.T: Actions._vocabulary_pass,
}
PLAYED = tuple(_MAKERS)
"""The kinds of operation that can be played."""


def _sent(direction: str, op: Op) -> Slot:
    """Where a value lies that will be sent, apart from what this rank's own stages read."""
    return (f"SEND_{direction}", op.stage, op.microbatch)


def _call_of(kind: Kind, unit: Unit) -> Callable[[], None]:
    if kind is Kind.REDUCE_GRAD:
        return unit.reduce_gradients
    return unit.hold if kind is Kind.UNSHARD else unit.release


def _check_frozen(schedule: Schedule) -> None:
    """UnsupportedError where a gradient would have to pass a stage that has no backward."""
    for microbatch in range(schedule.num_microbatches if schedule.frozen and not schedule.forward_only else 0):
        trained = None
        for stage in schedule.path(microbatch):
            if schedule.has_backward(stage):
                trained = stage
            elif trained is not None:
                raise UnsupportedError(
                    f"schedule {schedule.name} trains stage {trained}, but freezes stage {stage} behind it, through "
                    "which its gradient would have to come; only the first stages of a path may be frozen."
                )


def _evaluating(stage: Stage) -> Callable[[int, Value, object, object], Value]:
    return lambda microbatch, x, context, batch: stage.evaluate(x, context, batch)


def _splitting(stage: Stage) -> Callable[[int, Value, object, object], Value]:
    return lambda microbatch, x, context, batch: stage.forward(microbatch, x, context, batch, split=True)
