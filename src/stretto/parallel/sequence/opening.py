"""What fills the models' ``attend`` under context parallelism: Ulysses at a seat, a ring between the seats.

    q k v of own tokens ─► [all-to-all at the seat] ─► ring between seats ─► [all-to-all back] ─► out of own tokens

With one seat this is plain Ulysses, with one rank a seat a plain ring, else the 2D mesh of both (USP, LoongTrain).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stretto.parallel.sequence.all_gather import AllGather
from stretto.parallel.sequence.alone import Alone
from stretto.parallel.sequence.backends import kernel_for as kernel_for
from stretto.parallel.sequence.blockwise import Drop
from stretto.parallel.sequence.pieces import Kernel, Scheme, Task, attend_over
from stretto.parallel.sequence.results import Results
from stretto.parallel.sequence.ring import Ring
from stretto.parallel.sequence.shared_seat import SharedSeat, attend_together
from stretto.parallel.sequence.sight import Sight
from stretto.parallel.sequence.token_ring import TokenRing
from stretto.parallel.sequence.ulysses import Exchange
from stretto.parallel.wire import Wire
from stretto.spec.contract import SequencePart
from stretto.spec.sequence import Arrangement


class Cut(Protocol):
    """What the opening reads of a model's context."""

    @property
    def part(self) -> SequencePart | None:
        """The part of the rows that this rank holds."""

    @property
    def first(self) -> Tensor | None:
        """The first token of the row that each token sees, int64 [B or 1, S] on the CPU; None: plain causal."""


class Local(Protocol):
    """The attention that the opening stands in for."""

    def weight_dropout(self, context: Cut, /) -> Drop | None:
        """Dropout of attention weights, None where nothing is dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextAttend:
    """Attention of a rank's own tokens to all tokens of their rows."""

    wire: Wire
    arrangement: Arrangement
    local: Local
    kernel: Kernel
    results: Results | None = None
    """Keeps results for blocks that are recomputed."""

    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Cut, /) -> Tensor:
        """[B, H, T, K] of q, [B, G, T, K] of k and v, T own tokens -> [B, H, T, K]."""
        part, who = context.part, self.arrangement
        assert part is not None, "the batch was not cut over cp"
        heads, first_head = q.shape[1], 0
        exchange = self._exchange(part, heads, k.shape[1]) if who.ulysses > 1 else None
        if exchange is not None:
            first_head = exchange.of_queries(exchange.index)[0]
        task = Task(
            kernel=self.kernel,
            seats=who.seated(part.shares),
            sight=Sight(context.first),
            drop=self.local.weight_dropout(context),
            first_head=first_head,
            results=self.results,
        )
        scheme = self.scheme()
        if exchange is None:
            return attend_over(scheme, task, q, k, v)
        assert isinstance(scheme, Ring), "only a ring has seats that ranks share"
        place = SharedSeat(exchange=exchange, ring=scheme, ring_outside=who.ring_outside)
        return attend_together(place, task, q, k, v)

    def _exchange(self, part: SequencePart, heads: int, kv_heads: int) -> Exchange:
        members = self.arrangement.sharers(self.wire.index)
        return Exchange(
            wire=self.wire,
            members=members,
            index=members.index(self.wire.index),
            shares=tuple(part.shares[m] for m in members),
            heads=heads,
            kv_heads=kv_heads,
        )

    def scheme(self) -> Scheme:
        """What circulates between the seats."""
        who = self.arrangement
        if who.ranks == 1:
            return Alone()
        return scheme_of(who, self.wire, members=who.ring(self.wire.index), seat=who.place(self.wire.index)[0])


def scheme_of(who: Arrangement, wire: Wire, *, members: tuple[int, ...], seat: int) -> Scheme:
    """What circulates between the seats of an arrangement, of which this rank has ``seat``.

    ``members``: the rank on the wire of each seat with which this one makes a ring.
    """
    if who.outside == "token-ring":
        return TokenRing(wire=wire, members=members, seat=seat)
    if who.outside == "all-gather":
        return AllGather(wire=wire, members=members, seat=seat, keep=who.keep)
    inner = who.inner_ring if who.inner_ring > 1 else who.seats
    return Ring(wire=wire, members=members, seat=seat, inner=inner, pieces=who.pieces, keep=who.keep)
