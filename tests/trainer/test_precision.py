"""bfloat16 as the design defines it: float32 masters, moments, gradient sums and reductions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from equivalence.plan_run import batches_of
from ranks import Ranks
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.session import Session

STEPS = 12
RUN = RunSpec(
    model=ModelSpec(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, initial_std=0.1
    ),
    training=TrainingSpec(global_batch_size=8, sequence_length=16, dtype="bfloat16", learning_rate=0.003),
)
BOUND = 0.02
"""On the relative error of a loss. bfloat16 has 8 bits: a product is off by 2^-9 = 0.002 at most; a logit sums 32 of
them with random signs through two layers, so it is off by about 0.01 of its size, and a loss, the mean over some 60
tokens, by less than that; twelve updates of AdamW let it drift by a few parts in a thousand."""


def train_on_rank(rank: int, world: int, run: RunSpec) -> dict[str, Any]:
    session = Session.start(run, rank)
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        # One batch again and again: the loss must fall, so a dead update would show.
        result = session.train_step(step, batches_of(run, 1, session.mesh.dp_index, documents=True))
        losses.append(result.loss)
        norms.append(result.grad_norm)
    masters = session.model.masters
    moments = [v for s in session.optimizer.state.values() for v in s.values()]
    parameters = [p for unit in session.model.units for p in unit.parameters]
    return {
        "losses": losses,
        "norms": norms,
        "masters": {m.tensor.dtype for m in masters},
        "gradients": {m.tensor.grad.dtype for m in masters if m.tensor.grad is not None},
        "moments": {m.dtype for m in moments},
        "parameters": {p.dtype for p in parameters},
        "updates": session.step.updates,
    }


@pytest.fixture(scope="module")
def float32(ranks: Ranks) -> dict[str, Any]:
    run = replace(RUN, training=replace(RUN.training, dtype="float32"))
    return ranks.run(train_on_rank, 1, run)[0]


PLANS: list[dict[str, Any]] = [
    {},
    {"recompute": "full"},
    {"dp_shard": 2, "zero": 3},
    {"dp_shard": 2},
    {"dp_replicate": 4, "shard_parameters": 2, "shard_optimizer": 4},
    {"dp_replicate": 2},
    {"tp": 2},
    {"pp": 2},
    {"pp": 2, "schedule": "zb-h1", "dp_shard": 2, "zero": 3},
    {"pp": 2, "schedule": "dualpipe"},
    {"pp": 2, "passes": ("vocabulary:algorithm=1",)},
    {"pp": 2, "passes": ("vocabulary:algorithm=2",), "tp": 2},
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_curve_stays_close_to_float32s(ranks: Ranks, plan: dict[str, Any], float32: dict[str, Any]) -> None:
    run = replace(RUN, plan=PlanSpec(**plan))
    for found in ranks.run(train_on_rank, run.plan.num_ranks, run):
        assert found["losses"] == pytest.approx(float32["losses"], rel=BOUND)
        assert found["losses"] != float32["losses"]
        assert found["norms"][0] == pytest.approx(float32["norms"][0], rel=0.05)
        assert found["losses"][-1] < found["losses"][0] - 0.5
        assert found["parameters"] == {torch.bfloat16}
        assert found["masters"] == found["gradients"] == found["moments"] == {torch.float32}


def tiny_updates_on_rank(rank: int, world: int, run: RunSpec) -> float:
    session = Session.start(run, rank)
    before = [m.tensor.detach().clone() for m in session.model.masters]
    for step in range(1, 4):
        session.train_step(step, batches_of(run, step, session.mesh.dp_index, documents=True))
    pairs = zip(session.model.masters, before, strict=True)
    return min(float((m.tensor.detach() != b).float().mean()) for m, b in pairs if m.tensor.ndim)


@pytest.mark.parametrize("plan", [{}, {"dp_shard": 2, "zero": 3}, {"tp": 2}], ids=str)
def test_updates_too_small_for_bfloat16_are_not_lost(ranks: Ranks, plan: dict[str, Any]) -> None:
    # 1e-5 beside a norm of 1.0 is far below bfloat16's step of 2^-8, and well above float32's.
    training = replace(RUN.training, learning_rate=1e-5)
    run = replace(RUN, plan=PlanSpec(**plan), training=training)
    assert min(ranks.run(tiny_updates_on_rank, run.plan.num_ranks, run)) > 0.5


def micro_batches_on_rank(rank: int, world: int, run: RunSpec) -> float:
    session = Session.start(run, rank)
    return session.train_step(1, batches_of(run, 1, 0, documents=True)).grad_norm


def test_accumulation_loses_nothing(ranks: Ranks) -> None:
    # Eight micro-batches against one: sums in float32 differ from one product only by the products' own rounding.
    one, eight = (
        ranks.run(micro_batches_on_rank, 1, replace(RUN, plan=PlanSpec(micro_batch_size=size)))[0] for size in (8, 1)
    )
    assert eight == pytest.approx(one, rel=0.01)
