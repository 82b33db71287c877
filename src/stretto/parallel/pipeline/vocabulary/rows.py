"""Embeddings from the ranks that hold their rows to the first stage, and gradients back.

Every rank reads every micro-batch's tokens, so all know who needs which rows of whom, and only those travel: a
micro-batch's activation once, over all senders together, where a sum over the ranks would move it many times.

    tokens of m    7 2 9 2 │     rank 0 holds 0-3   sends 2 2  ─┐
    on stage 0's rank      │     rank 1 holds 4-7   sends 7    ─┼─► rows in place: 7 2 9 2      gradients: the same
                           │     rank 2 holds 8-11  sends 9    ─┘                               rows the other way

With tensor parallelism each of its ranks holds rows, and each of the first stage's needs its slice of the sequence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stretto.parallel.gradient import Deferred
from stretto.schedule.itinerary import LEAVING
from stretto.spec.contract import Batch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from stretto.parallel.pipeline.transport import Started, Transport
    from stretto.parallel.unit import Unit


class RowGradient(Deferred):
    """The gradient of some rows of a table, to be added to them."""

    __slots__ = ("_parts",)

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Args: parts: indices [k] into the rows held here, gradients [k, D]."""
        super().__init__()
        self._parts = parts

    def into(self, total: Tensor, *, fresh: bool) -> None:
        """Add them; a row that occurs several times gets the sum."""
        if fresh:
            total.zero_()
        for rows, gradient in self._parts:
            total.index_add_(0, rows, gradient.to(total.dtype))


