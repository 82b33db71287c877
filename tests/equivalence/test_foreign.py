"""Models that we don't ship train under plans like our own: any Hugging Face decoder, any stack, any loss.

Float64, three steps, tolerance 1e-9 for the reason in test_plans.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from equivalence.plan_run import train_plan
from equivalence.reference import train_reference, vanishing, worst_gradient, worst_of
from equivalence.test_plans import LLAMA, STEPS, TOLERANCE, TRAINING
from ranks import RankFailure, Ranks
from stretto.models.foreign import load_foreign
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSettings, RunSpec

CASES: list[tuple[str, dict[str, Any]]] = [
    ("neox", {}),
    ("neox", {"pp": 2, "dp_replicate": 2}),
    ("neox", {"pp": 4, "stages": (1, 1, 1, 1), "recompute": "full"}),
    ("neox", {"dp_shard": 4, "zero": 3}),
    ("neox", {"pp": 2, "schedule": "interleaved", "chunks": 2}),
    ("llama", {"tp": 2}),
    ("llama", {"tp": 4}),
    ("llama", {"pp": 2, "tp": 2, "dp_shard": 2, "zero": 3}),
    ("llama", {"pp": 4}),
    ("streams", {"pp": 2, "dp_shard": 2, "zero": 2}),
    ("streams", {"pp": 4, "recompute": "full"}),
    ("streams", {"pp": 2, "schedule": "dualpipe", "dp_shard": 2, "zero": 3}),
    ("neox", {"pp": 2, "schedule": "zb-v", "chunks": 2}),
    ("llama", {"pp": 2, "tp": 2, "schedule": "zb-h2", "recompute": "full"}),
]


def run_of(name: str, plan: dict[str, Any]) -> RunSpec:
    model = replace(LLAMA, family="foreign", module=f"equivalence.foreign_models:{name}", rope_scaling=None)
    return RunSpec(run=RunSettings(seed=7), model=model, plan=PlanSpec(**plan), training=TRAINING)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case[0], *(f"{k}={v}" for k, v in case[1].items())]))
def test_foreign_plan_equals_one_rank(ranks: Ranks, case: tuple[str, dict[str, Any]]) -> None:
    run = run_of(*case)
    plain: Any = load_foreign(run.model)
    reference = train_reference(run, STEPS, model=plain.to(torch.float64))
    record = train_plan(ranks, run, STEPS)
    assert worst_of(record.losses, reference.losses) <= TOLERANCE
    error, name = worst_gradient(record, reference)
    assert error <= TOLERANCE, name
    assert worst_of(record.norms, reference.norms) <= TOLERANCE
    assert len(record.gradients[0].keys() - vanishing(record.gradients[0])) > 5


def test_a_model_that_tp_cannot_split_says_so(ranks: Ranks) -> None:
    with pytest.raises(RankFailure, match="can't be split over tp"):
        train_plan(ranks, run_of("streams", {"tp": 2}), 1)
