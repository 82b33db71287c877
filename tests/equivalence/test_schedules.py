"""Every schedule gives the loss, the gradients and the weights of one plain rank.

The families as plans name them, and orders that no family would choose (orders.py); float64, two steps, very
unequal numbers of valid tokens, clipping active.  Tolerance as in test_plans.  Every family with fewer and with more
micro-batches than four ranks, which needs no processes, is in test_one_process_plans.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest

from equivalence.orders import any_order
from equivalence.plan_run import together, train_on_rank
from equivalence.reference import Record, error, train_reference, vanishing, worst_gradient, worst_of
from equivalence.test_plans import LLAMA, TOLERANCE
from ranks import Ranks
from stretto.schedule.schedule import Schedule
from stretto.spec import capabilities
from stretto.spec.check import check as check_spec
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer import schedules, session

STEPS = 2
DEEP = replace(LLAMA, num_layers=8)
MODELS: dict[str, ModelSpec] = {
    "dense": DEEP,
    "tied": replace(DEEP, tied_embeddings=True),
    "dropout": replace(DEEP, dropout=0.2, tied_embeddings=True),
    "gpt2": replace(DEEP, family="gpt2", num_kv_heads=None, tied_embeddings=True, qkv_bias=True, rope_scaling=None),
    "long": replace(DEEP, num_layers=16, tied_embeddings=True),
}


def run_of(model: str, plan: dict[str, Any], rows: int) -> RunSpec:
    training = TrainingSpec(
        steps=10, global_batch_size=rows, sequence_length=8, dtype="float64", learning_rate=0.01, clip_norm=0.5
    )
    return RunSpec(run=RunSettings(seed=7), model=MODELS[model], plan=PlanSpec(**plan), training=training)


@cache
def reference_of(model: str, rows: int) -> Record:
    return train_reference(run_of(model, {}, rows), STEPS)


def play_on_rank(rank: int, world: int, run: RunSpec, schedule: Schedule | None) -> dict[str, Any]:
    if schedule is None:
        return train_on_rank(rank, world, run, STEPS, True)
    both = tuple(schedules.lowered_and_valid(s) for s in (schedule, schedules.forward_of(schedule)))
    with patch.object(session, "schedules_of", lambda _: both):
        return train_on_rank(rank, world, run, STEPS, True)


def check(ranks: Ranks, run: RunSpec, schedule: Schedule | None, reference: Record) -> None:
    found = ranks.run(play_on_rank, run.plan.num_ranks, run, schedule)
    for other in found:
        assert (other["losses"], other["norms"]) == (found[0]["losses"], found[0]["norms"])
    record = Record(
        losses=found[0]["losses"],
        norms=found[0]["norms"],
        gradients=[together([f["gradients"][step] for f in found]) for step in range(STEPS)],
        weights=together([f["weights"] for f in found]),
    )
    assert worst_of(record.losses, reference.losses) <= TOLERANCE
    gradient_error, name = worst_gradient(record, reference)
    assert gradient_error <= TOLERANCE, name
    assert worst_of(record.norms, reference.norms) <= TOLERANCE
    for name in reference.weights.keys() - vanishing(reference.gradients[0]):
        assert error(record.weights[name], reference.weights[name]) <= TOLERANCE, name


ORDERS: list[tuple[str, int, str, dict[str, Any]]] = [
    ("loop2", 3, "dense", {}),
    ("v2", 1, "tied", {}),
    ("v2", 4, "tied", {"dp_shard": 2, "zero": 3}),
    ("v2", 4, "gpt2", {"tp": 2}),
    ("w2", 3, "dense", {"recompute": "selective"}),
    ("voices2", 4, "dense", {}),
    ("voices2", 5, "tied", {"dp_shard": 2, "zero": 1}),
    ("voices2", 4, "tied", {"dp_shard": 2, "zero": 2}),
    ("voices2", 4, "gpt2", {"dp_shard": 2, "zero": 3}),
    ("voices2", 4, "dropout", {"tp": 2, "recompute": "full"}),
    ("voices2", 1, "tied", {}),
    ("folded2", 4, "tied", {"dp_replicate": 2}),
    ("uneven2", 3, "tied", {"recompute": "full"}),
    ("v4", 5, "tied", {}),
    ("v4", 3, "dropout", {"dp_shard": 2, "zero": 3}),
    ("voices4", 6, "tied", {}),
    ("voices4", 4, "dense", {"tp": 2}),
    ("same4", 4, "tied", {}),
    ("scattered4", 4, "tied", {}),
    ("idle3", 3, "tied", {}),
    ("v8", 4, "long", {}),
    ("voices8", 4, "tied", {}),
]


@pytest.mark.parametrize("case", ORDERS, ids=str)
def test_any_order_equals_one_rank(ranks: Ranks, case: tuple[str, int, str, dict[str, Any]]) -> None:
    name, microbatches, model, plan = case
    schedule = any_order(name, microbatches=microbatches, seed=ORDERS.index(case), recompute=microbatches == 4)
    shape = {"pp": schedule.num_ranks, "stages": layers_of(model, schedule.num_stages)}
    run = run_of(model, {**shape, **plan}, 1)
    rows = microbatches * run.plan.dp
    check(ranks, run_of(model, {**shape, **plan}, rows), schedule, reference_of(model, rows))


def layers_of(model: str, stages: int) -> tuple[int, ...]:
    """As uneven as it can be: the first stage has what the others leave."""
    return (MODELS[model].num_layers - stages + 1, *[1] * (stages - 1))


def chunks_of(name: str) -> int:
    """The smallest number of chunks that shows what a family does."""
    counts = capabilities.SCHEDULES[name]
    return 2 if 2 in counts else counts[0]


def sharded(name: str) -> dict[str, Any]:
    """Recompute and sharding as operations: half of the families keep a stage gathered and reduce once."""
    own = {"chimera": "eager_sync", "bitpipe": "eager_sync", "zeropp": "sharded", "modular": "sharded"}
    passes = ("sharding",) if len(name) % 2 else ("recompute", "sharding:blocks=2,reshard=each,reduce=each")
    return {"passes": passes, "options": {own[name]: False} if name in own else {}}


def again(name: str) -> dict[str, Any]:
    """Recompute inside B and I, or of a stage as an operation before them, with the backward split or not."""
    how: list[dict[str, Any]] = [
        {"recompute": "full"},
        {"passes": ("recompute",), "recompute": "selective"},
        {"passes": ("2bp:when=late,behind=2", "recompute"), "recompute": "full"},
    ]
    return how[FAMILIES.index(name) % 3]


FAMILIES = [name for name in capabilities.SCHEDULES if name not in ("auto", "skip-pipe")]  # see test_asked_for.py
FAMILY_SHAPES: list[tuple[str, int, int, str, dict[str, Any]]] = [
    *[(name, 2, 4, "tied", {}) for name in FAMILIES],
    *[(name, 4, (3, 6)[i % 2], ("tied", "dense")[i // 2 % 2], {}) for i, name in enumerate(FAMILIES)],
    *[(name, 2, 3, "tied", {"dp_shard": 2, "zero": 3, **sharded(name)}) for name in FAMILIES],
    *[(name, 2, 3, "gpt2", {"tp": 2, **again(name)}) for name in FAMILIES],
    *[(name, 4, 8, "dropout", {"dp_replicate": 2}) for name in ("zb-h1", "dualpipe", "chimera", "dualpipe-v")],
    *[(name, 2, 4, "dense", {"dp_shard": 2, "dp_replicate": 2, "zero": 2}) for name in ("zb-h2", "dualpipe-v")],
    *[(name, 2, 4, "tied", {"dp_shard": 2, "zero": 1}) for name in ("chimera", "bitpipe", "breadth-first")],
    *[(name, 8, 8, "long", {}) for name in ("zb-h2", "dualpipe", "hanayo")],
    ("chimera", 2, 1, "tied", {"dp_shard": 2, "zero": 1, "passes": ("vocabulary:algorithm=1",)}),  # an idle replica
    ("bitpipe", 2, 1, "dense", {"recompute": "full"}),
    ("interleaved", 2, 4, "tied", {"chunks": 4}),
    ("hanayo", 2, 4, "tied", {"chunks": 4}),
    ("breadth-first", 2, 3, "dense", {"chunks": 1}),
]


@pytest.mark.parametrize("case", FAMILY_SHAPES, ids=str)
def test_family_equals_one_rank(ranks: Ranks, case: tuple[str, int, int, str, dict[str, Any]]) -> None:
    name, pp, microbatches, model, plan = case
    plan = {"pp": pp, "schedule": name, "chunks": chunks_of(name), **plan}
    rows = microbatches * run_of(model, plan, 1).plan.dp
    check_spec(run_of(model, plan, rows), data=False)
    check(ranks, run_of(model, plan, rows), None, reference_of(model, rows))
