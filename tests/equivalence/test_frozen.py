"""Frozen parameters: what trains gets the gradients of one rank that freezes the same, and the rest stays as it was.

First stages that are frozen have no backward; tolerance as in test_plans.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from equivalence.plan_run import batches_of, train_plan
from equivalence.reference import build_reference, error, train_reference, vanishing, worst_gradient, worst_of
from equivalence.test_plans import TOLERANCE
from equivalence.test_schedules import STEPS, run_of
from ranks import Ranks
from stretto.schedule.op import Kind
from stretto.spec.check import check
from stretto.spec.errors import ConfigError
from stretto.spec.run import RunSpec
from stretto.trainer.freezing import matches
from stretto.trainer.memory import persistent_bytes
from stretto.trainer.schedules import schedules_of
from stretto.trainer.session import Session

ENDS = ("inputs.*", "blocks.0.*", "blocks.1.*")
"""All of the first of four stages of two layers each."""
PARTS = (*ENDS, "blocks.2.attention.*", "*norm*", "blocks.5.*")
"""Besides that a part of a block, all norms, and a block in the middle, through which gradients pass."""
CASES: list[tuple[str, int, tuple[str, ...], dict[str, Any]]] = [
    ("tied", 4, PARTS, {}),
    ("dense", 4, ENDS, {"pp": 4, "schedule": "zb-h1"}),
    ("dense", 3, PARTS, {"pp": 2, "chunks": 2, "schedule": "zb-v", "dp_shard": 2, "zero": 3}),
    ("tied", 4, PARTS, {"pp": 4, "schedule": "chimera", "passes": ("2bp", "recompute")}),
    ("dense", 3, ENDS, {"pp": 4, "schedule": "zb-h1", "passes": ("vocabulary:algorithm=1",)}),
    ("tied", 3, PARTS, {"pp": 2, "passes": ("vocabulary:algorithm=1",)}),
    ("gpt2", 3, ("inputs.positions.*", "outputs.*"), {"pp": 2, "passes": ("vocabulary:algorithm=2",)}),
    ("gpt2", 4, ENDS, {"pp": 2, "tp": 2, "stages": (3, 5), "schedule": "zb-h2", "recompute": "full"}),
    ("dropout", 4, PARTS, {"pp": 2, "chunks": 2, "schedule": "interleaved", "dp_shard": 2, "zero": 2}),
]


def frozen_run(model: str, plan: dict[str, Any], rows: int, freeze: tuple[str, ...]) -> RunSpec:
    run = run_of(model, plan, rows)
    return replace(run, training=replace(run.training, freeze=freeze))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_frozen_parameters_equal_one_rank(ranks: Ranks, case: tuple[str, int, tuple[str, ...], dict[str, Any]]) -> None:
    model, microbatches, freeze, plan = case
    rows = microbatches * run_of(model, plan, 1).plan.dp
    run = frozen_run(model, plan, rows, freeze)
    check(run, data=False)
    built = build_reference(run, torch.float64)
    for name, parameter in built.named_parameters():
        parameter.requires_grad_(not matches(name, freeze))
    initial = {name: parameter.detach().clone() for name, parameter in built.named_parameters()}
    reference, found = train_reference(run, STEPS, model=built), train_plan(ranks, run, STEPS)
    assert worst_of(found.losses, reference.losses) <= TOLERANCE
    gradient_error, worst = worst_gradient(found, reference)
    assert gradient_error <= TOLERANCE, worst
    assert worst_of(found.norms, reference.norms) <= TOLERANCE
    noise = vanishing(reference.gradients[0])
    for name, expected in reference.weights.items():
        assert name in noise or error(found.weights[name], expected) <= TOLERANCE, name
        assert torch.equal(found.weights[name], initial[name]) == matches(name, freeze), name


def test_frozen_stages_have_no_backward() -> None:
    schedule, _ = schedules_of(frozen_run("dense", {"pp": 4, "schedule": "zb-h1"}, 4, (*ENDS, "blocks.2.*")))
    assert schedule.frozen == {0}
    assert {op.kind for op in schedule.ops(0)} == {Kind.F, Kind.SEND_F}
    assert Kind.SEND_B not in {op.kind for op in schedule.ops(1)}


def bytes_on_rank(rank: int, world: int, run: RunSpec) -> tuple[int, int, int, list[str]]:
    """Elements held and trained, bytes between steps, and what the optimizer has moments of."""
    session = Session.start(run, rank)
    session.train_step(1, batches_of(run, 1, 0, documents=True))
    masters = session.model.masters
    moments = [m.sharding.name for m in masters if m.tensor in session.optimizer.state]
    trained = sum(m.tensor.numel() for m in masters if m.trained)
    return sum(m.tensor.numel() for m in masters), trained, persistent_bytes(session), moments


def test_frozen_parameters_cost_no_more_than_themselves(ranks: Ranks) -> None:
    run = frozen_run("dense", {"pp": 2, "dp_shard": 2, "zero": 1}, 4, ("inputs.*", "blocks.[012].*"))
    for held, trained, found, moments in ranks.run(bytes_on_rank, 4, run):
        assert not [name for name in moments if matches(name, run.training.freeze)]
        steps = 4 * len(moments)
        whole = 8 * 2 * held  # zero 1 keeps parameters whole on both shards
        assert found <= whole + 8 * 3 * (trained + 64) + steps, (held, trained, found)


def test_what_can_not_be_frozen() -> None:
    for freeze, said in (
        (("input.*",), "no parameter is named 'input.*'"),
        (("outputs.head.*",), "is tied to"),
        (("*",), "leaves nothing to train"),
    ):
        with pytest.raises(ConfigError, match=said.replace("*", r"\*")):
            schedules_of(frozen_run("tied", {"pp": 2}, 2, freeze))
