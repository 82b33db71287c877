"""The way of each seat's tokens round a ring: from seat to seat, past those who see none of them, no further than
the last who does.

    all see all             0 ──► 1 ──► 2 ──► 3              what each seat passes on is all that it got
    a window, contiguous    0 ──► 1                          the tokens that seat 1 sees, and no further
    a window, zigzag        0 ──► 1 ──────────► 3            seat 2 sees none of seat 0's

Sums that go home behind the tokens (gradients) go the same way, with what the seats so far have found, and from the
last seat home.  In a double ring the same holds between nodes and inside each.

A message has a slot, the step of its sender; the receiver expects it in the same slot of its own, though it may
need it later.  So all ranks post all messages in one order, whoever is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from stretto.parallel.wire import Transfer, Wire
from stretto.spec.reach import Reach, merged
from stretto.spec.sequence import Ranges, count

Slot = tuple[int, int, bool]
"""Round, step, and whether the message goes to another node."""
Reads = Callable[[int, int], Ranges]
"""``reads(seat, owner)``: the owner's tokens that a seat needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One message."""

    owner: int
    """Whose tokens it is about."""
    source: int
    target: int
    """Seats."""
    slot: Slot
    tokens: Ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class Circle:
    """Seats of a ring, in nodes of ``inner`` each."""

    size: int
    inner: int

    def owner(self, seat: int, round_: int, step: int) -> int:
        """Whose tokens are at ``seat`` at ``step`` of ``round_``."""
        node, index = divmod(seat, self.inner)
        return (node - round_) % self.rounds * self.inner + (index - step) % self.inner

    @property
    def rounds(self) -> int:
        """Nodes."""
        return self.size // self.inner

    def there(self, owner: int, reads: Reads) -> list[Hop]:
        """How the owner's tokens get to all who need them."""
        index, found = owner % self.inner, []
        nodes = self._nodes(owner, reads)
        for number, (round_, node) in enumerate(nodes):
            stops = self._stops(node, owner, reads)
            for k, (step, seat) in enumerate(stops[:-1]):
                needed = _union(reads(other, owner) for _, other in stops[k + 1 :])
                slot = (round_, step, False)
                found.append(Hop(owner=owner, source=seat, target=stops[k + 1][1], slot=slot, tokens=needed))
            if number + 1 < len(nodes):
                needed = _union(self._of_node(other, owner, reads) for _, other in nodes[number + 1 :])
                ends = node * self.inner + index, nodes[number + 1][1] * self.inner + index
                found.append(Hop(owner=owner, source=ends[0], target=ends[1], slot=(round_, 0, True), tokens=needed))
        return found

    def home(self, owner: int, reads: Reads) -> list[Hop]:
        """How what all who got the owner's tokens have found for them gets home."""
        index, found = owner % self.inner, []
        nodes = self._nodes(owner, reads)
        for number, (round_, node) in enumerate(nodes):
            stops = self._stops(node, owner, reads)
            for k, (step, seat) in enumerate(stops[1:], start=1):
                so_far = _union(reads(other, owner) for _, other in stops[1 : k + 1])
                target = stops[(k + 1) % len(stops)][1]
                found.append(Hop(owner=owner, source=seat, target=target, slot=(round_, step, False), tokens=so_far))
            if number:
                so_far = _union(self._of_node(other, owner, reads) for _, other in nodes[1 : number + 1])
                ends = node * self.inner + index, nodes[(number + 1) % len(nodes)][1] * self.inner + index
                found.append(Hop(owner=owner, source=ends[0], target=ends[1], slot=(round_, 0, True), tokens=so_far))
        return found

    def _nodes(self, owner: int, reads: Reads) -> list[tuple[int, int]]:
        """Round and node of the owner and of the others that need something of it."""
        own = owner // self.inner
        nodes = [(r, (own + r) % self.rounds) for r in range(self.rounds)]
        return [nodes[0], *(pair for pair in nodes[1:] if self._of_node(pair[1], owner, reads))]

    def _stops(self, node: int, owner: int, reads: Reads) -> list[tuple[int, int]]:
        """Step and seat of where the owner's tokens enter a node, and of the others there that need some."""
        seats = [(s, node * self.inner + (owner + s) % self.inner) for s in range(self.inner)]
        return [seats[0], *(pair for pair in seats[1:] if reads(pair[1], owner))]

    def _of_node(self, node: int, owner: int, reads: Reads) -> Ranges:
        seats = range(node * self.inner, (node + 1) * self.inner)
        return _union(reads(seat, owner) for seat in seats if seat != owner)


def _union(parts: Iterable[Ranges]) -> Ranges:
    return merged([part for ranges in parts for part in ranges])


@dataclass(frozen=True, slots=True, kw_only=True)
class Timetable:
    """The messages of one seat, by slot."""

    sends: dict[Slot, list[Hop]]
    receives: dict[Slot, list[Hop]]

    @classmethod
    def of(cls, hops: Iterable[Hop], seat: int) -> Timetable:
        """Those that begin or end at ``seat``."""
        sends: dict[Slot, list[Hop]] = defaultdict(list)
        receives: dict[Slot, list[Hop]] = defaultdict(list)
        for hop in hops:
            if hop.source == seat:
                sends[hop.slot].append(hop)
            if hop.target == seat:
                receives[hop.slot].append(hop)
        return cls(sends=dict(sends), receives=dict(receives))


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """One seat's messages: tokens on their way to those who need them, and sums on their way home."""

    circle: Circle
    reach: Reach
    there: Timetable
    home: Timetable


