"""Moves the cut of a tensor with several sequence dims from one of them to another (DSP): one all-to-all.

        patches ►                                  patches ►
    f  ┌──────────────┐                        f  ┌────┬────┬────┐
    r  │   rank 0     │    ── all-to-all ──►   r  │    │    │    │      each rank keeps the square that is in both
    a  ├──────────────┤                        a  │ r0 │ r1 │ r2 │      parts, and sends the rest of what it had
    m  │   rank 1     │    ◄── backward ───    m  │    │    │    │
    e  ├──────────────┤                        e  │    │    │    │
    s  │   rank 2     │                        s  │    │    │    │
    ▼  └──────────────┘                        ▼  └────┴────┴────┘

A transformer that looks along one dim at a time needs no other communication: two of these a layer, where Ulysses
along one dim needs q, k, v and the output moved each time.  Bytes per rank, of f x p tokens of D channels over n ranks:

    D e f p / n (n-1)/n, forward and backward each          uneven parts: own part of ``cut`` x others' of ``into``
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, autograd
from torch.autograd.function import once_differentiable

from stretto.parallel.wire import Wire
from stretto.spec.sequence import Range, cut_sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class CutSwitch:
    """One rank's end of the switches of a model; every dim is cut contiguously, unevenly where it has to be."""

    wire: Wire
    ranks: int

    def parts(self, size: int) -> list[Range]:
        """What of ``size`` each rank has."""
        return [ranges[0] for ranges in cut_sequence(size, self.ranks, "contiguous")]

    def own(self, dim: int, size: int, /) -> Range:
        """What of ``size`` is here while its dim is cut."""
        return self.parts(size)[self.wire.index]

    def __call__(self, x: Tensor, cut: int, into: int, size: int, /) -> Tensor:
        """Part of dim ``cut`` (of ``size``) and all of ``into`` -> all of ``cut``, part of ``into``, with gradient."""
        return _Switch.apply(x, self, cut, into, size)

    def move(self, x: Tensor, cut: int, into: int, size: int) -> Tensor:
        """The same without gradient."""
        given, taken, me = self.parts(x.shape[into]), self.parts(size), self.wire.index
        mine = given[me][1] - given[me][0]
        pieces = [x] * self.ranks
        sends, receives = [], []
        for rank in range(self.ranks):
            start, stop = given[rank]
            piece = x.narrow(into, start, stop - start)
            if rank == me:
                pieces[rank] = piece
                continue
            shape = list(x.shape)
            shape[cut], shape[into] = taken[rank][1] - taken[rank][0], mine
            pieces[rank] = x.new_empty(shape)
            sends.append((piece, rank))
            receives.append((pieces[rank], rank))
        self.wire.start(sends, receives).wait()
        self.wire.flush()
        return torch.cat(pieces, dim=cut)


class _Switch(autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, switch: CutSwitch, cut: int, into: int, size: int) -> Tensor:
        ctx.switch, ctx.dims, ctx.size = switch, (into, cut), x.shape[into]
        return switch.move(x, cut, into, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.switch.move(gradients[0], *ctx.dims, ctx.size), None, None, None, None


def switch_bytes(parts: tuple[list[Range], list[Range]], rank: int, *, token_bytes: int) -> int:
    """Bytes that ``rank`` sends when the cut moves between the dims that are cut in ``parts``, first to second.

    ``token_bytes``: rows x channels x bytes of a number.
    """
    cut, into = parts
    own = cut[rank][1] - cut[rank][0]
    return token_bytes * own * sum(b - a for other, (a, b) in enumerate(into) if other != rank)
