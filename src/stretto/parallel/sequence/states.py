"""The states of linear layers over cp: each stretch of tokens makes  S' = through S + gain  of the state S before it.

    all-gather (LASP-2)     through and gain of every stretch to everybody at once; each chains them for itself
    ring (LASP)             S from the holder of one stretch to the holder of the next, in the order of the row

What travels has the size of states, whatever the length of the sequence.  Backward the gradient of states goes the
other way through the same chain: gathered once (``through`` is kept, one [K, K] a stretch, or one number), or handed
from rank to rank.  The ring is a chain: a rank waits for all before it; the gather is one message deep.

A rank holds one stretch, or with the zigzag layout two, that follow each other in the row with others between them.
Ring or gather, the order is the row's, so both layouts are exact; a zigzag ring goes there and back.

Bytes per rank, with n ranks, p stretches a rank, B rows, G heads of size K and x bytes of a sum (4 for bfloat16):

    way            forward                      backward
    all-gather     (n-1) p BG (K K + t) x       (n-1) p BG K K x     t: 1 for linear attention, K K for the delta rule
    ring           h BG K K x                   h BG K K x           h: hops away from this rank; 1 if contiguous
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, autograd
from torch.autograd.function import once_differentiable

from stretto.parallel.sequence.results import Results
from stretto.parallel.wire import Transfer, Wire
from stretto.spec.contract import SequencePart
from stretto.spec.sequence import Range, Ranges, count


class Cut(Protocol):
    """What the opening reads of a model's context."""

    @property
    def part(self) -> SequencePart | None:
        """The part of the rows that this rank holds."""


