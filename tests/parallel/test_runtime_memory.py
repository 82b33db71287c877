"""What a rank keeps while it plays is what the simulator says: each rank alone, with messages made up."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import pytest
import torch
from torch import Tensor

from parallel.test_master import mesh_at
from stretto.parallel.pipeline.channel import Message
from stretto.parallel.pipeline.runtime import Runtime, Seat
from stretto.parallel.pipeline.segment import Value
from stretto.parallel.pipeline.stage import Stage
from stretto.parallel.pipeline.virtual import virtual_stages
from stretto.schedule.families import build
from stretto.schedule.op import COMPUTE, Op
from stretto.schedule.passes.communication import lower
from stretto.schedule.passes.recompute import recompute
from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate.memory import peak_activation
from stretto.spec import capabilities
from stretto.spec.contract import Batch

TOKENS = torch.ones(1, 1, dtype=torch.int64)
BATCH = Batch(tokens=TOKENS, labels=TOKENS, positions=TOKENS, documents=None, samples=TOKENS[:, 0])
WIDTH = 4


class Echo:
    """A channel on which everything arrives at once; what it brings is always the same."""

    def begin_step(self, receives: Sequence[Message], shapes: Sequence[Hashable]) -> None:
        """Nothing."""

    def send(self, message: Message, value: Value) -> None:
        """Drop it."""

    def receive(self, message: Message) -> Value:
        """Ones."""
        return torch.ones(WIDTH, WIDTH)

    def tend(self) -> None:
        """Nothing."""

    def end_step(self) -> None:
        """Nothing."""


class Counter:
    """A device that looks, after each operation, at how many micro-batches' activations the stages hold."""

    def __init__(self, stages: dict[int, Stage]) -> None:
        self.stages, self.most, self.stashed = stages, 0, 0

    def begin(self, op: Op) -> None:
        """Nothing."""

    def end(self, op: Op) -> None:
        """Count."""
        self.most = max(self.most, sum(stage.num_in_flight for stage in self.stages.values()))
        self.stashed = max(self.stashed, sum(1 for s in self.stages.values() for _ in s.stashed_tensors()))


def play(schedule: Schedule, rank: int) -> Counter:
    stages = virtual_stages(schedule, rank, mesh=mesh_at(), width=WIDTH)
    counter = Counter(stages)
    runtime = Runtime(stages, schedule, Seat(rank=rank, channel=Echo(), device=counter))
    for _ in range(2):
        loss = runtime.step([BATCH] * schedule.num_microbatches, lambda _: None, lambda: torch.ones(()))
        assert (loss is not None) == any(replica[-1] == rank for replica in schedule.placement)
    assert all(stage.num_in_flight == 0 for stage in stages.values())
    return counter


@pytest.mark.parametrize("name", capabilities.SCHEDULES)
def test_activations_in_flight_are_those_of_the_simulator(name: str) -> None:
    for ranks, microbatches in ((2, 3), (4, 8)):
        options = {"auto": {"time_budget": 0.1}, "skip-pipe": {"keep": [0, ranks - 1]}}.get(name)
        schedule = build(name, ranks=ranks, microbatches=microbatches, options=options)
        peaks, chunks = peak_activation(schedule), schedule.num_stages / ranks
        lowered = lower(schedule)
        for rank in range(ranks):
            assert play(lowered, rank).most / chunks == pytest.approx(peaks[rank])


def test_the_stash_is_let_go_by_w() -> None:
    lowered = lower(build("zb-h2", ranks=4, microbatches=8))
    # x and dy of one layer per micro-batch between I and W; zb-h2 has no more of them than it must.
    assert [play(lowered, rank).stashed for rank in range(4)] == [most_between(lowered, rank) for rank in range(4)]


def most_between(schedule: Schedule, rank: int) -> int:
    """Largest number of stashed tensors of a rank, two for each micro-batch between its I and its W."""
    held = most = 0
    for op in schedule.ops(rank):
        held += 2 * ((op.kind.name == "I") - (op.kind.name == "W"))
        most = max(most, held)
    return most


def test_recomputed_stages_keep_their_input_alone() -> None:
    schedule = lower(recompute(build("1f1b", ranks=2, microbatches=4)))
    stages = virtual_stages(schedule, 0, mesh=mesh_at(), width=WIDTH)
    graphs: list[bool] = []

    class Graphs(Counter):
        def end(self, op: Op) -> None:
            assert op.kind in COMPUTE
            if op.kind.name == "F":
                graphs.append(any(isinstance(t, Tensor) and t.requires_grad for t in stages[0].kept_tensors()))

    runtime = Runtime(stages, schedule, Seat(rank=0, channel=Echo(), device=Graphs(stages)))
    runtime.step([BATCH] * 4, lambda _: None, lambda: torch.ones(()))
    assert "R" in {op.kind.name for op in schedule.ops(0)} and graphs == [False] * 4
