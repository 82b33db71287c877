"""Memory figures: exact where they can be counted by hand, and in the right order between plans."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equivalence.plan_run import batches_of
from ranks import Ranks
from stretto.models.foreign import ForeignStack
from stretto.planner.memory import memory
from stretto.planner.request import Request
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.memory import ActivationMeter, passing_bytes, persistent_bytes
from stretto.trainer.session import Session

B, T, D, V, L = 2, 8, 16, 32, 3
TRAINING = TrainingSpec(global_batch_size=2 * B, sequence_length=T, dtype="float64")
RUN = RunSpec(
    model=ModelSpec(family="foreign", module="nowhere:small", vocab_size=V, num_layers=L, num_heads=1),
    plan=PlanSpec(micro_batch_size=B),
    training=TRAINING,
)
LLAMA = replace(
    RUN,
    model=ModelSpec(vocab_size=61, hidden_size=32, intermediate_size=96, num_layers=4, num_heads=4),
    training=replace(TRAINING, global_batch_size=4),
    plan=PlanSpec(),
)


class Exponential(nn.Module):
    """Keeps exactly two tensors [B, T, D] for its backward: the input (for the weight) and the result of exp."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.01 * torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).exp()


def small() -> Any:
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=False)
    blocks = [Exponential() for _ in range(L)]
    stack = ForeignStack(embed=nn.Embedding(V, D), blocks=blocks, head=head, loss=first_label, tensor_rules={})
    return stack.to(torch.float64)


def first_label(predictions: Tensor, batch: Any) -> Tensor:
    """A loss that keeps nothing but the shape of its input."""
    return predictions.sum()


def measure(run: RunSpec, rank: int, stack: Any = None) -> tuple[int, int]:
    session = Session.start(run, rank, stack=stack)
    meter = ActivationMeter(session)
    with meter.watch():
        session.train_step(1, batches_of(run, 1, session.mesh.dp_index, documents=False))
    return persistent_bytes(session), meter.peak_bytes


def test_activations_are_counted_exactly() -> None:
    persistent, peak = measure(RUN, 0, small())
    size = B * T * D * 8
    # The embedding's output is the input of block 0; the output of exp in block i is the input of block i + 1, one
    # storage; so L + 1 of them, and the ids that the embedding keeps (rows of the whole step's tensor).
    assert peak == (L + 1) * size + 2 * B * T * 8
    parameters = 2 * V * D + L * D * D
    assert persistent == 8 * parameters * 4 + 4 * (L + 2)  # values, gradients, two moments; AdamW's step counts


def test_a_second_meter_counts_from_zero() -> None:
    session = Session.start(RUN, 0, stack=small())
    peaks = []
    for step in (1, 2):
        meter = ActivationMeter(session)
        with meter.watch():
            session.train_step(step, batches_of(RUN, step, 0, documents=False))
        peaks.append(meter.peak_bytes)
    assert peaks[0] == peaks[1]


def on_rank(rank: int, world: int, runs: list[RunSpec]) -> list[tuple[int, int]]:
    return [measure(run, rank) for run in runs]


def test_recompute_keeps_less() -> None:
    by_choice = {r: measure(replace(LLAMA, plan=PlanSpec(recompute=r)), 0) for r in ("none", "selective", "full")}  # type: ignore[arg-type]
    none, selective, full = (by_choice[r][1] for r in ("none", "selective", "full"))
    assert full < selective < none and full < 0.5 * none
    assert len({persistent for persistent, _ in by_choice.values()}) == 1


def test_zero_keeps_a_share_between_steps_and_no_more_activations(ranks: Ranks) -> None:
    (alone,) = ranks.run(on_rank, 1, [LLAMA])
    runs = [replace(LLAMA, plan=PlanSpec(dp_shard=4, zero=zero)) for zero in (1, 2, 3)]  # type: ignore[arg-type]
    found = ranks.run(on_rank, 4, runs)
    (whole, activations), *_ = alone
    for mine in found:
        persistent = [p for p, _ in mine]
        # In quarters of one copy of the model (one rank: values, gradients, 2 moments = 16 quarters):
        # zero 1 and 2 keep values 4, the reduced quarter of the gradients 1, moments 2; zero 3 a quarter of all.
        # Padding, and blocks that lie unevenly on 4 ranks, cost less than a hundredth.
        for found_bytes, quarters in zip(persistent, (7, 7, 4), strict=True):
            assert found_bytes == pytest.approx(whole * quarters / 16, rel=0.01)
        # Gathered parameters are no activations, however often their storage comes and goes.
        assert [a for _, a in mine] == [activations] * 3


def states_on_rank(rank: int, world: int, runs: list[RunSpec]) -> list[int]:
    found = []
    for run in runs:
        session = Session.start(run, rank)
        session.train_step(1, batches_of(run, 1, session.mesh.dp_index, documents=False))
        found.append(persistent_bytes(session) + passing_bytes(session))
    return found


def test_independent_factors_keep_what_the_planner_says(ranks: Ranks) -> None:
    factors = (
        {"shard_gradients": 2},
        {"shard_parameters": 2},
        {"shard_parameters": 2, "shard_gradients": 4},
        {"dp_shard": 2, "dp_replicate": 2, "zero": 3},
    )
    runs = [replace(LLAMA, plan=PlanSpec(**{"dp_shard": 4, **chosen})) for chosen in factors]  # type: ignore[arg-type]
    predicted = [memory(Request(run=run).work(run.plan))[0] for run in runs]
    for mine in ranks.run(states_on_rank, 4, runs):
        for found, said in zip(mine, predicted, strict=True):
            # Padding, and the step counts of AdamW, cost less than a hundredth.
            assert found == pytest.approx(said.parameters + said.gradients + said.optimizer, rel=0.01)


def test_a_pipeline_rank_keeps_its_share_of_the_parameters(ranks: Ranks) -> None:
    [[(whole, activations)]] = ranks.run(on_rank, 1, [LLAMA])
    first, last = (f[0] for f in ranks.run(on_rank, 2, [replace(LLAMA, plan=PlanSpec(pp=2))]))
    assert first[0] + last[0] == pytest.approx(whole, rel=0.01)
    # Under 1F1B the first of two ranks holds two micro-batches of its half, the last one of its.
    assert activations < first[1] + last[1] < 2.2 * activations and last[1] < first[1] + activations / 2
