"""Messages between pipeline ranks: receives posted ahead, sends in the background.

A message is known by (direction, stage, micro-batch); the schedule says in which order each route
carries them, so both ends agree without a word.  The shape of what crosses a stage boundary is told
once, in a header before the first message, and remembered for each shape of a micro-batch; micro-batches
of one step may differ.

    sender    SEND_F ── send, tensor kept until it is gone ────────────┐
    receiver  receive posted up to AHEAD messages early ... RECV_F waits ◄┘

Whatever is not needed at once waits for ``tend``, which runs while the device computes.  On CUDA no receive is posted
before RECV_F or RECV_B, to which the host comes ahead of the device anyway (transport.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from stretto.parallel.pipeline.header import HEADER, MAX_TENSORS, Shapes, header_of, shapes_in
from stretto.parallel.pipeline.segment import Value, tensors_of
from stretto.parallel.pipeline.transport import Transport, transport_for
from stretto.parallel.process_groups import Lane, new_group
from stretto.schedule.op import Kind

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from stretto.parallel.mesh import Mesh
    from stretto.parallel.pipeline.transport import Started
    from stretto.schedule.schedule import Schedule

AHEAD = 3
"""Receives posted before they are needed, per source and direction, where that may be."""

Direction = Literal["F", "B"]


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a step: ``boundary`` is the sender's stage for F and the receiver's for B, so that
    both directions of a boundary share the number of the stage below it."""

    direction: Direction
    boundary: int
    microbatch: int
    peer: int
    """The other end, as a position along pp."""
    arrived: tuple[int, int] = (0, 0)
    """Of a receive: how many activations and gradients to its sender have certainly arrived by then (delivery.py)."""


class Channel(Protocol):
    """Carries messages between this rank and its pipeline peers."""

    def begin_step(self, receives: Sequence[Message], shapes: Sequence[Hashable]) -> None:
        """Announce what this rank will receive, in the order of its schedule, and the shape of each micro-batch."""

    def announce(self, receives: Sequence[Message]) -> None:
        """Announce what this rank will receive besides, after what was announced before."""

    def send(self, message: Message, value: Value) -> None:
        """Send without waiting."""

    def receive(self, message: Message) -> Value:
        """Wait for a message."""

    def tend(self) -> None:
        """Do what can be done ahead; called while the device computes."""

    def end_step(self) -> None:
        """Return when everything sent has left."""

    def abandon(self) -> None:
        """End a step early: receive all that was announced, keep nothing of it, and return when all sent has left."""


Route = tuple[Direction, int, int]
"""Direction, and the positions along pp of sender and receiver."""


def routes_of(schedule: Schedule) -> set[Route]:
    """The routes on which a lowered schedule sends."""
    routes: set[Route] = set()
    for rank in range(schedule.num_ranks):
        for kind, _, _, peer in schedule.rows(rank):
            if kind in (Kind.SEND_F, Kind.SEND_B):
                routes.add(("F" if kind == Kind.SEND_F else "B", rank, peer))
    return routes


class _Outlet:
    """One route from this rank."""

    __slots__ = ("arrived", "group", "left", "sending", "target", "transport")

    def __init__(self, group: ProcessGroup, target: int, transport: Transport) -> None:
        self.group, self.target, self.transport = group, target, transport
        self.sending: deque[list[Started]] = deque()
        self.left = self.arrived = 0
        """Messages of this step that were let go, and that may be."""

    def let_go(self) -> None:
        """Let go what has arrived."""
        while self.left < self.arrived:
            self.left += 1
            for started in self.sending.popleft():
                self.transport.wait(started)

    def finish(self) -> None:
        """Wait until everything has left."""
        self.arrived = self.left + len(self.sending)
        self.let_go()
        self.left = self.arrived = 0


class _Inlet:
    """One route to this rank."""

    __slots__ = ("at", "group", "messages", "posted", "source")

    def __init__(self, group: ProcessGroup, source: int) -> None:
        self.group, self.source = group, source
        self.messages: list[Message] = []
        """What this step brings, in order."""
        self.at = 0
        """How many of them have been received."""
        self.posted: deque[Started] = deque()


