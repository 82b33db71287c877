"""Ring Self-Attention: keys and values travel, queries stay (with log-sum-exp after Liu et al. 2023).

    step 0       step 1       step 2              while a seat works on the keys that it has, the next ones come in
    seat 0  kv0  seat 0  kv3  seat 0  kv2  ...
    seat 1  kv1  seat 1  kv0  seat 1  kv3  ...

Double ring (LoongTrain): seats of one node form an inner ring, and only once a round, under all of its steps, something
crosses between nodes.  A plain ring is a double ring of one node.

    round 0   kv of node A circulates in node A   │  meanwhile each seat sends its own kv to its peer in node B
    round 1   kv of node D circulates in node A   │  ...

Backward: keys and values travel again, and behind them their gradients, to which each seat adds its share.  What a
seat finds for its own keys stays at home, so gradients travel n - 1 hops, like the keys, and no seat holds more
than two of each.  A seat's own block is cut in two: one part hides the first message, the other the last, with
which the gradients come home.  Bytes: forward the keys and values of all other seats, backward twice that; less under
a window or documents, where some seats see nothing of others (routes.py).  Where what came is kept, only gradients
travel backward.

A short ring has long messages.  They may go in pieces, each with a way and a journey home of its own, so that attention
begins with the first piece and gradients leave before the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from stretto.parallel.sequence.blockwise import Rows
from stretto.parallel.sequence.pieces import Meeting, Task, nothing_seen
from stretto.parallel.sequence.routes import Arrivals, Routes, Slot, add_at, picked, routes_of, summed
from stretto.parallel.wire import Wire
from stretto.spec.sequence import Ranges, count


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """What is at a seat in one step."""

    round: int
    step: int
    owner: int
    """Seat whose keys and values they are."""
    kv: Tensor | None
    """Those that this seat sees; None: none."""
    tokens: Ranges
    """Which tokens they are of."""
    last: bool
    """Whether no seat sees anything later."""
    piece: int
    """Which piece of the owner's tokens they are of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """One rank's place in a ring, or in a double ring."""

    wire: Wire
    members: tuple[int, ...]
    """Rank on the wire of each seat."""
    seat: int
    """This rank's."""
    inner: int
    """Seats of the inner ring; divides their number, and equals it in a plain ring."""
    pieces: int = 1
    """In how many messages a seat's tokens travel, each used, and sent on, as it comes."""
    keep: bool = False
    """Whether keys and values that came are kept for backward, which else has them sent again."""

    def routes(self, task: Task, piece: int | None = None) -> Routes:
        """Who sends what to whom, of all tokens or of a piece of each seat's."""
        reach = task.sight.reach(task.seats)
        if piece is not None and self.pieces > 1:
            reach = replace(reach, piece=(piece, self.pieces))
        return routes_of(reach, self.inner, self.seat)

    def visits(self, task: Task, kv: Tensor, *, backward: bool = False) -> Iterator[Visit]:
        """All steps, first that of this seat's own ``kv`` [2, B, G, T, K]; what comes next is on its way meanwhile.

        ``backward``: of the pieces those come first that fewest queries see, so that their gradients leave soonest.
        """
        lanes = [_Lane(self, task, piece, kv) for piece in range(self.pieces)]
        if backward:
            lanes.reverse()
        mine, last = task.seats[self.seat], self.routes(task).last
        for r, s in self._steps():
            owner = lanes[0].owner(r, s)
            if owner == self.seat:
                for lane in lanes:
                    lane.pass_on((r, s), {owner: (kv, mine)})
                yield Visit(round=r, step=s, piece=0, owner=owner, kv=kv, tokens=mine, last=(r, s) == last)
                continue
            for lane in lanes:
                here = lane.coming.take(owner, outside=s == 0)
                lane.pass_on((r, s), {} if here is None else {owner: here})
                seen = picked(*here, lane.reads(owner)) if here is not None and lane.reads(owner) else None
                yield lane.visit((r, s), seen, last=(r, s) == last and lane is lanes[-1])

    def _visits_of_kept(self, task: Task, kv: Tensor, kept: Sequence[Tensor]) -> Iterator[Visit]:
        """The steps of a backward with what the visits of the forward brought and was ``kept``; nothing is sent."""
        lanes = [_Lane(self, task, piece, kv) for piece in range(self.pieces)]
        mine, brought = task.seats[self.seat], iter(kept)
        for r, s in self._steps():
            owner = lanes[0].owner(r, s)
            if owner == self.seat:
                yield Visit(round=r, step=s, piece=0, owner=owner, kv=kv, tokens=mine, last=False)
                continue
            seen = [next(brought) if lane.reads(owner) else None for lane in lanes]
            for lane, of_lane in zip(lanes[::-1], seen[::-1], strict=True):
                yield lane.visit((r, s), of_lane, last=False)

    def _steps(self) -> Iterator[tuple[int, int]]:
        return product(range(len(self.members) // self.inner), range(self.inner))

    def attend(self, task: Task, q: Tensor, kv: Tensor, kept: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Merge the attention to every seat's keys as they come by."""
        found, mine = nothing_seen(q), task.seats[self.seat]
        for visit in self.visits(task, kv):
            if visit.kv is not None:
                task.attend(q, visit.kv, Meeting(queries=mine, keys=visit.tokens), found)
                self.remember(visit, kept)
        self.wire.flush()
        return found

    def remember(self, visit: Visit, kept: list[Tensor]) -> None:
        """Put what a visit brought among what is ``kept`` for backward, where that is wanted.

        Of a message that goes on to others no more than this seat sees.
        """
        if self.keep and visit.kv is not None and visit.owner != self.seat:
            kept.append(visit.kv.contiguous())

    def differentiate(self, task: Task, rows: Rows, kv: Tensor, kept: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Gradients of q, and of kv once it has been round."""
        dq = torch.zeros(rows.q.shape, dtype=rows.lse.dtype, device=kv.device)
        dkv = torch.zeros(kv.shape, dtype=dq.dtype, device=kv.device)
        journeys, mine = self.journeys(task, dkv), task.seats[self.seat]
        first, rest = _halves(mine, alone=len(self.members) == 1)
        for visit in self.visits_backward(task, kv, kept):
            if visit.owner == self.seat:
                own = Meeting(queries=mine, keys=mine, asking=first)
                task.differentiate(rows, kv, own, (dq, dkv))
                continue
            share = task.shares(rows, visit.kv, Meeting(queries=mine, keys=visit.tokens), dq)
            journeys[visit.piece].add(visit, share)
        for journey in journeys:
            journey.leave()
        task.differentiate(rows, kv, Meeting(queries=mine, keys=mine, asking=rest), (dq, dkv))
        for journey in journeys:
            journey.end()
        self.wire.flush()
        return dq, dkv

    def visits_backward(self, task: Task, kv: Tensor, kept: Sequence[Tensor]) -> Iterator[Visit]:
        """The steps of a backward, in which keys travel again unless they were ``kept``."""
        return self._visits_of_kept(task, kv, kept) if self.keep else self.visits(task, kv, backward=True)

    def journeys(self, task: Task, dkv: Tensor) -> list[Journey]:
        """Of the gradients of each piece, which are added up in ``dkv``, that of this seat's own keys."""
        return [Journey(self, task, piece, dkv) for piece in range(self.pieces)]


class _Lane:
    """The way of one piece of every seat's keys and values."""

    def __init__(self, ring: Ring, task: Task, piece: int, like: Tensor) -> None:
        self._routes, self._seat, self._piece, self._like = ring.routes(task, piece), ring.seat, piece, like
        self.coming = Arrivals(ring.wire, ring.members)

    def owner(self, round_: int, step: int) -> int:
        """Whose keys are here."""
        return self._routes.circle.owner(self._seat, round_, step)

    def reads(self, owner: int) -> Ranges:
        """The tokens of another seat's piece that this one sees."""
        return self._routes.reach.reads(self._seat, owner)

    def visit(self, step: tuple[int, int], kv: Tensor | None, *, last: bool) -> Visit:
        """What is seen in a step."""
        owner = self.owner(*step)
        tokens = self.reads(owner)
        return Visit(round=step[0], step=step[1], piece=self._piece, owner=owner, kv=kv, tokens=tokens, last=last)

    def pass_on(self, step: tuple[int, int], held: dict[int, tuple[Tensor, Ranges]]) -> None:
        """Send on what is here, and expect what comes next."""
        if step[1] == 0:
            self.coming.post(self._routes.there, (*step, True), held, self._like)
        self.coming.post(self._routes.there, (*step, False), held, self._like)


def _halves(tokens: Ranges, *, alone: bool) -> tuple[Ranges, Ranges]:
    """A seat's queries in two parts with about the same number of pairs among its own keys.

    Under a causal mask the first of N tokens to reach half of the pairs is N / sqrt(2), whatever ranges they lie in.
    """
    at = count(tokens) if alone else round(count(tokens) * 0.5**0.5)
    first, rest = [], []
    for start, stop in tokens:
        middle = min(stop, start + max(at, 0))
        first += [(start, middle)] if start < middle else []
        rest += [(middle, stop)] if middle < stop else []
        at -= stop - start
    return tuple(first), tuple(rest)


class Journey:
    """Gradients of keys and values, or of a piece of every seat's, on their way home.

    Inside a node each seat adds its share and hands the sum on, until the node's sum is at the seat that brought the
    keys into the node; from there it goes on to the next node, which adds its own.  Each is waited for only when there
    is something to add it to, one block of work after it was sent.

    Args:
        dkv: where the gradient of this seat's own keys and values is added up, [2, B, G, T, K].
    """

    def __init__(self, ring: Ring, task: Task, piece: int, dkv: Tensor) -> None:
        self._ring, self._routes, self._dkv = ring, ring.routes(task, piece), dkv
        self._mine = task.seats[ring.seat]
        self._coming = Arrivals(ring.wire, ring.members)
        self._brought: tuple[Tensor, Ranges] | None = None
        """What this seat found for the keys that it brought into the node this round."""

    def add(self, visit: Visit, share: Tensor | None) -> None:
        """The seat's share of the gradient of the keys of a visit, None where it sees none of them."""
        found = None if share is None else (share, visit.tokens)
        if visit.step == 0:
            self._finish(visit.round - 1)
            self._brought = found
            return
        self._send((visit.round, visit.step, False), visit.owner, [found])

    def _finish(self, round_: int) -> None:
        """The node's sum of a round is complete: send it on.  That of the first is of our own keys, and stays."""
        if round_ < 1:
            return
        owner = self._routes.circle.owner(self._ring.seat, round_, 0)
        inside = self._coming.take(owner, outside=False)
        self._send((round_, 0, True), owner, [self._brought, inside])
        self._brought = None

    def _send(self, slot: Slot, owner: int, parts: list[tuple[Tensor, Ranges] | None]) -> None:
        """Add up what there is of an owner, with what came from the seat before, and hand it on."""
        leaving = next((hop for hop in self._routes.home.sends.get(slot, ()) if hop.owner == owner), None)
        held = {}
        if leaving is not None:
            before = self._coming.take(owner, outside=slot[2])
            held[owner] = (
                summed([part for part in [*parts, before] if part is not None], leaving.tokens),
                leaving.tokens,
            )
        self._coming.post(self._routes.home, slot, held, self._dkv)

    def leave(self) -> None:
        """After the last round: send on to its owner what has been through all nodes."""
        self._finish(self._routes.circle.rounds - 1)

    def end(self) -> None:
        """Add what comes home."""
        for outside in (False, True):
            found = self._coming.take(self._ring.seat, outside=outside)
            if found is not None:
                add_at(self._dkv, self._mine, *found)
