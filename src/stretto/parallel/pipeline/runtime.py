"""The runtime: interprets one rank's operations of a lowered Schedule, one after the other.

It decides nothing.  What runs when was fixed, verified and drawn before any process started; here an
operation finds its input where an earlier one left it:

    RECV_F ─► inbox ─► F ─► outbox ─► SEND_F        RECV_B ─► inbox ─► B ─► outbox ─► SEND_B
                         └► inbox of the next stage, where it lies on the same rank

Reductions of gradients start inside the last backward of each unit (unit.py) and end after the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stretto.parallel.pipeline.channel import Channel, Message
from stretto.parallel.pipeline.segment import Value
from stretto.parallel.pipeline.stage import Stage, scalar
from stretto.parallel.unit import Unit
from stretto.schedule.op import MESSAGES, Kind, Op
from stretto.schedule.schedule import Schedule
from stretto.spec.contract import Batch, Observer
from stretto.spec.errors import UnsupportedError

PLAYED = (Kind.F, Kind.B, Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B)
"""The kinds of operation that this runtime plays."""


class Runtime:
    """Plays one rank's part of a schedule.

    Args:
        stages: this rank's stages by number.
        schedule: lowered (with messages).
        rank: this rank's position along pp.
        channel: carries its messages; None where the schedule has none.
        observer: hears every operation.

    Raises:
        UnsupportedError: for a schedule with operations that can't be played yet.
    """

    def __init__(
        self, stages: Mapping[int, Stage], schedule: Schedule, *, rank: int, channel: Channel | None, observer: Observer
    ) -> None:
        self._stages, self._schedule, self._channel, self._observer = stages, schedule, channel, observer
        self._ops = schedule.ops(rank)
        for op in self._ops:
            if op.kind not in PLAYED:
                played = ", ".join(kind.name for kind in PLAYED)
                raise UnsupportedError(
                    f"schedule {schedule.name} has {op}, which the runtime can't play; it plays {played}."
                )
        self._messages = {
            (op.kind, op.stage, op.microbatch): self._message(op) for op in self._ops if op.kind in MESSAGES
        }
        self._receives = [m for (kind, _, _), m in self._messages.items() if kind in (Kind.RECV_F, Kind.RECV_B)]
        self._names = [str(op) for op in self._ops]
        self._uses = Counter(op.microbatch for op in self._ops if op.kind in (Kind.F, Kind.B))
        self._contributions: dict[int, int] = Counter(
            id(unit) for op in self._ops if op.kind == Kind.B for unit in stages[op.stage].units
        )
        self._last_stage = schedule.num_stages - 1

    @property
    def units(self) -> list[Unit]:
        """The units of this rank, each once, in model order."""
        found = {id(unit): unit for index in sorted(self._stages) for unit in self._stages[index].units}
        return list(found.values())

    def _message(self, op: Op) -> Message:
        """The message of an operation; a boundary is numbered by the stage below it."""
        forward = op.kind in (Kind.SEND_F, Kind.RECV_F)
        boundary: int | None = op.stage
        if op.kind == Kind.RECV_F:
            boundary = self._schedule.previous_stage(op.stage, op.microbatch)
        elif op.kind == Kind.SEND_B:
            boundary = self._schedule.gradient_target(op.stage, op.microbatch)
        assert boundary is not None
        return Message("F" if forward else "B", boundary, op.microbatch, op.peer)

    def step(
        self, batches: Sequence[Batch], context_of: Callable[[Batch], Any], scale: Callable[[], Tensor] | None
    ) -> Tensor | None:
        """Play all operations.

        Args:
            batches: the micro-batches.
            context_of: makes what the blocks share of a micro-batch.
            scale: gives the gradient of the summed loss (one over the number of tokens); None: evaluate only.

        Returns:
            Sum of the losses of this rank's micro-batches, a scalar, on the rank of the last stage; else None.
        """
        play = _Play(batches, context_of, scale, Counter(self._uses))
        if scale is not None:
            for unit in self.units:
                unit.begin_step(self._contributions[id(unit)])
        if self._channel is not None:
            self._channel.begin_step(self._receives, tuple(batches[0].tokens.shape))
        for op, name in zip(self._ops, self._names, strict=True):
            self._observer.begin(name, peer=op.peer if op.peer >= 0 else None)
            self._play(op, play)
            self._observer.end()
        if self._channel is not None:
            self._channel.end_step()
        assert not play.inbox and not play.outbox, "values of this step were not used"
        return play.loss

    def _play(self, op: Op, play: _Play) -> None:
        if op.kind == Kind.F:
            self._forward(op, play)
        elif op.kind == Kind.B:
            self._backward(op, play)
        else:
            assert self._channel is not None
            direction = "F" if op.kind in (Kind.SEND_F, Kind.RECV_F) else "B"
            key = (direction, op.stage, op.microbatch)
            message = self._messages[op.kind, op.stage, op.microbatch]
            if op.kind in (Kind.RECV_F, Kind.RECV_B):
                play.inbox[key] = self._channel.receive(message)
            else:
                self._channel.send(message, play.outbox.pop(key))

    def _forward(self, op: Op, play: _Play) -> None:
        stage, m = self._stages[op.stage], op.microbatch
        before, after = self._schedule.previous_stage(op.stage, m), self._schedule.next_stage(op.stage, m)
        x = None if before is None else play.inbox.pop(("F", op.stage, m))
        context, batch = play.context(m), play.batches[m]
        if play.scale is None:
            with torch.no_grad():
                y = stage.evaluate(x, context, batch)
        else:
            y = stage.forward(m, x, context, batch)
        play.done_with(m)
        if after is None:
            play.add_loss(scalar(y))
        elif after in self._stages:
            play.inbox["F", after, m] = y
        else:
            play.outbox["F", op.stage, m] = y

    def _backward(self, op: Op, play: _Play) -> None:
        stage, m = self._stages[op.stage], op.microbatch
        assert play.scale is not None
        source, target = self._schedule.gradient_source(op.stage, m), self._schedule.gradient_target(op.stage, m)
        dy: Value = play.seed() if source is None else play.inbox.pop(("B", op.stage, m))
        dx = stage.backward(m, dy, play.context(m), play.batches[m])
        play.done_with(m)
        if target is None:
            return
        if target in self._stages:
            play.inbox["B", target, m] = dx
        else:
            play.outbox["B", op.stage, m] = dx


class _Play:
    """What lives for one step: values between operations, contexts, the loss."""

    def __init__(
        self,
        batches: Sequence[Batch],
        context_of: Callable[[Batch], Any],
        scale: Callable[[], Tensor] | None,
        uses: Counter[int],
    ) -> None:
        self.batches, self.scale = batches, scale
        self.inbox: dict[tuple[str, int, int], Value] = {}
        self.outbox: dict[tuple[str, int, int], Value] = {}
        self.loss: Tensor | None = None
        self._loss_dtype: torch.dtype | None = None
        self._context_of, self._uses = context_of, uses
        self._contexts: dict[int, Any] = {}

    def context(self, microbatch: int) -> Any:
        """The context of a micro-batch, made when first needed."""
        if microbatch not in self._contexts:
            self._contexts[microbatch] = self._context_of(self.batches[microbatch])
        return self._contexts[microbatch]

    def done_with(self, microbatch: int) -> None:
        """One use of a micro-batch is over; after the last its context is let go."""
        self._uses[microbatch] -= 1
        if not self._uses[microbatch]:
            del self._contexts[microbatch]

    def seed(self) -> Tensor:
        """Gradient of the summed loss, in the loss's own type."""
        assert self.scale is not None and self._loss_dtype is not None
        return self.scale().to(self._loss_dtype)

    def add_loss(self, loss: Tensor) -> None:
        """Sum the losses, in at least float32."""
        loss = loss.detach()
        self._loss_dtype = loss.dtype
        wide = loss.to(torch.promote_types(loss.dtype, torch.float32))
        self.loss = wide if self.loss is None else self.loss + wide
