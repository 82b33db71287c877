"""Brings the last stage's output of each micro-batch to all pipeline ranks.

rank 3   3F0 ── give ──┐                 A message to each rank, not a broadcast: that would make a rank wait
rank 0   ... post ◄────┤ ... take ─ 0S0  until all others have come as far, which no arrow says.  Messages are
rank 1   ... post ◄────┘ ... take ─ 1S0  started in the order of S, which all ranks share, receives ahead
                                         where they may be (transport.py)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from stretto.schedule.itinerary import OUTPUTS_AHEAD, Outputs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from stretto.parallel.pipeline.transport import Layout, Started, Transport


class Spread:
    """The outputs of one schedule.

    Args:
        transport: how messages travel.
        group: the pipeline; None where it is one rank.
        order: micro-batches in the order of S.
        sources: index in the group of the rank that makes each one's output.
        here: this rank's index, of ``num_ranks``.
    """

    def __init__(
        self,
        transport: Transport,
        group: ProcessGroup | None,
        order: Sequence[int],
        sources: Mapping[int, int],
        *,
        here: int,
        num_ranks: int,
    ) -> None:
        self._transport, self._group, self._order = transport, group, order
        self._sources, self._here = sources, here
        self._peers = [rank for rank in range(num_ranks) if rank != here]
        self._ahead = OUTPUTS_AHEAD if transport.early else 0
        self._outputs = self._unmoved()
        self._layout: Callable[[int], Layout] | None = None
        self._begun: list[int] = []
        """Outputs of this step that are sent or received."""
        self._ready: dict[int, Tensor] = {}
        self._arriving: dict[int, Started] = {}
        self._leaving: dict[int, list[Started]] = {}

    def begin_step(self, layout: Callable[[int], Layout]) -> None:
        """``layout`` gives shape and type of a micro-batch's output."""
        self._outputs = self._unmoved()
        self._layout = layout
        self._begun.clear()
        self._start(self._outputs.begin())

    def _unmoved(self) -> Outputs:
        return Outputs(self._order, self._sources, here=self._here, ahead=self._ahead)

    def give(self, microbatch: int, y: Tensor) -> None:
        """This rank made an output; it must not be changed."""
        self._ready[microbatch] = y
        self._start(self._outputs.give(microbatch))

    def take(self, microbatch: int) -> Tensor:
        """Wait for the next output in order."""
        self._start(self._outputs.take())
        started = self._arriving.pop(microbatch)
        self._transport.wait(started)
        return started[1][0]

    def let_go(self, microbatch: int) -> None:
        """All ranks have taken an output."""
        for started in self._leaving.pop(microbatch, ()):
            self._transport.wait(started)

    def abandon(self, number: int, blank: Callable[[int], Tensor]) -> None:
        """The step is given up: go on until the first ``number`` outputs have been begun, and let go of them.

        ``blank`` makes a tensor of a micro-batch's shape, to be sent where its output isn't there.
        """
        rest = self._order[len(self._begun) : number]
        own = (m for m in rest if self._sources[m] == self._here)
        self._ready = {m: self._ready[m] if m in self._ready else blank(m) for m in own}
        self._start(rest)
        for started in self._arriving.values():
            self._transport.wait(started)
        self._arriving.clear()
        self.end_step()

    def end_step(self) -> None:
        """Wait until everything has left."""
        for microbatch in list(self._leaving):
            self.let_go(microbatch)

    def _start(self, microbatches: Iterable[int]) -> None:
        """Send what is this rank's own, receive what isn't."""
        for microbatch in microbatches:
            self._begun.append(microbatch)
            source = self._sources[microbatch]
            if source == self._here:
                self._arriving[microbatch] = self._send(microbatch)
            else:
                assert self._group is not None and self._layout is not None
                layout = self._layout(microbatch)
                self._arriving[microbatch] = self._transport.receive(self._group, source, layout, microbatch)

    def _send(self, microbatch: int) -> Started:
        """To all others; this rank has it already."""
        y = self._ready.pop(microbatch)
        if self._group is not None:
            group = self._group
            self._leaving[microbatch] = [self._transport.send(group, peer, [y], microbatch) for peer in self._peers]
        return (), [y]

    def tensors(self) -> list[Tensor]:
        """What it keeps until S takes it, and until all have it."""
        moving = [*self._arriving.values(), *(started for sent in self._leaving.values() for started in sent)]
        return [*self._ready.values(), *(tensor for _, tensors in moving for tensor in tensors)]
