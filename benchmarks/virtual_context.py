"""Virtual devices and links for context parallelism: compute is a wait in proportion to its work, so are messages.

    block of w (query, key) pairs ──► wait until its start + w x seconds per pair          (backward: 2.5 times that)
    message of b bytes            ──► arrives when its link has carried it: links carry one message after the other

Everything else is real: processes, gloo, what is sent when, the merge.  A rank has a link to the other ranks of its
node and a slower one to other nodes, each in its own direction, as devices with a network card each have.  A message
travels with the moment at which its link has carried it, and its receiver waits until then; all processes read the
same clock.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from stretto.parallel.pipeline.virtual import wait_until
from stretto.parallel.sequence.blockwise import Block, Rows, sum_dtype
from stretto.parallel.sequence.opening import ContextAttend
from stretto.parallel.wire import Transfer, Wire
from stretto.spec.contract import SequencePart
from stretto.spec.plan import PlanSpec
from stretto.spec.sequence import Arrangement, cut_sequence

HEADS, KV_HEADS, HEAD_SIZE = 8, 8, 1
"""Small, since only their number matters: compute takes as long as it is told."""
BACKWARD = 2.5
"""Work of the backward in forwards: five matrix products instead of two."""


@dataclass(frozen=True)
class CutRows:
    """What cut attention reads of a context."""

    part: SequencePart
    first: Tensor | None = None


class NoDropout:
    """Stands for the attention that the opening replaces."""

    def weight_dropout(self, context: Any) -> None:
        """Nothing is dropped."""


class VirtualKernel:
    """A backend that takes time and computes nothing."""

    def __init__(self, seconds_per_pair: float) -> None:
        self.seconds_per_pair = seconds_per_pair
        """Of one query head and row."""
        self.pairs = 0
        """Pairs of forward blocks so far, over all heads and rows."""

    def forward(self, q: Tensor, kv: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """Zeros, after as long as the block takes."""
        start = time.perf_counter()
        pairs = q.shape[0] * q.shape[1] * block.sight.pairs(block.queries, block.keys)
        self.pairs += pairs
        found = torch.zeros(q.shape, dtype=sum_dtype(q.dtype)), torch.zeros(q.shape[:3], dtype=sum_dtype(q.dtype))
        wait_until(start + self.seconds_per_pair * pairs)
        return found

    def backward(self, rows: Rows, kv: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """Zeros likewise."""
        start = time.perf_counter()
        pairs = rows.q.shape[0] * rows.q.shape[1] * block.sight.pairs(block.queries, block.keys)
        found = torch.zeros_like(rows.q), torch.zeros(kv.shape, dtype=rows.lse.dtype)
        wait_until(start + BACKWARD * self.seconds_per_pair * pairs)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """How fast messages are."""

    node: int
    """Ranks of a node."""
    inside: float
    """Bytes a second of a rank's link inside its node."""
    between: float
    """Bytes a second of a rank's link to other nodes."""


class VirtualWire(Wire):
    """A wire whose messages take as long as the links say."""

    def __init__(self, group: ProcessGroup | None, links: Links) -> None:
        super().__init__(group)
        self.links = links
        self.carried = 0.0
        """Seconds that the links needed for what this rank received."""
        self._free = {True: 0.0, False: 0.0}

    def start(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> Transfer:
        """Send each message with the moment of its arrival and the seconds that its link needs."""
        stamped: list[tuple[Tensor, int]] = []
        for tensor, to in sends:
            stamped += [(tensor, to), (self._stamp(tensor, to), to)]
        expected: list[tuple[Tensor, int]] = []
        for tensor, source in receives:
            expected += [(tensor, source), (torch.zeros(2, dtype=torch.float64), source)]
        return _Stamped(self, super().start(stamped, expected))

    def _stamp(self, tensor: Tensor, to: int) -> Tensor:
        inside = to // self.links.node == self.index // self.links.node
        seconds = tensor.numel() * tensor.element_size() / (self.links.inside if inside else self.links.between)
        self._free[inside] = max(self._free[inside], time.perf_counter()) + seconds
        return torch.tensor([self._free[inside], seconds], dtype=torch.float64)


class _Stamped(Transfer):
    """Messages that have arrived when their links have carried them."""

    __slots__ = ("_inner", "_virtual")

    def __init__(self, wire: VirtualWire, inner: Transfer) -> None:
        self._virtual, self._inner = wire, inner

    def wait(self) -> list[Tensor]:
        """Wait for the latest."""
        both = self._inner.wait()
        start = time.perf_counter()
        for stamp in both[1::2]:
            moment, seconds = stamp.tolist()
            self._virtual.carried += seconds
            wait_until(moment)
        self._virtual.waited += time.perf_counter() - start
        return both[::2]


class Side:
    """One way of cutting, on one rank.

    Args:
        compute: seconds of a rank's forward, where work is equal.
        shape: key/value heads, and numbers of a head that travel.
    """

    def __init__(
        self,
        plan: PlanSpec,
        wire: Wire,
        *,
        tokens: int,
        compute: float,
        shape: tuple[int, int] = (KV_HEADS, HEAD_SIZE),
    ) -> None:
        shares = cut_sequence(tokens, plan.cp, plan.context_layout)
        index = torch.cat([torch.arange(*part) for part in shares[dist.get_rank()]])
        self.rows = CutRows(SequencePart(shares=shares, tokens=index, documents=None))
        self.kernel = VirtualKernel(compute * plan.cp / (HEADS * tokens * (tokens + 1) / 2))
        self.wire = wire
        self.attend = ContextAttend(
            wire=self.wire, arrangement=Arrangement.of(plan), local=NoDropout(), kernel=self.kernel
        )
        kv_heads, size = shape
        self.qkv = [torch.zeros(1, n, len(index), size, requires_grad=True) for n in (HEADS, kv_heads, kv_heads)]

    def turn(self) -> dict[str, float]:
        """Seconds of one forward and backward, of the slowest rank, and what this rank counted."""
        self.wire.waited = 0.0
        if isinstance(self.wire, VirtualWire):
            self.wire.carried = 0.0
        self.kernel.pairs = 0
        dist.barrier()
        start = time.perf_counter()
        out = self.attend(*self.qkv, self.rows)
        torch.autograd.grad(out, self.qkv, torch.zeros_like(out))
        return self._over_ranks(time.perf_counter() - start)

    def _over_ranks(self, seconds: float) -> dict[str, float]:
        carried = self.wire.carried if isinstance(self.wire, VirtualWire) else 0.0
        mine = torch.tensor([seconds, self.kernel.pairs, self.wire.waited, carried], dtype=torch.float64)
        largest, total = mine.clone(), mine.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        dist.all_reduce(total)
        return {
            "seconds": float(largest[0]),
            "balance": float(largest[1] / (total[1] / dist.get_world_size())),
            "hidden": 1.0 - float(total[2] / total[3]) if total[3] else 1.0,
        }


def best_of(sides: dict[str, Side], turns: int) -> dict[str, dict[str, float]]:
    """The sides take turns; the first isn't counted.  The figures of each side's fastest turn."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, side in sides.items():
            figures = side.turn()
            if turn:
                found[name].append(figures)
    return {name: min(rows, key=lambda row: row["seconds"]) for name, rows in found.items()}