class PeerChannel:
    """Messages over torch.distributed (gloo or NCCL), point to point.

    Each route has a group of its own: NCCL runs the messages of a group one after the other, so that a
    receive posted ahead would hold up a send.

    Args:
        schedules: all lowered schedules that it will serve; the groups are made from them, collective
            over the world.
    """

    def __init__(self, mesh: Mesh, device: torch.device, schedules: Sequence[Schedule]) -> None:
        here = mesh.index("pp")
        routes = {route for schedule in schedules for route in routes_of(schedule)}
        self._device = device
        self._transport = transport_for(device, routes=sum(here in ends for _, *ends in routes))
        self._ahead = AHEAD if self._transport.early else 0
        self._boundaries = max(schedule.num_stages for schedule in schedules)
        self._outlets: dict[tuple[Direction, int], _Outlet] = {}
        self._inlets: dict[tuple[Direction, int], _Inlet] = {}
        for direction, source, target in sorted(routes):
            for column in mesh.columns:
                ends = sorted((column[source], column[target]))
                group = new_group(ends, Lane.MESSAGES, limit=mesh.limit)
                if mesh.rank not in ends:
                    continue
                sending = here == source
                peer = ends.index(column[target if sending else source])
                self._transport.connect(group, peer, sending=sending)
                if sending:
                    self._outlets[direction, target] = _Outlet(group, peer, self._transport)
                else:
                    self._inlets[direction, source] = _Inlet(group, peer)
        self._shapes: dict[Hashable, Shapes] = {}
        self._batch_shapes: Sequence[Hashable] = ()

    def begin_step(self, receives: Sequence[Message], shapes: Sequence[Hashable]) -> None:
        """Sort what will be received by where it comes from."""
        self._batch_shapes = shapes
        for inlet in self._inlets.values():
            inlet.messages, inlet.at = [], 0
        self.announce(receives)

    def announce(self, receives: Sequence[Message]) -> None:
        """Sort what will be received besides by where it comes from."""
        for message in receives:
            self._inlets[message.direction, message.peer].messages.append(message)

    def _key(self, message: Message, *, sending: bool) -> Hashable:
        """What both ends know a shape by: the boundary, which way it is crossed forward, the micro-batch's shape.

        With replicas in both directions a boundary is crossed both ways, and each way tells its own header.
        """
        down = sending == (message.direction == "F")
        return message.boundary, message.peer, down, self._batch_shapes[message.microbatch]

    def _tag(self, message: Message, part: int) -> int:
        return (message.microbatch * self._boundaries + message.boundary) * (MAX_TENSORS + 1) + part

    def send(self, message: Message, value: Value) -> None:
        """Send in the background; the tensors are kept until they have left."""
        outlet = self._outlets[message.direction, message.peer]
        sending: list[Started] = []
        start = self._transport.send
        key = self._key(message, sending=True)
        if key not in self._shapes:
            header = header_of(value, message.boundary)
            self._shapes[key] = shapes_in(header)
            there = header.to(self._device, non_blocking=True)  # what it says was read before: this host needn't wait
            sending.append(start(outlet.group, outlet.target, [there], self._tag(message, MAX_TENSORS)))
        tensors = [tensor.detach().contiguous() for tensor in tensors_of(value)]
        sending.append(start(outlet.group, outlet.target, tensors, self._tag(message, 0)))
        outlet.sending.append(sending)

    def receive(self, message: Message) -> Value:
        """Wait for a message that ``begin_step`` announced."""
        inlet = self._inlets[message.direction, message.peer]
        due = inlet.messages[inlet.at]
        assert due == message, f"{message} is not the next from its source, {due} is"
        value = self._next(inlet)
        for direction, count in zip("FB", message.arrived, strict=True):
            if count:
                self._outlets[direction, message.peer].arrived = count  # type: ignore[index]
        return value

    def _next(self, inlet: _Inlet) -> Value:
        """Wait for the next message of a route."""
        message = inlet.messages[inlet.at]
        key = self._key(message, sending=False)
        if not inlet.posted:
            if key not in self._shapes:
                tag = self._tag(message, MAX_TENSORS)
                header = self._transport.receive(inlet.group, inlet.source, HEADER, tag)
                self._transport.wait(header)
                self._shapes[key] = shapes_in(header[1][0])
            self._post(inlet)
            self.tend()
        inlet.at += 1
        started = inlet.posted.popleft()
        self._transport.wait(started)
        return self._shapes[key].value_of(list(started[1]))

    def tend(self) -> None:
        """Post the next receives of every source, as far as their shapes are known; let go what has arrived."""
        for inlet in self._inlets.values():
            while len(inlet.posted) < self._ahead and self._post(inlet):
                pass
        for outlet in self._outlets.values():
            outlet.let_go()

    def _post(self, inlet: _Inlet) -> bool:
        """Post one more receive, if there is one whose shape is known."""
        at = inlet.at + len(inlet.posted)
        if at == len(inlet.messages):
            return False
        message = inlet.messages[at]
        shapes = self._shapes.get(self._key(message, sending=False))
        if shapes is None:
            return False
        tag = self._tag(message, 0)
        inlet.posted.append(self._transport.receive(inlet.group, inlet.source, shapes.tensors, tag))
        return True

    def end_step(self) -> None:
        """Wait until everything sent has left."""
        for inlet in self._inlets.values():
            assert inlet.at == len(inlet.messages), "messages of this step were not received"
        for outlet in self._outlets.values():
            outlet.finish()

    def abandon(self) -> None:
        """Receive what peers have sent or will, so that the next step finds empty routes; then as ``end_step``."""
        for inlet in self._inlets.values():
            while inlet.at < len(inlet.messages):
                self._next(inlet)
        self.end_step()
