"""Messages between the ranks of a group, from one to another, each byte counted.

Receives are posted before sends and both at once, so that no order of the ranks can block; what a rank needs
next is on its way while it computes:

    transfer = wire.start(sends, receives)      posted, returns at once
    ... compute ...
    tensors = transfer.wait()

A sent tensor is kept until it has left, which is asked for a few messages later, since asking earlier would tie a
rank to the pace of its receivers.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

LINGERING = 4
"""Messages that may still be leaving when another has arrived."""


class Wire:
    """One rank's end of the messages of ``group`` (None: this rank alone)."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group
        self.index = 0 if group is None else dist.get_rank(group)
        """This rank's index in the group."""
        self.sent_to: Counter[int] = Counter()
        """Bytes sent so far, by the index of the receiver."""
        self.waited = 0.0
        """Seconds spent waiting for messages."""
        self._ranks = [0] if group is None else dist.get_process_group_ranks(group)
        self._leaving: deque[tuple[list[Work], list[Tensor]]] = deque()

    @property
    def sent(self) -> int:
        """Bytes sent so far."""
        return self.sent_to.total()

    def start(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> Transfer:
        """Send tensors to, and receive into tensors from, ranks given by their index in the group."""
        leaving = [(tensor.contiguous(), to) for tensor, to in sends if tensor.numel()]
        coming = [(tensor, source) for tensor, source in receives if tensor.numel()]
        for tensor, to in leaving:
            self.sent_to[to] += tensor.numel() * tensor.element_size()
        ops = [dist.P2POp(dist.irecv, t, self._ranks[i], self.group) for t, i in coming]
        ops += [dist.P2POp(dist.isend, t, self._ranks[i], self.group) for t, i in leaving]
        works: list[Work] = dist.batch_isend_irecv(ops) if ops else []
        # NCCL gives one handle for all: where something comes, what leaves is kept until that is waited for.
        together = bool(coming) and len(works) != len(ops)
        arriving, sent = works if together else works[: len(coming)], [tensor for tensor, _ in leaving]
        self._leaving.append((works[len(arriving) :], sent))
        return Transfer(self, arriving, [tensor for tensor, _ in receives], sent if together else [])

    def let_go(self, keep: int = LINGERING) -> None:
        """Wait until all but the last ``keep`` messages have left."""
        while len(self._leaving) > keep:
            works, _ = self._leaving.popleft()
            for work in works:
                work.wait()

    def flush(self) -> None:
        """Wait until everything has left."""
        self.let_go(0)


class Transfer:
    """Messages under way; waited for exactly once."""

    __slots__ = ("_sent", "_tensors", "_wire", "_works")

    def __init__(self, wire: Wire, works: list[Work], tensors: list[Tensor], sent: list[Tensor]) -> None:
        self._wire, self._works, self._tensors, self._sent = wire, works, tensors, sent

    def wait(self) -> list[Tensor]:
        """What arrived, in the order of ``receives``; nothing of it is held here any longer."""
        started = time.perf_counter()
        for work in self._works:
            work.wait()
        self._wire.let_go()
        self._wire.waited += time.perf_counter() - started
        arrived, self._tensors, self._sent = self._tensors, [], []
        return arrived
