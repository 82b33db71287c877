"""Ulysses (S2): between two all-to-alls a rank has all tokens of some heads instead of some tokens of all heads.

        tokens ►                                    tokens ►
    h  ┌────┬────┬────┐                         h  ┌──────────────┐
    ▼  │ r0 │ r1 │ r2 │    ── all-to-all ──►    ▼  │   rank 0     │
       │    │    │    │                            ├──────────────┤      any attention of whole rows,
       │    │    │    │    ◄── all-to-all ──       │   rank 1     │      or a ring of such ranks (S3, S4)
       │    │    │    │                            ├──────────────┤
       └────┴────┴────┘                            │   rank 2     │
                                                   └──────────────┘
Queries, keys and values go in one message.  Where there are fewer key/value heads than ranks, each rank gets the ones
that its query heads read; the gradients of a head that went to several ranks are added up on the way back.
The tokens come out in the order of the row, whatever the layout was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, autograd
from torch.autograd.function import once_differentiable

from stretto.parallel.wire import Wire
from stretto.spec.sequence import Range, Ranges, count, heads_of, uneven_reads


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """The ranks that share heads, and what each holds."""

    wire: Wire
    members: tuple[int, ...]
    """Ranks on the wire."""
    index: int
    """This rank's index among them."""
    shares: tuple[Ranges, ...]
    """Tokens of each member."""

    def to_heads(self, parts: Sequence[Tensor], heads: Sequence[Sequence[Range]]) -> list[Tensor]:
        """Several [B, heads of all, own tokens, K] -> [B, own heads, all tokens, K]; ``heads[p][m]``: member m's."""
        cut = [[x[:, slice(*ranges[m])] for x, ranges in zip(parts, heads, strict=True)] for m in self._all]
        own = [(x.shape[0], _size(ranges[self.index]), x.shape[3]) for x, ranges in zip(parts, heads, strict=True)]
        shapes: list[list[tuple[int, ...]]] = []
        for m in self._all:
            tokens = count(self.shares[m])
            shapes.append([(rows, size, tokens, channels) for rows, size, channels in own])
        got = self._all_to_all(cut, shapes)
        return [self._in_order([got[m][p] for m in self._all]) for p in range(len(parts))]

    def to_tokens(self, parts: Sequence[Tensor], heads: Sequence[Sequence[Range]]) -> list[Tensor]:
        """The way back; what several members give for the same head is added up."""
        split = [self._by_member(x) for x in parts]
        cut = [[of_part[m] for of_part in split] for m in self._all]
        own = count(self.shares[self.index])
        shapes: list[list[tuple[int, ...]]] = [
            [(x.shape[0], _size(ranges[m]), own, x.shape[3]) for x, ranges in zip(parts, heads, strict=True)]
            for m in self._all
        ]
        got = self._all_to_all(cut, shapes)
        found = []
        for p, (x, ranges) in enumerate(zip(parts, heads, strict=True)):
            whole = x.new_zeros(x.shape[0], ranges[-1][1], own, x.shape[3])
            for m in self._all:
                whole[:, slice(*ranges[m])] += got[m][p]
            found.append(whole)
        return found

    @property
    def _all(self) -> range:
        return range(len(self.members))

    def _all_to_all(self, cut: list[list[Tensor]], shapes: list[list[tuple[int, ...]]]) -> list[list[Tensor]]:
        """Give member m ``cut[m]``; return what each gives us, of ``shapes[m]``."""
        others = [m for m in self._all if m != self.index]
        sends = [(torch.cat([x.flatten() for x in cut[m]]), self.members[m]) for m in others]
        like = cut[self.index][0]
        receives = []
        for m in others:
            size = sum(torch.Size(shape).numel() for shape in shapes[m])
            receives.append((like.new_empty(size), self.members[m]))
        arrived = dict(zip(others, self.wire.start(sends, receives).wait(), strict=True))
        self.wire.flush()
        found = []
        for m in self._all:
            if m == self.index:
                found.append(cut[m])
                continue
            flat = arrived[m].split([torch.Size(shape).numel() for shape in shapes[m]])
            found.append([part.view(shape) for part, shape in zip(flat, shapes[m], strict=True)])
        return found

    def _order(self) -> list[tuple[Range, int]]:
        """Every range of every member, ascending, and whose it is."""
        return sorted((part, m) for m in self._all for part in self.shares[m])

    def _in_order(self, of_members: list[Tensor]) -> Tensor:
        """Join [.., T, K] of all members in the order of the row."""
        pieces = [list(x.split([b - a for a, b in self.shares[m]], dim=2)) for m, x in enumerate(of_members)]
        return torch.cat([pieces[m].pop(0) for _, m in self._order()], dim=2)

    def _by_member(self, x: Tensor) -> list[Tensor]:
        """Undo ``_in_order``."""
        order = self._order()
        pieces = x.split([b - a for (a, b), _ in order], dim=2)
        return [torch.cat([p for p, (_, n) in zip(pieces, order, strict=True) if n == m], dim=2) for m in self._all]


def _size(part: Range) -> int:
    return part[1] - part[0]


class _ToHeads(autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, heads: Any, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.heads = exchange, heads
        return tuple(exchange.to_heads(parts, heads))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, None, *ctx.exchange.to_tokens(gradients, ctx.heads)


class _ToTokens(autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, heads: Any, out: Tensor) -> Tensor:
        ctx.exchange, ctx.heads = exchange, heads
        return exchange.to_tokens([out], [heads])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, None, ctx.exchange.to_heads(gradients, [ctx.heads])[0]


def to_heads(exchange: Exchange, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, heads, own tokens, K] -> [B, own heads, all tokens of the members, K], with gradient.

    k and v come with as many heads as divide those of q evenly, whatever the cut.
    """
    parts = len(exchange.members)
    both = [heads_of(q.shape[1], k.shape[1], parts, m) for m in range(parts)]
    heads = [[of_q for of_q, _ in both], *([of_kv for _, of_kv in both],) * 2]
    reads = uneven_reads(q.shape[1], k.shape[1], parts, exchange.index)
    q, k, v = _ToHeads.apply(exchange, heads, q, k, v)
    if reads is not None:  # each query head gets a copy of its own
        index = torch.tensor(reads, device=k.device)
        k, v = k.index_select(1, index), v.index_select(1, index)
    return q, k, v


def to_tokens(exchange: Exchange, out: Tensor, heads: int) -> Tensor:
    """[B, own heads, all tokens, K] -> [B, ``heads``, own tokens, K], with gradient."""
    parts = len(exchange.members)
    return _ToTokens.apply(exchange, [heads_of(heads, heads, parts, m)[0] for m in range(parts)], out)
