"""How tensors get from one pipeline rank to another, on the host and on CUDA.

On the host a send or receive is a call per tensor.  On CUDA nothing waits on the host; what must wait are streams:

    compute       │F2      │F3      │▲ B0           B0 waits for the event of its message, the host doesn't
    ahead         ·post·            ││              receives are posted here: NCCL begins when its peer does, not
    NCCL, route      │ receive ─────┘│              when the arithmetic has come to where the host was
    NCCL, other      │ send                         behind the operation that made it, beside what follows

The tensors of a message are one batch, so that they are one kernel, and both ends name them in the same order.  A
communicator is made with the first batch of its route, which stops the host until the other end is there too: so
all are made before the first step, in an order that is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

    Started = tuple[Sequence[Work], Sequence[Tensor]]
    """What to wait for, and the tensors meanwhile."""

Layout = Sequence[tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of each tensor of a message."""


class Transport(Protocol):
    """Starts messages on a route, whose group holds its two ends; ``tag`` and some behind it are the message's own."""

    def connect(self, group: ProcessGroup, peer: int, *, sending: bool) -> None:
        """Meet the other end of a route; called on all ranks in the same order."""

    def send(self, group: ProcessGroup, peer: int, tensors: Sequence[Tensor], tag: int) -> Started:
        """Start to send what has been computed so far."""

    def receive(self, group: ProcessGroup, peer: int, layout: Layout, tag: int) -> Started:
        """Start to receive into new tensors, whatever is being computed."""

    def wait(self, started: Started) -> None:
        """What is computed from now on comes after these messages."""


def transport_for(device: torch.device) -> Transport:
    """The transport of tensors on ``device``."""
    return CudaTransport(device) if device.type == "cuda" else HostTransport(device)


class HostTransport:
    """Gloo, or any other backend that computes where the host does."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def connect(self, group: ProcessGroup, peer: int, *, sending: bool) -> None:
        """Gloo met when the group was made."""

    def send(self, group: ProcessGroup, peer: int, tensors: Sequence[Tensor], tag: int) -> Started:
        """Send each."""
        return [group.send([tensor], peer, tag + part) for part, tensor in enumerate(tensors)], tensors

    def receive(self, group: ProcessGroup, peer: int, layout: Layout, tag: int) -> Started:
        """Receive each."""
        tensors = [torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in layout]
        return [group.recv([tensor], peer, tag + part) for part, tensor in enumerate(tensors)], tensors

    def wait(self, started: Started) -> None:
        """Wait for each."""
        for work in started[0]:
            work.wait()


class CudaTransport:
    """NCCL.

    Args:
        device: of the tensors.
        cuda: where streams come from, ``p2p``: what sends; tests give some that only remember the calls.
    """

    def __init__(self, device: torch.device, *, cuda: Any = torch.cuda, p2p: Any = dist) -> None:
        self._device, self._cuda, self._p2p = device, cuda, p2p
        self._ahead = cuda.Stream()

    def connect(self, group: ProcessGroup, peer: int, *, sending: bool) -> None:
        """Carry one number."""
        call = self._p2p.isend if sending else self._p2p.irecv
        self.wait((self._batch(call, group, peer, [torch.zeros(1, device=self._device)], 0), ()))

    def send(self, group: ProcessGroup, peer: int, tensors: Sequence[Tensor], tag: int) -> Started:
        """Behind what the current stream has made; the caller keeps the tensors until the peer has them."""
        return self._batch(self._p2p.isend, group, peer, tensors, tag), tensors

    def receive(self, group: ProcessGroup, peer: int, layout: Layout, tag: int) -> Started:
        """On a stream that waits for nothing, into memory of that stream."""
        with self._cuda.stream(self._ahead):
            tensors = [torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in layout]
            return self._batch(self._p2p.irecv, group, peer, tensors, tag), tensors

    def wait(self, started: Started) -> None:
        """The current stream waits; what was received is in its use from now on, until it has let go of it."""
        works, tensors = started
        for work in works:
            work.wait()
        here = self._cuda.current_stream()
        for tensor in tensors:
            tensor.record_stream(here)

    def _batch(self, call: Any, group: ProcessGroup, peer: int, tensors: Sequence[Tensor], tag: int) -> Sequence[Work]:
        if not tensors:
            return ()
        operations = [
            self._p2p.P2POp(call, tensor, group=group, group_peer=peer, tag=tag + part)
            for part, tensor in enumerate(tensors)
        ]
        works: Sequence[Work] = self._p2p.batch_isend_irecv(operations)
        return works
