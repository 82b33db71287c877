"""A seat that several ranks share: Ulysses with its all-to-alls under attention, and the 2D mesh (USP, LoongTrain).

Of its own heads a rank has its own tokens from the start, and attention needs nothing else to begin with:

    forward     own queries to own keys            while keys and queries of the others come
                own queries to others' keys        as they come; when all are there, the ring's first message leaves
                others' queries to all keys
                ... the ring's steps ...
                last step: others' queries first   and their outputs leave while own queries are at work

    backward    own queries to others' keys        while the others' gradients of outputs come
                ... the ring's steps ...
                others' queries to others' keys    while the ring's gradients come home; then those of keys leave
                others' queries to own keys        and those of queries
                own queries to own keys            while these are under way

That order suits slow links at the seat.  Where the ring has them, as little as possible precedes its messages and all
that is left of the own block follows them: own queries meet others' keys after the ring's first message, backward all
but the first other's after its last, and gradients of keys leave when the ring has brought home its share.

So no all-to-all is waited for unless a share of a block takes less than its message; what is sent is what Ulysses
and a ring send.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, autograd
from torch.autograd.function import once_differentiable

from stretto.parallel.sequence.blockwise import Rows
from stretto.parallel.sequence.pieces import Meeting, Task, nothing_seen, products
from stretto.parallel.sequence.ring import Journey, Ring, Visit
from stretto.parallel.sequence.routes import picked, put_at, with_tokens
from stretto.parallel.sequence.ulysses import Exchange
from stretto.parallel.wire import Transfer
from stretto.spec.sequence import Range, Ranges, count, joined

_Coming = list[tuple[Range, Transfer]]
"""Heads, and the message that brings this rank's tokens of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSeat:
    """One rank's place at its seat, and its seat's in the ring."""

    exchange: Exchange
    ring: Ring
    ring_outside: bool = True
    """Whether the ring has the slower links, or the seat's exchanges have them."""

    @property
    def ring_first(self) -> bool:
        """Whether the order of work follows the ring's messages."""
        return self.ring_outside and len(self.ring.members) > 1

    @property
    def mine(self) -> Ranges:
        """This rank's own tokens."""
        return self.exchange.shares[self.exchange.index]

    def attend(self, task: Task, q: Tensor, kv: Tensor) -> tuple[list[Tensor], Tensor]:
        """Attention of this rank's tokens, q [B, H, T, K] and kv [2, B, G, T, K].

        Returns:
            q, kv, out and lse of the whole seat and this rank's heads, then what the ring keeps; out [B, H, T, K] of
            own tokens and all heads.
        """
        work = _Forward(self, task, q, kv)
        brought: list[Tensor] = []
        work.begin(short=self.ring.routes(task).last == (0, 0))
        for visit in self.ring.visits(task, work.kv):
            if visit.owner == self.ring.seat:
                work.finish_own_block(ending=visit.last)
            else:
                work.visit(visit)
                self.ring.remember(visit, brought)
        out = work.end()
        self.ring.wire.flush()
        return [work.q, work.kv, work.found[0].to(q.dtype), work.found[1], *brought], out

    def gather(self, task: Task, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """q and kv of the whole seat and this rank's heads, nothing else done."""
        work = _Forward(self, task, q, kv)
        work.take_keys()
        work.take_queries()
        self.ring.wire.flush()
        return work.q, work.kv

    def scatter(self, task: Task, out: Tensor) -> Tensor:
        """Own tokens and all heads of the output of the whole seat and this rank's heads."""
        seat, exchange = task.seats[self.ring.seat], self.exchange
        coming = [exchange.give_back(picked(out, seat, exchange.shares[m]), m, keys=False) for m in exchange.others]
        whole = self.of_all_heads(picked(out, seat, self.mine), coming, keys=False)
        self.ring.wire.flush()
        return whole

    def differentiate(self, task: Task, dout: Tensor, kept: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Gradients of q [B, H, T, K] and kv [2, B, G, T, K] of own tokens; ``kept``: what ``attend`` returned."""
        q, kv, out, lse, *brought = kept
        exchange, seat = self.exchange, task.seats[self.ring.seat]
        coming = exchange.to_heads(dout, keys=False)
        rows = Rows(q=q, dout=torch.empty_like(q), lse=lse, delta=torch.empty_like(lse), out=out)
        self._fill(rows, seat, dout[:, slice(*exchange.of_queries(exchange.index))], self.mine)
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        dkv = torch.zeros(kv.shape, dtype=lse.dtype, device=kv.device)
        journeys = self.ring.journeys(task, dkv)
        for visit in self.ring.visits_backward(task, kv, brought):
            if visit.owner == self.ring.seat:
                for other in exchange.others[: 1 if self.ring_first else None]:
                    task.differentiate(rows, kv, self._within(seat, self.mine, exchange.shares[other]), (dq, dkv))
                for other, transfer in coming:
                    self._fill(rows, seat, transfer.wait()[0], exchange.shares[other])
                continue
            share = task.shares(rows, visit.kv, Meeting(queries=seat, keys=visit.tokens), dq)
            journeys[visit.piece].add(visit, share)
        for journey in journeys:
            journey.leave()
        leave = self._leave_behind if self.ring_first else self._leave_ahead
        queries, keys = leave(task, rows, kv, (dq, dkv), journeys)
        task.differentiate(rows, kv, self._within(seat, self.mine, self.mine), (dq, dkv))
        found = (
            self.of_all_heads(picked(dq, seat, self.mine).to(kv.dtype), queries, keys=False),
            self.of_all_heads(self._one_per_head(picked(dkv, seat, self.mine)), keys, keys=True).to(kv.dtype),
        )
        self.ring.wire.flush()
        return found

    def _leave_ahead(
        self, task: Task, rows: Rows, kv: Tensor, sums: tuple[Tensor, Tensor], journeys: list[Journey]
    ) -> tuple[_Coming, _Coming]:
        """The rest of the own block but own queries to own keys, where this seat's messages have the slow links: the
        ring's come home soon, and what is complete leaves soon."""
        (dq, dkv), exchange, seat = sums, self.exchange, task.seats[self.ring.seat]
        queries, keys = [], []
        for number, other in enumerate(self._farthest_first):
            task.differentiate(rows, kv, self._within(seat, self._theirs, exchange.shares[other]), sums)
            if number == 0:
                for journey in journeys:
                    journey.end()
            keys.append(self._give_keys(dkv, seat, other, kv.dtype))
        for other in self._farthest_first:
            task.differentiate(rows, kv, self._within(seat, exchange.shares[other], self.mine), sums)
            queries.append(self._give_queries(dq, seat, other, kv.dtype))
        return queries, keys

    def _leave_behind(
        self, task: Task, rows: Rows, kv: Tensor, sums: tuple[Tensor, Tensor], journeys: list[Journey]
    ) -> tuple[_Coming, _Coming]:
        """The same where the ring has them: all of the block hides its messages, and keys leave when they are home."""
        (dq, dkv), exchange, seat = sums, self.exchange, task.seats[self.ring.seat]
        queries = []
        for other in self._farthest_first:
            task.differentiate(rows, kv, self._within(seat, exchange.shares[other], None), sums)
            queries.append(self._give_queries(dq, seat, other, kv.dtype))
        for other in exchange.others[1:]:
            task.differentiate(rows, kv, self._within(seat, self.mine, exchange.shares[other]), sums)
        for journey in journeys:
            journey.end()
        return queries, [self._give_keys(dkv, seat, other, kv.dtype) for other in self._farthest_first]

    @property
    def _farthest_first(self) -> tuple[int, ...]:
        return self.exchange.others[::-1]

    @property
    def _theirs(self) -> Ranges:
        """Tokens of all others of the seat."""
        return joined(part for other in self.exchange.others for part in self.exchange.shares[other])

    def _give_queries(self, dq: Tensor, seat: Ranges, other: int, dtype: torch.dtype) -> tuple[Range, Transfer]:
        part = picked(dq, seat, self.exchange.shares[other]).to(dtype)
        return self.exchange.give_back(part, other, keys=False)

    def _give_keys(self, dkv: Tensor, seat: Ranges, other: int, dtype: torch.dtype) -> tuple[Range, Transfer]:
        part = self._one_per_head(picked(dkv, seat, self.exchange.shares[other])).to(dtype)
        return self.exchange.give_back(part, other, keys=True)

    def _within(self, seat: Ranges, asking: Ranges, answering: Ranges | None) -> Meeting:
        return Meeting(queries=seat, keys=seat, asking=asking, answering=answering)

    def _fill(self, rows: Rows, seat: Ranges, dout: Tensor, tokens: Ranges) -> None:
        """Put the gradient of some tokens' outputs in its place."""
        assert rows.out is not None
        put_at(rows.dout, seat, dout, tokens)
        delta = products(dout, picked(rows.out, seat, tokens), rows.lse.dtype)
        put_at(rows.delta.unsqueeze(-1), seat, delta.unsqueeze(-1), tokens)

    def _one_per_head(self, dkv: Tensor) -> Tensor:
        """Gradients of key/value heads that were copied for each query head, added up."""
        reads = self.exchange.reads(dkv.device)
        if reads is None:
            return dkv
        first, last = self.exchange.of_keys(self.exchange.index)
        return dkv.new_zeros(*dkv.shape[:2], last - first, *dkv.shape[3:]).index_add_(2, reads, dkv)

    def of_all_heads(self, own: Tensor, coming: list[tuple[Range, Transfer]], *, keys: bool) -> Tensor:
        """Own tokens of all heads (dim -3): this rank's and what the others give, added where heads are the same.

        In the type of ``own``: sums over ranks that read the same key/value head want a wide one.
        """
        exchange = self.exchange
        size = exchange.kv_heads if keys else exchange.heads
        of = exchange.of_keys if keys else exchange.of_queries
        whole = own.new_zeros(*own.shape[:-3], size, *own.shape[-2:])
        whole[..., slice(*of(exchange.index)), :, :] += own
        for part, transfer in coming:
            whole[..., slice(*part), :, :] += transfer.wait()[0]
        return whole


class _Forward:
    """One forward pass at a shared seat, under way."""

    def __init__(self, place: SharedSeat, task: Task, q: Tensor, kv: Tensor) -> None:
        self._place, self._task, self._exchange = place, task, place.exchange
        self._seat = task.seats[place.ring.seat]
        self._reads = self._exchange.reads(q.device)
        self._keys = self._exchange.to_heads(kv, keys=True)
        self._queries = self._exchange.to_heads(q, keys=False)
        self._outputs: list[tuple[Range, Transfer]] = []
        index = self._exchange.index
        own_q = q[:, slice(*self._exchange.of_queries(index))]
        own_kv = self._copied(kv[:, :, slice(*self._exchange.of_keys(index))])
        self.q, self.kv = (with_tokens(x, count(self._seat)) for x in (own_q, own_kv))
        self.found = nothing_seen(self.q)
        self._later: list[Ranges] = []
        """Keys that own queries haven't met yet."""
        put_at(self.q, self._seat, own_q, place.mine)
        put_at(self.kv, self._seat, own_kv, place.mine)

    def begin(self, *, short: bool) -> None:
        """Own queries to own keys, and to others' as they come.

        ``short``: there is no other step, so that some of that is left for the time in which outputs travel.  Where
        the ring has the slower links all of it is: its messages wait for the keys.
        """
        mine, shares = self._place.mine, [self._exchange.shares[other] for other in self._exchange.others]
        now = shares[: (len(shares) // 2)] if short else shares
        now = [] if self._place.ring_first else now
        self._meet(mine, mine)
        for number, (other, transfer) in enumerate(self._keys):
            put_at(self.kv, self._seat, self._copied(transfer.wait()[0]), self._exchange.shares[other])
            if number < len(now):
                self._meet(mine, now[number])
        self._later = shares[len(now) :]

    def take_keys(self) -> None:
        """All keys that come."""
        for other, transfer in self._keys:
            put_at(self.kv, self._seat, self._copied(transfer.wait()[0]), self._exchange.shares[other])

    def take_queries(self) -> None:
        """All queries that come."""
        for other, transfer in self._queries:
            put_at(self.q, self._seat, transfer.wait()[0], self._exchange.shares[other])

    def finish_own_block(self, *, ending: bool) -> None:
        """Others' queries, as they come, to all keys of the seat."""
        for other, transfer in self._queries:
            put_at(self.q, self._seat, transfer.wait()[0], self._exchange.shares[other])
            self._meet(self._exchange.shares[other], None)
            if ending:
                self._send(other)
        for answering in self._later:
            self._meet(self._place.mine, answering)

    def visit(self, visit: Visit) -> None:
        """All queries of the seat to keys of another; in the last step others' first."""
        if not visit.last:
            self._visit_by(None, visit)
            return
        for other in reversed(self._exchange.others):  # what has the longest way leaves first
            self._visit_by(self._exchange.shares[other], visit)
            self._send(other)
        self._visit_by(self._place.mine, visit)

    def end(self) -> Tensor:
        """The output of own tokens, all heads."""
        own = picked(self.found[0], self._seat, self._place.mine).to(self.q.dtype)
        return self._place.of_all_heads(own, self._outputs, keys=False)

    def _visit_by(self, asking: Ranges | None, visit: Visit) -> None:
        if visit.kv is not None:
            meeting = Meeting(queries=self._seat, keys=visit.tokens, asking=asking)
            self._task.attend(self.q, visit.kv, meeting, self.found)

    def _meet(self, asking: Ranges, answering: Ranges | None) -> None:
        meeting = Meeting(queries=self._seat, keys=self._seat, asking=asking, answering=answering)
        self._task.attend(self.q, self.kv, meeting, self.found)

    def _send(self, other: int) -> None:
        out = picked(self.found[0], self._seat, self._exchange.shares[other]).to(self.q.dtype)
        self._outputs.append(self._exchange.give_back(out, other, keys=False))

    def _copied(self, kv: Tensor) -> Tensor:
        """One key/value head for each query head, where they can't be shared evenly."""
        return kv if self._reads is None else kv.index_select(2, self._reads)


class _Attend(autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, place: SharedSeat, task: Task) -> Tensor:
        kv = torch.stack((k, v))
        known = task.results.take() if task.results is not None else None
        if known is None:
            kept, out = place.attend(task, q, kv)
            if task.results is not None:
                task.results.put(*kept[2:])
        else:
            kept, out = [*place.gather(task, q, kv), *known], place.scatter(task, known[0])
        ctx.place, ctx.task = place, task
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        dq, dkv = ctx.place.differentiate(ctx.task, gradients[0], ctx.saved_tensors)
        return dq, *dkv.unbind(0), None, None


@torch.compiler.disable
def attend_together(place: SharedSeat, task: Task, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q [B, H, T, K] to the k and v [B, G, T, K] of all seats, [B, H, T, K], with its gradient.

    Kept for backward: q, k, v, the output and lse of this rank's heads and its seat's tokens.
    """
    return _Attend.apply(q, k, v, place, task)
