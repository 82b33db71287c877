"""Vocabulary passes of ranks that are threads of one process (one_process.py): messages and sums without a group.

    thread 0   0S0 ── scores ──► office ◄── scores ── 1S0   thread 1        each reads the scores of all, and sums them
               0T0 ◄─────────────┘  └─────────────► 1T0                     in the order of the ranks

What an operation of the schedule waits for tells the clock when it was made; embeddings, which no operation stands for,
tell it nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stretto.parallel.collectives import DONE, Pending
from stretto.parallel.mesh import AXES, Mesh
from stretto.parallel.pipeline.vocabulary.background import Promise
from stretto.parallel.pipeline.vocabulary.groups import Groups
from stretto.parallel.pipeline.vocabulary.passes import Shard, Vocabulary
from stretto.parallel.pipeline.vocabulary.scores import Scores, loss_of
from stretto.schedule.op import Kind

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from stretto.parallel.pipeline.one_process import PostOffice
    from stretto.parallel.pipeline.simulated import SimulatedClock
    from stretto.parallel.pipeline.transport import Layout, Started

OUTPUTS, ROWS, ROW_GRADIENTS = "outputs", "rows", "row gradients"
"""What stands for process groups."""


class _Awaited:
    """What a transport waits for: a letter."""

    def __init__(self, letter: tuple[int, int, str, int, int], into: Tensor) -> None:
        self.letter, self.into = letter, into


class MemoryTransport:
    """One rank's end of all messages between vocabulary passes."""

    early = True

    def __init__(self, office: PostOffice, rank: int, clock: SimulatedClock) -> None:
        self._office, self._rank, self._clock = office, rank, clock

    def connect(self, group: ProcessGroup, peer: int, *, sending: bool) -> None:
        """All have met."""

    def send(self, group: Any, peer: int, tensors: Sequence[Tensor], tag: int) -> Started:
        """Post it; ``tag`` is the micro-batch."""
        time = self._clock.output_at(tag) if group == OUTPUTS else 0.0
        self._office.leave((self._rank, peer, group, -1, tag), (tensors[0], time))
        return (), tensors

    def receive(self, group: Any, peer: int, layout: Layout, tag: int) -> Started:
        """Make room for it."""
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in layout]
        awaited: Any = [_Awaited((peer, self._rank, group, -1, tag), tensor) for tensor in tensors]
        return awaited, tensors

    def wait(self, started: Started) -> None:
        """Let other ranks run until it is there."""
        awaited: Any
        for awaited in started[0]:
            tensor, time = self._office.collect(awaited.letter)
            awaited.into.copy_(tensor)
            self._clock.hold(time)


class MemorySums:
    """Sums over the ranks of a schedule."""

    def __init__(self, office: PostOffice, rank: int, num_ranks: int, clock: SimulatedClock) -> None:
        self._office, self._rank, self._clock = office, rank, clock
        self._others = [other for other in range(num_ranks) if other != rank]

    def of_scores(self, scores: Scores, microbatch: int, target: int | None) -> Promise:
        """See ``Sums``: what S found goes to all."""
        time = self._clock.vocabulary_at(Kind.S, microbatch)
        for other in self._others:
            self._office.leave((self._rank, other, "S", -1, microbatch), (scores, time))
        return _Summed(self, scores, microbatch, wanted=target == self._rank)

    def of_gradients(self, dx: Tensor, microbatch: int, target: int) -> Pending:
        """See ``Sums``: what T made goes to the one that needs it."""
        if target == self._rank:
            return _SummedGradient(self, dx, microbatch)
        time = self._clock.vocabulary_at(Kind.T, microbatch)
        self._office.leave((self._rank, target, "T", -1, microbatch), (dx, time))
        return DONE

    def collect(self, kind: str, microbatch: int, own: Any) -> list[Any]:
        """What all ranks left, in their order; waits for it."""
        found = {self._rank: own}
        for other in self._others:
            found[other], time = self._office.collect((other, self._rank, kind, -1, microbatch))
            self._clock.hold(time)
        return [found[rank] for rank in sorted(found)]


class _Summed:
    def __init__(self, sums: MemorySums, scores: Scores, microbatch: int, *, wanted: bool) -> None:
        self._sums, self._scores, self._microbatch, self._wanted = sums, scores, microbatch, wanted

    def result(self) -> tuple[Tensor, ...]:
        shards: list[Scores] = self._sums.collect("S", self._microbatch, self._scores)
        top = torch.stack([shard.top for shard in shards]).amax(0)
        mass = torch.stack([shard.mass * (shard.top - top).exp() for shard in shards]).sum(0)
        label = torch.stack([shard.label for shard in shards]).sum(0)
        totals = top, mass, loss_of(self._scores.valid, top, mass, label)
        if not self._wanted:
            return totals
        return (*totals, torch.stack([shard.take_input_gradient(top, mass) for shard in shards]).sum(0))

    def found(self) -> tuple[Tensor, ...]:
        return ()


class _SummedGradient(Pending):
    __slots__ = ("_dx", "_microbatch", "_sums")

    def __init__(self, sums: MemorySums, dx: Tensor, microbatch: int) -> None:
        super().__init__(None)
        self._sums, self._dx, self._microbatch = sums, dx, microbatch

    def wait(self) -> None:
        """Return when all have run T."""
        parts = self._sums.collect("T", self._microbatch, self._dx)
        self._dx.copy_(torch.stack(parts).sum(0))


def in_memory(shard: Shard, office: PostOffice, place: tuple[int, int], clock: SimulatedClock) -> Vocabulary:
    """What the passes of a rank share; ``place`` is its position and the number of ranks."""
    rank, num_ranks = place
    sizes = dict.fromkeys(AXES, 1) | {"pp": num_ranks}
    mesh = Mesh(sizes=sizes, coordinates=dict.fromkeys(AXES, 0) | {"pp": rank}, rank=rank, groups={})
    names: Any = {"outputs": OUTPUTS, "rows": ROWS, "row_gradients": ROW_GRADIENTS}
    return Vocabulary(
        shard=shard,
        mesh=mesh,
        groups=Groups(**names, scores=None, inputs_of_s=None, inputs_of_t=None),
        transport=MemoryTransport(office, rank, clock),
        sums=MemorySums(office, rank, num_ranks, clock),
    )
