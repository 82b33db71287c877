"""Every family gives the gradients of one plain rank, all its ranks in one process.

The runtime, the split backward and the order are those of training on as many processes (test_schedules); messages
are handed over in memory, and weights that several ranks hold are one tensor; vocabulary passes have a shard each.
Float64, tied weights, dropout, very unequal numbers of valid tokens; tolerance as in test_plans.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from equivalence.plan_run import batches_of
from equivalence.reference import Record, error, train_reference, vanishing
from equivalence.test_plans import LLAMA, TOLERANCE
from stretto.assemble.rank_model import Assembler, Precision, RankModel
from stretto.models.build import build_model
from stretto.parallel.mesh import build_mesh
from stretto.parallel.pipeline.one_process import OneProcess
from stretto.parallel.pipeline.vocabulary.passes import Shard
from stretto.parallel.pipeline.vocabulary.rows import Table
from stretto.parallel.unit import LocalUnit, settle_all
from stretto.schedule.op import Kind
from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate.clock import run as simulate
from stretto.schedule.simulate.costs import Costs
from stretto.spec import capabilities
from stretto.spec.check import stages_of
from stretto.spec.contract import IGNORE
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.sharding import Sharding
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
    scored = bool((schedule.kind == Kind.S).any())
    return assembler.build(
        stages_of(run), placement, num_heads=run.model.num_heads, device=torch.device("cpu"), vocabulary=scored
    )


def shards_of(whole: Shard, ranks: int) -> list[Shard]:
    """The rows of a tied embedding and head, cut for so many ranks."""
    height = -(-len(whole.head) // ranks)
    found = []
    for rank, part in enumerate(whole.head.detach().split(height)):
        weight = nn.Parameter(part.clone())
        sharding = Sharding.whole(f"rows.{rank}", tuple(part.shape))
        unit = LocalUnit(f"rows.{rank}", [(weight, sharding)], mesh=build_mesh(PlanSpec(), 0), compute=part.dtype)
        table = Table(weight=weight, unit=unit, height=height, start=rank * height)
        found.append(Shard(head=weight, unit=unit, table=table))
    return found


FAMILIES = sorted(set(capabilities.SCHEDULES) - {"auto", "skip-pipe"})
CASES = [(name, number, ()) for name in FAMILIES for number in (3, 5)]
CASES += [(name, 5, ("vocabulary:algorithm=1",)) for name in ("1f1b", "zb-v", "chimera")]
CASES += [(name, 5, ("vocabulary:algorithm=2",)) for name in ("zb-h1", "interleaved", "dualpipe")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_family_equals_one_rank(case: tuple[str, int, tuple[str, ...]]) -> None:
    name, microbatches, passes = case
    counts = capabilities.SCHEDULES[name]
    chunks, offload = 2 if 2 in counts else counts[0], microbatches > 4 and not passes
    plan = PlanSpec(pp=4, schedule=name, chunks=chunks, offload=offload, passes=passes)
    run = run_of(plan, microbatches)
    schedule, _ = schedules_of(run)
    model = whole_model(run, schedule)
    shards = shards_of(model.shard, plan.pp) if model.shard is not None else None
    held = [{s for v in range(len(schedule.placement)) for s in schedule.stages_of(r, v)} for r in range(plan.pp)]
    costs = Costs(F=4.0, I=5.0, W=3.0, S=0.7, T=0.9, comm=0.3)
    process = OneProcess(schedule, [{s: model.stages[s] for s in mine} for mine in held], costs=costs, shards=shards)
    batches = batches_of(run, 1, 0, documents=True)
    tokens = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
    loss = process.step(
        batches,
        lambda batch: model.context(batch, seed=run.run.seed, step=1, training=True),
        lambda: torch.tensor(1 / tokens, dtype=torch.float64),
    )
    units = [unit for unit in model.units if model.shard is None or unit not in model.shard.units]
    settle_all([*units, *(shard.unit for shard in shards or ())])
    expected = reference(microbatches)
    assert loss is not None and abs(float(loss) / tokens - expected.losses[0]) <= TOLERANCE
    gradients = expected.gradients[0]
    found = {m.sharding.name: given(m.tensor) for unit in units for m in unit.masters}
    if model.shard is not None and shards is not None:
        found[model.shard.unit.masters[0].sharding.name] = torch.cat([given(shard.head) for shard in shards])
    assert found.keys() == gradients.keys()
    for parameter in gradients.keys() - vanishing(gradients):
        assert error(found[parameter], gradients[parameter]) <= TOLERANCE, parameter
    assert process.makespan == simulate(schedule, costs).makespan


def given(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad
