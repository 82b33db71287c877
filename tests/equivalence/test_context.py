"""Every way of cutting attention over cp gives the loss, gradients and weights of one plain rank.

The bounds are those of test_plans.py.  Sequences of 23 tokens don't divide by anything: shares are uneven.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from equivalence.cut_runs import Case, hold_to_one_rank, name_of, run_of
from equivalence.plan_run import batches_of
from ranks import Ranks
from stretto.spec.model import ModelSpec
from stretto.spec.run import RunSpec
from stretto.trainer.session import Session

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

CASES: list[Case] = [
    ("grouped", 23, True, {"cp": 2}),
    ("grouped", 23, True, {"cp": 4}),
    ("one-key", 23, False, {"cp": 4, "attention_backend": "blockwise", **CONTIGUOUS}),
    ("window", 23, True, {"cp": 4, "inner_ring": 2}),
    ("dropout", 23, True, {"cp": 4, "context": "mesh", "ulysses": 2, "pp": 2, "context_keep": True}),
    ("gpt2", 23, True, {"cp": 2, "recompute": "selective"}),
    ("one-key", 23, True, {"cp": 4, "context": "ulysses", "recompute": "full"}),
    ("window", 23, True, {"cp": 4, "context": "mesh", "ulysses": 2, "context_inner": "ring", **CONTIGUOUS}),
    ("dropout", 23, True, {"cp": 4, "context": "token-ring"}),
    ("grouped", 23, True, {"cp": 4, "context": "all-gather", "dp_shard": 2}),
    ("grouped", 30, True, {"cp": 2, "tp": 2, "pp": 2, "schedule": "zb-h1"}),
    ("dropout", 30, True, {"cp": 2, "context": "ulysses", "tp": 2, "dp_shard": 2, "zero": 3, "recompute": "full"}),
    ("window", 23, True, {"cp": 2, "context": "token-ring", "pp": 2, "dp_shard": 2, "zero": 2}),
    ("gpt2", 30, True, {"cp": 4, "context": "mesh", "ulysses": 2, "tp": 2}),
    ("grouped", 23, True, {"cp": 8, "inner_ring": 4, "context_keep": True}),
    ("window", 23, True, {"cp": 8, "context": "mesh", "ulysses": 4, "context_inner": "ring"}),
    ("window", 30, True, {"tp": 2, "pp": 2, "recompute": "full", "attention_backend": "flash"}),
]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_cut_attention_equals_one_rank(ranks: Ranks, case: Case) -> None:
    hold_to_one_rank(ranks, MODELS[case[0]], case, tolerance=TOLERANCE)


def evaluate(rank: int, world: int, run: RunSpec) -> tuple[float, int]:
    session = Session.start(run, rank)
    return session.evaluate(batches_of(run, 1, session.mesh.dp_index, documents=True))


def test_evaluation_sees_all_tokens_once(ranks: Ranks) -> None:
    ((loss, tokens),) = ranks.run(evaluate, 1, run_of(MODELS["dropout"], 23, {}))
    for found in ranks.run(evaluate, 4, run_of(MODELS["dropout"], 23, {"cp": 2, "pp": 2, "context": "all-gather"})):
        assert found[1] == tokens and abs(found[0] - loss) <= 1e-12 * abs(loss)


def sent_bytes(rank: int, world: int, run: RunSpec) -> tuple[int, float]:
    """Bytes that this rank sends for attention in one step, and its loss."""
    session = Session.start(run, rank)
    result = session.train_step(1, batches_of(run, 1, session.mesh.dp_index, documents=True))
    attention: Any = session.model.stack.blocks[0]
    return attention.attention.attend.wire.sent, result.loss


def test_a_recomputed_block_sends_no_keys_again(ranks: Ranks) -> None:
    once = ranks.run(sent_bytes, 2, run_of(MODELS["dropout"], 23, {"cp": 2}))
    assert ranks.run(sent_bytes, 2, run_of(MODELS["dropout"], 23, {"cp": 2, "recompute": "full"})) == once
    again = ranks.run(sent_bytes, 2, run_of(MODELS["dropout"], 23, {"cp": 2, "recompute": "selective"}))
    assert all(a[0] > b[0] > 0 and a[1] == b[1] for a, b in zip(again, once, strict=True))
