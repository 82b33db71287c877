"""Virtual devices: an operation takes its duration from its own start, and the runtime tends messages meanwhile."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence

import torch

from parallel.test_master import mesh_at
from ranks import Ranks
from stretto.parallel.mesh import build_mesh
from stretto.parallel.pipeline.channel import Message, PeerChannel
from stretto.parallel.pipeline.runtime import Runtime, Seat
from stretto.parallel.pipeline.segment import Value
from stretto.parallel.pipeline.virtual import VirtualDevice, virtual_batch, virtual_shard, virtual_stages, wake_on_time
from stretto.parallel.pipeline.vocabulary.passes import Vocabulary
from stretto.schedule.families import build
from stretto.schedule.op import Kind, Op
from stretto.schedule.passes.communication import lower
from stretto.schedule.passes.vocabulary import vocabulary
from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate import simulate
from stretto.schedule.simulate.costs import Costs
from stretto.spec.contract import Batch
from stretto.spec.plan import PlanSpec

TOKENS = torch.ones(1, 1, dtype=torch.int64)
BATCH = Batch(tokens=TOKENS, labels=TOKENS, positions=TOKENS, documents=None, samples=TOKENS[:, 0])
COSTS = Costs(F=0.02, I=0.02, W=0.02, S=0.02, T=0.02)
SECONDS = {Kind.F: 0.004, Kind.I: 0.006, Kind.W: 0.002}


def test_an_operation_takes_its_duration_from_its_own_start() -> None:
    device = VirtualDevice(SECONDS)
    for kind, expected in ((Kind.F, 0.004), (Kind.B, 0.008), (Kind.R, 0.004)):
        start = time.perf_counter()
        device.begin(Op(kind, stage=0, microbatch=0))
        time.sleep(0.002)  # its real work
        device.end(Op(kind, stage=0, microbatch=0))
        assert expected <= time.perf_counter() - start < expected + 0.05


class Recorder:
    """A channel and a device that note the order in which they are called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def begin(self, op: Op) -> None:
        self.calls.append(f"begin {op}")

    def end(self, op: Op) -> None:
        self.calls.append(f"end {op}")

    def begin_step(self, receives: Sequence[Message], shapes: Sequence[Hashable]) -> None:
        self.calls.append("step")

    def send(self, message: Message, value: Value) -> None:
        self.calls.append(f"send {message.direction}{message.microbatch}")

    def receive(self, message: Message) -> Value:
        self.calls.append(f"receive {message.direction}{message.microbatch}")
        return torch.ones(64, 64)

    def tend(self) -> None:
        self.calls.append("tend")

    def end_step(self) -> None:
        self.calls.append("over")


def test_messages_are_tended_while_the_device_computes() -> None:
    schedule, recorder = lower(build("zb-h1", ranks=2, microbatches=1)), Recorder()
    stages = virtual_stages(schedule, 0, mesh=mesh_at())
    runtime = Runtime(stages, schedule, Seat(rank=0, channel=recorder, device=recorder))
    runtime.step([BATCH], lambda _: None, lambda: torch.ones(()))
    assert recorder.calls == [
        *["step", "begin 0F0", "tend", "end 0F0", "send F0", "receive B0"],
        *["begin 0I0", "tend", "end 0I0", "begin 0W0", "tend", "end 0W0", "over"],
    ]


def schedule_of(name: str) -> Schedule:
    """``zb-h1+2``: with vocabulary passes of algorithm 2."""
    family, _, algorithm = name.partition("+")
    found = build(family, ranks=2, microbatches=4)
    return vocabulary(found, algorithm=int(algorithm), costs=COSTS) if algorithm else found


def play_on_rank(rank: int, world: int, name: str) -> float:
    wake_on_time()
    schedule, mesh = lower(schedule_of(name)), build_mesh(PlanSpec(pp=world), rank)
    scored = (schedule.kind == Kind.S).any()
    batches = [virtual_batch(schedule)] * 4
    runtime = Runtime(
        virtual_stages(schedule, rank, mesh=mesh),
        schedule,
        Seat(
            rank=rank,
            channel=PeerChannel(mesh, torch.device("cpu"), [schedule]),
            device=VirtualDevice(dict.fromkeys((*SECONDS, Kind.S, Kind.T), 0.02)),
            vocabulary=Vocabulary.join(virtual_shard(mesh), mesh, torch.device("cpu")) if scored else None,
        ),
    )
    taken = []
    for _ in range(3):
        torch.distributed.barrier()
        start = time.perf_counter()
        runtime.step(batches, lambda _: None, lambda: torch.ones(()))
        taken.append(time.perf_counter() - start)
    return min(taken)


def test_a_step_takes_as_long_as_simulated(ranks: Ranks) -> None:
    # A wide margin: the machine may be busy.  benchmarks/virtual_pipeline.py measures.
    for name in ("zb-h1+2", "dualpipe"):
        simulated = simulate(schedule_of(name), COSTS).makespan
        slowest = max(ranks.run(play_on_rank, 2, name))
        assert simulated * 0.99 <= slowest <= simulated * 1.5
