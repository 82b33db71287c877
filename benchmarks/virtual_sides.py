"""What plays a schedule on virtual devices: our runtime, a floor loop, and torch.distributed.pipelining.

All three do the same tiny autograd work on a [64, 64] activation and wait with the same function.  The floor is what
messages, sleeps and autograd cost by themselves: every receive posted before the step, no bookkeeping.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, autograd, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from stretto.parallel.mesh import Mesh
from stretto.parallel.pipeline.channel import PeerChannel
from stretto.parallel.pipeline.runtime import Runtime, Seat
from stretto.parallel.pipeline.virtual import (
    WIDTH,
    VirtualDevice,
    virtual_batch,
    virtual_shard,
    virtual_stages,
    wait_until,
)
from stretto.parallel.pipeline.vocabulary.passes import Vocabulary
from stretto.schedule import placement
from stretto.schedule.families import build
from stretto.schedule.op import COMPUTE, Kind, Op
from stretto.schedule.passes.communication import without_messages
from stretto.schedule.schedule import Schedule

Step = Callable[[], Any]
CPU = torch.device("cpu")
SINGLE = {"GPipe": "gpipe", "1F1B": "1f1b"}
"""torch's schedules of one stage per rank, whose order is our family's."""
FOLDED = ("ZBVZeroBubble", "DualPipeV")
TORCH = (*SINGLE, "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", *FOLDED)


def ours(schedule: Schedule, mesh: Mesh, seconds: float, scored: float) -> Step:
    """The runtime of training; ``schedule`` is lowered, F, I and W take ``seconds`` each, S and T ``scored``."""
    rank = mesh.index("pp")
    durations = dict.fromkeys((Kind.F, Kind.I, Kind.W), seconds) | dict.fromkeys((Kind.S, Kind.T), scored)
    shared = Vocabulary.join(virtual_shard(mesh), mesh, CPU) if (schedule.kind == Kind.S).any() else None
    channel = PeerChannel(mesh, CPU, [schedule])
    seat = Seat(rank=rank, channel=channel, device=VirtualDevice(durations), vocabulary=shared)
    runtime = Runtime(virtual_stages(schedule, rank, mesh=mesh), schedule, seat)
    batches, one = [virtual_batch(schedule)] * schedule.num_microbatches, torch.ones(())
    return lambda: runtime.step(batches, lambda _: None, lambda: one)


class Floor:
    """The order of one rank, played by a loop."""

    def __init__(self, schedule: Schedule, mesh: Mesh, seconds: float) -> None:
        self._schedule, self._mesh, self._seconds = schedule, mesh, seconds
        self._ops = schedule.ops(mesh.index("pp"))
        self._weight = torch.zeros(WIDTH, WIDTH, requires_grad=True)

    def __call__(self) -> None:
        """Play one step."""
        self._values: dict[tuple[str, int, int], Tensor] = {}
        self._graphs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._sends: list[Any] = []
        receives = {op: self._post(op) for op in self._ops if op.kind in (Kind.RECV_F, Kind.RECV_B)}
        for op in self._ops:
            if op in receives:
                work, buffer = receives.pop(op)
                work.wait()
                self._values["F" if op.kind is Kind.RECV_F else "B", op.stage, op.microbatch] = buffer
            elif op.kind in (Kind.SEND_F, Kind.SEND_B):
                self._send(op)
            elif op.kind in COMPUTE:
                end = time.perf_counter() + self._seconds * (2 if op.kind is Kind.B else 1)
                self._compute(op)
                wait_until(end)
        for work in self._sends:
            work.wait()

    def _tag(self, direction: str, stage: int, microbatch: int) -> int:
        return ((direction == "B") * self._schedule.num_stages + stage) * self._schedule.num_microbatches + microbatch

    def _post(self, op: Op) -> tuple[Any, Tensor]:
        buffer = torch.empty(WIDTH, WIDTH)
        tag = self._tag("F" if op.kind is Kind.RECV_F else "B", op.stage, op.microbatch)
        return dist.irecv(buffer, self._mesh.pipeline_rank(op.peer), tag=tag), buffer

    def _send(self, op: Op) -> None:
        forward, m = op.kind is Kind.SEND_F, op.microbatch
        reader = (self._schedule.next_stage if forward else self._schedule.gradient_target)(op.stage, m)
        assert reader is not None
        value = self._values.pop(("F" if forward else "B", reader, m))
        tag = self._tag("F" if forward else "B", reader, m)
        self._sends.append(dist.isend(value, self._mesh.pipeline_rank(op.peer), tag=tag))

    def _compute(self, op: Op) -> None:
        key, m = (op.stage, op.microbatch), op.microbatch
        if op.kind is Kind.F:
            x = self._values.pop(("F", *key)) if op.stage else torch.ones(WIDTH, WIDTH)
            x = x.detach().requires_grad_()
            y = nn.functional.linear(x, self._weight)
            self._graphs[key] = (x, y)
            reader = self._schedule.next_stage(*key)
            if reader is not None:
                self._values["F", reader, m] = y.detach()
        elif op.kind in (Kind.I, Kind.B):
            x, y = self._graphs.pop(key)
            last = self._schedule.gradient_source(*key) is None
            dy = torch.ones(WIDTH, WIDTH) if last else self._values.pop(("B", *key))
            dx, _ = torch.autograd.grad(y, [x, self._weight], dy)
            reader = self._schedule.gradient_target(*key)
            if reader is not None:
                self._values["B", reader, m] = dx


class _Begin(autograd.Function):
    """Notes when the backward of a stage begins."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, stage: TorchStage) -> Tensor:
        ctx.stage = stage
        return y.clone()  # torch detaches outputs in place, which views refuse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.stage.began = time.perf_counter()
        return grads[0], None


