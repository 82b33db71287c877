"""Parameters, gradients and optimizer states divided over different numbers of ranks, against one rank.

Float64 and three steps of clipping AdamW as in ``test_plans``, whose tolerance of 1e-9 holds here for the same reason:
sums in another order.  Each plan brings factors together with something else that could go wrong with them.
"""

from __future__ import annotations

from typing import Any

import pytest

from equivalence.plan_run import train_plan
from equivalence.reference import assert_same_training
from equivalence.test_plans import STEPS, TOLERANCE, name_of, reference_of, run_of
from ranks import Ranks

SPLIT = {"pp": 2, "schedule": "v-half", "chunks": 2, "passes": ("sharding",)}
PLANS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"cp": 2, "dp_shard": 4, "shard_parameters": 2, "shard_gradients": 4}),
    ("dropout", {"tp": 2, "dp_replicate": 2, "dp_shard": 2, "zero": 3, "shard_optimizer": 4, "recompute": "full"}),
    ("llama", {**SPLIT, "dp_replicate": 2, "dp_shard": 2, "zero": 3, "shard_optimizer": 4}),
    ("tied", {"pp": 2, "schedule": "chimera", "dp_replicate": 4, "shard_gradients": 2}),
    ("tied", {"pp": 2, "schedule": "chimera", "dp_shard": 2, "dp_replicate": 2, "zero": 2, "shard_optimizer": 4}),
]


@pytest.mark.parametrize("case", PLANS, ids=name_of)
def test_divided_states_equal_one_rank(ranks: Ranks, case: tuple[str, dict[str, Any]]) -> None:
    model, plan = case
    record = train_plan(ranks, run_of(model, plan), STEPS)
    assert_same_training(record, reference_of(model), tolerance=TOLERANCE)
