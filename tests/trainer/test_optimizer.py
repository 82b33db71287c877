"""AdamW over masters: who decays, that a step is torch's own, and what its state looks like in a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from equivalence.plan_run import batches_of, plain, together, train_plan
from equivalence.reference import error, train_reference, worst_of
from ranks import Ranks
from stretto.parallel.master import Master
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.sharding import Sharding
from stretto.spec.training import TrainingSpec
from stretto.trainer.optimizer import MOMENTS, build_optimizer, optimizer_pieces, set_steps_taken
from stretto.trainer.resume import session_pieces
from stretto.trainer.session import Session
from trainer.small import MODEL

TRAINING = TrainingSpec(learning_rate=0.1, weight_decay=0.5, eps=1e-6, beta1=0.8, beta2=0.9)


def master_of(name: str, *shape: int, flat: bool = False) -> Master:
    values = torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    tensor = values.flatten() if flat else values
    sharding = Sharding.whole(name, shape)
    return Master(tensor=tensor, sharding=sharding, start=0, stop=tensor.numel(), counted=True, owned=True)


def test_norms_and_biases_do_not_decay_even_where_all_is_flat() -> None:
    masters = [master_of("w", 2, 3, flat=True), master_of("b", 3)]
    optimizer = build_optimizer(masters, TRAINING)
    before = [m.tensor.clone() for m in masters]
    for master in masters:
        master.tensor.grad = torch.zeros_like(master.tensor)
    optimizer.step()
    torch.testing.assert_close(masters[0].tensor, before[0] * (1 - 0.1 * 0.5))
    assert torch.equal(masters[1].tensor, before[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_steps_equal_torchs_own(dtype: torch.dtype) -> None:
    shapes = {"w": (5, 3), "norm": (7,), "b": (3,)}
    generator = torch.Generator().manual_seed(0)
    values = {n: torch.randn(s, generator=generator, dtype=dtype) for n, s in shapes.items()}
    mine = [
        Master(
            tensor=v.clone(), sharding=Sharding.whole(n, shapes[n]), start=0, stop=v.numel(), counted=True, owned=True
        )
        for n, v in values.items()
    ]
    theirs = {n: torch.nn.Parameter(v.clone()) for n, v in values.items()}
    optimizer = build_optimizer(mine, TRAINING)
    groups = [
        {"params": [theirs["w"]], "weight_decay": 0.5},
        {"params": [theirs["norm"], theirs["b"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.1, eps=1e-6, betas=(0.8, 0.9), fused=False)
    for _ in range(4):
        for master in mine:
            gradient = torch.randn(master.tensor.shape, generator=generator, dtype=dtype)
            master.tensor.grad = gradient
            theirs[master.sharding.name].grad = gradient.clone()
        optimizer.step()
        reference.step()
    for master in mine:
        torch.testing.assert_close(master.tensor, theirs[master.sharding.name].detach())


def test_state_exists_from_the_start_and_steps_are_restored() -> None:
    masters = [master_of("w", 2, 2)]
    optimizer = build_optimizer(masters, TRAINING)
    names = [p.name for p in optimizer_pieces(masters, optimizer)]
    assert names == ["model.w", *(f"optimizer.{m}.w" for m in MOMENTS)]
    set_steps_taken(optimizer, 7)
    assert optimizer.state[masters[0].tensor]["step"].item() == 7.0


def test_a_rank_without_parameters_has_an_optimizer() -> None:
    optimizer = build_optimizer([], TRAINING)
    optimizer.step()
    assert list(optimizer_pieces([], optimizer)) == []


def pieces_on_rank(rank: int, world: int, run: RunSpec) -> Any:
    session = Session.start(run, rank)
    for step in (1, 2):
        session.train_step(step, batches_of(run, step, session.mesh.dp_index, documents=False))
    found: dict[str, list[Any]] = {}
    for piece in session_pieces(session):
        kind = next(k for k in ("model", *(f"optimizer.{m}" for m in MOMENTS)) if piece.name.startswith(k + "."))
        found.setdefault(kind, []).extend([("." + name.removeprefix(kind), *rest) for name, *rest in plain([piece])])
    return found


def state_of(ranks: Ranks, plan: PlanSpec) -> dict[str, dict[str, Tensor]]:
    training = TrainingSpec(global_batch_size=4, sequence_length=8, dtype="float64", learning_rate=0.01)
    found = ranks.run(pieces_on_rank, plan.num_ranks, RunSpec(model=MODEL, plan=plan, training=training))
    kinds = {k for f in found for k in f}
    return {k: together([f.get(k, []) for f in found]) for k in kinds}


@pytest.mark.parametrize("plan", [PlanSpec(pp=2), PlanSpec(tp=2), PlanSpec(dp_shard=2, zero=3)], ids=str)
def test_moments_are_the_same_under_every_plan(ranks: Ranks, plan: PlanSpec) -> None:
    expected, found = state_of(ranks, PlanSpec()), state_of(ranks, plan)
    assert found.keys() == expected.keys() == {"model", *(f"optimizer.{m}" for m in MOMENTS)}
    for kind in expected:
        assert found[kind].keys() == expected[kind].keys()
        for name, value in expected[kind].items():
            torch.testing.assert_close(found[kind][name], value, rtol=1e-8, atol=1e-14, msg=f"{kind} {name}")


@pytest.mark.parametrize("plan", [{}, {"pp": 2, "schedule": "zb-h1"}, {"dp_shard": 2, "zero": 3}], ids=str)
def test_sgd_under_every_plan_is_torchs_own(ranks: Ranks, plan: dict[str, Any]) -> None:
    training = TrainingSpec(
        global_batch_size=4, sequence_length=8, dtype="float64", learning_rate=0.1, optimizer="sgd", clip_norm=0.5
    )
    run = RunSpec(model=MODEL, plan=PlanSpec(**plan), training=training)
    record, reference = train_plan(ranks, run, 3), train_reference(run, 3)
    assert worst_of(record.losses, reference.losses) <= 1e-9
    assert max(error(record.weights[n], reference.weights[n]) for n in reference.weights) <= 1e-9


def test_the_velocity_is_what_a_checkpoint_of_sgd_holds() -> None:
    masters = [master_of("w", 2, 2)]
    optimizer = build_optimizer(masters, replace(TRAINING, optimizer="sgd"))
    names = [p.name for p in optimizer_pieces(masters, optimizer)]
    assert names == ["model.w", "optimizer.momentum_buffer.w"]
    set_steps_taken(optimizer, 7)