class Needs:
    """Which rows one rank of the first stage needs for a micro-batch, and where they go."""

    def __init__(self, tokens: Tensor, height: int, holders: int) -> None:
        """Args: tokens: [B, t], its slice of the sequence; height: rows of every shard but the last ones."""
        self.shape = tokens.shape
        self.ids = tokens.flatten()
        holder = self.ids // height
        self.counted = holder.new_zeros(holders).scatter_add_(0, holder, torch.ones_like(holder))
        self.places = holder.argsort(stable=True)
        self.starts: list[int] = []
        """Where each shard's part of ``places`` starts; known once ``counted`` has come to the host."""

    def know(self, counts: Sequence[int]) -> None:
        """The numbers in ``counted``."""
        self.starts = [0, *accumulate(counts)]

    def count_of(self, shard: int) -> int:
        """How many rows of a shard it needs."""
        return self.starts[shard + 1] - self.starts[shard]

    def places_of(self, shard: int) -> Tensor:
        """Places in [B · t] that a shard's rows go to."""
        return self.places[self.starts[shard] : self.starts[shard + 1]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A rank's rows of the embedding."""

    weight: nn.Parameter
    """[n, D]."""
    unit: Unit
    """What gathers it and takes its gradient."""
    height: int
    """Rows of every shard but the last ones, which may have fewer."""
    start: int
    """Number of the first row here."""

    @property
    def trains(self) -> bool:
        """Whether anybody needs the gradients of its rows."""
        return self.weight.requires_grad


class Rows:
    """Carries rows for one schedule.

    Args:
        table: this rank's rows.
        transport: how messages travel.
        groups: the ranks along pp and tp, once for rows and once for gradients; None where it is one rank.
        ranks: how many there are along pp, and along tp, which are numbered fastest in the groups.
        here: this rank's index in the groups.
        firsts: pipeline rank of each micro-batch's first stage.
    """

    def __init__(
        self,
        table: Table,
        transport: Transport,
        groups: tuple[ProcessGroup | None, ProcessGroup | None],
        *,
        ranks: tuple[int, int],
        here: int,
        firsts: Mapping[int, int],
    ) -> None:
        self._table, self._transport, (self._there, self._back) = table, transport, groups
        (self._pp, self._tp), self._here, self._firsts = ranks, here, firsts
        self._needs: dict[int, list[Needs]] = {}
        self._looked_up = 0
        """Micro-batches of this step."""
        self._arriving: dict[int, list[tuple[int, Started]]] = {}
        self._made: dict[int, Tensor] = {}
        self._gradients: dict[int, list[tuple[Tensor, Started]]] = {}
        self._leaving: deque[list[Started]] = deque()

    def begin_step(self, batches: Sequence[Batch]) -> None:
        """Find out who needs what; the one time in a step that the host asks the device."""
        self._looked_up = 0
        self._needs = {m: self._needed(batch.tokens) for m, batch in enumerate(batches)}
        needs = [need for found in self._needs.values() for need in found]
        for need, counts in zip(needs, torch.stack([need.counted for need in needs]).tolist(), strict=True):
            need.know(counts)

    def _needed(self, tokens: Tensor) -> list[Needs]:
        return [Needs(part, self._table.height, self._pp * self._tp) for part in tokens.chunk(self._tp, dim=1)]

    def _readers(self, microbatch: int) -> list[tuple[int, Needs]]:
        """Index of each rank of the first stage, and its needs."""
        first = self._firsts[microbatch] * self._tp
        return [(first + index, need) for index, need in enumerate(self._needs[microbatch])]

    def look_up(self, microbatch: int) -> None:
        """Send this rank's rows to the first stage, or start to receive those of the others."""
        table, sending = self._table, []
        self._looked_up += 1
        table.unit.unshard()
        table.unit.ready()
        for reader, need in self._readers(microbatch):
            found = table.weight.detach()[need.ids[need.places_of(self._here)] - table.start]
            if reader == self._here:
                self._arriving[microbatch] = [
                    (shard, self._receive(self._there, shard, need.count_of(shard), microbatch, own=found))
                    for shard in range(self._pp * self._tp)
                ]
            elif len(found):
                sending.append(self._send(self._there, found, reader, microbatch))
        table.unit.reshard()
        self._leave(sending)

    def abandon(self, microbatches: Sequence[int]) -> None:
        """The step is given up: look up what is missing of ``microbatches``, and let go of all rows."""
        for microbatch in microbatches[self._looked_up :]:
            self.look_up(microbatch)
        for parts in self._arriving.values():
            for _, started in parts:
                self._transport.wait(started)
        self._arriving.clear()
        self.end_step()

    def _send(self, group: ProcessGroup | None, rows: Tensor, target: int, tag: int) -> Started:
        assert group is not None
        return self._transport.send(group, target, [rows], tag)

    def _receive(self, group: ProcessGroup | None, source: int, count: int, tag: int, *, own: Tensor) -> Started:
        """Start to receive ``count`` rows; this rank's own are there, and where there are none nothing is sent."""
        if source == self._here or not count:
            return (), [own[:count]]
        assert group is not None
        return self._transport.receive(group, source, [((count, own.shape[1]), own.dtype)], tag)

    def take(self, microbatch: int) -> Tensor:
        """The embeddings [B, t, D] that this rank of the first stage needs; waits for them."""
        need = next(need for reader, need in self._readers(microbatch) if reader == self._here)
        width = self._table.weight.shape[1]
        x = self._table.weight.new_empty(len(need.ids), width, requires_grad=False)
        for shard, started in self._arriving.pop(microbatch):
            self._transport.wait(started)
            x[need.places_of(shard)] = started[1][0]
        return x.view(*need.shape, width)

    def give_back(self, microbatch: int, dx: Tensor) -> None:
        """The gradients of a micro-batch's embeddings, [B, t, D], are there."""
        self._made[microbatch] = dx.flatten(0, 1)

    def exchange(self, microbatch: int) -> None:
        """Send gradients to the ranks that hold the rows, and start to receive those of this rank's rows."""
        sending, parts, width = [], [], self._table.weight.shape[1]
        for reader, need in self._readers(microbatch):
            rows = need.ids[need.places_of(self._here)] - self._table.start
            own = self._table.weight.new_empty(0, width, requires_grad=False)
            if reader == self._here:
                made = self._made.pop(microbatch)
                own = made[need.places_of(self._here)]
                for shard in range(self._pp * self._tp):
                    if shard != self._here and need.count_of(shard):
                        sending.append(self._send(self._back, made[need.places_of(shard)], shard, microbatch))
            parts.append((rows, self._receive(self._back, reader, len(rows), microbatch, own=own)))
        self._gradients[microbatch] = parts
        self._leave(sending)

    def take_gradient(self, microbatch: int) -> None:
        """Wait for them and hand them to the unit."""
        found = []
        for rows, started in self._gradients.pop(microbatch):
            self._transport.wait(started)
            found.append((rows, started[1][0]))
        self._table.unit.add_gradients([RowGradient(found)])

    def end_step(self) -> None:
        """Wait until everything has left."""
        assert not (self._arriving or self._gradients or self._made), "rows of this step were not used"
        while self._leaving:
            self._let_go()
        self._needs = {}

    def _leave(self, sending: list[Started]) -> None:
        """Keep what is sent; what was sent so long ago that its receiver has come to it may go."""
        self._leaving.append(sending)
        if len(self._leaving) > LEAVING:
            self._let_go()

    def _let_go(self) -> None:
        for started in self._leaving.popleft():
            self._transport.wait(started)

    def tensors(self) -> list[Tensor]:
        """What is here on its way."""
        moving = [started for parts in self._arriving.values() for _, started in parts]
        moving += [started for parts in self._gradients.values() for _, started in parts]
        moving += [started for sending in self._leaving for started in sending]
        return [*self._made.values(), *(tensor for _, tensors in moving for tensor in tensors)]
