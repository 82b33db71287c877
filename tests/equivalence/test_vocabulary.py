"""Vocabulary parallelism gives the loss, the gradients and the weights of one plain rank.

Embedding and head lie on all pipeline ranks, in shares of 16, 16, 16 and 13 of 61 rows; float64, two steps, micro-
batches of very unequal numbers of valid tokens, clipping active.  Tolerance as in test_plans.
"""

from __future__ import annotations

from typing import Any

import pytest

from equivalence.test_schedules import check, reference_of, run_of
from ranks import Ranks

ONE, TWO = ("vocabulary:algorithm=1",), ("vocabulary:algorithm=2",)
CASES: list[tuple[str, int, int, str, dict[str, Any]]] = [
    ("1f1b", 2, 3, "dense", {"passes": ONE}),
    ("1f1b", 4, 6, "tied", {"passes": TWO}),
    ("gpipe", 2, 3, "gpt2", {"passes": TWO}),
    ("gpipe", 4, 4, "dense", {"passes": ONE}),
    ("zb-h1", 2, 4, "tied", {"passes": ONE}),
    ("zb-h1", 4, 5, "gpt2", {"passes": TWO}),
    ("v-half", 2, 3, "dense", {"passes": TWO, "chunks": 2}),
    ("zb-v", 4, 4, "dropout", {"passes": ONE, "chunks": 2}),
    ("interleaved", 2, 4, "dropout", {"passes": ONE, "chunks": 2, "recompute": "full"}),
    ("interleaved", 4, 4, "tied", {"passes": TWO, "chunks": 2}),
    ("dualpipe", 2, 4, "tied", {"passes": TWO}),
    ("chimera", 4, 4, "gpt2", {"passes": ONE}),
    ("1f1b", 2, 3, "gpt2", {"passes": TWO, "tp": 2}),
    ("zb-h1", 2, 3, "tied", {"passes": ONE, "tp": 2, "dp_shard": 2, "zero": 3}),
    ("1f1b", 2, 3, "tied", {"passes": ONE, "dp_replicate": 2}),
    ("zb-h1", 2, 3, "dense", {"passes": TWO, "dp_shard": 2, "zero": 1}),
    ("1f1b", 2, 3, "tied", {"passes": TWO, "dp_shard": 2, "zero": 2}),
    ("1f1b", 1, 3, "tied", {"passes": TWO}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_split_vocabulary_equals_one_rank(ranks: Ranks, case: tuple[str, int, int, str, dict[str, Any]]) -> None:
    name, pp, microbatches, model, plan = case
    plan = {"pp": pp, "schedule": name, **plan}
    rows = microbatches * run_of(model, plan, 1).plan.dp
    check(ranks, run_of(model, plan, rows), None, reference_of(model, rows))
