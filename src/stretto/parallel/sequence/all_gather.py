"""Keys and values of all seats gathered before attention, their gradients scattered after it (one of Megatron-Core's
ways of context parallelism; the simplest, and fast where there are few key/value heads).

    forward     kv ── to every seat ──► attend to each as it arrives
    backward    kv ── to every seat ──► dkv of each ── back to its seat ──► sum

What was gathered isn't kept for backward, or memory would not fall with the number of ranks; it is gathered again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stretto.parallel.sequence.blockwise import Rows
from stretto.parallel.sequence.pieces import Task, nothing_seen
from stretto.parallel.wire import Transfer, Wire


@dataclass(frozen=True, slots=True, kw_only=True)
class AllGather:
    """One rank's place among those that gather."""

    wire: Wire
    members: tuple[int, ...]
    """Rank on the wire of each seat."""
    seat: int
    """This rank's."""

    def gather(self, task: Task, kv: Tensor) -> list[tuple[int, Transfer]]:
        """Start everything; nearest seats first."""
        found = []
        for distance in range(1, len(self.members)):
            ahead, behind = self._at(distance), self._at(-distance)
            coming = _like(kv, task.tokens(behind))
            sends, receives = [(kv, self.members[ahead])], [(coming, self.members[behind])]
            found.append((behind, self.wire.start(sends, receives)))
        return found

    def attend(self, task: Task, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Attend to this rank's own keys while the others' come."""
        found, others = nothing_seen(q), self.gather(task, kv)
        task.attend(q, kv, (self.seat, self.seat), found)
        for seat, transfer in others:
            task.attend(q, transfer.wait()[0], (self.seat, seat), found)
        self.wire.flush()
        return found

    def differentiate(self, task: Task, rows: Rows, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Send each seat the gradient of its keys as soon as it is there; add up what comes back."""
        others = self.gather(task, kv)
        dq = torch.zeros(rows.q.shape, dtype=rows.lse.dtype, device=kv.device)
        dkv = task.differentiate(rows, kv, (self.seat, self.seat), dq)
        coming: list[Transfer] = []
        for distance, (seat, transfer) in enumerate(others, start=1):
            share = task.differentiate(rows, transfer.wait()[0], (self.seat, seat), dq)
            ours = torch.empty_like(dkv)
            sends, receives = [(share, self.members[seat])], [(ours, self.members[self._at(distance)])]
            coming.append(self.wire.start(sends, receives))
        for transfer in coming:
            dkv += transfer.wait()[0]
        self.wire.flush()
        return dq, dkv

    def _at(self, distance: int) -> int:
        return (self.seat + distance) % len(self.members)


def _like(kv: Tensor, length: int) -> Tensor:
    return torch.empty((*kv.shape[:3], length, kv.shape[4]), dtype=kv.dtype, device=kv.device)
