"""Messages between pipeline ranks: receives posted ahead, sends in the background.

A message is known by (direction, stage, micro-batch); the schedule says in which order each channel
carries them, so both ends agree without a word.  The shape of what crosses a stage boundary is told
once, in a header before the first message, and remembered for each shape of a micro-batch; micro-batches
of one step may differ.

    sender    SEND_F ── isend, tensor kept until it is gone ───────────┐
    receiver  irecv posted up to AHEAD messages early ... RECV_F waits ◄┘
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from stretto.parallel.pipeline.segment import Value, tensors_of
from stretto.schedule.op import Kind
from stretto.spec.errors import UnsupportedError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

    from stretto.parallel.mesh import Mesh
    from stretto.schedule.schedule import Schedule

AHEAD = 4
"""Receives posted before they are needed, per source and direction."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
MAX_TENSORS, MAX_DIMS = 6, 6

Direction = Literal["F", "B"]


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a step: ``stage`` is the sender's stage for F and the receiver's for B, so that
    both directions of a boundary share the number of the stage below it."""

    direction: Direction
    boundary: int
    microbatch: int
    peer: int
    """The other end, as a position along pp."""


class Channel(Protocol):
    """Carries messages between this rank and its pipeline peers."""

    def begin_step(self, receives: Sequence[Message], shapes: Sequence[Hashable]) -> None:
        """Announce what this rank will receive, in the order of its schedule, and the shape of each micro-batch."""

    def send(self, message: Message, value: Value) -> None:
        """Send without waiting."""

    def receive(self, message: Message) -> Value:
        """Wait for a message."""

    def end_step(self) -> None:
        """Return when everything sent has left."""


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


class PeerChannel:
    """Messages over torch.distributed (gloo or NCCL), point to point.

    Each route has a group of its own: NCCL runs the messages of a group one after the other, so that a
    receive posted ahead would hold up a send.

    Args:
        schedules: all lowered schedules that it will serve; the groups are made from them, collective
            over the world.
    """

    def __init__(self, mesh: Mesh, device: torch.device, schedules: Sequence[Schedule]) -> None:
        self._mesh, self._device = mesh, device
        self._boundaries = max(schedule.num_stages for schedule in schedules)
        self._groups: dict[Route, ProcessGroup] = {}
        for direction, source, target in sorted({r for schedule in schedules for r in routes_of(schedule)}):
            for column in mesh.columns:
                ends = sorted((column[source], column[target]))
                group = dist.new_group(ends)
                if mesh.rank in ends:
                    self._groups[direction, source, target] = group
        self._shapes: dict[Hashable, list[tuple[tuple[int, ...], torch.dtype]]] = {}
        self._single: dict[Hashable, bool] = {}
        self._queues: dict[tuple[Direction, int], deque[Message]] = {}
        self._posted: dict[Message, list[tuple[Work, Tensor]]] = {}
        self._sending: deque[tuple[Work, Tensor]] = deque()
        self._batch_shapes: Sequence[Hashable] = ()

    def begin_step(self, receives: Sequence[Message], shapes: Sequence[Hashable]) -> None:
        """Post the first receives of every source."""
        self._batch_shapes = shapes
        self._queues.clear()
        for message in receives:
            self._queues.setdefault((message.direction, message.peer), deque()).append(message)
        for queue in self._queues.values():
            self._post(queue)

    def _key(self, message: Message, *, sending: bool) -> Hashable:
        """What both ends know a shape by: the boundary, which way it is crossed forward, the micro-batch's shape.

        With replicas in both directions a boundary is crossed both ways, and each way tells its own header.
        """
        down = sending == (message.direction == "F")
        return message.boundary, message.peer, down, self._batch_shapes[message.microbatch]

    def _group(self, message: Message, *, sending: bool) -> ProcessGroup:
        here = self._mesh.index("pp")
        ends = (here, message.peer) if sending else (message.peer, here)
        return self._groups[message.direction, *ends]

    def _tag(self, message: Message, part: int) -> int:
        return (message.microbatch * self._boundaries + message.boundary) * (MAX_TENSORS + 1) + part

    def _post(self, queue: deque[Message]) -> None:
        """Post the next receives of a source, as far as their shapes are known."""
        for message in islice(queue, AHEAD):
            if message in self._posted:
                continue
            shapes = self._shapes.get(self._key(message, sending=False))
            if shapes is None:
                return
            source, group = self._mesh.pipeline_rank(message.peer), self._group(message, sending=False)
            posted = []
            for part, (shape, dtype) in enumerate(shapes):
                buffer = torch.empty(shape, dtype=dtype, device=self._device)
                work = dist.irecv(buffer, source, group=group, tag=self._tag(message, part))
                assert work is not None
                posted.append((work, buffer))
            self._posted[message] = posted

    def receive(self, message: Message) -> Value:
        """Wait for a message that ``begin_step`` announced, and post the next one."""
        queue = self._queues[message.direction, message.peer]
        assert queue[0] == message, f"{message} is not the next from its source, {queue[0]} is"
        key = self._key(message, sending=False)
        if key not in self._shapes:
            self._receive_header(message)
        if message not in self._posted:
            self._post(queue)
        queue.popleft()
        posted = self._posted.pop(message)
        if not posted[-1][0].is_completed():
            self._post(queue)  # while there is nothing else to do
        found = []
        for work, buffer in posted:
            work.wait()
            found.append(buffer)
        return found[0] if self._single[key] else tuple(found)

    def send(self, message: Message, value: Value) -> None:
        """Send in the background; the tensor is kept until it has left."""
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        if self._key(message, sending=True) not in self._shapes:
            self._send_header(message, value)
        target, group = self._mesh.pipeline_rank(message.peer), self._group(message, sending=True)
        for part, tensor in enumerate(tensors_of(value)):
            tensor = tensor.detach().contiguous()
            work = dist.isend(tensor, target, group=group, tag=self._tag(message, part))
            assert work is not None
            self._sending.append((work, tensor))

    def _send_header(self, message: Message, value: Value) -> None:
        tensors = tensors_of(value)
        if len(tensors) > MAX_TENSORS or any(t.ndim > MAX_DIMS or t.dtype not in DTYPES for t in tensors):
            found = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in tensors)
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise UnsupportedError(
                f"stage {message.boundary} passes on {len(tensors)} tensors ({found}); what crosses between pipeline "
                f"ranks may be at most {MAX_TENSORS} tensors of at most {MAX_DIMS} dims, in {names}."
            )
        header = torch.zeros(MAX_TENSORS + 1, MAX_DIMS + 2, dtype=torch.int64)
        header[0, 0], header[0, 1] = len(tensors), int(isinstance(value, Tensor))
        for row, t in zip(header[1:], tensors, strict=False):
            row[0], row[1] = DTYPES.index(t.dtype), t.ndim
            row[2 : 2 + t.ndim] = torch.tensor(t.shape)
        header = header.to(self._device)
        target = self._mesh.pipeline_rank(message.peer)
        group = self._group(message, sending=True)
        work = dist.isend(header, target, group=group, tag=self._tag(message, MAX_TENSORS))
        assert work is not None
        self._sending.append((work, header))
        self._remember(self._key(message, sending=True), header)

    def _receive_header(self, message: Message) -> None:
        header = torch.zeros(MAX_TENSORS + 1, MAX_DIMS + 2, dtype=torch.int64, device=self._device)
        source = self._mesh.pipeline_rank(message.peer)
        group = self._group(message, sending=False)
        dist.recv(header, source, group=group, tag=self._tag(message, MAX_TENSORS))
        self._remember(self._key(message, sending=False), header)

    def _remember(self, key: Hashable, header: Tensor) -> None:
        rows = header.tolist()
        count, single = rows[0][0], rows[0][1]
        self._shapes[key] = [(tuple(r[2 : 2 + r[1]]), DTYPES[r[0]]) for r in rows[1 : 1 + count]]
        self._single[key] = bool(single)

    def end_step(self) -> None:
        """Wait until everything sent has left."""
        assert not self._posted and not any(self._queues.values()), "messages of this step were not received"
        while self._sending:
            self._sending.popleft()[0].wait()
