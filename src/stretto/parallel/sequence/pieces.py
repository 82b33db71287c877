"""A rank's queries against the keys of one seat of the ring: range by range, what is empty left out.

A seat holds one or two ranges of the row (zigzag), so its queries and somebody's keys meet in up to four blocks:

                  keys of seat j   │ chunk j │ chunk 2n-1-j │
    queries        chunk i         │  some   │      -       │        i = j: a triangle in both, and one full block
    of seat i      chunk 2n-1-i    │  full   │     some     │        else:  two full blocks, whoever i and j are

Under a plain causal mask the gaps between a seat's ranges don't matter, and each of these lines is one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, autograd
from torch.autograd.function import once_differentiable

from stretto.parallel.sequence.blockwise import Block, Drop, Rows, sum_dtype
from stretto.parallel.sequence.merge import merge
from stretto.parallel.sequence.rectangles import without_gaps
from stretto.parallel.sequence.results import Results
from stretto.parallel.sequence.sight import Relation, Sight
from stretto.spec.sequence import Range, Ranges, count

PIECE = 4096
"""Tokens of which products are summed at once."""


class Kernel(Protocol):
    """A backend: attention of one block on one device."""

    def forward(self, q: Tensor, kv: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """``out`` [B, H, T, K] in the type of q or wider, and ``lse`` [B, H, T], as Blockwise gives them."""

    def backward(self, rows: Rows, kv: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """The block's share of dq [B, H, T, K] and dkv [2, B, G, S, K], in the type of q or wider."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Some queries and some keys, by their tokens."""

    queries: Ranges
    """Of the queries at hand."""
    keys: Ranges
    """Of the keys at hand."""
    asking: Ranges | None = None
    """Those of the queries that ask; None: all."""
    answering: Ranges | None = None
    """Those of the keys that they ask; None: all."""

    def without_gaps(self) -> Meeting:
        """The same, with tokens counted over those that meet: fewer, larger blocks of what follows each other here."""
        place = without_gaps(self.queries, self.keys)
        return Meeting(
            queries=place(self.queries),
            keys=place(self.keys),
            asking=None if self.asking is None else place(self.asking),
            answering=None if self.answering is None else place(self.answering),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One call of attention, as all ranks of a ring know it."""

    kernel: Kernel
    seats: tuple[Ranges, ...]
    """Tokens of each seat."""
    sight: Sight
    drop: Drop | None = None
    first_head: int = 0
    """Number of the first query head here among those of this tp rank."""
    results: Results | None = None
    """Where results may lie that needn't be computed again."""

    def tokens(self, seat: int) -> int:
        """Tokens that a seat holds."""
        return count(self.seats[seat])

    def attend(self, q: Tensor, kv: Tensor, meeting: Meeting, into: tuple[Tensor, Tensor]) -> None:
        """Merge attention of queries to keys into (out, lse) of all queries of the meeting."""
        out, lse = into
        for block, rows, columns in self._blocks(meeting):
            found = self.kernel.forward(q[:, :, rows], kv[:, :, :, columns], block)
            merge(out[:, :, rows], lse[:, :, rows], *found)

    def differentiate(self, rows: Rows, kv: Tensor, meeting: Meeting, into: tuple[Tensor, Tensor]) -> None:
        """Add the gradients of queries and of keys and values to ``into``, of all that meet."""
        dq, dkv = into
        for block, at, columns in self._blocks(meeting):
            part = rows.narrow(at.start, at.stop - at.start)
            found = self.kernel.backward(part, kv[:, :, :, columns], block)
            dq[:, :, at] += found[0]
            dkv[:, :, :, columns] += found[1]

    def shares(self, rows: Rows, kv: Tensor | None, meeting: Meeting, dq: Tensor) -> Tensor | None:
        """Add to ``dq``; return the gradient of ``kv``, None if there is none."""
        if kv is None:
            return None
        blocks = list(self._blocks(meeting))
        if [columns for _, _, columns in blocks] == [slice(0, kv.shape[3])]:  # all of it at once
            block, at, _ = blocks[0]
            of_q, of_kv = self.kernel.backward(rows.narrow(at.start, at.stop - at.start), kv, block)
            dq[:, :, at] += of_q
            return of_kv.to(dq.dtype)
        dkv = torch.zeros(kv.shape, dtype=dq.dtype, device=kv.device)
        self.differentiate(rows, kv, meeting, (dq, dkv))
        return dkv

    def _blocks(self, meeting: Meeting) -> Iterator[tuple[Block, slice, slice]]:
        """The blocks in which somebody sees somebody, and where they lie among queries and keys."""
        if self.sight.first is None and self.drop is None:  # nothing but the order counts
            meeting = meeting.without_gaps()
        for who, rows in _placed(meeting.queries, meeting.asking):
            for whom, columns in _placed(meeting.keys, meeting.answering):
                if self.sight.relation(who, whom) is not Relation.EMPTY:
                    block = Block(queries=who, keys=whom, sight=self.sight, drop=self.drop, first_head=self.first_head)
                    yield block, rows, columns


def _placed(held: Ranges, part: Ranges | None) -> Iterator[tuple[Range, slice]]:
    """Ranges that are held, or what of them is in ``part``, and where they lie among all tokens held."""
    at = 0
    for start, stop in held:
        for low, high in ((start, stop),) if part is None else part:
            low, high = max(low, start), min(high, stop)
            if low < high:
                yield (low, high), slice(at + low - start, at + high - start)
        at += stop - start


def nothing_seen(q: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of queries that have met no keys yet."""
    exact = sum_dtype(q.dtype)
    return torch.zeros(q.shape, dtype=exact, device=q.device), torch.full(
        q.shape[:3], float("-inf"), dtype=exact, device=q.device
    )


class Scheme(Protocol):
    """What circulates between the seats of a ring."""

    def attend(self, task: Task, q: Tensor, kv: Tensor, kept: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Attention of this rank's queries to the keys of all seats: out [B, H, T, K] and lse [B, H, T].

        Of what came from other seats it puts into ``kept`` what it wants to have again.
        """

    def differentiate(self, task: Task, rows: Rows, kv: Tensor, kept: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Gradients of this rank's q, and of its kv, from the queries of all seats; ``kept`` by ``attend``."""


def products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of a * b over channels, in ``dtype``, of some rows at a time, or long rows would be held wide at once."""
    pieces = zip(a.split(PIECE, dim=2), b.split(PIECE, dim=2), strict=True)
    return torch.cat([(x.to(dtype) * y.to(dtype)).sum(-1) for x, y in pieces], dim=2)


class _Attend(autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scheme: Scheme, task: Task) -> Tensor:
        kv = torch.stack((k, v))
        found = task.results.take() if task.results is not None else None
        kept: list[Tensor] = []
        if found is None:
            exact, lse = scheme.attend(task, q, kv, kept)
            found = exact.to(q.dtype), lse
            if task.results is not None:
                task.results.put(*found)
        out, lse = found
        ctx.scheme, ctx.task = scheme, task
        ctx.save_for_backward(q, kv, out, lse, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        q, kv, out, lse, *kept = ctx.saved_tensors
        dout = gradients[0]
        rows = Rows(q=q, dout=dout, lse=lse, delta=products(dout, out, lse.dtype), out=out)
        dq, dkv = ctx.scheme.differentiate(ctx.task, rows, kv, kept)
        dk, dv = dkv.to(kv.dtype).unbind(0)
        return dq.to(q.dtype), dk, dv, None, None


@torch.compiler.disable
def attend_over(scheme: Scheme, task: Task, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q [B, H, T, K] to the k and v [B, G, T, K] of all seats, [B, H, T, K], with its gradient.

    Kept for backward: q, k, v, the output and lse, all of this rank's own tokens, and what the scheme keeps.
    """
    return _Attend.apply(q, k, v, scheme, task)
