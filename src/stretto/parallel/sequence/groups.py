"""Attention of documents that each have a group of ranks of their own, anew for every step (ByteScale, FlexSP).

    rank 0   │ a, first part │ c      │        a micro-batch of a rank is one row of its parts of documents; everything
    rank 1   │ a, other part │ d │ e  │        but attention works token by token and sees no borders

Messages go from rank to rank through one process group that holds them all, so a group of a few of them is nothing
but their numbers: none has to be made, and no rank that a document doesn't concern hears of it.  Ranks that share
several documents meet them in the same order, so nothing can block.

Inside a group everything is as it is over cp: the ranks share the heads (Ulysses, FlexSP's way), pass keys round, or
sit together at the seats of a ring, as far as their number lets them.  Layers that keep a state hand it through each
document by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from stretto.parallel.sequence.alone import Alone
from stretto.parallel.sequence.blockwise import Drop
from stretto.parallel.sequence.opening import Cut, scheme_of
from stretto.parallel.sequence.pieces import Kernel, Scheme, Task, attend_over
from stretto.parallel.sequence.results import Results
from stretto.parallel.sequence.ring import Ring
from stretto.parallel.sequence.shared_seat import SharedSeat, attend_together
from stretto.parallel.sequence.sight import Sight
from stretto.parallel.sequence.states import Chain, Stretch, Way, begin
from stretto.parallel.sequence.ulysses import Exchange
from stretto.parallel.wire import Wire
from stretto.spec.sequence import Arrangement, Ranges, Section, count


class PlacedDrop(Drop, Protocol):
    """Dropout of attention weights, of documents wherever they are."""

    def of_document(self, sample: int, start: int, /) -> Drop:
        """That of a document at token ``start`` of a sample's row, in which queries and keys are counted."""


class Placed(Protocol):
    """The attention that the opening stands in for."""

    def weight_dropout(self, context: Any, /) -> PlacedDrop | None:
        """Dropout of attention weights, None where nothing is dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedAttend:
    """Attention of a rank's parts of documents, each to all of its own document."""

    wire: Wire
    arrange: Callable[[int], Arrangement]
    """Who sits where in a group of so many ranks."""
    kernel: Kernel
    local: Placed
    """The attention that the opening stands in for."""
    whole: Callable[..., Tensor] | None = None
    """Attention over whole documents, for those that a rank has to itself; None: the kernel does them too."""
    results: Results | None = None
    """Keeps results of cut documents for blocks that are recomputed."""

    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Cut, /) -> Tensor:
        """[1, H, T, K] of q, [1, G, T, K] of k and v, T own tokens -> [1, H, T, K]."""
        sight, dropped = Sight(context.first), self.local.weight_dropout(context)
        whole = self.whole if context.first is None and dropped is None else None
        found = []
        for section in _sections(context):
            length = count(section.shares[self.wire.index - section.first])
            own = [x.narrow(2, section.start, length) for x in (q, k, v)]
            if whole is not None and len(section.shares) == 1:
                found.append(whole(*own, context))
            else:
                drop = None if dropped is None else dropped.of_document(section.sample, section.place)
                found.append(self._attend(section, sight, drop, own))
        return torch.cat(found, dim=2)

    def _attend(self, section: Section, sight: Sight, drop: Drop | None, own: list[Tensor]) -> Tensor:
        """Own tokens of one document to all of it."""
        who = self.arrangement(section)
        scheme, exchange = self._scheme(who, section), self._exchange(who, section, own)
        task = Task(
            kernel=self.kernel,
            seats=who.seated(section.shares),
            sight=sight,
            drop=drop,
            first_head=0 if exchange is None else exchange.of_queries(exchange.index)[0],
            results=self.results,
        )
        if exchange is None:
            return attend_over(scheme, task, *own)
        assert isinstance(scheme, Ring), "only a ring has seats that ranks share"
        place = SharedSeat(exchange=exchange, ring=scheme, ring_outside=who.ring_outside)
        return attend_together(place, task, *own)

    def _exchange(self, who: Arrangement, section: Section, own: list[Tensor]) -> Exchange | None:
        """Between the ranks of a document that share heads."""
        if who.ulysses == 1:
            return None
        index = self.wire.index - section.first
        sharers = who.sharers(index)
        return Exchange(
            wire=self.wire,
            members=_on_wire(section, sharers),
            index=sharers.index(index),
            shares=tuple(section.shares[m] for m in sharers),
            heads=own[0].shape[1],
            kv_heads=own[1].shape[1],
        )

    def arrangement(self, section: Section) -> Arrangement:
        """Who sits where in a document's group; a plain ring where a rank has no token of it, and nothing to share."""
        who = self.arrange(len(section.shares))
        if who.ulysses > 1 and not all(map(count, section.shares)):
            return Arrangement(ranks=who.ranks)
        return who

    def _scheme(self, who: Arrangement, section: Section) -> Scheme:
        """What circulates between the seats of a document."""
        if who.ranks == 1:
            return Alone()
        index = self.wire.index - section.first
        return scheme_of(who, self.wire, members=_on_wire(section, who.ring(index)), seat=who.place(index)[0])


def _on_wire(section: Section, members: tuple[int, ...]) -> tuple[int, ...]:
    """Where members of a group are among all ranks."""
    return tuple(section.first + member for member in members)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedStates:
    """Fills the opening ``states`` of a linear layer: each document has a chain of its own."""

    wire: Wire
    way: Way
    local: Any
    """The opening of whole documents, before which nothing was."""
    results: Results | None = None
    """Keeps states for blocks that are recomputed, so that nothing travels a second time."""

    def lengths(self, context: Cut, tokens: int, /) -> Sequence[int]:
        """Tokens of each of this rank's stretches, document by document."""
        return [count([part]) for section in _sections(context) for part in self._own(section)]

    @torch.compiler.disable
    def begin(self, stretches: Sequence[Stretch], context: Cut, /) -> Callable[[], Sequence[Tensor]]:
        """Send for the state before each stretch, [1, G, K, K]; a call of what is returned waits for them."""
        coming: list[Callable[[], Sequence[Tensor]]] = []
        rest = iter(stretches)
        for section in _sections(context):
            own = [next(rest) for _ in self._own(section)]
            if not own:  # a document with fewer tokens than ranks
                continue
            if len(section.shares) == 1:
                coming.append(self.local.begin(own, context))
            else:
                way = self.way(Chain.of(self.wire, section.shares, section.first))
                coming.append(begin(way, own, self.results))
        return lambda: [state for wait in coming for state in wait()]

    def _own(self, section: Section) -> Ranges:
        """This rank's stretches of a document, none of them empty."""
        return tuple(part for part in section.shares[self.wire.index - section.first] if count([part]))


def _sections(context: Cut) -> tuple[Section, ...]:
    assert context.part is not None and context.part.sections, "the batch was not placed"
    return context.part.sections
