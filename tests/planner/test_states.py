"""Parameters, gradients and optimizer states divided over different numbers of ranks."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations_with_replacement
from typing import Any

import pytest

from stretto.planner.calibration import Calibration
from stretto.planner.candidates import shardings
from stretto.planner.communication import data_seconds, group
from stretto.planner.explain import why_not
from stretto.planner.memory import memory
from stretto.planner.request import Request
from stretto.planner.search import search
from stretto.planner.stack import KernelStack
from stretto.planner.step import step_time
from stretto.planner.workload import Workload
from stretto.spec import toml
from stretto.spec.check import check
from stretto.spec.errors import ConfigError
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_cluster import cluster_preset
from stretto.spec.presets_model import model_preset
from stretto.spec.run import RunSpec
from stretto.spec.states import StateSharding, of_plan, written
from stretto.spec.training import TrainingSpec


def work_of(sharding: StateSharding | None = None, *, cluster: str = "a100:64", **plan: int) -> Workload:
    """Llama 2 7B on 64 devices."""
    return Workload(
        model=model_preset("llama-2-7b"),
        plan=PlanSpec(**{"dp_shard": 64, **plan}),  # type: ignore[arg-type]
        cluster=cluster_preset(cluster),
        sequence_length=2048,
        global_batch_size=512,
        sharding=sharding,
    )


def test_zero_is_a_choice_of_factors() -> None:
    for zero, factors in ((1, (1, 1, 64)), (2, (1, 64, 64)), (3, (64, 64, 64))):
        found = of_plan(PlanSpec(dp_shard=64, zero=zero))  # type: ignore[arg-type]
        assert (found.parameters, found.gradients, found.optimizer) == factors


def test_factors_divide_what_they_say() -> None:
    whole, divided = (
        memory(work_of(StateSharding(**factors)))[0] for factors in ({}, {"gradients": 8, "optimizer": 64})
    )
    assert divided.parameters == whole.parameters
    assert divided.gradients == whole.gradients / 8 and divided.optimizer == whole.optimizer / 64


def test_the_node_in_the_middle_saves_the_network() -> None:
    """Parameters gathered inside nodes alone, the optimizer's states over all: less time than ZeRO-3 over all."""
    middle = StateSharding(parameters=8, gradients=8, optimizer=64)
    inside, across = data_seconds(work_of(middle), Calibration()), data_seconds(work_of(zero=3), Calibration())
    assert inside < across / 2
    assert memory(work_of(middle))[0].optimizer == memory(work_of(zero=3))[0].optimizer


def test_context_parallel_ranks_share_shards() -> None:
    work = work_of(dp_shard=32, cp=2, zero=3)
    assert work.states.parameters == 64 and memory(work)[0].optimizer == memory(work_of(zero=3))[0].optimizer


def test_factors_must_nest() -> None:
    with pytest.raises(ConfigError, match="24 isn't a multiple of 16"):
        StateSharding(gradients=16, optimizer=24)


def test_dies_of_a_module_are_nearer() -> None:
    work = work_of(cluster="mi250x:64")
    pair, node = (group(replace(work), size, 1, Calibration()) for size in (2, 8))
    assert pair.bytes_per_second == 4 * node.bytes_per_second


def test_divided_parameters_hide_under_every_micro_batch() -> None:
    """Gathered for each micro-batch, beside the work of each; whole ones are summed once, beside one."""
    stack = KernelStack(overlapped_reduction=True)
    for zero, hidden in ((2, 1), (3, 8)):
        work = replace(work_of(zero=zero), stack=stack)
        time, data = step_time(work), data_seconds(work, Calibration())
        assert work.num_microbatches == 8 and data > time.work / 8
        assert time.data_communication == pytest.approx(max(0.0, data - time.work * hidden / 8))