class _Input(autograd.Function):
    """Ends the gradient of the input ``seconds`` after the backward began."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: TorchStage) -> Tensor:
        ctx.stage = stage
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        wait_until(ctx.stage.began + ctx.stage.seconds)
        return grads[0], None


class _Weight(autograd.Function):
    """Makes the gradient of the weight take ``seconds``, in a node of its own."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, stage: TorchStage) -> Tensor:
        ctx.stage = stage
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        wait_until(time.perf_counter() + ctx.stage.seconds)
        ctx.stage.began += ctx.stage.seconds  # in a full backward, the input's share begins now
        return grads[0], None


class TorchStage(nn.Module):
    """A virtual stage as torch's pipeline wants it."""

    def __init__(self, seconds: float, first: bool) -> None:
        super().__init__()
        self.seconds, self.began = seconds, 0.0
        self.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))
        # An input of its own that needs a gradient, so that the first stage takes as long as the others.
        self.start = nn.Parameter(torch.zeros(WIDTH, WIDTH)) if first else None

    def forward(self, x: Tensor) -> Tensor:
        """F."""
        end = time.perf_counter() + self.seconds
        if self.start is not None:
            x = x + self.start
        y = _Begin.apply(nn.functional.linear(_Input.apply(x, self), _Weight.apply(self.weight, self)), self)
        wait_until(end)
        return y


def torch_pipeline(name: str, mesh: Mesh, microbatches: int, seconds: float) -> tuple[Step, Schedule]:
    """torch's runtime on its schedule of that name, and the same order as our Schedule, without messages."""
    ranks, rank = mesh.size("pp"), mesh.index("pp")
    chunks = 1 if name in SINGLE else 2
    count = ranks * chunks
    holders = (placement.zigzag if name in FOLDED else placement.loop)(ranks, count)
    modules = {i: TorchStage(seconds, i == 0) for i in range(count) if holders[i] == rank}
    stages: list[Any] = [PipelineStage(module, i, count, CPU) for i, module in modules.items()]
    schedule: Any = get_schedule_class(name)(
        stages[0] if chunks == 1 else stages, n_microbatches=microbatches, loss_fn=lambda y, _: y.sum()
    )
    x, target = torch.ones(microbatches * WIDTH, WIDTH), torch.ones(microbatches, 1)

    def step() -> None:
        for module in modules.values():
            module.zero_grad(set_to_none=True)
        last = {"target": target, "losses": []} if count - 1 in modules else {}
        schedule.step(*((x,) if 0 in modules else ()), return_outputs=False, **last)

    if name in SINGLE:
        return step, without_messages(build(SINGLE[name], ranks=ranks, microbatches=microbatches))
    orders = [list(ops_of(schedule.pipeline_order[r])) for r in range(ranks)]
    same = Schedule.from_orders(orders, name=name, num_stages=count, num_microbatches=microbatches, placement=[holders])
    return step, same


def ops_of(actions: Any) -> Iterator[Op]:
    """torch's actions as ours; a pair that it overlaps is played one after the other there, too."""
    kinds = {"FORWARD": Kind.F, "BACKWARD_INPUT": Kind.I, "BACKWARD_WEIGHT": Kind.W, "FULL_BACKWARD": Kind.B}
    for action in actions:
        if action is None:
            continue
        if action.sub_actions:
            yield from ops_of(action.sub_actions)
        elif (kind := kinds.get(action.computation_type.name)) is not None:
            yield Op(kind, stage=action.stage_index, microbatch=action.microbatch_index)
