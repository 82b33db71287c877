"""Ring attention: keys and values travel, queries stay (S1; with log-sum-exp after Liu et al. 2023).

    step 0       step 1       step 2              while a seat works on the keys that it has, the next ones come in
    seat 0  kv0  seat 0  kv3  seat 0  kv2  ...
    seat 1  kv1  seat 1  kv0  seat 1  kv3  ...

Double ring (S4): seats of one node form an inner ring, and only once a round, under all of its steps, something crosses
between nodes.  A plain ring is a double ring of one node.

    round 0   kv of node A circulates in node A   │  meanwhile each seat sends its own kv to its peer in node B
    round 1   kv of node D circulates in node A   │  ...

Backward: keys and values travel again, and behind them their gradients, to which each seat adds its share.  What a
seat finds for its own keys stays at home, so gradients travel n - 1 hops, like the keys, and no seat holds more
than two of each.  A seat's own block is cut in two: one part hides the first message, the other the last, with
which the gradients come home.  Bytes: forward the keys and values of all other seats, backward twice that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stretto.parallel.sequence.blockwise import Rows
from stretto.parallel.sequence.pieces import Task, nothing_seen
from stretto.parallel.wire import Transfer, Wire
from stretto.spec.sequence import Range


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

    @property
    def rounds(self) -> int:
        """Rounds of the inner ring."""
        return len(self.members) // self.inner

    def owner(self, round_: int, step: int) -> int:
        """The seat whose keys are here at ``step`` of ``round_``."""
        node, index = divmod(self.seat, self.inner)
        return (node - round_) % self.rounds * self.inner + (index - step) % self.inner

    def pass_on(self, tensor: Tensor, task: Task, owner: int, *, outside: bool) -> Transfer:
        """Send ``tensor`` [..., T, K] one seat on (one node on, if ``outside``); receive what ``owner`` is to have."""
        node, index = divmod(self.seat, self.inner)
        hops = [(node + d) % self.rounds * self.inner + index for d in (1, -1)]
        if not outside:
            hops = [node * self.inner + (index + d) % self.inner for d in (1, -1)]
        shape = (*tensor.shape[:-2], task.tokens(owner), tensor.shape[-1])
        coming = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        return self.wire.start([(tensor, self.members[hops[0]])], [(coming, self.members[hops[1]])])

    def attend(self, task: Task, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Merge the attention to every seat's keys as they come by."""
        found = nothing_seen(q)
        rounds, steps, outer = self.rounds, self.inner, None
        for r in range(rounds):
            if r + 1 < rounds:
                outer = self.pass_on(kv, task, self.owner(r + 1, 0), outside=True)
            here = kv
            for s in range(steps):
                coming = self.pass_on(here, task, self.owner(r, s + 1), outside=False) if s + 1 < steps else None
                task.attend(q, here, (self.seat, self.owner(r, s)), found)
                if coming is not None:
                    (here,) = coming.wait()
            if outer is not None and r + 1 < rounds:
                (kv,) = outer.wait()
        self.wire.flush()
        return found

    def differentiate(self, task: Task, rows: Rows, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of q, and of kv once it has been round."""
        dq = torch.zeros(rows.q.shape, dtype=rows.lse.dtype, device=kv.device)
        journey, own = _Journey(self, task), kv
        first, rest = _halves(task.tokens(self.seat), alone=len(self.members) == 1)
        for r in range(self.rounds):
            outer = self.pass_on(kv, task, self.owner(r + 1, 0), outside=True) if r + 1 < self.rounds else None
            here = kv
            for s in range(self.inner):
                last = s + 1 == self.inner
                coming = None if last else self.pass_on(here, task, self.owner(r, s + 1), outside=False)
                asking = first if r == s == 0 else None
                share = task.differentiate(rows, here, (self.seat, self.owner(r, s)), dq, asking=asking)
                journey.add(share, r, s)
                if coming is not None:
                    (here,) = coming.wait()
            if outer is not None:
                (kv,) = outer.wait()
        if self.rounds > 1:
            journey.leave()
        dkv = task.differentiate(rows, own, (self.seat, self.seat), dq, asking=rest)
        dkv += journey.end()
        self.wire.flush()
        return dq, dkv


def _halves(tokens: int, *, alone: bool) -> tuple[Range, Range]:
    """A seat's queries in two parts with about the same number of pairs among its own keys.

    Under a causal mask the first of N tokens to reach half of the pairs is N / sqrt(2), whatever ranges they lie in.
    """
    at = tokens if alone else round(tokens * 0.5**0.5)
    return (0, at), (at, tokens)


class _Journey:
    """Gradients of keys and values on their way home.

    Inside a node each seat adds its share and hands the sum on, until the node's sum is at the seat that brought the
    keys into the node; from there it goes on to the next node, which adds its own.  Each is waited for only when there
    is something to add it to, one block of work after it was sent.
    """

    def __init__(self, ring: Ring, task: Task) -> None:
        self._ring, self._task = ring, task
        self._mine: Tensor | None = None
        """What this seat found for the keys that it brought into the node this round."""
        self._inside: Transfer | None = None
        self._across: Transfer | None = None
        self._home: Tensor | None = None

    def add(self, share: Tensor, round_: int, step: int) -> None:
        """The seat's share of the gradient of the keys that are here at ``step`` of ``round_``."""
        if step == 0:
            if round_:
                self._finish(round_ - 1)
            self._mine = share
            return
        if step > 1:
            share += _arrived(self._inside)
        owner = self._ring.owner(round_, step + 1)
        self._inside = self._ring.pass_on(share, self._task, owner, outside=False)

    def _finish(self, round_: int) -> None:
        """The node's sum of a round is complete: keep it if it is of our own keys, else send it on."""
        ring, node = self._ring, self._mine
        assert node is not None
        if ring.inner > 1:
            node += _arrived(self._inside)
        if round_ == 0:
            self._home = node
            return
        if round_ > 1:
            node += _arrived(self._across)
        owner = ring.owner((round_ + 1) % ring.rounds, 0)
        self._across = ring.pass_on(node, self._task, owner, outside=True)

    def leave(self) -> None:
        """After the last round: send on to its owner what has been through all nodes."""
        self._finish(self._ring.rounds - 1)

    def end(self) -> Tensor:
        """The gradient of this seat's keys and values, once all of it is home."""
        if self._ring.rounds == 1:
            self.leave()
        assert self._home is not None
        if self._ring.rounds > 1:
            self._home += _arrived(self._across)
        return self._home


def _arrived(transfer: Transfer | None) -> Tensor:
    assert transfer is not None
    return transfer.wait()[0]
