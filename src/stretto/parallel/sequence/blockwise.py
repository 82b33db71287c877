"""Attention of a block of queries to a block of keys in plain PyTorch, with log-sum-exp and its own gradient.

No table of scores is larger than a tile, so memory grows with the block and not with its square, and tiles that
nobody sees are left out (FlashAttention without its kernel).  Query heads that share a key/value head are rows of one
matrix product, so nothing is repeated.  Exact: in float64 it differs from the plain formula by rounding only.

    forward     s = q k^T K^-1/2      lse = log sum exp s      out = (exp(s - lse) * drop) v
    backward    p = exp(s - lse)      ds = p * (drop * (dout v^T) - delta)      delta = sum(dout * out)

In the backward ``lse`` and ``delta`` are those of the whole row of attention, so that each block's share of the
gradient is right by itself and shares are simply added up.

Shapes: B sequences, H query heads, G key/value heads, T queries, S keys, K head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stretto.parallel.sequence.merge import merge
from stretto.parallel.sequence.sight import Relation, Sight
from stretto.spec.sequence import Range

TILE = 512
"""Queries, and keys, of a tile."""


class Drop(Protocol):
    """Dropout of attention weights by global head and positions."""

    def __call__(self, heads: Range, queries: Range, keys: Range, /) -> Tensor:
        """The factor of every weight, [B, heads, queries, keys]: 0, or 1 / (1 - p)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Some queries and some keys, by position in the whole row, and what holds between them."""

    queries: Range
    keys: Range
    sight: Sight
    drop: Drop | None = None
    """Dropout of the weights; None: no dropout."""
    first_head: int = 0
    """Number of the first query head here among those of this tp rank."""

    def within(self, queries: Range, keys: Range) -> Block:
        """A part of it."""
        return Block(queries=queries, keys=keys, sight=self.sight, drop=self.drop, first_head=self.first_head)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What the gradient of attention needs of its queries."""

    q: Tensor
    """[B, H, T, K]."""
    dout: Tensor
    """Gradient of the output, [B, H, T, K]."""
    lse: Tensor
    """Of the whole row of attention, [B, H, T]."""
    delta: Tensor
    """Sum of dout * out over channels, [B, H, T]."""
    out: Tensor | None = None
    """Output of the whole row of attention, [B, H, T, K], where it is at hand."""

    def narrow(self, start: int, length: int) -> Rows:
        """Some of the queries."""
        q, dout = (t.narrow(2, start, length) for t in (self.q, self.dout))
        lse, delta = (t.narrow(2, start, length) for t in (self.lse, self.delta))
        out = None if self.out is None else self.out.narrow(2, start, length)
        return Rows(q=q, dout=dout, lse=lse, delta=delta, out=out)

    def row(self, index: int) -> Rows:
        """One of the sequences."""
        q, dout, lse, delta = (t[index : index + 1] for t in (self.q, self.dout, self.lse, self.delta))
        return Rows(q=q, dout=dout, lse=lse, delta=delta, out=None if self.out is None else self.out[index : index + 1])


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over keys and queries are kept in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


