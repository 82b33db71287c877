"""The runtime: plays one rank's operations of a lowered Schedule, one after the other.

It decides nothing.  What runs when was fixed, verified and drawn before any process started; what each
operation does was looked up when the runtime was made (operation.py).

Reductions of gradients start where the schedule has REDUCE_GRAD, else with the last contribution to each
unit (unit.py), and end after the step.

A step may begin before its weights are confirmed: it then plays the warm-up (schedule/warm_up.py), asks, and either
goes on or lets go of everything and begins again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import Any

from torch import Tensor

from stretto.parallel.pipeline.channel import Channel, Message
from stretto.parallel.pipeline.device import Device, Present
from stretto.parallel.pipeline.landing import Landing
from stretto.parallel.pipeline.operation import Action, Actions
from stretto.parallel.pipeline.play import Play
from stretto.parallel.pipeline.stage import Stage
from stretto.parallel.pipeline.vocabulary.passes import Passes, Vocabulary
from stretto.parallel.unit import Unit
from stretto.schedule.op import COMPUTE, Kind, Op
from stretto.schedule.schedule import Schedule
from stretto.schedule.warm_up import warm_up
from stretto.spec.contract import Batch, Observer, Silent

Played = tuple[str, int | None, Op | None, tuple[Action | None, Action, Action | None]]
"""Name of an operation, whom it waits for, itself where it computes; and what it waits for, what it does, and what may
happen once the device has done that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unconfirmed:
    """What a step may do before its weights are confirmed, and how to undo it."""

    length: int
    """Operations of the warm-up."""
    early: Sequence[Message]
    """Messages that are certainly sent whatever is found, in order."""
    late: Sequence[Message]
    """The others, in order."""
    undo: Sequence[Action]
    """Gives gathered parameters back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A rank's place in its pipeline, whatever schedule it plays there."""

    rank: int
    """Position along pp."""
    channel: Channel | None = None
    """Carries its messages; None where its schedules have none."""
    observer: Observer = field(default_factory=Silent)
    """Hears every operation."""
    device: Device = field(default_factory=Present)
    """What it computes on; the default: what the tensors lie on."""
    vocabulary: Vocabulary | None = None
    """Its shard, for schedules that have S; it isn't asked for elsewhere."""


