"""All ranks in one process: the gradients of autograd, and the makespan of the simulator to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parallel.test_offloading import WIDTH, stage_of
from parallel.test_runtime_memory import BATCH
from stretto.parallel.pipeline.one_process import OneProcess
from stretto.parallel.pipeline.stage import Stage
from stretto.schedule.families import build
from stretto.schedule.op import Op
from stretto.schedule.passes import change
from stretto.schedule.passes.communication import lower
from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate.clock import run
from stretto.schedule.simulate.costs import Costs
from stretto.spec import capabilities
from stretto.spec.errors import ScheduleError


def stages_for(schedule: Schedule) -> tuple[list[Stage], list[dict[int, Stage]]]:
    """One object for each stage, and what each rank holds; replicas share theirs."""
    stages = [stage_of(index, schedule.num_stages) for index in range(schedule.num_stages)]
    voices = range(len(schedule.placement))
    held = [{s for v in voices for s in schedule.stages_of(rank, v)} for rank in range(schedule.num_ranks)]
    return stages, [{s: stages[s] for s in sorted(mine)} for mine in held]


def costs_of(schedule: Schedule) -> Costs:
    """Different everywhere, and no round numbers."""
    stages = range(schedule.num_stages)
    return Costs(
        F=[1 + 0.1 * s for s in stages],
        I=[1.3 + 0.07 * s for s in stages],
        W=[0.9 + 0.03 * s for s in stages],
        comm=[0.2 + 0.11 * s for s in stages][:-1],
        O=[0.7] * len(stages),
        L=[0.6] * len(stages),
        OPT=[0.5 + 0.1 * r for r in range(schedule.num_ranks)],
    )


def play(schedule: Schedule) -> OneProcess:
    stages, held = stages_for(schedule)
    costs = costs_of(schedule)
    process = OneProcess(lower(schedule), held, costs=costs)
    for _ in range(2 if schedule.num_ranks == 2 else 1):
        loss = process.step([BATCH] * schedule.num_microbatches, lambda _: None, lambda: torch.tensor(0.25))
        assert loss is not None and process.makespan == run(schedule, costs).makespan
    weights = [unit.parameters[0] for stage in stages for unit in stage.units]
    found = [w.grad for w in weights]
    total = torch.zeros(())
    for m in range(schedule.num_microbatches):
        x = torch.ones(WIDTH, WIDTH)
        for s in schedule.path(m):
            x = torch.tanh(x @ weights[s].T) * 2.0
        total = total + x.sum()
    torch.testing.assert_close(loss, total.detach())
    for gradient, expected in zip(found, torch.autograd.grad(total / 4, weights), strict=True):
        torch.testing.assert_close(gradient, expected)
    return process


@pytest.mark.parametrize("name", sorted(set(capabilities.SCHEDULES) - {"auto"}))
def test_every_family(name: str) -> None:
    for ranks, microbatches in ((2, 3), (4, 6)):
        options = {"keep": [0, ranks - 1]} if name == "skip-pipe" else {}
        play(build(name, ranks=ranks, microbatches=microbatches, options=options))


PASSES: list[tuple[str, list[tuple[str, dict[str, Any]]]]] = [
    ("gpipe", [("offload", {})]),
    ("interleaved", [("offload", {"fraction": 0.6})]),
    ("v-half", [("offload", {"stages": "0-3"})]),
    ("1f1b", [("2bp", {"when": "idle"}), ("offload", {})]),
    ("zb-h1", [("recompute", {"stages": "0-1"}), ("offload", {}), ("sharding", {"blocks": 1, "optimizer": True})]),
    ("breadth-first", [("sharding", {"blocks": 2})]),
    ("dualpipe", [("split-backward", {}), ("sharding", {})]),
]


@pytest.mark.parametrize(("name", "passes"), PASSES)
def test_passes(name: str, passes: list[tuple[str, dict[str, Any]]]) -> None:
    schedule = build(name, ranks=4, microbatches=6)
    for chosen, options in passes:
        schedule, _ = change(schedule, chosen, options=options)
    play(schedule)


def circle() -> Schedule:
    """Two ranks of which each wants the other's message first: 0B0 stands before 0F1, and 1F1 before 1B0."""
    orders = [["0F0", "0B0", "0F1", "0B1"], ["1F0", "1F1", "1B0", "1B1"]]
    return Schedule.from_orders(
        [[Op.parse(token) for token in order] for order in orders],
        name="circle",
        num_stages=2,
        num_microbatches=2,
        placement=[(0, 1)],
    )


def test_a_deadlock_is_said_with_who_waits_for_whom() -> None:
    schedule = circle()
    process = OneProcess(lower(schedule), stages_for(schedule)[1])
    for _ in range(2):
        with pytest.raises(ScheduleError) as raised:
            process.step([BATCH] * 2, lambda _: None, lambda: torch.ones(()))
        told = str(raised.value)
        assert "nothing moves: rank 0 waits in 0RECV_B0 for rank 1, rank 1 waits in 1RECV_F1 for rank 0." in told
        assert "rank 1 │" in told and "^" in told


def test_the_first_error_of_a_rank_ends_all() -> None:
    schedule = build("1f1b", ranks=4, microbatches=8)
    stages, held = stages_for(schedule)
    stages[2].segments[0].run = lambda x, context, batch: 1 / 0
    process = OneProcess(lower(schedule), held)
    with pytest.raises(ZeroDivisionError):
        process.step([BATCH] * 8, lambda _: None, lambda: torch.ones(()))