class Blockwise:
    """The backend that runs everywhere."""

    def __init__(self, tile: int = TILE) -> None:
        self.tile = tile

    def forward(self, q: Tensor, kv: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            q: [B, H, T, K].
            kv: keys and values, [2, B, G, S, K].

        Returns:
            out [B, H, T, K] and lse [B, H, T], in float32 or wider; 0 and -inf where a query sees no key.
        """
        exact = sum_dtype(q.dtype)
        out = torch.zeros(q.shape, dtype=exact, device=q.device)
        lse = torch.full(q.shape[:3], float("-inf"), dtype=exact, device=q.device)
        for tile, rows, columns in self._tiles(block):
            found = attend_tile(q[:, :, rows], kv[:, :, :, columns], tile)
            merge(out[:, :, rows], lse[:, :, rows], *found)
        return out, lse

    def backward(self, rows: Rows, kv: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """The block's share of the gradients of its queries [B, H, T, K] and of keys and values [2, B, G, S, K]."""
        exact = sum_dtype(rows.q.dtype)
        dq = torch.zeros(rows.q.shape, dtype=exact, device=rows.q.device)
        dkv = torch.zeros(kv.shape, dtype=exact, device=kv.device)
        for tile, at, columns in self._tiles(block):
            part = rows.narrow(at.start, at.stop - at.start)
            differentiate_tile(part, kv[:, :, :, columns], tile, dq=dq[:, :, at], dkv=dkv[:, :, :, columns])
        return dq, dkv

    def _tiles(self, block: Block) -> Iterator[tuple[Block, slice, slice]]:
        """The tiles in which somebody sees somebody, and where they lie in the block."""
        for queries in _cut(block.queries, self.tile):
            for keys in _cut(block.keys, self.tile):
                if block.sight.relation(queries, keys) is not Relation.EMPTY:
                    rows = slice(queries[0] - block.queries[0], queries[1] - block.queries[0])
                    columns = slice(keys[0] - block.keys[0], keys[1] - block.keys[0])
                    yield block.within(queries, keys), rows, columns


def _cut(whole: Range, size: int) -> list[Range]:
    return [(at, min(at + size, whole[1])) for at in range(whole[0], whole[1], size)]


def _by_group(x: Tensor, groups: int) -> Tensor:
    """[B, H, T, ...] -> [B, G, H/G * T, ...]: the query heads of a key/value head as rows of one matrix."""
    return x.reshape(x.shape[0], groups, -1, *x.shape[3:])


def _scores(q: Tensor, k: Tensor, tile: Block) -> Tensor:
    """Scaled scores [B, H, T, S], -inf where a query doesn't see a key."""
    scores = _by_group(q, k.shape[1]) @ k.transpose(2, 3)
    scores = scores.to(sum_dtype(q.dtype)).mul_(q.shape[-1] ** -0.5).view(*q.shape[:3], k.shape[2])
    if tile.sight.relation(tile.queries, tile.keys) is Relation.PARTIAL:
        scores.masked_fill_(~tile.sight.mask(tile.queries, tile.keys, q.device), float("-inf"))
    return scores


def _factors(tile: Block, heads: int) -> Tensor | None:
    if tile.drop is None:
        return None
    return tile.drop((tile.first_head, tile.first_head + heads), tile.queries, tile.keys)


def attend_tile(q: Tensor, kv: Tensor, tile: Block) -> tuple[Tensor, Tensor]:
    """Attention of one tile with its whole table of scores."""
    k, v = kv.unbind(0)
    scores = _scores(q, k, tile)
    lse = scores.logsumexp(-1)
    # A query that sees nothing here: its scores are -inf, and subtracting -inf would make NaN of them.
    weights = scores.sub_(lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)).exp_()
    factors = _factors(tile, q.shape[1])
    if factors is not None:
        weights.mul_(factors)
    out = _by_group(weights, k.shape[1]).to(v.dtype) @ v
    return out.view(*q.shape[:3], v.shape[-1]), lse


def differentiate_tile(rows: Rows, kv: Tensor, tile: Block, *, dq: Tensor, dkv: Tensor) -> None:
    """Add one tile's share of the gradients to ``dq`` and ``dkv``."""
    k, v = kv.unbind(0)
    groups, dtype = k.shape[1], rows.q.dtype
    lse = rows.lse.masked_fill(rows.lse == float("-inf"), 0.0)
    weights = _scores(rows.q, k, tile).sub_(lse.unsqueeze(-1)).exp_()
    dout = _by_group(rows.dout, groups)
    dweights = (dout @ v.transpose(2, 3)).to(weights.dtype).view(weights.shape)
    factors = _factors(tile, rows.q.shape[1])
    used = weights
    if factors is not None:
        dweights.mul_(factors)
        used = weights * factors
    dkv[1] += _by_group(used, groups).to(dtype).transpose(2, 3) @ dout
    dscores = dweights.sub_(rows.delta.unsqueeze(-1)).mul_(weights).mul_(rows.q.shape[-1] ** -0.5)
    by_group = _by_group(dscores, groups).to(dtype)
    dq += (by_group @ k).view(dq.shape)
    dkv[0] += by_group.transpose(2, 3) @ _by_group(rows.q, groups)
