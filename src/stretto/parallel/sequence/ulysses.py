"""DeepSpeed-Ulysses: between two all-to-alls a rank has all tokens of some heads instead of some tokens of all heads.

        tokens ►                                    tokens ►
    h  ┌────┬────┬────┐                         h  ┌──────────────┐
    ▼  │ r0 │ r1 │ r2 │    ── all-to-all ──►    ▼  │   rank 0     │
       │    │    │    │                            ├──────────────┤      any attention of whole rows,
       │    │    │    │    ◄── all-to-all ──       │   rank 1     │      or a ring of such ranks (USP, LoongTrain)
       │    │    │    │                            ├──────────────┤
       └────┴────┴────┘                            │   rank 2     │
                                                   └──────────────┘
Where there are fewer key/value heads than ranks, each rank gets the ones that its query heads read; the gradients of a
head that went to several ranks are added up on the way back.  Each all-to-all is a message to every other rank,
neighbours first, so that what has come can be used while the rest is under way (``shared_seat`` does that).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stretto.parallel.wire import Transfer, Wire
from stretto.spec.sequence import Range, Ranges, count, heads_of, uneven_reads


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """The ranks that share heads, and what each holds."""

    wire: Wire
    members: tuple[int, ...]
    """Ranks on the wire."""
    index: int
    """This rank's index among them."""
    shares: tuple[Ranges, ...]
    """Tokens of each member."""
    heads: int
    """Query heads of all."""
    kv_heads: int
    """Key/value heads of all; they divide the query heads."""

    @property
    def others(self) -> tuple[int, ...]:
        """The other members in the order in which messages go: neighbours first, in pairs where that works out.

        With two, four, eight, ... members, of which neighbours are on one node, what is of the same node comes first.
        """
        size = len(self.members)
        if size & (size - 1) == 0:
            return tuple(self.index ^ bits for bits in range(1, size))
        return tuple((self.index + d) % size for d in range(1, size))

    def giver(self, other: int) -> int:
        """Who gives this rank something while it gives to ``other``."""
        size = len(self.members)
        return other if size & (size - 1) == 0 else (2 * self.index - other) % size

    def of_queries(self, member: int) -> Range:
        """Query heads of a member."""
        return heads_of(self.heads, self.kv_heads, len(self.members), member)[0]

    def of_keys(self, member: int) -> Range:
        """Key/value heads that a member reads."""
        return heads_of(self.heads, self.kv_heads, len(self.members), member)[1]

    def reads(self, device: torch.device) -> Tensor | None:
        """Which of this rank's key/value heads each of its query heads reads; None: evenly many each, in order."""
        found = uneven_reads(self.heads, self.kv_heads, len(self.members), self.index)
        return None if found is None else torch.tensor(found).to(device, non_blocking=True)

    def to_heads(self, x: Tensor, *, keys: bool) -> list[tuple[int, Transfer]]:
        """Give every other member its heads (dim -3) of this rank's tokens; get this rank's heads of theirs."""
        of = self.of_keys if keys else self.of_queries
        coming, (first, last) = [], of(self.index)
        for other in self.others:
            asks = self.giver(other)
            shape = (*x.shape[:-3], last - first, count(self.shares[other]), x.shape[-1])
            sends = [(x[..., slice(*of(asks)), :, :], self.members[asks])]
            coming.append((other, self.wire.start(sends, [(x.new_empty(shape), self.members[other])])))
        return coming

    def give_back(self, x: Tensor, other: int, *, keys: bool) -> tuple[Range, Transfer]:
        """Give a member its tokens ``x`` of this rank's heads; get own tokens of another's heads, and which those are.

        To be called for each of ``others``, in the same order on all ranks.
        """
        gives = self.giver(other)
        first, last = part = (self.of_keys if keys else self.of_queries)(gives)
        shape = (*x.shape[:-3], last - first, count(self.shares[self.index]), x.shape[-1])
        receives = [(x.new_empty(shape), self.members[gives])]
        return part, self.wire.start([(x, self.members[other])], receives)
