"""Wires the recorder into a run: which steps, whose trace, what the messages carry."""

from __future__ import annotations

import socket
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import nn

from stretto.parallel.pipeline.segment import Value, tensors_of
from stretto.parallel.wire import Wire
from stretto.resilience.recorder import Recorder, epoch_of_clock
from stretto.schedule.measured.document_format import Held
from stretto.schedule.measured.format import FOLDER, Source
from stretto.schedule.measured.identity import identity
from stretto.spec.contract import Batch, Observer, Stack
from stretto.spec.run import RunSpec
from stretto.spec.sequence import count
from stretto.spec.traced_steps import traced_steps
from stretto.trainer.processor import processor_name, usable_cores

if TYPE_CHECKING:
    from stretto.parallel.pipeline.channel import Channel, Message
    from stretto.trainer.world import World


def recorder_of(run: RunSpec, world: World, observer: Observer, *, device: str) -> Recorder | None:
    """The recorder that ``run.trace`` asks for; None where it is off."""
    steps = traced_steps(run.run.trace)
    if run.run.trace == "off":
        return None
    plan = run.plan
    pipelines = plan.num_ranks // plan.pp
    source = Source(
        rank=world.rank,
        world_size=world.world_size,
        position=world.rank // pipelines,
        pipeline=world.rank % pipelines,
        host=socket.gethostname(),
        epoch=epoch_of_clock(),
        device=device,
        processor=processor_name(),
        cores=usable_cores(),
        compiled=plan.compile,
        plan=identity(run),
    )
    wanted = None if steps is None else lambda step: any(first <= step <= last for first, last in steps)
    return Recorder(observer, Path(run.run.dir) / FOLDER, source=source, wanted=wanted)


def held_of(batches: Sequence[Batch]) -> list[Held]:
    """What this rank has of the documents of its micro-batches."""
    found = []
    for number, batch in enumerate(batches):
        part = batch.part
        assert part is not None and part.sources is not None, "the batch was placed"
        tokens = len(part.sources)
        starts = [section.start for section in part.sections]
        samples = part.sources[[min(start, tokens - 1) for start in starts], 0].tolist()
        for section, end, sample in zip(part.sections, [*starts[1:], tokens], samples, strict=True):
            if end == section.start or sample >= 0:  # else it fills up
                length = sum(count(share) for share in section.shares)
                held = Held(number, section.first, len(section.shares), length, end - section.start, part.away)
                found.append(held)
    return found


def waited_in(stack: Stack) -> Callable[[], float]:
    """Tells the seconds that attention has waited for messages so far."""
    modules = cast(nn.Module, stack).modules()
    openings = [getattr(module, name, None) for module in modules for name in ("attend", "states")]
    wires = {id(wire): wire for opening in openings if isinstance(wire := getattr(opening, "wire", None), Wire)}
    return lambda: sum(wire.waited for wire in wires.values())


class Metered:
    """A channel that tells a recorder what its messages weigh."""

    def __init__(self, channel: Channel, recorder: Recorder) -> None:
        self._channel, self._recorder = channel, recorder

    def begin_step(self, receives: Sequence[Message], shapes: Sequence[Hashable]) -> None:
        """As the channel does."""
        self._channel.begin_step(receives, shapes)

    def announce(self, receives: Sequence[Message]) -> None:
        """As the channel does."""
        self._channel.announce(receives)

    def send(self, message: Message, value: Value) -> None:
        """Send, and say how much."""
        self._channel.send(message, value)
        self._recorder.carried(_weight(value))

    def receive(self, message: Message) -> Value:
        """Receive, and say how much."""
        value = self._channel.receive(message)
        self._recorder.carried(_weight(value))
        return value

    def tend(self) -> None:
        """As the channel does."""
        self._channel.tend()

    def end_step(self) -> None:
        """As the channel does."""
        self._channel.end_step()

    def abandon(self) -> None:
        """As the channel does."""
        self._channel.abandon()


def _weight(value: Value) -> int:
    """Bytes of its tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(value))
