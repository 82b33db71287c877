"""A frozen front that is computed a step ahead, in the planner's memory and time (spec/front.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from equivalence.plan_run import batches_of
from planner.test_measured_step import MACHINE, RUN
from ranks import Ranks
from stretto.planner.measured_step import layer, played
from stretto.planner.memory import memory, waiting_bytes
from stretto.planner.pins import check_pins
from stretto.planner.request import Request
from stretto.planner.step import stage_turns, step_time
from stretto.planner.tracked import tracked
from stretto.planner.workload import Workload
from stretto.schedule.families import build
from stretto.schedule.passes.hand_over import ahead
from stretto.schedule.simulate import Costs, simulate
from stretto.spec.cluster import ClusterSpec
from stretto.spec.errors import UnsupportedError
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_cluster import cluster_preset
from stretto.spec.presets_model import model_preset
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.memory import ActivationMeter, passing_bytes, persistent_bytes
from stretto.trainer.session import Session

FRONT = ("inputs.*", "blocks.[0-7].*")


def work_of(plan: dict[str, Any], freeze: tuple[str, ...] = FRONT) -> Workload:
    """A 7B model of 32 layers on 4 A100s."""
    run = RunSpec(
        model=model_preset("llama-2-7b"),
        cluster=cluster_preset("a100:4"),
        plan=PlanSpec(pp=4, **plan),
        training=TrainingSpec(global_batch_size=16, sequence_length=2048, dtype="bfloat16", freeze=freeze),
    )
    return Request(run=run).work(run.plan)


@pytest.mark.parametrize("plan", [{}, {"schedule": "zb-h1"}, {"schedule": "zb-v", "chunks": 2}], ids=str)
def test_its_step_is_the_simulated_one(plan: dict[str, Any]) -> None:
    filled, plain = work_of({**plan, "passes": ("fill-bubbles",)}), work_of(plan)
    assert filled.ahead == 8 and sum(filled.layers) == 24 == sum(filled.backward_layers)
    turns = stage_turns(filled)
    inputs = [whole - part for whole, part in zip(turns.backward, turns.weights, strict=True)]
    costs = Costs(F=turns.forward, I=inputs, W=turns.weights)
    layer = turns.forward[0] / filled.layers[0]
    schedule = build(plan.get("schedule", "1f1b"), ranks=4, microbatches=16, costs=costs)
    simulated = simulate(*ahead(schedule, frozen="+".join([repr(layer)] * 8), costs=costs)).makespan
    time = step_time(filled)
    assert time.work + time.bubble == pytest.approx(simulated, rel=0.04)
    assert time.total < 0.95 * step_time(plain).total


def test_on_measured_machines_its_operations_are_followed() -> None:
    freeze = ("inputs.*", "blocks.0.*")
    run = replace(RUN, plan=replace(RUN.plan, pp=2, passes=("fill-bubbles",)))
    run = replace(run, training=replace(run.training, freeze=freeze))
    filled = Request(run=run).work(run.plan)
    alone = replace(MACHINE, contention=((1, 1.0), (4, 1.0)))
    found = played(filled, alone)
    frozen = filled.num_microbatches * (layer(filled, alone).forward + alone.operation_seconds)
    pipeline = played(filled, alone, schedule=build("1f1b", ranks=2, microbatches=filled.num_microbatches))
    # Both ranks idle for a forward and a backward of the other's stage; the rest of the frozen work is shared.
    assert pipeline.makespan <= found.makespan < pipeline.makespan + frozen / 2
    assert found.busiest <= pipeline.busiest + frozen


def test_every_rank_holds_the_front_and_the_first_the_inputs_that_wait() -> None:
    filled, plain = work_of({"passes": ("fill-bubbles",)}), work_of({})
    whole = sum(share.parameters for share in plain.shares)
    front = filled.shares[0].parameters - filled.shares[0].trained
    assert sum(share.parameters for share in filled.shares) == pytest.approx(whole + 3 * front)
    assert sum(share.trained for share in filled.shares) == pytest.approx(sum(s.trained for s in plain.shares))
    assert [waiting_bytes(filled, rank) for rank in range(4)] == [16 * 2048 * 4096 * 2, 0, 0, 0]
    both = work_of({"schedule": "chimera", "passes": ("fill-bubbles",)})
    assert [waiting_bytes(both, rank) for rank in range(4)] == [8 * 2048 * 4096 * 2, 0, 0, 8 * 2048 * 4096 * 2]
    assert memory(filled)[3].parameters > memory(plain)[3].parameters


def test_the_search_says_that_it_does_not_lay_it_out() -> None:
    run = replace(RunSpec(), training=replace(TrainingSpec(), freeze=FRONT))
    with pytest.raises(UnsupportedError, match=r"plan without it, and add it to plan\.passes"):
        check_pins(Request(run=run, pins={"passes": ("fill-bubbles",)}))


def bytes_on_rank(rank: int, world: int, run: RunSpec) -> int:
    """All tracked tensors at the fullest moment of a step whose front waited, and which computes the next."""
    session = Session.start(run, rank)
    batches = [batches_of(run, step, 0, documents=True) for step in (1, 2, 3)]
    session.train_step(1, batches[0], ahead=batches[1])
    meter = ActivationMeter(session)
    with meter.watch():
        session.train_step(2, batches[1], ahead=batches[2])
    return persistent_bytes(session) + passing_bytes(session) + meter.peak_bytes


def test_tracked_tensors_are_those_of_training(ranks: Ranks) -> None:
    run = RunSpec(
        run=RunSettings(device="cpu"),
        model=ModelSpec(num_layers=6, hidden_size=128, intermediate_size=352),
        cluster=ClusterSpec(name="local-cpu:2"),
        plan=PlanSpec(pp=2, passes=("fill-bubbles",)),
        training=TrainingSpec(global_batch_size=6, sequence_length=64, freeze=("inputs.*", "blocks.[01].*")),
    )
    predicted = tracked(Request(run=run).work(run.plan))
    for memory_of, held in zip(predicted, ranks.run(bytes_on_rank, 2, run), strict=True):
        assert memory_of.total == pytest.approx(held, rel=0.1)
