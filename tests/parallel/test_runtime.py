"""The runtime: plays what the schedule says and nothing else, and leaves nothing behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from equivalence.plan_run import batches_of
from parallel.test_segment import segment_of, weights
from ranks import Ranks
from stretto.parallel.pipeline import operation
from stretto.parallel.pipeline.runtime import Runtime, Seat
from stretto.parallel.pipeline.stage import Stage
from stretto.parallel.unit import settle_all
from stretto.schedule.families import build
from stretto.schedule.op import MESSAGES, Kind, Op
from stretto.schedule.passes.communication import lower
from stretto.schedule.schedule import Schedule
from stretto.spec.contract import Batch
from stretto.spec.errors import UnsupportedError
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.session import Session

MODEL = ModelSpec(vocab_size=61, hidden_size=16, intermediate_size=24, num_layers=4, num_heads=2, initial_std=0.2)
TRAINING = TrainingSpec(global_batch_size=4, sequence_length=8, dtype="float64", learning_rate=0.01)


class Listener:
    """Remembers the operations and whom they wait for."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int | None]] = []
        self.open = 0

    def begin(self, operation: str, /, *, peer: int | None = None) -> None:
        self.heard.append((operation, peer))
        self.open += 1

    def end(self) -> None:
        self.open -= 1


def batch_of(number: int) -> Batch:
    tokens = torch.full((1, 3), number)
    return Batch(tokens=tokens, labels=tokens, positions=tokens, documents=None, samples=tokens[:, 0])


def two_stages(ws: list[nn.Parameter]) -> dict[int, Stage]:
    def first(x: None, context: float, batch: Batch) -> Tensor:
        return torch.tanh(batch.tokens.double() @ ws[0]) * context

    def last(x: Tensor, context: float, batch: Batch) -> Tensor:
        return (x @ ws[1]).square().sum()

    return {i: Stage(i, [segment_of(str(i), run, ws[i])[0]]) for i, run in enumerate((first, last))}


def test_two_stages_on_one_rank_hand_over_without_messages() -> None:
    ws = weights(2)
    schedule = lower(build("interleaved", ranks=1, microbatches=3, chunks=2))
    listener = Listener()
    stages = two_stages(ws)
    runtime = Runtime(stages, schedule, Seat(rank=0, observer=listener))
    made: list[int] = []

    def context(batch: Batch) -> float:
        made.append(int(batch.samples[0]))
        return 1.5

    loss = runtime.step([batch_of(m) for m in range(3)], context, lambda: torch.tensor(0.25))
    expected = torch.zeros((), dtype=torch.float64)
    for m in range(3):
        expected = expected + ((torch.tanh(batch_of(m).tokens.double() @ ws[0]) * 1.5) @ ws[1]).square().sum()
    gradients = torch.autograd.grad(expected / 4, ws)
    assert loss is not None
    torch.testing.assert_close(loss, expected.detach())
    for unit, gradient in zip(runtime.units, gradients, strict=True):
        found = unit.masters[0].tensor.grad
        assert found is not None
        torch.testing.assert_close(found, gradient, rtol=1e-13, atol=1e-13)
    assert made == [0, 1, 2]  # a context is made once for each micro-batch, for both stages and directions
    assert [name for name, _ in listener.heard] == [str(op) for op in schedule.ops(0)] and listener.open == 0
    assert all(stage.num_in_flight == 0 for stage in stages.values())


def test_an_operation_that_can_t_be_played_is_refused() -> None:
    schedule = Schedule.from_orders(
        [[Op(Kind.F, stage=0, microbatch=0), Op(Kind.O, stage=0, microbatch=0)]],
        name="offloading",
        num_stages=1,
        num_microbatches=1,
        placement=[(0,)],
    )
    stages = {0: two_stages(weights(2))[0]}
    played = {kind: make for kind, make in operation._MAKERS.items() if kind is not Kind.O}
    with (
        patch.object(operation, "_MAKERS", played),
        pytest.raises(UnsupportedError, match="has 0O0, which the runtime can't play; it plays F, B, I, W, R, "),
    ):
        Runtime(stages, schedule, Seat(rank=0))


def test_a_gradient_can_t_pass_a_frozen_stage() -> None:
    order = [Op(kind, stage=s, microbatch=0) for kind, s in ((Kind.F, 0), (Kind.F, 1), (Kind.B, 0))]
    schedule = Schedule.from_orders(
        [order], name="frozen end", num_stages=2, num_microbatches=1, placement=[(0, 0)], frozen=[1]
    )
    with pytest.raises(UnsupportedError, match="trains stage 0, but freezes stage 1 behind it"):
        Runtime(two_stages(weights(2)), schedule, Seat(rank=0))


