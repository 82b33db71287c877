"""How tensors get from one pipeline rank to another, on the host and on CUDA.

On the host a send or receive is a call per tensor.  On CUDA nothing waits on the host; what must wait are streams:

    compute       │F2      │F3      │▲ B0           B0 waits for the event of its message, the host doesn't
    ahead         ·post·            ││              receives are posted here: NCCL begins when its peer does, not
    NCCL, route      │ receive ─────┘│              when the arithmetic has come to where the host was
    NCCL, other      │ send                         behind the operation that made it, beside what follows

The tensors of a message are one batch, so that they are one kernel, and both ends name them in the same order.  A
communicator is made with the first batch of its route, which stops the host until the other end is there too: so
all are made before the first step, in an order that is the same everywhere.

A receive is posted when the host comes to it, which is ahead of the device, and no sooner (``early``): by then all
that this rank does for its message has been launched.  A device doesn't promise to run what is launched later beside a
receive that waits; where memory goes back to the driver, or a kernel is used for the first time, the host may stop
until everything launched so far is over.

Streams must not hold each other up either.  The driver puts them on so many queues to the device as
CUDA_DEVICE_MAX_CONNECTIONS says, and what waits at the head of a queue holds up all behind it, whichever stream it is
of:

    one queue   send 0 (runs)   send 1 (waits for 0)   receive 0 (behind it; its sender receives only afterwards)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from stretto.spec.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

    Started = tuple[Sequence[Work], Sequence[Tensor]]
    """What to wait for, and the tensors meanwhile."""

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
"""Variable that says how many queues a process has to its device; the driver reads it when it starts, else has 8."""
MOST_CONNECTIONS = 32
"""What the driver takes at most; trainer/member.py asks for it."""
Layout = Sequence[tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of each tensor of a message."""


class Transport(Protocol):
    """Starts messages on a route, whose group holds its two ends; ``tag`` and some behind it are the message's own."""

    early: bool
    """Whether a receive may be posted before this rank has begun all that the message depends on."""

    def connect(self, group: ProcessGroup, peer: int, *, sending: bool) -> None:
        """Meet the other end of a route; called on all ranks in the same order."""

    def send(self, group: ProcessGroup, peer: int, tensors: Sequence[Tensor], tag: int) -> Started:
        """Start to send what has been computed so far."""

    def receive(self, group: ProcessGroup, peer: int, layout: Layout, tag: int) -> Started:
        """Start to receive into new tensors, whatever is being computed."""

    def wait(self, started: Started) -> None:
        """What is computed from now on comes after these messages."""


def transport_for(device: torch.device, *, routes: int = 0) -> Transport:
    """The transport on ``device`` of so many routes; ConfigError where their streams have too few queues."""
    if device.type != "cuda":
        return HostTransport(device)
    check_connections(routes, os.environ)
    return CudaTransport(device)


def check_connections(routes: int, environment: Mapping[str, str]) -> None:
    """ConfigError where the environment gives fewer queues than ``routes``, the arithmetic and what is posted need."""
    given, needed = environment.get(CONNECTIONS, ""), routes + 2
    if given.isdecimal() and int(given) < min(needed, MOST_CONNECTIONS):
        raise ConfigError(
            f"{CONNECTIONS} = {given} has the streams of {routes} message routes and of the arithmetic share queues, "
            f"in which a receive that was posted ahead can hold up what it waits for; unset it, or set it to "
            f"{MOST_CONNECTIONS}."
        )


class HostTransport:
    """Gloo, or any other backend that computes where the host does."""

    early = True

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

    early = False

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