class Runtime:
    """Plays one rank's part of a schedule.

    Args:
        stages: this rank's stages by number.
        schedule: lowered (with messages).
        seat: where it plays.

    Raises:
        UnsupportedError: for a schedule with operations that can't be played yet.
    """

    def __init__(self, stages: Mapping[int, Stage], schedule: Schedule, seat: Seat) -> None:
        rank, channel, vocabulary = seat.rank, seat.channel, seat.vocabulary
        self._stages, self._channel, self._observer, self._device = stages, channel, seat.observer, seat.device
        ops = schedule.ops(rank)
        scored = vocabulary is not None and any(op.kind is Kind.S for op in ops)
        self.vocabulary = Passes(vocabulary, schedule, rank) if vocabulary is not None and scored else None
        """Plays S and T, where there are such."""
        actions = Actions(schedule, rank, stages=stages, channel=channel, vocabulary=self.vocabulary)
        self.offloader = actions.offloader
        self._program: list[Played] = [
            (str(op), self._giver(op), op if op.kind in COMPUTE else None, (before, actions.action(op), behind))
            for op, (before, behind) in zip(ops, self._around(ops), strict=True)
        ]
        self._receives = [actions.message(op) for op in ops if op.kind in (Kind.RECV_F, Kind.RECV_B)]
        self._schedule, self._rank, self._actions = schedule, rank, actions
        kept = {number for number, stage in stages.items() if isinstance(stage, Landing)}  # which asks for no context
        self._uses = Counter(
            op.microbatch for op in ops if op.kind in (Kind.F, Kind.B, Kind.I, Kind.R) and op.stage not in kept
        )
        told = {op.stage for op in ops if op.kind is Kind.REDUCE_GRAD}
        self._told = {id(unit) for index in told for unit in stages[index].units}
        first = takewhile(lambda op: op.kind is not Kind.OPT, ops)
        self._contributions: dict[int, int] = Counter(
            id(unit) for op in first if op.kind in (Kind.B, Kind.W) for unit in stages[op.stage].units
        )
        if self.vocabulary is not None:
            self._contributions |= self.vocabulary.contributions

    @property
    def units(self) -> list[Unit]:
        """The units of this rank, each once, in model order."""
        found = {id(unit): unit for index in sorted(self._stages) for unit in self._stages[index].units}
        return [*found.values(), *(() if self.vocabulary is None else self.vocabulary.units)]

    def _giver(self, op: Op) -> int | None:
        """Position of the rank that an operation sends to or may wait for; None where it is none, or all are."""
        if op.kind is Kind.S and self.vocabulary is not None:
            return self.vocabulary.giver(op)
        return op.peer if op.peer >= 0 else None

    def _around(self, ops: Sequence[Op]) -> Sequence[tuple[Action | None, Action | None]]:
        """What comes before and behind each operation."""
        return [(None, None)] * len(ops) if self.vocabulary is None else self.vocabulary.around(ops)

    @cached_property
    def _unconfirmed(self) -> Unconfirmed:
        """What a step may do before its weights are confirmed."""
        found = warm_up(self._schedule, self._rank)
        early = [m for m in self._receives if m.direction == "F" and (m.boundary, m.microbatch, m.peer) in found.sent]
        known = set(early)
        return Unconfirmed(
            length=found.length,
            early=early,
            late=[message for message in self._receives if message not in known],
            undo=[self._actions.action(op) for op in found.gathered],
        )

    def step(
        self,
        batches: Sequence[Batch],
        context_of: Callable[[Batch], Any],
        scale: Callable[[], Tensor] | None,
        *,
        confirm: Callable[[], bool] | None = None,
    ) -> Tensor | None:
        """Play all operations.

        Args:
            batches: the micro-batches.
            context_of: makes what the blocks share of a micro-batch.
            scale: gives the gradient of the summed loss (one over the number of tokens); None where the
                schedule is forward only.
            confirm: called after the warm-up, and before anything of the last step's gradients is let go: whether
                the weights that it ran with are right.  If not, they are by then, and the step begins again.

        Returns:
            Sum of the losses of this rank's micro-batches, a scalar, where it holds the last stage; else None.
        """
        play = Play(batches, context_of, scale, self._uses)
        shapes = [tuple(batch.tokens.shape) for batch in batches]
        if confirm is None:
            self._begin(self._receives, shapes, differentiated=scale is not None)
            if self.vocabulary is not None:
                self.vocabulary.begin_step(play)
            self._play_all(play, self._program)
        elif not self._play_unconfirmed(play, shapes, confirm):
            return self.step(batches, context_of, scale)
        if self.vocabulary is not None:
            self.vocabulary.end_step(play)
        if self._channel is not None:
            self._observer.begin("FLUSH")
            self._channel.end_step()
            self._observer.end()
        assert not play.values, f"values of this step were not used: {sorted(play.values)}"
        return play.loss

    def _play_unconfirmed(self, play: Play, shapes: Sequence[Hashable], confirm: Callable[[], bool]) -> bool:
        """Play the warm-up, and the rest if the weights are right; else nothing is left of it."""
        ahead = self._unconfirmed
        if self._channel is not None:
            self._channel.begin_step(ahead.early, shapes)
        if self.vocabulary is not None:
            self.vocabulary.begin_step(play)
        self._play_all(play, self._program[: ahead.length])
        if not confirm():
            self._abandon(play)
            return False
        if self._channel is not None:
            self._channel.announce(ahead.late)
        self._begin_units()
        self._play_all(play, self._program[ahead.length :])
        return True

    def _begin(self, receives: Sequence[Message], shapes: Sequence[Hashable], *, differentiated: bool) -> None:
        if differentiated:
            self._begin_units()
        if self._channel is not None:
            self._channel.begin_step(receives, shapes)

    def _begin_units(self) -> None:
        for unit in self.units:
            unit.begin_step(self._contributions[id(unit)], told=id(unit) in self._told)

    def _abandon(self, play: Play) -> None:
        """Let go of all that the warm-up left: activations, messages on their way, gathered parameters."""
        for stage in self._stages.values():
            stage.forget()
        if self._channel is not None:
            self._channel.abandon()
        if self.vocabulary is not None:
            self.vocabulary.abandon(play)
        for undo in self._unconfirmed.undo:
            undo(play)

    def _play_all(self, play: Play, program: Sequence[Played]) -> None:
        begin, end, device = self._observer.begin, self._observer.end, self._device
        tend = _nothing if self._channel is None else self._channel.tend
        for name, peer, compute, (before, action, behind) in program:
            begin(name, peer=peer)
            if before is not None:
                before(play)
            if compute is None:
                action(play)
            else:
                device.begin(compute)
                action(play)
                tend()
                device.end(compute)
            if behind is not None:
                behind(play)
            end()


def _nothing() -> None:
    """There are no messages to tend."""
