"""Keys and values of all seats gathered before attention, their gradients scattered after it (one of Megatron-Core's
ways of context parallelism; the simplest, and fast where there are few key/value heads).

    forward     kv ── to every seat ──► attend to each as it arrives
    backward    kv ── to every seat ──► dkv of each ── back to its seat ──► sum

Each gets the tokens that it sees.  What was gathered isn't kept for backward, or memory would not fall with the number
of ranks; it is gathered again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stretto.parallel.sequence.blockwise import Rows
from stretto.parallel.sequence.pieces import Meeting, Task, nothing_seen
from stretto.parallel.sequence.routes import add_at, picked, with_tokens
from stretto.parallel.wire import Transfer, Wire
from stretto.spec.sequence import Ranges, count


@dataclass(frozen=True, slots=True, kw_only=True)
class AllGather:
    """One rank's place among those that gather."""

    wire: Wire
    members: tuple[int, ...]
    """Rank on the wire of each seat."""
    seat: int
    """This rank's."""

    def gather(self, task: Task, kv: Tensor) -> list[tuple[int, Ranges, Transfer | None]]:
        """Start everything; nearest seats first.  Seat, tokens that are seen, and the transfer that brings them."""
        reach, mine = task.sight.reach(task.seats), task.seats[self.seat]
        found = []
        for distance in range(1, len(self.members)):
            ahead, behind = self._at(distance), self._at(-distance)
            theirs, ours = reach.reads(ahead, self.seat), reach.reads(self.seat, behind)
            transfer = None
            if theirs or ours:
                sends = [(picked(kv, mine, theirs), self.members[ahead])] if theirs else []
                transfer = self.wire.start(sends, [(with_tokens(kv, count(ours)), self.members[behind])])
            found.append((behind, ours, transfer))
        return found

    def attend(self, task: Task, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Attend to this rank's own keys while the others' come."""
        found, others, mine = nothing_seen(q), self.gather(task, kv), task.seats[self.seat]
        task.attend(q, kv, Meeting(queries=mine, keys=mine), found)
        for _, tokens, transfer in others:
            if transfer is not None:
                task.attend(q, transfer.wait()[0], Meeting(queries=mine, keys=tokens), found)
        self.wire.flush()
        return found

    def differentiate(self, task: Task, rows: Rows, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Send each seat the gradient of its keys as soon as it is there; add up what comes back."""
        others, mine, reach = self.gather(task, kv), task.seats[self.seat], task.sight.reach(task.seats)
        dq = torch.zeros(rows.q.shape, dtype=rows.lse.dtype, device=kv.device)
        dkv = torch.zeros(kv.shape, dtype=dq.dtype, device=kv.device)
        task.differentiate(rows, kv, Meeting(queries=mine, keys=mine), (dq, dkv))
        coming: list[tuple[Transfer, Ranges]] = []
        for distance, (seat, tokens, transfer) in enumerate(others, start=1):
            if transfer is None:
                continue
            theirs = reach.reads(self._at(distance), self.seat)
            share = task.shares(rows, transfer.wait()[0], Meeting(queries=mine, keys=tokens), dq)
            sends = [] if share is None else [(share, self.members[seat])]
            receives = [(with_tokens(dkv, count(theirs)), self.members[self._at(distance)])]
            coming.append((self.wire.start(sends, receives), theirs))
        for transfer, theirs in coming:
            add_at(dkv, mine, transfer.wait()[0], theirs)
        self.wire.flush()
        return dq, dkv

    def _at(self, distance: int) -> int:
        return (self.seat + distance) % len(self.members)