class Stretch(Protocol):
    """What consecutive tokens make of a state."""

    def total(self) -> tuple[Tensor, Tensor]:
        """``through`` [B, G, K, K], or [B, G, 1, 1] where states are only scaled, and ``gain`` [B, G, K, K]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """The stretches of a row in order, and this rank's end of the messages."""

    wire: Wire
    owners: tuple[int, ...]
    """Whose each stretch is, by the rank on the wire."""

    @classmethod
    def of(cls, wire: Wire, shares: tuple[Ranges, ...], first: int = 0) -> Chain:
        """The chain of rows that are cut in ``shares``, of ranks that follow each other from ``first`` on."""
        held = [(part, first + rank) for rank, ranges in enumerate(shares) for part in ranges if count([part])]
        order: list[tuple[Range, int]] = sorted(held)
        return cls(wire=wire, owners=tuple(rank for _, rank in order))

    @property
    def own(self) -> list[int]:
        """Where this rank's stretches are in the chain."""
        return self.held(self.wire.index)

    def held(self, rank: int) -> list[int]:
        """Where the stretches of a rank are in the chain."""
        return [at for at, owner in enumerate(self.owners) if owner == rank]

    def gather(self, own: Sequence[Tensor]) -> Gathering:
        """Send ``own[i]`` [p, ...] of this rank's stretches to all."""
        others = sorted({*self.owners} - {self.wire.index})
        packed = torch.cat([x.flatten(1) for x in own], dim=1)
        sends = [(packed, rank) for rank in others]
        receives = [(packed.new_empty(len(self.held(rank)), packed.shape[1]), rank) for rank in others]
        shapes = [x.shape[1:] for x in own]
        return Gathering(chain=self, others=others, own=packed, shapes=shapes, coming=self.wire.start(sends, receives))

    def hand_on(self, at: int, state: Tensor | None, like: Tensor, *, step: int) -> Tensor | None:
        """Give ``state`` (None: not ours) of stretch ``at`` to the holder of the one ``step`` further; return it there.

        Nothing travels between stretches of one rank.
        """
        giver, taker, me = self.owners[at], self.owners[at + step], self.wire.index
        if giver == taker or me not in (giver, taker):
            return state if taker == me else None
        if me == giver:
            assert state is not None
            self.wire.start([(state, taker)], [])
            return None
        return self.wire.start([], [(torch.empty_like(like), giver)]).wait()[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathering:
    """An all-gather under way."""

    chain: Chain
    others: list[int]
    """Ranks from which something comes."""
    own: Tensor
    """What this rank gave, [p, numbers]."""
    shapes: list[torch.Size]
    """Of each tensor of a stretch."""
    coming: Transfer

    def wait(self) -> list[list[Tensor]]:
        """The same of all stretches, ``[i][stretch]``."""
        arrived = dict(zip(self.others, self.coming.wait(), strict=True))
        arrived[self.chain.wire.index] = self.own
        rows = {at: row for rank, x in arrived.items() for at, row in zip(self.chain.held(rank), x, strict=True)}
        self.chain.wire.flush()
        parts = [rows[at].split([shape.numel() for shape in self.shapes]) for at in range(len(rows))]
        return [[part[i].view(shape) for part in parts] for i, shape in enumerate(self.shapes)]


class Gathered:
    """One all-gather each way, under the products inside chunks (LASP-2)."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain

    def begin(self, through: Tensor, gain: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        """Gather; then: states before own stretches [p, B, G, K, K], and ``through`` of all stretches."""
        gathering = self.chain.gather((through, gain))

        def finish() -> tuple[Tensor, Tensor]:
            every, gains = gathering.wait()
            state = torch.zeros_like(gain[0])
            states = []
            for at, owner in enumerate(self.chain.owners):
                if owner == self.chain.wire.index:
                    states.append(state)
                state = _passed(every[at], state) + gains[at]
            return torch.stack(states), torch.stack(every)

        return finish

    def begin_back(self, kept: Tensor, gradient: Tensor) -> Callable[[], Tensor]:
        """Gather gradients of states before own stretches; then: those of the states after them."""
        gathering = self.chain.gather((gradient,))

        def finish() -> Tensor:
            (every,) = gathering.wait()
            after = torch.zeros_like(gradient[0])
            found: dict[int, Tensor] = {}
            for at in reversed(range(len(self.chain.owners))):
                found[at] = after
                after = every[at] + _passed(kept[at].transpose(-1, -2), after)
            return torch.stack([found[at] for at in self.chain.own])

        return finish


class Ringed:
    """One hop after the other (LASP): begun forward when everything else is done, backward before."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain

    def begin(self, through: Tensor, gain: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        """States before own stretches [p, B, G, K, K], and ``through`` of own stretches."""
        return lambda: self._before(through, gain)

    def begin_back(self, kept: Tensor, gradient: Tensor) -> Callable[[], Tensor]:
        """Gradients of the states after own stretches, given those of the states before them."""
        found = self._back(kept, gradient)
        return lambda: found

    def _before(self, through: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        chain = self.chain
        state: Tensor | None = torch.zeros_like(gain[0])
        states, mine, last = [], iter(zip(through, gain, strict=True)), len(chain.owners) - 1
        for at, owner in enumerate(chain.owners):
            if owner == chain.wire.index:
                assert state is not None
                states.append(state)
                step, more = next(mine)
                state = _passed(step, state) + more
            if at < last:
                state = chain.hand_on(at, state, gain[0], step=1)
        chain.wire.flush()
        return torch.stack(states), through

    def _back(self, kept: Tensor, gradient: Tensor) -> Tensor:
        chain = self.chain
        after: Tensor | None = torch.zeros_like(gradient[0])
        own, found = chain.own, []
        for at in reversed(range(len(chain.owners))):
            if chain.owners[at] == chain.wire.index:
                assert after is not None
                found.append(after)
                i = own.index(at)
                after = gradient[i] + _passed(kept[i].transpose(-1, -2), after)
            if at > 0:
                after = chain.hand_on(at, after, gradient[0], step=-1)
        chain.wire.flush()
        return torch.stack(found[::-1])


Way = type[Gathered] | type[Ringed]
WAYS: dict[str, Way] = {"all-gather": Gathered, "ring": Ringed}
"""How states travel, by ``plan.linear_context``."""


class Passage:
    """The way of one layer's states through the chain, and of their gradients back, each begun and later finished.

    Autograd goes through the nodes of a graph from the last to the first, so what was computed between ``_Begin`` and
    ``_End`` is differentiated between the two as well, while gradients of states are under way.
    """

    def __init__(self, way: Gathered | Ringed, results: Results | None) -> None:
        self._way, self._results = way, results
        self._finish: Callable[[], tuple[Tensor, Tensor]] | None = None
        self._finish_back: Callable[[], tuple[Tensor, Tensor]] | None = None

    def begin(self, through: Tensor, gain: Tensor) -> None:
        """Send, unless the states are kept from before a recomputation."""
        found = self._results.take() if self._results is not None else None
        self._finish = self._way.begin(through, gain) if found is None else lambda: found

    def finish(self) -> tuple[Tensor, Tensor]:
        """States before own stretches, and what their gradients need."""
        assert self._finish is not None
        found, self._finish = self._finish(), None
        if self._results is not None:
            self._results.put(*found)
        return found

    def begin_back(self, states: Tensor, kept: Tensor, gradient: Tensor) -> None:
        """Send gradients of the states."""
        after = self._way.begin_back(kept, gradient)

        def finish() -> tuple[Tensor, Tensor]:
            found = after()
            through = found @ states.transpose(-1, -2)
            if kept.shape[-1] == 1:
                through = through.diagonal(dim1=-1, dim2=-2).sum(-1)[..., None, None]
            return through, found

        self._finish_back = finish

    def finish_back(self) -> tuple[Tensor, Tensor]:
        """Gradients of ``through`` and ``gain``."""
        assert self._finish_back is not None
        found, self._finish_back = self._finish_back(), None
        return found


class _Begin(autograd.Function):
    @staticmethod
    def forward(ctx: Any, through: Tensor, gain: Tensor, passage: Passage) -> tuple[Tensor, Tensor]:
        passage.begin(through, gain)
        ctx.passage = passage
        return through.view_as(through), gain.view_as(gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        return *ctx.passage.finish_back(), None


class _End(autograd.Function):
    @staticmethod
    def forward(ctx: Any, through: Tensor, gain: Tensor, passage: Passage) -> Tensor:
        states, kept = passage.finish()
        ctx.passage, ctx.shapes = passage, (through.shape, gain.shape)
        ctx.save_for_backward(states, kept)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.passage.begin_back(*ctx.saved_tensors, gradients[0].contiguous())
        # What _Begin gives in their place is still under way.
        return *(gradients[0].new_zeros(()).expand(shape) for shape in ctx.shapes), None


@dataclass(frozen=True, slots=True, kw_only=True)
class CutStates:
    """Fills the opening ``states`` of a linear layer whose rows are cut over cp."""

    wire: Wire
    way: Way
    results: Results | None = None
    """Keeps states for blocks that are recomputed, so that nothing travels a second time."""

    def lengths(self, context: Cut, tokens: int, /) -> Sequence[int]:
        """Tokens of each of this rank's stretches."""
        part = context.part
        assert part is not None, "the batch was not cut over cp"
        return [stop - start for start, stop in part.shares[self.wire.index]]

    @torch.compiler.disable
    def begin(self, stretches: Sequence[Stretch], context: Cut, /) -> Callable[[], Sequence[Tensor]]:
        """Send for the state before each stretch, [B, G, K, K]; a call of what is returned waits for them."""
        part = context.part
        assert part is not None, "the batch was not cut over cp"
        return begin(self.way(Chain.of(self.wire, part.shares)), stretches, self.results)


def begin(
    way: Gathered | Ringed, stretches: Sequence[Stretch], results: Results | None
) -> Callable[[], Sequence[Tensor]]:
    """Send for the state before each of this rank's stretches in a chain; a call of what is returned waits for them."""
    throughs, gains = zip(*(stretch.total() for stretch in stretches), strict=True)
    passage = Passage(way, results)
    both = _Begin.apply(torch.stack(throughs), torch.stack(gains), passage)
    return lambda: _End.apply(*both, passage).unbind(0)


def _passed(through: Tensor, state: Tensor) -> Tensor:
    """``through`` applied to a state; one of [..., 1, 1] scales it."""
    return through * state if through.shape[-1] == 1 else through @ state
