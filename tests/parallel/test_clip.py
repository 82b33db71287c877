"""The gradient norm: replicated and tied copies count once, whatever the plan."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from equivalence.plan_run import batches_of
from parallel.test_master import mesh_at
from ranks import Ranks
from stretto.parallel.clip import scale_gradients, squared_norm_held
from stretto.parallel.master import Master, counts_here
from stretto.parallel.mesh import Holders
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.sharding import Sharding
from stretto.spec.training import TrainingSpec
from stretto.trainer.session import Session

CPU = torch.device("cpu")


def master_of(sharding: Sharding, gradient: list[float] | None, tp: int = 0, holders: Holders | None = None) -> Master:
    counted = counts_here(sharding, mesh_at(tp=(tp, 2), pp=(1, 2)), holders)
    tensor = torch.zeros(sharding.shape)
    tensor.grad = None if gradient is None else torch.tensor(gradient)
    return Master(tensor=tensor, sharding=sharding, start=0, stop=tensor.numel(), counted=counted, owned=counted)


def test_only_what_counts_is_summed_and_all_is_scaled() -> None:
    original = master_of(Sharding.whole("a", (2,)), [3.0, 4.0])
    tied = master_of(Sharding.whole("b", (2,), tied_to="a"), [3.0, 4.0], holders=Holders(ranks=(0, 1), group=None))
    frozen = master_of(Sharding.whole("c", (2,)), None)
    on_second_rank = master_of(Sharding.whole("a", (2,)), [3.0, 4.0], tp=1)
    empty = master_of(Sharding.whole("d", (0,)), [])
    masters = [original, tied, frozen, on_second_rank, empty]
    squared = squared_norm_held(masters, device=CPU)
    assert squared.dtype == torch.float64 and squared.item() == pytest.approx(25.0)
    scale_gradients(masters, 0.5)
    for master in (original, tied, on_second_rank):
        assert master.tensor.grad is not None and master.tensor.grad.tolist() == [1.5, 2.0]


def test_nothing_held_is_zero() -> None:
    assert squared_norm_held([], device=CPU).item() == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_the_norm(value: float) -> None:
    masters = [master_of(Sharding.whole("a", (2,)), [1.0, value])]
    assert not math.isfinite(squared_norm_held(masters, device=CPU).item())


def norm_on_rank(rank: int, world: int, run: RunSpec) -> float:
    session = Session.start(run, rank)
    totals = session.step.gradients(1, batches_of(run, 1, session.mesh.dp_index, documents=True))
    return math.sqrt(totals.squared_norm)


TIED = ModelSpec(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    tied_embeddings=True,
    qkv_bias=True,
    initial_std=0.2,
)


@pytest.mark.parametrize(
    "plan", [{"pp": 2}, {"tp": 2}, {"dp_replicate": 2}, {"pp": 2, "tp": 2, "dp_shard": 2, "zero": 2}], ids=str
)
def test_the_norm_is_the_whole_models(ranks: Ranks, plan: dict[str, Any]) -> None:
    training = TrainingSpec(global_batch_size=4, sequence_length=8, dtype="float64")
    (expected,) = ranks.run(norm_on_rank, 1, RunSpec(model=TIED, training=training))
    run = RunSpec(model=TIED, plan=PlanSpec(**plan), training=training)
    assert ranks.run(norm_on_rank, run.plan.num_ranks, run) == [pytest.approx(expected, rel=1e-12)] * run.plan.num_ranks
