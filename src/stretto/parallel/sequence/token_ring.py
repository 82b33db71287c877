"""TokenRing (S5): queries travel one way, partial outputs the other; keys and values stay.

    step s    seat i has the queries of seat i - s: it attends to its own keys, hands the queries on to seat i + 1
              and sends (out, lse) back to seat i - s, whose own partial result comes from seat i + s

        queries  ──►  i-1  ──►  i  ──►  i+1  ──►
        outputs  ◄────────────  i                        both directions of a link work at once

Backward: what the gradient needs of the queries (q, dout, lse, delta) travels, dq goes back, dk and dv stay at home.
Where there are fewer key/value heads than heads, a ring of keys sends less; where there are not, each direction of
the links carries about half of what the ring sends in one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stretto.parallel.sequence.blockwise import Rows
from stretto.parallel.sequence.merge import merge
from stretto.parallel.sequence.pieces import Task, nothing_seen
from stretto.parallel.wire import Transfer, Wire


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRing:
    """One rank's place in the ring."""

    wire: Wire
    members: tuple[int, ...]
    """Rank on the wire of each seat."""
    seat: int
    """This rank's."""

    def at(self, distance: int) -> int:
        """The seat so many ahead."""
        return (self.seat + distance) % len(self.members)

    def hand_on(self, tensors: list[Tensor], task: Task, step: int) -> Transfer:
        """Send the queries of ``step`` (dim 3) to the next seat; receive those of the step after."""
        length = task.tokens(self.at(-step - 1))
        coming = [_with_length(t, 3, length) for t in tensors]
        ahead, behind = self.members[self.at(1)], self.members[self.at(-1)]
        return self.wire.start([(t, ahead) for t in tensors], [(t, behind) for t in coming])

    def give_back(self, result: Tensor, task: Task, step: int) -> Transfer:
        """Send what the queries of ``step`` found (dim 2) to their owner; receive what ours found there."""
        coming = _with_length(result, 2, task.tokens(self.seat))
        return self.wire.start([(result, self.members[self.at(-step)])], [(coming, self.members[self.at(step)])])

    def attend(self, task: Task, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Send the queries round; merge what comes back."""
        mine, seats = nothing_seen(q), len(self.members)
        there, back = q.unsqueeze(0), None
        for s in range(seats):
            onward = self.hand_on([there], task, s) if s + 1 < seats else None
            found = mine if s == 0 else nothing_seen(there[0])
            task.attend(there[0], kv, (self.at(-s), self.seat), found)
            _take(back, mine)
            back = self.give_back(_packed(*found), task, s) if s else None
            if onward is not None:
                (there,) = onward.wait()
        _take(back, mine)
        self.wire.flush()
        return mine

    def differentiate(self, task: Task, rows: Rows, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Send what the queries' gradient needs round; add up what comes back."""
        exact, seats = rows.lse.dtype, len(self.members)
        dq = torch.zeros(rows.q.shape, dtype=exact, device=kv.device)
        dkv = torch.zeros(kv.shape, dtype=exact, device=kv.device)
        wide = torch.stack((rows.q, rows.dout.to(rows.q.dtype)))
        narrow = torch.stack((rows.lse, rows.delta))
        back: Transfer | None = None
        for s in range(seats):
            onward = self.hand_on([wide, narrow], task, s) if s + 1 < seats else None
            asking = Rows(q=wide[0], dout=wide[1], lse=narrow[0], delta=narrow[1])
            share = dq if s == 0 else torch.zeros(wide[0].shape, dtype=exact, device=kv.device)
            dkv += task.differentiate(asking, kv, (self.at(-s), self.seat), share)
            if back is not None:
                dq += back.wait()[0]
            back = self.give_back(share, task, s) if s else None
            if onward is not None:
                wide, narrow = onward.wait()
        if back is not None:
            dq += back.wait()[0]
        self.wire.flush()
        return dq, dkv


def _with_length(tensor: Tensor, dim: int, length: int) -> Tensor:
    shape = (*tensor.shape[:dim], length, *tensor.shape[dim + 1 :])
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)


def _packed(out: Tensor, lse: Tensor) -> Tensor:
    """One message [B, H, T, K + 1] of both."""
    return torch.cat((out, lse.unsqueeze(-1)), -1)


def _take(back: Transfer | None, mine: tuple[Tensor, Tensor]) -> None:
    if back is not None:
        (packed,) = back.wait()
        merge(*mine, packed[..., :-1], packed[..., -1])
