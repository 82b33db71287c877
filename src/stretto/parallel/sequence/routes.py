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
from itertools import accumulate

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

    def hops(self, owner: int, reads: Reads) -> tuple[list[Hop], list[Hop]]:
        """How the owner's tokens get to all who need them, and how what all these have found for them gets home."""
        index, own = owner % self.inner, owner // self.inner
        wanted = [() if seat == owner else reads(seat, owner) for seat in range(self.size)]
        there: list[Hop] = []
        home: list[Hop] = []
        nodes: list[tuple[Slot, int, Ranges]] = []
        for round_ in range(self.rounds):
            node = (own + round_) % self.rounds * self.inner
            of_node = merged([part for seat in range(node, node + self.inner) for part in wanted[seat]])
            if round_ and not of_node:
                continue
            nodes.append(((round_, 0, True), node + index, of_node))
            seats = [(step, node + (index + step) % self.inner) for step in range(self.inner)]
            stops = [((round_, step, False), seat, wanted[seat]) for step, seat in seats if not step or wanted[seat]]
            for found, more in zip((there, home), _chain(owner, stops), strict=True):
                found += more
        on, back = _chain(owner, nodes)
        return there + on, home + back

    def last(self, reads: Reads) -> tuple[int, int]:
        """Round and step of the last in which any seat sees anything."""
        steps = [(r, s) for r in range(self.rounds) for s in range(self.inner)]

        def seen(seat: int, owner: int) -> bool:
            return seat == owner or bool(reads(seat, owner))

        return max(at for at in steps if any(seen(seat, self.owner(seat, *at)) for seat in range(self.size)))


def _chain(owner: int, stops: list[tuple[Slot, int, Ranges]]) -> tuple[list[Hop], list[Hop]]:
    """From stop to stop, each with what those behind it want; back from stop to stop to the first, with what those so
    far have found.  Each stop has its slot, its seat and what it wants."""
    slots, seats = [slot for slot, _, _ in stops], [seat for _, seat, _ in stops]
    wanted = [tokens for _, _, tokens in stops[1:]]
    so_far = list(accumulate(wanted, _both))
    ahead = list(accumulate(reversed(wanted), _both))[::-1]
    ends = list(zip(slots, seats, [*seats[1:], seats[0]], strict=True))
    return (
        [Hop(owner=owner, source=a, target=b, slot=s, tokens=t) for (s, a, b), t in zip(ends[:-1], ahead, strict=True)],
        [Hop(owner=owner, source=a, target=b, slot=s, tokens=t) for (s, a, b), t in zip(ends[1:], so_far, strict=True)],
    )


def _both(some: Ranges, more: Ranges) -> Ranges:
    return some if some == more else merged([*some, *more])


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
    last: tuple[int, int]
    """Round and step after which no seat sees anything, the same for all."""


@lru_cache(maxsize=512)
def routes_of(reach: Reach, inner: int, seat: int) -> Routes:
    """Of keys and values, in a ring with nodes of ``inner`` seats."""
    circle = Circle(size=len(reach.seats), inner=inner)
    hops = [circle.hops(owner, reach.reads) for owner in range(circle.size)]
    there, home = (Timetable.of((hop for of_owner in way for hop in of_owner), seat) for way in zip(*hops, strict=True))
    return Routes(circle=circle, reach=reach, there=there, home=home, last=circle.last(reach.reads))


@lru_cache(maxsize=512)
def query_routes_of(reach: Reach, seat: int) -> Timetable:
    """Of queries, in a plain ring."""
    circle = Circle(size=len(reach.seats), inner=len(reach.seats))
    return Timetable.of((hop for owner in range(circle.size) for hop in circle.hops(owner, reach.asks)[0]), seat)


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