def test_a_frozen_first_stage_is_evaluated_and_its_gradient_is_zero() -> None:
    order = [Op(kind, stage=s, microbatch=0) for kind, s in ((Kind.F, 0), (Kind.F, 1), (Kind.I, 1), (Kind.W, 1))]
    schedule = Schedule.from_orders(
        [order], name="frozen start", num_stages=2, num_microbatches=1, placement=[(0, 0)], frozen=[0]
    )
    ws = weights(2)
    stages = two_stages(ws)
    runtime = Runtime(stages, schedule, Seat(rank=0))
    loss = runtime.step([batch_of(3)], lambda batch: 1.5, lambda: torch.tensor(0.25))
    assert loss is not None and stages[0].num_in_flight == 0
    settle_all(runtime.units)
    first, last = (unit.masters[0].tensor.grad for unit in runtime.units)
    assert first is not None and last is not None and bool((first == 0).all()) and bool((last != 0).any())


def run_of(plan: dict[str, Any]) -> RunSpec:
    return RunSpec(model=MODEL, plan=PlanSpec(**plan), training=TRAINING)


def of_length(run: RunSpec, length: int) -> RunSpec:
    return replace(run, training=replace(run.training, sequence_length=length))


def lengths_on_rank(rank: int, world: int, run: RunSpec, lengths: list[int]) -> list[tuple[float, float]]:
    listener = Listener()
    session = Session.start(run, rank, observer=listener)
    found = []
    for step, length in enumerate(lengths, start=1):
        result = session.train_step(
            step, batches_of(of_length(run, length), step, session.mesh.dp_index, documents=True)
        )
        found.append((result.loss, result.grad_norm))
    kinds = {kind.name for kind in MESSAGES}
    for name, peer in listener.heard:
        assert (peer is not None) == any(kind in name for kind in kinds), name
    return found


@pytest.mark.parametrize("plan", [{"pp": 2}, {"pp": 2, "schedule": "interleaved", "chunks": 2}], ids=str)
def test_the_batch_shape_may_change_between_steps(ranks: Ranks, plan: dict[str, Any]) -> None:
    lengths = [8, 12, 8, 4]
    (alone,) = ranks.run(lengths_on_rank, 1, run_of({}), lengths)
    for found in ranks.run(lengths_on_rank, 2, run_of(plan), lengths):
        for mine, expected in zip(found, alone, strict=True):
            assert mine == pytest.approx(expected, rel=1e-11)


def evaluate_on_rank(rank: int, world: int, run: RunSpec, between: bool) -> list[Any]:
    session = Session.start(run, rank)
    found: list[Any] = []
    for step in (1, 2, 3):
        batches = batches_of(run, step, session.mesh.dp_index, documents=True)
        found.append(session.train_step(step, batches).loss)
        if between:
            gradients = [m.tensor.grad.clone() for m in session.model.masters if m.tensor.grad is not None]
            one, two = (session.evaluate(batches) for _ in range(2))
            assert one == two
            after = [m.tensor.grad for m in session.model.masters if m.tensor.grad is not None]
            assert all(torch.equal(a, b) for a, b in zip(gradients, after, strict=True))
            assert all(stage.num_in_flight == 0 for stage in session.model.stages.values())
    return found


@pytest.mark.parametrize("plan", [{"pp": 2}, {"dp_shard": 2, "zero": 3}], ids=str)
def test_evaluation_between_steps_changes_nothing(ranks: Ranks, plan: dict[str, Any]) -> None:
    run = replace(run_of(plan), model=replace(MODEL, dropout=0.3))
    assert ranks.run(evaluate_on_rank, 2, run, True) == ranks.run(evaluate_on_rank, 2, run, False)


def mean_loss_on_rank(rank: int, world: int, run: RunSpec) -> tuple[float, int]:
    session = Session.start(run, rank)
    return session.evaluate(batches_of(run, 1, session.mesh.dp_index, documents=True))


def test_evaluation_is_the_same_under_every_plan(ranks: Ranks) -> None:
    run = replace(run_of({}), model=replace(MODEL, dropout=0.3))
    ((loss, tokens),) = ranks.run(mean_loss_on_rank, 1, run)
    split = {"pp": 2, "schedule": "zb-v", "chunks": 2, "passes": ("vocabulary",)}
    for plan in ({"pp": 2}, {"tp": 2}, {"dp_replicate": 2}, {"dp_shard": 2, "zero": 3}, split):
        for found in ranks.run(mean_loss_on_rank, 2, replace(run, plan=PlanSpec(**plan))):
            assert found == (pytest.approx(loss, rel=1e-12), tokens)
