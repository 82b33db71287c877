"""Plans that cut the sequence, held to one plain rank."""

from __future__ import annotations

from functools import cache
from typing import Any

from equivalence.plan_run import train_plan
from equivalence.reference import Record, assert_same_training, train_reference
from ranks import Ranks
from stretto.spec.check import check
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.training import TrainingSpec

STEPS = 2

Case = tuple[str, int, bool, dict[str, Any]]
"""Model, tokens, whether rows hold several documents, plan."""


def run_of(model: ModelSpec, length: int, plan: dict[str, Any]) -> RunSpec:
    """A run in float64 whose gradients are clipped."""
    training = TrainingSpec(
        steps=10, global_batch_size=4, sequence_length=length, dtype="float64", learning_rate=0.01, clip_norm=0.5
    )
    return RunSpec(run=RunSettings(seed=7), model=model, plan=PlanSpec(**plan), training=training)


@cache
def reference_of(model: ModelSpec, length: int, documents: bool) -> Record:
    """What one plain rank finds."""
    return train_reference(run_of(model, length, {}), STEPS, documents=documents)


def name_of(case: Case) -> str:
    """The case in a word."""
    model, length, documents, plan = case
    words = [model, f"T{length}", *(["documents"] if documents else []), *(f"{k}={v}" for k, v in plan.items())]
    return "-".join(words)


def hold_to_one_rank(ranks: Ranks, model: ModelSpec, case: Case, *, tolerance: float) -> None:
    """Train the plan of a case and compare."""
    _, length, documents, plan = case
    run = run_of(model, length, plan)
    check(run, data=False)
    record = train_plan(ranks, run, STEPS, documents=documents)
    assert_same_training(record, reference_of(model, length, documents), tolerance=tolerance)
