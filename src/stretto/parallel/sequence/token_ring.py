"""TokenRing: queries travel one way, partial outputs the other; keys and values stay.

    step s    seat i has the queries of seat i - s: it attends to its own keys, hands the queries on to seat i + 1
              and sends (out, lse) back to seat i - s, whose own partial result comes from seat i + s

        queries  ──►  i-1  ──►  i  ──►  i+1  ──►
        outputs  ◄────────────  i                        both directions of a link work at once

Queries go past seats none of whose keys they see (routes.py).

Backward: what the gradient needs of the queries (q, dout, lse, delta) travels, dq goes back, dk and dv stay at home.
Where there are fewer key/value heads than heads, a ring of keys sends less; where there are not, each direction of
the links carries about half of what the ring sends in one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stretto.parallel.sequence.blockwise import Rows
from stretto.parallel.sequence.merge import merge
from stretto.parallel.sequence.pieces import Meeting, Task, nothing_seen
from stretto.parallel.sequence.routes import Arrivals, add_at, picked, query_routes_of, stretches, with_tokens
from stretto.parallel.wire import Transfer, Wire
from stretto.spec.sequence import Ranges, count


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

    def visits(self, task: Task, mine: list[Tensor]) -> Iterator[tuple[int, Ranges, list[Tensor]]]:
        """All steps: which of the queries at hand see this seat's keys, and what is theirs (of our own: of ``mine``).

        Tokens are dim -2.
        """
        reach, own = task.sight.reach(task.seats), task.seats[self.seat]
        timetable = query_routes_of(reach, self.seat)
        streams = [Arrivals(self.wire, self.members) for _ in mine]
        for s in range(len(self.members)):
            owner, tokens = self.at(-s), reach.asks(self.seat, self.at(-s)) if s else own
            seen = []
            for coming, tensor in zip(streams, mine, strict=True):
                here = coming.take(owner, outside=False) if s else (tensor, own)
                coming.post(timetable, (0, s, False), {} if here is None else {owner: here}, tensor)
                if here is not None and tokens:
                    seen.append(picked(*here, tokens))
            yield s, tokens, seen

    def give_back(self, result: Tensor | None, task: Task, step: int, like: Tensor) -> _Back | None:
        """Send what queries of ``step`` found (dim -2) to their owner; receive what ours found, shaped as ``like``."""
        tokens = task.sight.reach(task.seats).asks(self.at(step), self.seat)
        if result is None and not tokens:
            return None
        sends = [] if result is None else [(result, self.members[self.at(-step)])]
        return self.wire.start(sends, [(with_tokens(like, count(tokens)), self.members[self.at(step)])]), tokens

    def attend(self, task: Task, q: Tensor, kv: Tensor, kept: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Send the queries round; merge what comes back."""
        mine, own, back = nothing_seen(q), task.seats[self.seat], None
        like = mine[0].new_empty(*q.shape[:3], q.shape[3] + 1)
        for s, tokens, here in self.visits(task, [q]):
            found = mine if s == 0 else None
            if here:
                found = found or nothing_seen(here[0])
                task.attend(here[0], kv, Meeting(queries=tokens, keys=own), found)
            _take(back, mine, own)
            back = self.give_back(found and _packed(*found), task, s, like) if s else None
        _take(back, mine, own)
        self.wire.flush()
        return mine

    def differentiate(self, task: Task, rows: Rows, kv: Tensor, kept: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Send what the queries' gradient needs round; add up what comes back."""
        exact, own = rows.lse.dtype, task.seats[self.seat]
        dq = torch.zeros(rows.q.shape, dtype=exact, device=kv.device)
        dkv = torch.zeros(kv.shape, dtype=exact, device=kv.device)
        wide = torch.stack((rows.q, rows.dout.to(rows.q.dtype)))
        narrow = torch.stack((rows.lse, rows.delta)).unsqueeze(-1)
        back: _Back | None = None
        for s, tokens, here in self.visits(task, [wide, narrow]):
            share = dq if s == 0 else None
            if here:
                (q, dout), (lse, delta) = here[0].unbind(), here[1].squeeze(-1).unbind()
                share = torch.zeros(q.shape, dtype=exact, device=kv.device) if share is None else share
                asking = Rows(q=q, dout=dout, lse=lse, delta=delta)
                task.differentiate(asking, kv, Meeting(queries=tokens, keys=own), (share, dkv))
            if back is not None:
                add_at(dq, own, back[0].wait()[0], back[1])
            back = self.give_back(share, task, s, dq) if s else None
        if back is not None:
            add_at(dq, own, back[0].wait()[0], back[1])
        self.wire.flush()
        return dq, dkv


_Back = tuple[Transfer, Ranges]
"""What is on its way back, and of which queries."""


def _packed(out: Tensor, lse: Tensor) -> Tensor:
    """One message [B, H, T, K + 1] of both."""
    return torch.cat((out, lse.unsqueeze(-1)), -1)


def _take(back: _Back | None, mine: tuple[Tensor, Tensor], own: Ranges) -> None:
    if back is None:
        return
    packed, begin = back[0].wait()[0], 0
    for at, length in stretches(own, back[1]):
        out, lse = (t.narrow(2, at, length) for t in mine)
        part = packed.narrow(2, begin, length)
        merge(out, lse, part[..., :-1], part[..., -1])
        begin += length
