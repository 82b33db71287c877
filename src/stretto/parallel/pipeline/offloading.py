"""O and L at run time: what a stage keeps of a micro-batch spends the time in the host's memory.

    F   forward, autograd's tensors noted ──► O   copies start, the graph's leaves are emptied
    B   waits, then as ever               ◄── L   memory is taken, copies start back

Nothing of this is known to a stage: its forward runs with hooks around its segments, and its backward finds the
tensors where it left them.  What moves and when their memory is given back is in ``parallel/offload``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from stretto.parallel.offload.activation import tensors_in
from stretto.parallel.offload.offloader import Offloader
from stretto.parallel.pipeline.play import Play
from stretto.parallel.pipeline.segment import Segment, Value, tensors_of
from stretto.parallel.pipeline.stage import Stage
from stretto.schedule.op import Kind, Op
from stretto.schedule.schedule import Schedule

TAKES_MEMORY = (Kind.F, Kind.R)
"""Operations that keep activations."""
NEEDS_ACTIVATION = (Kind.B, Kind.I)
"""Operations that need those of their forward."""


@dataclass(frozen=True, slots=True)
class NotingForward:
    """A forward whose activation will be offloaded."""

    offloader: Offloader
    stage: Stage
    split: bool

    def __call__(self, microbatch: int, x: Value, context: object, batch: object) -> Value:
        """Run it; autograd saves notes instead of tensors."""
        device = next(tensors_in(batch)).device
        activation = self.offloader.note((self.stage.index, microbatch), device, (context, batch))

        def around(segment: Segment) -> AbstractContextManager[object]:
            return activation.noting([tensor for unit in segment.units for tensor in unit.buffers()])

        return self.stage.forward(microbatch, x, context, batch, split=self.split, around=around)


@dataclass(frozen=True, slots=True)
class Offload:
    """O: the activation starts on its way to the host."""

    offloader: Offloader
    stage: Stage
    microbatch: int

    def __call__(self, play: Play) -> None:
        """Play it."""
        inputs: Sequence[Tensor] = [t for x in self.stage.inputs_of(self.microbatch) for t in tensors_of(x)]
        self.offloader.offload((self.stage.index, self.microbatch), inputs)


@dataclass(frozen=True, slots=True)
class Load:
    """L: it starts on its way back."""

    offloader: Offloader
    stage: int
    microbatch: int

    def __call__(self, play: Play) -> None:
        """Play it."""
        self.offloader.load((self.stage, self.microbatch))


@dataclass(frozen=True, slots=True)
class Beside:
    """An operation that computes on a rank that offloads: it waits for what comes back and lets go of what left."""

    action: Callable[[Play], None]
    offloader: Offloader
    op: Op

    def __call__(self, play: Play) -> None:
        """Play it."""
        if self.op.kind in TAKES_MEMORY:
            self.offloader.before_memory()
        elif self.op.kind in NEEDS_ACTIVATION:
            self.offloader.before_backward((self.op.stage, self.op.microbatch))
        self.action(play)
        self.offloader.after_computing()


def offloader_of(schedule: Schedule, rank: int) -> Offloader | None:
    """What moves the activations that ``rank`` offloads; None where it offloads none."""
    keys = [(stage, microbatch) for kind, stage, microbatch, _ in schedule.rows(rank) if kind == Kind.O]
    return Offloader(keys) if keys else None
