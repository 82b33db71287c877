"""Linear and delta layers, and hybrids with softmax ones, cut over cp and all else: one plain rank in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from equivalence.cut_runs import Case, hold_to_one_rank, name_of, run_of
from equivalence.plan_run import batches_of
from ranks import Ranks
from stretto.planner.sequence_volume import Heads
from stretto.planner.state_volume import state_volume
from stretto.spec.model import ModelSpec
from stretto.spec.run import RunSpec
from stretto.spec.sequence import cut_sequence
from stretto.trainer.session import Session

TOLERANCE = 1e-9

LINEAR = ModelSpec(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_positions=64,
    initial_std=0.2,
    attention=("linear",),
)
MODELS = {
    "linear": LINEAR,
    "delta": replace(LINEAR, attention=("delta",)),
    "hybrid": replace(LINEAR, num_layers=4, attention=("delta", "softmax", "linear"), dropout=0.2),
    "gpt2": replace(LINEAR, family="gpt2", num_kv_heads=None, attention=("linear", "softmax"), tied_embeddings=True),
}

CASES: list[Case] = [
    ("linear", 23, True, {"cp": 2, "linear_context": "ring", "recompute": "full"}),
    ("delta", 23, True, {"cp": 4, "linear_context": "ring"}),
    ("delta", 23, False, {"cp": 4, "context_layout": "contiguous", "recompute": "selective"}),
    ("hybrid", 23, True, {"cp": 4, "context": "all-gather", "recompute": "full"}),
    ("hybrid", 30, True, {"cp": 2, "pp": 2, "schedule": "zb-h1", "context": "ulysses"}),
    ("hybrid", 30, True, {"cp": 2, "tp": 2, "dp_shard": 2, "zero": 3, "linear_context": "ring"}),
    ("gpt2", 30, True, {"cp": 2, "tp": 2, "context_layout": "contiguous", "linear_context": "ring"}),
]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_cut_states_equal_one_rank(ranks: Ranks, case: Case) -> None:
    hold_to_one_rank(ranks, MODELS[case[0]], case, tolerance=TOLERANCE)


def sent_bytes(rank: int, world: int, runs: list[RunSpec]) -> list[int]:
    """Bytes that this rank sends for the states of all layers in one step of each run."""
    found = []
    for run in runs:
        session = Session.start(run, rank)
        session.train_step(1, batches_of(run, 1, session.mesh.dp_index, documents=True))
        layer: Any = session.model.stack.blocks[0]
        found.append(layer.attention.states.wire.sent)
    return found


def test_bytes_are_those_of_the_papers_and_recompute_adds_none(ranks: Ranks) -> None:
    runs = [
        run_of(MODELS[model], 23, {"cp": 2, "context_layout": layout, "linear_context": way, "recompute": recompute})
        for model, layout, way, recompute in (
            ("linear", "contiguous", "ring", "none"),
            ("linear", "contiguous", "all-gather", "full"),
            ("delta", "zigzag", "ring", "full"),
            ("delta", "zigzag", "all-gather", "none"),
        )
    ]
    sent = ranks.run(sent_bytes, 2, runs)
    heads = Heads(rows=1, heads=4, kv_heads=2, head_size=4, element_bytes=8)
    state = 2 * 4 * 4 * 8
    for index, run in enumerate(runs):
        shares = cut_sequence(23, 2, run.plan.context_layout)
        kind = run.model.attention[0]
        for rank in range(2):
            volume = state_volume(run.plan.linear_context, kind, shares, rank, heads)
            assert sent[rank][index] == (volume.forward + volume.backward) * 4 * 2  # micro-batches, layers
    # LASP: one state on to the next rank, one gradient back; LASP-2 by data-dependent decay: one number a head more.
    assert [s[0] for s in sent] == [state * 8, state * 8]
    assert [s[1] for s in sent] == [(2 * state + 2 * 8) * 8] * 2