@lru_cache(maxsize=512)
def routes_of(reach: Reach, inner: int, seat: int) -> Routes:
    """Of keys and values, in a ring with nodes of ``inner`` seats."""
    circle = Circle(size=len(reach.seats), inner=inner)
    owners = range(circle.size)
    return Routes(
        circle=circle,
        reach=reach,
        there=Timetable.of((hop for owner in owners for hop in circle.there(owner, reach.reads)), seat),
        home=Timetable.of((hop for owner in owners for hop in circle.home(owner, reach.reads)), seat),
    )


@lru_cache(maxsize=512)
def query_routes_of(reach: Reach, seat: int) -> Timetable:
    """Of queries, in a plain ring."""
    circle = Circle(size=len(reach.seats), inner=len(reach.seats))
    return Timetable.of((hop for owner in range(circle.size) for hop in circle.there(owner, reach.asks)), seat)


class Arrivals:
    """What is under way to this seat, by its owner and kind."""

    def __init__(self, wire: Wire, members: tuple[int, ...]) -> None:
        self._wire, self._members = wire, members
        self._coming: dict[tuple[int, bool], tuple[_Shared, int, Ranges]] = {}

    def post(self, timetable: Timetable, slot: Slot, held: dict[int, tuple[Tensor, Ranges]], like: Tensor) -> None:
        """Send of what is ``held`` of each owner what the slot asks for, and expect what it brings.

        Tokens are dim -2 of all tensors, whose other dims and type are those of ``like``.
        """
        leaving, expected = timetable.sends.get(slot, ()), timetable.receives.get(slot, ())
        if not leaving and not expected:
            return
        sends = [(picked(*held[hop.owner], hop.tokens), self._members[hop.target]) for hop in leaving]
        receives = [(with_tokens(like, count(hop.tokens)), self._members[hop.source]) for hop in expected]
        shared = _Shared(self._wire.start(sends, receives))
        for number, hop in enumerate(expected):
            self._coming[hop.owner, slot[2]] = shared, number, hop.tokens

    def take(self, owner: int, *, outside: bool) -> tuple[Tensor, Ranges] | None:
        """What came of an owner from inside the node, or from ``outside``, and of which tokens; None: nothing."""
        entry = self._coming.pop((owner, outside), None)
        if entry is None:
            return None
        shared, number, tokens = entry
        return shared.wait()[number], tokens


class _Shared:
    """Messages of one slot; waited for when the first of them is needed."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer, self._tensors = transfer, None

    _tensors: list[Tensor] | None

    def wait(self) -> list[Tensor]:
        if self._tensors is None:
            self._tensors = self._transfer.wait()
        return self._tensors


def with_tokens(like: Tensor, tokens: int) -> Tensor:
    """An empty tensor with so many tokens (dim -2), else like another."""
    return torch.empty((*like.shape[:-2], tokens, like.shape[-1]), dtype=like.dtype, device=like.device)


def picked(tensor: Tensor, held: Ranges, wanted: Ranges) -> Tensor:
    """The ``wanted`` ones of the tokens ``held`` (dim -2)."""
    if held == wanted:
        return tensor
    parts = [tensor.narrow(-2, at, length) for at, length in stretches(held, wanted)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def add_at(whole: Tensor, held: Ranges, share: Tensor, tokens: Ranges) -> None:
    """Add to some of the tokens ``held``."""
    if held == tokens:
        whole += share
        return
    begin = 0
    for at, length in stretches(held, tokens):
        whole.narrow(-2, at, length).add_(share.narrow(-2, begin, length))
        begin += length


def put_at(whole: Tensor, held: Ranges, part: Tensor, tokens: Ranges) -> None:
    """Put some tokens (dim -2) in their places among those ``held``."""
    begin = 0
    for at, length in stretches(held, tokens):
        whole.narrow(-2, at, length).copy_(part.narrow(-2, begin, length))
        begin += length


def summed(parts: list[tuple[Tensor, Ranges]], tokens: Ranges) -> Tensor:
    """The sum of parts that are each of some of ``tokens``; it may be one of them."""
    whole = next((part for part, of in parts if of == tokens), None)
    total = torch.zeros_like(with_tokens(parts[0][0], count(tokens))) if whole is None else whole
    for part, of in parts:
        if part is not whole:
            add_at(total, tokens, part, of)
    return total


def stretches(held: Ranges, wanted: Ranges) -> list[tuple[int, int]]:
    """Where the wanted tokens lie among those held: start and length of each stretch."""
    found, at = [], 0
    for start, stop in held:
        for a, b in wanted:
            if max(a, start) < min(b, stop):
                found.append((at + max(a, start) - start, min(b, stop) - max(a, start)))
        at += stop - start
    return found
