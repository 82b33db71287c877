"""Collective operations with the shapes that the rest of ``parallel`` speaks.

A ``group`` of None is a group of one: nothing is sent.  Asynchronous ones return a ``Pending``
that is waited for exactly once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from stretto.parallel.process_groups import is_gloo

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work


class Pending:
    """A collective that is under way, or already done (``work`` None)."""

    __slots__ = ("_keep", "_work")

    def __init__(self, work: Work | None, *keep: Tensor) -> None:
        self._work = work
        self._keep = keep

    def wait(self) -> None:
        """Return when the result may be read."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        self._keep = ()

    def is_over(self) -> bool:
        """Whether ``wait`` would return at once; of collectives only, gloo doesn't know it of messages."""
        return self._work is None or self._work.is_completed()


class Then(Pending):
    """A collective and another one that needs its result: the second starts when the first has been waited for."""

    __slots__ = ("_first", "_following")

    def __init__(self, first: Pending, following: Callable[[], Pending]) -> None:
        super().__init__(None)
        self._first = first
        self._following: Callable[[], Pending] | None = following

    def wait(self) -> None:
        """Return when the second one's result may be read."""
        if self._following is not None:
            following, self._following = self._following, None
            self._first.wait()
            following().wait()

    def is_over(self) -> bool:
        """Whether ``wait`` has returned."""
        return self._following is None


class Sum(Pending):
    """Every rank's ``part`` [n] for this one, added into it once all have arrived in ``received`` [ranks * n]."""

    __slots__ = ("_part", "_received")

    def __init__(self, work: Work | None, received: Tensor, part: Tensor, *keep: Tensor) -> None:
        super().__init__(work, *keep)
        self._received: Tensor | None = received
        self._part = part

    def wait(self) -> None:
        """Return when the sum may be read."""
        super().wait()
        if self._received is not None:
            torch.sum(self._received.view(-1, self._part.numel()), 0, out=self._part)
            self._received = None


DONE = Pending(None)
"""Nothing to wait for."""


def size_of(group: ProcessGroup | None) -> int:
    """Ranks in ``group``."""
    return 1 if group is None else dist.get_world_size(group)


def index_in(group: ProcessGroup | None) -> int:
    """This rank's index in ``group``."""
    return 0 if group is None else dist.get_rank(group)


def all_reduce(tensor: Tensor, group: ProcessGroup | None, *, maximum: bool = False) -> Pending:
    """Sum (or maximum) of ``tensor`` over ``group``, in place."""
    if group is None or tensor.numel() == 0:
        return DONE
    op = dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM
    return Pending(dist.all_reduce(tensor, op=op, group=group, async_op=True), tensor)


def reduce(tensor: Tensor, target: int, group: ProcessGroup | None) -> Pending:
    """On the rank at index ``target`` of ``group``: the sum of ``tensor`` over it, in place; elsewhere undefined."""
    if group is None or tensor.numel() == 0:
        return DONE
    return Pending(dist.reduce(tensor, group=group, group_dst=target, async_op=True), tensor)


def reduce_scatter(flat: Tensor, shard: Tensor, group: ProcessGroup | None) -> Pending:
    """``shard`` [n] becomes this rank's part of the sum of all ``flat`` [ranks * n].

    gloo's own is an all-reduce, which sends twice the bytes; there each rank sends each other one its part.
    """
    if group is None:
        shard.copy_(flat)
        return DONE
    if is_gloo(group):
        received = torch.empty_like(flat)
        work = dist.all_to_all_single(received.view(-1), flat.view(-1), group=group, async_op=True)
        return Sum(work, received, shard.view(-1), flat)
    return Pending(dist.reduce_scatter_single(shard.view(-1), flat.view(-1), group=group, async_op=True), flat, shard)


def all_gather(shard: Tensor, flat: Tensor, group: ProcessGroup | None) -> Pending:
    """``flat`` [ranks * n] becomes every rank's ``shard`` [n], in rank order."""
    if group is None:
        if flat.data_ptr() != shard.data_ptr():
            flat.copy_(shard)
        return DONE
    return Pending(dist.all_gather_single(flat.view(-1), shard.view(-1), group=group, async_op=True), flat, shard)


def gather_dim(x: Tensor, dim: int, group: ProcessGroup | None) -> Tensor:
    """Every rank's ``x`` joined along ``dim``."""
    if group is None:
        return x
    ranks = dist.get_world_size(group)
    x = x.contiguous()
    if is_gloo(group):
        parts = _exchange([x] * (ranks - 1), group)
        parts.insert(dist.get_rank(group), x)
        return torch.cat(parts, dim)
    joined = x.new_empty(ranks, *x.shape)
    all_gather(x, joined, group).wait()
    return joined.movedim(0, dim).reshape(*x.shape[:dim], ranks * x.shape[dim], *x.shape[dim + 1 :])


def reduce_scatter_dim(x: Tensor, dim: int, group: ProcessGroup | None) -> Tensor:
    """This rank's part, along ``dim``, of the sum of every rank's ``x``; the ranks must divide that dim."""
    if group is None:
        return x
    ranks = dist.get_world_size(group)
    if is_gloo(group):
        parts = list(x.chunk(ranks, dim))
        mine = parts.pop(dist.get_rank(group))
        first, *more = _exchange(parts, group)
        for part in more:
            first.add_(part)
        return first.add_(mine)
    stacked = x.reshape(*x.shape[:dim], ranks, x.shape[dim] // ranks, *x.shape[dim + 1 :]).movedim(dim, 0).contiguous()
    summed = torch.empty_like(stacked[0])
    reduce_scatter(stacked, summed, group).wait()
    return summed


def _exchange(parts: list[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Send ``parts``, one to each other rank in order; return what each of them sent, in order.

    On gloo this serves for gathering and reduce-scattering of activations: its own collectives copy
    more often and take up to twice the time for the same bytes.
    """
    sent = parts[0].contiguous().view(-1) if len(parts) == 1 else torch.stack(parts).view(-1)
    received = sent.new_empty(len(parts), *parts[0].shape)
    counts = [parts[0].numel()] * (len(parts) + 1)
    counts[dist.get_rank(group)] = 0
    dist.all_to_all_single(received.view(-1), sent, counts, counts, group=group)
    return list(received.unbind(0))
