"""A rank's queries against the keys of one seat of the ring: range by range, what is empty left out.

A seat holds one or two ranges of the row (zigzag), so its queries and somebody's keys meet in up to four blocks:

                  keys of seat j   │ chunk j │ chunk 2n-1-j │
    queries        chunk i         │  some   │      -       │        i = j: a triangle in both, and one full block
    of seat i      chunk 2n-1-i    │  full   │     some     │        else:  two full blocks, whoever i and j are
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, autograd
from torch.autograd.function import once_differentiable

from stretto.parallel.sequence.blockwise import Block, Drop, Rows, sum_dtype
from stretto.parallel.sequence.merge import merge
from stretto.parallel.sequence.results import Results
from stretto.parallel.sequence.sight import Relation, Sight
from stretto.spec.sequence import Range, Ranges, count


class Kernel(Protocol):
    """A backend: attention of one block on one device."""

    def forward(self, q: Tensor, kv: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """``out`` [B, H, T, K] and ``lse`` [B, H, T], as Blockwise gives them."""

    def backward(self, rows: Rows, kv: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """The block's share of dq [B, H, T, K] and dkv [2, B, G, S, K]."""


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

    def attend(self, q: Tensor, kv: Tensor, seats: tuple[int, int], into: tuple[Tensor, Tensor]) -> None:
        """Merge attention of the queries of the first of ``seats`` to the keys of the second into (out, lse)."""
        out, lse = into
        for block, rows, columns in self._blocks(*seats):
            found = self.kernel.forward(q[:, :, rows], kv[:, :, :, columns], block)
            merge(out[:, :, rows], lse[:, :, rows], *found)

    def differentiate(
        self, rows: Rows, kv: Tensor, seats: tuple[int, int], dq: Tensor, *, asking: Range | None = None
    ) -> Tensor:
        """Add to ``dq`` what the keys of the second of ``seats`` give; return the gradient of ``kv``.

        ``asking``: which of the first seat's tokens, counted there; None: all.
        """
        dkv = torch.zeros(kv.shape, dtype=dq.dtype, device=kv.device)
        for block, at, columns in self._blocks(*seats, asking):
            part = rows.narrow(at.start, at.stop - at.start)
            found = self.kernel.backward(part, kv[:, :, :, columns], block)
            dq[:, :, at] += found[0]
            dkv[:, :, :, columns] += found[1]
        return dkv

    def _blocks(self, queries: int, keys: int, asking: Range | None = None) -> Iterator[tuple[Block, slice, slice]]:
        """The blocks of two seats in which somebody sees somebody, and where they lie in both."""
        for who, rows in _placed(self.seats[queries], asking):
            for whom, columns in _placed(self.seats[keys], None):
                if self.sight.relation(who, whom) is not Relation.EMPTY:
                    block = Block(queries=who, keys=whom, sight=self.sight, drop=self.drop, first_head=self.first_head)
                    yield block, rows, columns


def _placed(ranges: Ranges, part: Range | None) -> Iterator[tuple[Range, slice]]:
    """Ranges of a seat and where they lie among its tokens; of ``part`` of its tokens only, if it isn't None."""
    at = 0
    for start, stop in ranges:
        low, high = (at, at + stop - start) if part is None else (max(at, part[0]), min(at + stop - start, part[1]))
        if low < high:
            yield (start + low - at, start + high - at), slice(low, high)
        at += stop - start


def nothing_seen(q: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of queries that have met no keys yet."""
    exact = sum_dtype(q.dtype)
    return torch.zeros(q.shape, dtype=exact, device=q.device), torch.full(
        q.shape[:3], float("-inf"), dtype=exact, device=q.device
    )


class Scheme(Protocol):
    """What circulates between the seats of a ring."""

    def attend(self, task: Task, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of this rank's queries to the keys of all seats: out [B, H, T, K] and lse [B, H, T]."""

    def differentiate(self, task: Task, rows: Rows, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of this rank's q, and of its kv, from the queries of all seats."""


class _Attend(autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scheme: Scheme, task: Task) -> Tensor:
        kv = torch.stack((k, v))
        found = task.results.take() if task.results is not None else None
        if found is None:
            exact, lse = scheme.attend(task, q, kv)
            found = exact.to(q.dtype), lse
            if task.results is not None:
                task.results.put(*found)
        out, lse = found
        ctx.scheme, ctx.task = scheme, task
        ctx.save_for_backward(q, kv, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        q, kv, out, lse = ctx.saved_tensors
        dout = gradients[0]
        delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        dq, dkv = ctx.scheme.differentiate(ctx.task, Rows(q=q, dout=dout, lse=lse, delta=delta), kv)
        dk, dv = dkv.to(kv.dtype).unbind(0)
        return dq.to(q.dtype), dk, dv, None, None


@torch.compiler.disable
def attend_over(scheme: Scheme, task: Task, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q [B, H, T, K] to the k and v [B, G, T, K] of all seats, [B, H, T, K], with its gradient.

    Kept for backward: q, k, v, the output and lse, all of this rank's own tokens.
    """
    return _Attend.apply(q, k, v, scheme, task)
