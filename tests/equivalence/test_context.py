"""Every way of cutting attention over cp gives the loss, gradients and weights of one plain rank.

The bounds are those of test_plans.py.  Sequences of 23 tokens don't divide by anything: shares are uneven.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from equivalence.plan_run import batches_of, train_plan
from equivalence.reference import Record, error, train_reference, vanishing, worst_gradient, worst_of
from ranks import Ranks
from stretto.spec.check import check
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.session import Session

STEPS = 2
TOLERANCE = 1e-9

GROUPED = ModelSpec(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    max_positions=64,
    initial_std=0.2,
)
MODELS = {
    "grouped": GROUPED,
    "one-key": replace(GROUPED, num_kv_heads=1),
    "window": replace(GROUPED, sliding_window=5, tied_embeddings=True),
    "dropout": replace(GROUPED, dropout=0.2),
    "gpt2": replace(GROUPED, family="gpt2", num_kv_heads=None, tied_embeddings=True),
}
CONTIGUOUS = {"context_layout": "contiguous"}

# Model, tokens, whether rows hold several documents, plan.
CASES: list[tuple[str, int, bool, dict[str, Any]]] = [
    ("grouped", 23, True, {"cp": 2}),
    ("grouped", 23, True, {"cp": 4}),
    ("one-key", 23, False, {"cp": 4, **CONTIGUOUS}),
    ("window", 23, True, {"cp": 4, "inner_ring": 2}),
    ("dropout", 23, True, {"cp": 4, "context": "mesh", "ulysses": 2}),
    ("gpt2", 23, True, {"cp": 2, "recompute": "selective"}),
    ("one-key", 23, True, {"cp": 4, "context": "ulysses", "recompute": "full"}),
    ("window", 23, True, {"cp": 4, "context": "mesh", "ulysses": 2, "context_inner": "ring", **CONTIGUOUS}),
    ("dropout", 23, True, {"cp": 4, "context": "token-ring"}),
    ("grouped", 23, True, {"cp": 4, "context": "all-gather"}),
    ("grouped", 30, True, {"cp": 2, "tp": 2, "pp": 2, "schedule": "zb-h1"}),
    ("dropout", 30, True, {"cp": 2, "context": "ulysses", "tp": 2, "dp_shard": 2, "zero": 3, "recompute": "full"}),
    ("window", 23, True, {"cp": 2, "context": "token-ring", "pp": 2, "dp_shard": 2, "zero": 2}),
    ("gpt2", 30, True, {"cp": 4, "context": "mesh", "ulysses": 2, "tp": 2}),
    ("grouped", 23, True, {"cp": 8, "inner_ring": 4}),
]


def run_of(model: str, length: int, plan: dict[str, Any]) -> RunSpec:
    training = TrainingSpec(
        steps=10, global_batch_size=4, sequence_length=length, dtype="float64", learning_rate=0.01, clip_norm=0.5
    )
    return RunSpec(run=RunSettings(seed=7), model=MODELS[model], plan=PlanSpec(**plan), training=training)


@cache
def reference_of(model: str, length: int, documents: bool) -> Record:
    return train_reference(run_of(model, length, {}), STEPS, documents=documents)


def name_of(case: tuple[str, int, bool, dict[str, Any]]) -> str:
    model, length, documents, plan = case
    words = [model, f"T{length}", *(["documents"] if documents else []), *(f"{k}={v}" for k, v in plan.items())]
    return "-".join(words)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_cut_attention_equals_one_rank(ranks: Ranks, case: tuple[str, int, bool, dict[str, Any]]) -> None:
    model, length, documents, plan = case
    run = run_of(model, length, plan)
    check(run, data=False)
    reference = reference_of(model, length, documents)
    record = train_plan(ranks, run, STEPS, documents=documents)
    assert record.tokens == reference.tokens
    assert worst_of(record.losses, reference.losses) <= TOLERANCE
    gradient_error, name = worst_gradient(record, reference)
    assert gradient_error <= TOLERANCE, name
    assert worst_of(record.norms, reference.norms) <= TOLERANCE
    compared = reference.weights.keys() - vanishing(reference.gradients[0])
    weight_errors = {n: error(record.weights[n], reference.weights[n]) for n in compared}
    assert max(weight_errors.values()) <= TOLERANCE, max(weight_errors, key=weight_errors.__getitem__)


def evaluate(rank: int, world: int, run: RunSpec) -> tuple[float, int]:
    session = Session.start(run, rank)
    return session.evaluate(batches_of(run, 1, session.mesh.dp_index, documents=True))


def test_evaluation_sees_all_tokens_once(ranks: Ranks) -> None:
    ((loss, tokens),) = ranks.run(evaluate, 1, run_of("dropout", 23, {}))
    for found in ranks.run(evaluate, 4, run_of("dropout", 23, {"cp": 2, "pp": 2, "context": "all-gather"})):
        assert found[1] == tokens and abs(found[0] - loss) <= 1e-12 * abs(loss)


def sent_bytes(rank: int, world: int, run: RunSpec) -> tuple[int, float]:
    """Bytes that this rank sends for attention in one step, and its loss."""
    session = Session.start(run, rank)
    result = session.train_step(1, batches_of(run, 1, session.mesh.dp_index, documents=True))
    attention: Any = session.model.stack.blocks[0]
    return attention.attention.attend.wire.sent, result.loss


def test_a_recomputed_block_sends_no_keys_again(ranks: Ranks) -> None:
    once = ranks.run(sent_bytes, 2, run_of("dropout", 23, {"cp": 2}))
    assert ranks.run(sent_bytes, 2, run_of("dropout", 23, {"cp": 2, "recompute": "full"})) == once
    again = ranks.run(sent_bytes, 2, run_of("dropout", 23, {"cp": 2, "recompute": "selective"}))
    assert all(a[0] > b[0] > 0 and a[1] == b[1] for a, b in zip(again, once, strict=True))
