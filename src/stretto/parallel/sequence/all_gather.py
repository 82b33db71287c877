"""Keys and values of all seats gathered before attention, their gradients scattered after it (one of Megatron-Core's
ways of context parallelism; the simplest, and fast where there are few key/value heads).

    forward     kv ── to every seat ──► attend to each as it arrives
    backward    kv ── to every seat ──► dkv of each ── back to its seat ──► sum

Each gets the tokens that it sees.  What was gathered isn't kept for backward unless that is asked for, or memory would
not fall with the number of ranks; it is gathered again.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    keep: bool = False
    """Whether what was gathered is kept for backward."""

    def gather(self, task: Task, kv: Tensor) -> list[Transfer | None]:
        """Start everything, in the order of ``others``; None where nothing comes."""
        mine, found = task.seats[self.seat], []
        for other in self.others(task):
            sends = [(picked(kv, mine, other.seen_there), self.members[other.ahead])] if other.seen_there else []
            receives = [(with_tokens(kv, count(other.seen)), self.members[other.behind])] if other.seen else []
            transfer = self.wire.start(sends, receives) if sends or receives else None
            found.append(transfer if receives else None)
        return found

    def others(self, task: Task) -> list[_Pair]:
        """Whom keys go to and come from, nearest seats first."""
        reach, found = task.sight.reach(task.seats), []
        for distance in range(1, len(self.members)):
            ahead, behind = self._at(distance), self._at(-distance)
            seen, there = reach.reads(self.seat, behind), reach.reads(ahead, self.seat)
            found.append(_Pair(ahead=ahead, seen_there=there, behind=behind, seen=seen))
        return found

    def attend(self, task: Task, q: Tensor, kv: Tensor, kept: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Attend to this rank's own keys while the others' come."""
        found, coming, mine = nothing_seen(q), self.gather(task, kv), task.seats[self.seat]
        task.attend(q, kv, Meeting(queries=mine, keys=mine), found)
        for other, transfer in zip(self.others(task), coming, strict=True):
            if transfer is None:
                continue
            (theirs,) = transfer.wait()
            task.attend(q, theirs, Meeting(queries=mine, keys=other.seen), found)
            if self.keep:
                kept.append(theirs)
        self.wire.flush()
        return found

    def differentiate(self, task: Task, rows: Rows, kv: Tensor, kept: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Send each seat the gradient of its keys as soon as it is there; add up what comes back."""
        mine, others = task.seats[self.seat], self.others(task)
        if self.keep:
            known = iter(kept)
        else:
            gathered = self.gather(task, kv)
            known = (transfer.wait()[0] for transfer in gathered if transfer is not None)
        dq = torch.zeros(rows.q.shape, dtype=rows.lse.dtype, device=kv.device)
        dkv = torch.zeros(kv.shape, dtype=dq.dtype, device=kv.device)
        task.differentiate(rows, kv, Meeting(queries=mine, keys=mine), (dq, dkv))
        coming: list[tuple[Transfer, Ranges]] = []
        for other in others:
            theirs = next(known) if other.seen else None
            share = task.shares(rows, theirs, Meeting(queries=mine, keys=other.seen), dq)
            sends = [] if share is None else [(share, self.members[other.behind])]
            like = with_tokens(dkv, count(other.seen_there))
            receives = [(like, self.members[other.ahead])] if other.seen_there else []
            if sends or receives:
                coming.append((self.wire.start(sends, receives), other.seen_there))
        for arriving, tokens in coming:
            if tokens:
                add_at(dkv, mine, arriving.wait()[0], tokens)
        self.wire.flush()
        return dq, dkv

    def _at(self, distance: int) -> int:
        return (self.seat + distance) % len(self.members)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """Two seats as far from this one, ahead and behind."""

    ahead: int
    seen_there: Ranges
    """Tokens of this seat that the one ahead sees."""
    behind: int
    seen: Ranges
    """Tokens of the one behind that this seat sees."""
