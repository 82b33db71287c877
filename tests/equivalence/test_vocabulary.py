"""Vocabulary parallelism gives the loss, the gradients and the weights of one plain rank.

Embedding and head lie on all pipeline ranks, in shares of 16, 16, 16 and 13 of 61 rows; float64, two steps, micro-
batches of very unequal numbers of valid tokens, clipping active.  Tolerance as in test_plans.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from equivalence.orders import any_order
from equivalence.reference import train_reference
from equivalence.test_schedules import STEPS, check, layers_of, reference_of, run_of
from ranks import Ranks
from stretto.spec.plan import PlanSpec

ONE, TWO = "vocabulary:algorithm=1", "vocabulary:algorithm=2"
CASES: list[tuple[str, int, int, str, dict[str, Any]]] = [
    ("1f1b", 1, 2, "tied", {"passes": (TWO,)}),
    ("1f1b", 2, 3, "tied", {"passes": (ONE,), "dp_replicate": 2}),
    ("1f1b", 4, 6, "dense", {"passes": (TWO,)}),
    ("gpipe", 2, 3, "gpt2", {"passes": (TWO,), "tp": 2}),
    ("gpipe", 4, 4, "dense", {"passes": (ONE,)}),
    ("zb-h1", 2, 3, "tied", {"passes": (ONE,), "tp": 2, "dp_shard": 2, "zero": 3}),
    ("zb-h1", 4, 5, "gpt2", {"passes": (TWO,)}),
    ("v-half", 2, 3, "dense", {"passes": (TWO,), "chunks": 2, "dp_shard": 2, "zero": 1}),
    ("zb-v", 4, 4, "dropout", {"passes": (ONE,), "chunks": 2}),
    ("interleaved", 2, 4, "dropout", {"passes": (ONE,), "chunks": 2, "recompute": "full", "dp_shard": 2, "zero": 2}),
    ("interleaved", 4, 4, "tied", {"passes": (TWO, "offload", "sharding:blocks=2"), "chunks": 2}),
    ("dualpipe", 4, 4, "gpt2", {"passes": (ONE,)}),
    ("1f1b", 2, 3, "tied", {"passes": (TWO, "recompute"), "cp": 2}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_split_vocabulary_equals_one_rank(ranks: Ranks, case: tuple[str, int, int, str, dict[str, Any]]) -> None:
    name, pp, microbatches, model, plan = case
    plan = {"pp": pp, "schedule": name, **plan}
    rows = microbatches * run_of(model, plan, 1).plan.dp
    check(ranks, run_of(model, plan, rows), None, reference_of(model, rows))


ORDERS: list[tuple[str, int, str, int, dict[str, Any]]] = [
    ("idle3", 4, "tied", 61, {}),
    ("voices4", 5, "dense", 5, {}),  # shares of 2, 2, 1 and 0 rows
    ("folded2", 3, "gpt2", 61, {"tp": 2, "dp_shard": 2, "zero": 2}),
]


@pytest.mark.parametrize("case", ORDERS, ids=str)
def test_any_order_of_the_passes_equals_one_rank(ranks: Ranks, case: tuple[str, int, str, int, dict[str, Any]]) -> None:
    """Both algorithms in one step, S and T wherever their arrows let them be."""
    name, microbatches, model, size, plan = case
    schedule = any_order(name, microbatches=microbatches, seed=ORDERS.index(case), vocabulary=True)
    shape = {"pp": schedule.num_ranks, "stages": layers_of(model, schedule.num_stages), **plan}
    rows = microbatches * run_of(model, shape, 1).plan.dp
    run = run_of(model, shape, rows)
    run = replace(run, model=replace(run.model, vocab_size=size))
    check(ranks, run, schedule, train_reference(replace(run, plan=PlanSpec()), STEPS))
