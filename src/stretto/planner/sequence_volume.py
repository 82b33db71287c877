"""Bytes that one rank sends for the attention of one layer and micro-batch, for every way to cut it over cp.

With N tokens over n seats, H query and G key/value heads of size K, and e bytes a number, per rank and row:

    way           forward                              backward
    ring          2GK e N (n-1)/n                      2GK (e + x) N (n-1)/n         keys; keys, and their gradients
    ulysses       (2H + 2G) K e N/n (n-1)/n            the same                      G at least n, else n/G times its 2G
    token-ring    H (K e + (K+1) x) N (n-1)/n          H (2K e + 2x + K x) N (n-1)/n
    all-gather    2GK e N (n-1)/n                      2GK (e + x) N (n-1)/n

x: bytes of a sum, 4 for bfloat16, else e.  Where keys that came are kept, backward sends their gradients only.

A double ring sends what a ring sends, but over the slow links only once a round.  A mesh of u ranks a seat sends what
Ulysses over u sends, and what a ring with 1/u of the heads and u times the tokens sends.  What follows is exact for
uneven shares too (the ways are those of Ring Self-Attention, DeepSpeed-Ulysses, USP, LoongTrain and TokenRing; tests
hold the runtime to it).

Under a window or documents some seats see nothing of others.  Tokens go then only to those who see them:
a ring takes them from one of these to the next and no further, and sends on what those still to come see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from stretto.spec.reach import Reach, Seats, merged
from stretto.spec.sequence import Arrangement, Ranges, count, heads_of, uneven_reads


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Queries, keys and values of one layer on one tp rank."""

    rows: int
    """Sequences of a micro-batch."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key/value heads."""
    head_size: int
    """Channels of a head."""
    element_bytes: int
    """Bytes of a number."""

    @property
    def sum_bytes(self) -> int:
        """Bytes of a number of outputs and gradients that are not complete yet."""
        return max(4, self.element_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """Bytes sent by one rank."""

    forward: int
    backward: int

    def __add__(self, other: Volume) -> Volume:
        """Both."""
        return Volume(forward=self.forward + other.forward, backward=self.backward + other.backward)


def sequence_volume(
    who: Arrangement,
    shares: tuple[Ranges, ...],
    rank: int,
    heads: Heads,
    *,
    sees: Callable[[Seats], Reach] = Reach.whole,
) -> Volume:
    """What ``rank`` of cp sends when the tokens are cut in ``shares``; ``sees``: who sees whom, of given seats."""
    found = Volume(forward=0, backward=0)
    if who.ulysses > 1:
        members = who.sharers(rank)
        index = members.index(rank)
        found = _exchanged([count(shares[m]) for m in members], index, heads)
        heads = at_seat(heads, who.ulysses, index)
    seats = who.seated(shares)
    seat = who.place(rank)[0]
    if len(seats) == 1:
        return found
    reach = sees(seats)
    if who.outside == "token-ring":
        return found + _token_ring(reach, seat, heads)
    if who.outside == "all-gather":
        return found + _gathered(reach, seat, heads, keep=who.keep)
    inner = who.inner_ring if who.inner_ring > 1 else len(seats)
    for piece in range(who.pieces):
        found += _ring(replace(reach, piece=(piece, who.pieces)), seat, inner, heads, keep=who.keep)
    return found


def _exchanged(tokens: list[int], index: int, heads: Heads) -> Volume:
    """Ulysses: q, k, v there and out back; backward the other way round."""
    cut = [heads_of(heads.heads, heads.kv_heads, len(tokens), m) for m in range(len(tokens))]
    of_q = [b - a for (a, b), _ in cut]
    of_kv = [b - a for _, (a, b) in cut]
    others = [m for m in range(len(tokens)) if m != index]
    there = sum(tokens[index] * (of_q[m] + 2 * of_kv[m]) for m in others)
    back = sum(tokens[m] * of_q[index] for m in others)
    dout = sum(tokens[index] * of_q[m] for m in others)
    gradients = sum(tokens[m] * (of_q[index] + 2 * of_kv[index]) for m in others)
    each = heads.rows * heads.head_size * heads.element_bytes
    return Volume(forward=each * (there + back), backward=each * (dout + gradients))


def at_seat(heads: Heads, parts: int, index: int) -> Heads:
    """The heads that one of the ranks of a seat has; key/value heads that a cut runs through are one per query head."""
    (start, stop), (first, last) = heads_of(heads.heads, heads.kv_heads, parts, index)
    even = uneven_reads(heads.heads, heads.kv_heads, parts, index) is None
    return Heads(
        rows=heads.rows,
        heads=stop - start,
        kv_heads=last - first if even else stop - start,
        head_size=heads.head_size,
        element_bytes=heads.element_bytes,
    )


def _ring(reach: Reach, seat: int, inner: int, heads: Heads, *, keep: bool) -> Volume:
    """Keys go on to those behind this seat that see some, and their gradients with what those up to it have found."""
    keys = sums = 0
    for owner in range(len(reach.seats)):
        nodes = _in_turn(len(reach.seats) // inner, owner // inner, seat // inner)
        inside, before, after = ([node * inner + i for node in part for i in range(inner)] for part in nodes)
        steps = _in_turn(inner, owner % inner, seat % inner)
        own, first, rest = ([seat // inner * inner + i for i in part] for part in steps)
        entry = seat % inner == owner % inner
        brought = seat // inner == owner // inner or bool(_seen(reach.reads, inside, owner))
        if brought and (entry or reach.reads(seat, owner)):
            keys += _seen(reach.reads, rest, owner)
        if brought and not entry and reach.reads(seat, owner):
            sums += _seen(reach.reads, own + first[1:], owner)
        if brought and entry:
            keys += _seen(reach.reads, after, owner)
        if brought and entry and seat != owner:
            sums += _seen(reach.reads, inside + [s for s in before if s // inner != owner // inner], owner)
    token = 2 * heads.rows * heads.kv_heads * heads.head_size
    return Volume(
        forward=token * keys * heads.element_bytes,
        backward=token * ((not keep) * keys * heads.element_bytes + sums * heads.sum_bytes),
    )


def _in_turn(size: int, start: int, here: int) -> tuple[list[int], list[int], list[int]]:
    """On a circle from ``start``: ``here``, what comes before it, and what comes after it."""
    turn = [(start + i) % size for i in range(size)]
    at = turn.index(here)
    return [here], turn[:at], turn[at + 1 :]


def _seen(wanted: Callable[[int, int], Ranges], seats: list[int], owner: int) -> int:
    """How many tokens of the owner any of the seats wants."""
    return count(merged([part for seat in seats if seat != owner for part in wanted(seat, owner)]))


def _token_ring(reach: Reach, seat: int, heads: Heads) -> Volume:
    on = back = 0
    for owner in range(len(reach.seats)):
        _, _, rest = _in_turn(len(reach.seats), owner, seat)
        if seat == owner or reach.asks(seat, owner):
            on += _seen(reach.asks, rest, owner)
        back += _seen(reach.asks, [seat], owner)
    size, e, x = heads.head_size, heads.element_bytes, heads.sum_bytes
    each = heads.rows * heads.heads
    return Volume(
        forward=each * (on * size * e + back * (size + 1) * x),
        backward=each * (on * 2 * (size * e + x) + back * size * x),
    )


def _gathered(reach: Reach, seat: int, heads: Heads, *, keep: bool) -> Volume:
    others = [other for other in range(len(reach.seats)) if other != seat]
    token = 2 * heads.rows * heads.kv_heads * heads.head_size
    keys = token * sum(count(reach.reads(other, seat)) for other in others) * heads.element_bytes
    sums = token * sum(count(reach.reads(seat, other)) for other in others) * heads.sum_bytes
    return Volume(forward=keys, backward=(not keep) * keys + sums)
