"""Attention of documents that each have a group of ranks of their own, anew for every step (ByteScale, FlexSP).

    rank 0   │ a, first part │ c      │        a micro-batch of a rank is one row of its parts of documents; everything
    rank 1   │ a, other part │ d │ e  │        but attention works token by token and sees no borders

Messages go from rank to rank through one process group that holds them all, so a group of a few of them is nothing
but their numbers: none has to be made, and no rank that a document doesn't concern hears of it.  Ranks that share
several documents meet them in the same order, so nothing can block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stretto.parallel.sequence.all_gather import AllGather
from stretto.parallel.sequence.alone import Alone
from stretto.parallel.sequence.opening import Cut
from stretto.parallel.sequence.pieces import Kernel, Scheme, Task, attend_over
from stretto.parallel.sequence.results import Results
from stretto.parallel.sequence.ring import Ring
from stretto.parallel.sequence.sight import Sight
from stretto.parallel.sequence.token_ring import TokenRing
from stretto.parallel.wire import Wire
from stretto.spec.sequence import Section


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedAttend:
    """Attention of a rank's parts of documents, each to all of its own document."""

    wire: Wire
    outside: str
    """What circulates in a group: ``ring``, ``token-ring`` or ``all-gather``."""
    kernel: Kernel
    local: Callable[..., Tensor] | None = None
    """Attention over whole documents, for those that a rank has to itself; None: the kernel does them too."""
    results: Results | None = None
    """Keeps results of cut documents for blocks that are recomputed."""

    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Cut, /) -> Tensor:
        """[1, H, T, K] of q, [1, G, T, K] of k and v, T own tokens -> [1, H, T, K]."""
        part = context.part
        assert part is not None and part.sections, "the batch was not placed"
        sight = Sight(context.first)
        found = []
        for section in part.sections:
            task = Task(kernel=self.kernel, seats=section.shares, sight=sight, results=self.results)
            own = [x.narrow(2, section.start, task.tokens(self.seat(section))) for x in (q, k, v)]
            if self.local is not None and len(section.shares) == 1 and context.first is None:
                found.append(self.local(*own, context))
            else:
                found.append(attend_over(self.scheme(section), task, *own))
        return torch.cat(found, dim=2)

    def seat(self, section: Section) -> int:
        """This rank's place in a document's group."""
        return self.wire.index - section.first

    def scheme(self, section: Section) -> Scheme:
        """What circulates between the ranks of a document."""
        size, seat = len(section.shares), self.seat(section)
        if size == 1:
            return Alone()
        members = tuple(range(section.first, section.first + size))
        if self.outside == "token-ring":
            return TokenRing(wire=self.wire, members=members, seat=seat)
        if self.outside == "all-gather":
            return AllGather(wire=self.wire, members=members, seat=seat)
        return Ring(wire=self.wire, members=members, seat=seat, inner=size)
