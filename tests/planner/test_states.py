"""Parameters, gradients and optimizer states divided over different numbers of ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stretto.planner.calibration import Calibration
from stretto.planner.communication import data_seconds, group
from stretto.planner.memory import memory
from stretto.planner.stack import KernelStack
from stretto.planner.step import step_time
from stretto.planner.workload import Workload
from stretto.spec.errors import ConfigError
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_cluster import cluster_preset
from stretto.spec.presets_model import model_preset
from stretto.spec.states import StateSharding, of_plan


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
