"""Every family gives the gradients of one plain rank, all its ranks in one process.

The runtime, the split backward and the order are those of training on as many processes (test_schedules); messages
are handed over in memory, and weights that several ranks hold are one tensor.  Float64, tied weights, dropout, very
unequal numbers of valid tokens; tolerance as in test_plans.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from equivalence.plan_run import batches_of
from equivalence.reference import Record, error, train_reference, vanishing
from equivalence.test_plans import LLAMA, TOLERANCE
from stretto.assemble.rank_model import Assembler, Precision, RankModel
from stretto.models.build import build_model
from stretto.parallel.mesh import build_mesh
from stretto.parallel.pipeline.one_process import OneProcess
from stretto.parallel.unit import settle_all
from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate.clock import run as simulate
from stretto.schedule.simulate.costs import Costs
from stretto.spec import capabilities
from stretto.spec.check import stages_of
from stretto.spec.contract import IGNORE
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.schedules import schedules_of

MODEL = replace(LLAMA, num_layers=16, hidden_size=16, intermediate_size=24, dropout=0.2, tied_embeddings=True)


def run_of(plan: PlanSpec, rows: int) -> RunSpec:
    training = TrainingSpec(
        steps=10, global_batch_size=rows, sequence_length=8, dtype="float64", learning_rate=0.01, clip_norm=0.0
    )
    return RunSpec(run=RunSettings(seed=7), model=MODEL, plan=plan, training=training)


@cache
def reference(rows: int) -> Record:
    return train_reference(run_of(PlanSpec(), rows), 1)


def whole_model(run: RunSpec, schedule: Schedule) -> RankModel:
    """All stages, on one rank."""
    alone = PlanSpec(recompute=run.plan.recompute)
    with torch.device("meta"):
        stack = build_model(run.model)
    precision = Precision.of(run.training.dtype)
    assembler = Assembler(stack, alone, build_mesh(alone, 0), precision=precision, seed=run.run.seed)
    placement = [(0,) * schedule.num_stages]
    return assembler.build(stages_of(run), placement, num_heads=run.model.num_heads, device=torch.device("cpu"))


@pytest.mark.parametrize("microbatches", [3, 5])
@pytest.mark.parametrize("name", sorted(set(capabilities.SCHEDULES) - {"auto", "skip-pipe"}))
def test_family_equals_one_rank(name: str, microbatches: int) -> None:
    counts = capabilities.SCHEDULES[name]
    plan = PlanSpec(pp=4, schedule=name, chunks=2 if 2 in counts else counts[0], offload=microbatches > 4)
    run = run_of(plan, microbatches)
    schedule, _ = schedules_of(run)
    model = whole_model(run, schedule)
    held = [{s for v in range(len(schedule.placement)) for s in schedule.stages_of(r, v)} for r in range(plan.pp)]
    process = OneProcess(schedule, [{s: model.stages[s] for s in mine} for mine in held])
    batches = batches_of(run, 1, 0, documents=True)
    tokens = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
    loss = process.step(
        batches,
        lambda batch: model.context(batch, seed=run.run.seed, step=1, training=True),
        lambda: torch.tensor(1 / tokens, dtype=torch.float64),
    )
    settle_all(model.units)
    expected = reference(microbatches)
    assert loss is not None and abs(float(loss) / tokens - expected.losses[0]) <= TOLERANCE
    gradients = expected.gradients[0]
    found: dict[str, Tensor] = {}
    for master in model.masters:
        assert master.tensor.grad is not None
        found[master.sharding.name] = master.tensor.grad
    assert found.keys() == gradients.keys()
    for parameter in gradients.keys() - vanishing(gradients):
        assert error(found[parameter], gradients[parameter]) <= TOLERANCE, parameter
    assert process.makespan == simulate(schedule, Costs()).makespan
