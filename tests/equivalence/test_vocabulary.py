"""Vocabulary parallelism gives the loss, the gradients and the weights of one plain rank.

Embedding and head lie on all pipeline ranks, in shares of 16, 16, 16 and 13 of 61 rows; float64, two steps, micro-
batches of very unequal numbers of valid tokens, clipping active.  Tolerance as in test_plans.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from equivalence.orders import any_order
from equivalence.plan_run import batches_of
from equivalence.reference import train_reference
from equivalence.test_schedules import STEPS, check, layers_of, reference_of, run_of
from ranks import Ranks
from stretto.models.foreign import ForeignStack
from stretto.spec.errors import UnsupportedError
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.memory import ActivationMeter, persistent_bytes
from stretto.trainer.schedules import schedules_of
from stretto.trainer.session import Session

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
    ("scattered4", 6, "tied", 61, {}),  # rank 1 is ahead of rank 3 by three S
    ("idle3", 4, "tied", 61, {}),
    ("voices4", 5, "dense", 5, {}),  # shares of 2, 2, 1 and 0 rows
    ("folded2", 3, "gpt2", 61, {"tp": 2, "dp_shard": 2, "zero": 2}),
]


@pytest.mark.parametrize("case", ORDERS, ids=str)
def test_any_order_of_the_passes_equals_one_rank(ranks: Ranks, case: tuple[str, int, str, int, dict[str, Any]]) -> None:
    """Both algorithms in one step, S and T wherever their arrows let them be."""
    name, microbatches, model, size, plan = case
    schedule = any_order(name, microbatches=microbatches, seed=11 + ORDERS.index(case), vocabulary=True)
    shape = {"pp": schedule.num_ranks, "stages": layers_of(model, schedule.num_stages), **plan}
    rows = microbatches * run_of(model, shape, 1).plan.dp
    run = run_of(model, shape, rows)
    run = replace(run, model=replace(run.model, vocab_size=size))
    check(ranks, run, schedule, train_reference(replace(run, plan=PlanSpec()), STEPS))


def kept_on_rank(rank: int, world: int, runs: list[RunSpec]) -> list[tuple[int, int]]:
    """Bytes between steps, and with the activations of a step, for each run."""
    found = []
    for run in runs:
        session = Session.start(run, rank)
        meter = ActivationMeter(session)
        with meter.watch():
            session.train_step(1, batches_of(run, 1, 0, documents=False))
        kept = persistent_bytes(session)
        found.append((kept, kept + meter.peak_bytes))
    return found


def test_memory_is_flat_over_the_ranks(ranks: Ranks) -> None:
    """What the ends of the pipeline hold too much of without the pass, all share with it."""
    model = ModelSpec(vocab_size=4001, hidden_size=32, intermediate_size=64, num_layers=4, num_heads=4)
    training = TrainingSpec(global_batch_size=8, sequence_length=16, dtype="float32")
    plans = [PlanSpec(pp=4, passes=passes) for passes in ((), (ONE,), (TWO,))]
    found = ranks.run(kept_on_rank, 4, [RunSpec(model=model, plan=plan, training=training) for plan in plans])
    whole, *split = ([rank[at] for rank in found] for at in range(3))
    for figures in split:
        for before, after in zip(zip(*whole, strict=True), zip(*figures, strict=True), strict=True):
            assert max(after) < 1.15 * min(after) and max(after) < 0.62 * max(before)
            assert after[-1] < 0.62 * before[-1]
            assert sum(after) < 1.25 * sum(before)


def test_what_can_t_be_combined_is_said() -> None:
    for plan, said in (({"asynchronous": "stash"}, "a vocabulary that lies on all ranks has no stage"),):
        with pytest.raises(UnsupportedError, match=said):
            schedules_of(run_of("dense", {"pp": 2, "passes": (TWO,), **plan}, 4))
    unruly = ForeignStack(embed=nn.Embedding(8, 4), blocks=[nn.Linear(4, 4)], head=nn.Linear(4, 8), tensor_rules={})
    run = run_of("dense", {"passes": (TWO,)}, 4)
    with pytest.raises(UnsupportedError, match="which layers are its token embedding and its head"):
        Session.start(run, 0, stack=unruly)