def request_of(cluster: str, **pins: Any) -> Request:
    """Llama 2 7B, half a million tokens a step."""
    run = RunSpec(
        model=model_preset("llama-2-7b"),
        cluster=cluster_preset(cluster),
        training=TrainingSpec(global_batch_size=256, sequence_length=2048, dtype="bfloat16"),
    )
    return Request(run=run, pins=pins)


def factors(plan: PlanSpec) -> tuple[int, int, int]:
    states = of_plan(plan)
    return states.parameters, states.gradients, states.optimizer


def test_every_nested_choice_of_link_levels_is_a_candidate_once() -> None:
    request = request_of("mi250x:64")
    found = [factors(plan) for plan in shardings(request, PlanSpec(dp_shard=32, tp=2))]
    levels = (1, 4, 32)  # of modules of 2 and nodes of 8 devices under tp 2, and of all data ranks
    assert {(p, g, 32) for p, g in combinations_with_replacement(levels, 2)} <= set(found)
    assert len(set(found)) == len(found)
    (pinned,) = shardings(request_of("mi250x:64", shard_gradients=2, shard_parameters=2), PlanSpec(dp_shard=64))
    assert factors(pinned) == (2, 2, 64) and (pinned.dp_shard, pinned.zero) == (64, 3)
    hybrid = request_of("mi250x:64", dp_shard=8, dp_replicate=8, zero=3, shard_optimizer=64)
    assert [factors(plan) for plan in shardings(hybrid, PlanSpec(dp_shard=64))] == [(8, 8, 64)]


@pytest.mark.parametrize("states", [(1, 1, 8), (1, 4, 8), (2, 4, 8), (4, 4, 4), (8, 8, 8), (1, 2, 4), (1, 1, 1)])
def test_written_plans_divide_as_asked(states: tuple[int, int, int]) -> None:
    parameters, gradients, optimizer = states
    wanted = StateSharding(parameters=parameters, gradients=gradients, optimizer=optimizer)
    for plan in (PlanSpec(dp_shard=8), PlanSpec(dp_replicate=4, cp=2), PlanSpec(dp_replicate=8, zero=3)):
        assert of_plan(written(plan, wanted)) == wanted


def test_each_collective_is_between_the_ranks_that_a_factor_adds() -> None:
    """Pairs, nodes and all: the volumes of each are those that a step sends, and scattering replaces summing."""
    work = replace(
        work_of(StateSharding(parameters=2, gradients=8, optimizer=64), cluster="mi250x:64"),
        stack=request_of("mi250x:64").stack,
    )
    held, number, none = work.largest_share, work.num_microbatches, Calibration()
    pair, four, eight = group(work, 2, 1, none), group(work, 4, 2, none), group(work, 8, 8, none)
    each = 2 * pair.all_gather(2 * held) + pair.all_gather(4 * held) + four.all_gather(4 * held / 2)
    once = eight.all_gather(4 * held / 8) + four.all_gather(2 * held / 2) + eight.all_gather(2 * held / 8)
    assert data_seconds(work, none) == pytest.approx(number * each + once)


def test_pins_that_cannot_be_are_refused_and_others_explained() -> None:
    request = request_of("mi250x:64", pp=1, tp=1, cp=1)
    for pins, why in (
        ({"shard_parameters": 3}, "shard_parameters = 3 can't divide 64 data ranks; it may be 1, 2, 4, 8, 16, 32, 64."),
        ({"shard_parameters": 8, "shard_optimizer": 4}, "4 isn't a multiple of 8"),
        ({"shard_parameters": 2, "shard_gradients": 8}, "can be, at best as dp_shard 64, zero 3, parameters over 2"),
    ):
        assert why in why_not(request, pins)


def test_a_plan_with_factors_goes_through_a_run_file() -> None:
    request = request_of("mi250x:64", pp=1, tp=1, cp=1, shard_parameters=2, shard_gradients=8)
    found = search(request, top=1).plans[0]
    run = replace(request.run, plan=found.plan)
    check(run, data=False)
    assert factors(toml.from_text(toml.to_text(run)).plan) == (2, 8, 64)
