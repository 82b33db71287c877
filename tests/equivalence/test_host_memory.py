"""Activations that spend the time in the host's memory come back as they were.

The same plan with and without offload does the same arithmetic in the same order, so that losses and gradients are
equal bit by bit.  Without offload plans are held to one rank in test_plans and test_schedules.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from equivalence.plan_run import Pieces, batches_of, plain
from equivalence.test_plans import MODELS
from ranks import Ranks
from stretto.schedule.op import Kind
from stretto.schedule.simulate.clock import run as simulate
from stretto.schedule.simulate.costs import Costs
from stretto.schedule.simulate.memory import peaks_over_time
from stretto.spec.check import check
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.memory import ActivationMeter
from stretto.trainer.planned import planned
from stretto.trainer.session import Session

STEPS = 2
Case = tuple[str, str, dict[str, Any]]
CASES: list[Case] = [
    ("float64", "llama", {"pp": 4, "schedule": "1f1b"}),
    (
        "float64",
        "tied",
        {"pp": 2, "schedule": "interleaved", "chunks": 2, "passes": ("vocabulary:algorithm=2",), "cp": 2},
    ),
    ("float64", "tied", {"pp": 2, "schedule": "interleaved", "chunks": 2, "recompute": "selective"}),
    ("float64", "tied", {"pp": 2, "schedule": "v-half", "chunks": 2, "dp_shard": 2, "zero": 3}),
    ("float64", "dropout", {"pp": 2, "schedule": "gpipe", "recompute": "full"}),
    ("bfloat16", "gpt2", {"pp": 2, "schedule": "gpipe", "tp": 2}),
]


def run_of(dtype: str, model: str, plan: dict[str, Any]) -> RunSpec:
    training = TrainingSpec(steps=10, sequence_length=16, dtype=dtype, learning_rate=0.01, clip_norm=0.5)
    run = RunSpec(run=RunSettings(seed=7), model=MODELS[model], plan=PlanSpec(**plan), training=training)
    return replace(run, training=replace(training, global_batch_size=6 * run.plan.dp))


def train(rank: int, run: RunSpec) -> tuple[list[float], list[Pieces], int, int]:
    """Losses, gradients, peak of activation bytes, and host bytes used, of one rank."""
    session = Session.start(run, rank)
    losses, gradients = [], []
    meter = ActivationMeter(session)
    with meter.watch():
        for step in range(1, STEPS + 1):
            result = session.train_step(step, batches_of(run, step, session.mesh.dp_index, documents=True))
            losses += [result.loss, result.grad_norm]
            held = [m for m in session.model.masters if m.tensor.grad is not None]
            gradients.append(plain([p for m in held for p in m.pieces("gradient", m.tensor.grad)]))
    offloader = session.runtime.offloader
    assert offloader is None or offloader.pool.used_bytes == offloader.pool.refused == 0
    return losses, gradients, meter.peak_bytes, 0 if offloader is None else offloader.pool.peak_bytes


def both(rank: int, world: int, run: RunSpec) -> list[Any]:
    return [train(rank, replace(run, plan=replace(run.plan, offload=offload))) for offload in (False, True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_offload_changes_no_bit_and_frees_what_it_should(ranks: Ranks, case: Case) -> None:
    run = run_of(*case)
    check(replace(run, plan=replace(run.plan, offload=True)), data=False)
    costs = Costs(act_w=0.85, O=1.0, L=1.0)
    bare, moved = (planned(replace(run, plan=replace(run.plan, offload=o))) for o in (False, True))
    before, after = (peaks_over_time(simulate(s, costs)) for s in (bare, moved))
    for rank, (without, with_it) in enumerate(ranks.run(both, run.plan.num_ranks, run)):
        assert without[0] == with_it[0]
        for a, b in zip(without[1], with_it[1], strict=True):
            assert all(x[:3] == y[:3] and torch.equal(x[3], y[3]) for x, y in zip(a, b, strict=True))
        pp = rank // (run.plan.num_ranks // run.plan.pp)
        measured, simulated = with_it[2] / without[2], after[pp] / before[pp]
        if run.plan.recompute == "full":  # what the backward makes again is measured besides, with and without
            assert measured < 0.8 and simulated < 0.8
        else:
            # What S keeps for T is measured, and doesn't count in the simulator.
            assert measured == pytest.approx(simulated, rel=0.1 if run.plan.passes else 0.06)
        assert (with_it[3] > 0) == any(op.kind is Kind.O for op in moved.ops(pp))
