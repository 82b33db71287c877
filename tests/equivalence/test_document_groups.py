"""Documents in groups of ranks of their own give the loss, gradients and weights of one plain rank.

The bounds are those of test_plans.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from equivalence.plan_run import plain, together
from equivalence.reference import (
    Record,
    assert_same_training,
    global_batch,
    rows_of,
    train_reference,
)
from ranks import Ranks
from stretto.planner.sequence_volume import Heads, sequence_volume
from stretto.planner.state_volume import state_volume
from stretto.spec.check import check
from stretto.spec.cluster import ClusterSpec
from stretto.spec.contract import Batch
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.host_memory import host_bytes
from stretto.trainer.memory import ActivationMeter
from stretto.trainer.session import Session

STEPS = 2
TOLERANCE = 1e-9
CONTIGUOUS = {"context_layout": "contiguous"}
MODEL = ModelSpec(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_positions=64,
    initial_std=0.2,
)
WINDOW = {"sliding_window": 5, "tied_embeddings": True}
STATES = {"attention": ("linear", "delta", "softmax"), "num_layers": 3}
DROPS = {"dropout": 0.2}
# What the model is beside MODEL, and the plan; a rank holds few tokens, so that several sizes of groups are needed.
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (DROPS, {"cp": 2, "context_tokens": 12}),
    (WINDOW, {"cp": 2, "dp_shard": 2, "zero": 3, "context_tokens": 9, "context": "token-ring"}),
    (STATES, {"dp_replicate": 2, "dp_shard": 2, "zero": 2, "context_tokens": 7, "recompute": "full"}),
    (WINDOW, {"cp": 4, "dp_shard": 2, "context": "mesh", "ulysses": 2, "inner_ring": 2, "context_tokens": 4}),
    (STATES, {"cp": 3, **CONTIGUOUS, "context": "all-gather", "linear_context": "ring", "recompute": "selective"}),
    ({**STATES, **DROPS}, {"cp": 2, "tp": 2, "dp_shard": 2, "zero": 2, "context_tokens": 7, "offload": True}),
    (WINDOW, {"cp": 2, "offload": True, "context_tokens": 12, "recompute": "full"}),
    ({}, {"pp": 2, "cp": 2, "tp": 2, "context": "ulysses", "context_tokens": 12, "offload": True}),
    (WINDOW, {"pp": 2, "dp_shard": 2, "cp": 2, "zero": 3, "context_tokens": 12, "schedule": "gpipe", "offload": True}),
    (DROPS, {"cp": 4, "context": "ulysses", "context_tokens": 7, "recompute": "full"}),
]


def run_of(changes: dict[str, Any], plan: dict[str, Any], *, layers: int | None = None) -> RunSpec:
    training = TrainingSpec(
        steps=10,
        global_batch_size=4,
        sequence_length=23 + (plan.get("tp", 1) > 1),
        dtype="float64",
        learning_rate=0.01,
        clip_norm=0.5,
    )
    model = replace(MODEL, **changes)
    if layers or plan.get("offload"):
        model = replace(model, num_layers=layers or 5 * plan.get("pp", 1))
    # So slow a device that it hides copies to the host.
    cluster = ClusterSpec(peak_flops_float32=1e5)
    return RunSpec(run=RunSettings(seed=7), model=model, cluster=cluster, plan=PlanSpec(**plan), training=training)


def rows_at(run: RunSpec, step: int) -> list[Batch]:
    """Every row of a global batch by itself."""
    whole = global_batch(run, step, documents=True)
    return [rows_of(whole, at, at + 1) for at in range(run.training.global_batch_size)]


def train_on_rank(rank: int, world: int, run: RunSpec, steps: int) -> dict[str, Any]:
    session = Session.start(run, rank)
    found: dict[str, Any] = {"losses": [], "norms": [], "tokens": [], "gradients": [], "groups": set(), "away": set()}
    found["evaluated"] = session.evaluate(rows_at(run, 1))
    for step in range(1, steps + 1):
        rows = rows_at(run, step)
        assert session.model.documents is not None
        for batch in session.model.documents(rows):
            assert batch.part is not None
            found["groups"] |= {len(section.shares) for section in batch.part.sections}
            found["away"].add(batch.part.away)
        result = session.train_step(step, rows)
        factor = min(1.0, run.training.clip_norm / result.grad_norm)
        masters = [m for m in session.model.masters if m.tensor.grad is not None]
        found["gradients"].append(plain([p for m in masters for p in m.pieces("gradient", m.tensor.grad / factor)]))
        found["losses"].append(result.loss)
        found["norms"].append(result.grad_norm)
        found["tokens"].append(result.tokens)
    found["weights"] = plain([p for m in session.model.masters for p in m.pieces("model", m.tensor)])
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{k}={v}" for k, v in case[1].items()))
def test_placed_documents_equal_one_rank(ranks: Ranks, case: tuple[dict[str, Any], dict[str, Any]]) -> None:
    changes, plan = case
    run = run_of(changes, {**plan, "context_groups": "dynamic"})
    check(run, data=False)
    reference = train_reference(replace(run, plan=PlanSpec()), STEPS, documents=True)
    found = ranks.run(train_on_rank, run.plan.num_ranks, run, STEPS)
    record = Record(
        losses=found[0]["losses"],
        norms=found[0]["norms"],
        tokens=found[0]["tokens"],
        gradients=[together([f["gradients"][step] for f in found]) for step in range(STEPS)],
        weights=together([f["weights"] for f in found]),
    )
    if run.plan.offload:
        assert set().union(*(f["away"] for f in found)) > {0}, "some stay, some go"
    else:
        assert {1} < set().union(*(f["groups"] for f in found)), "documents of several sizes of groups"
    assert_same_training(record, reference, tolerance=TOLERANCE)
    for other in found:
        loss, tokens = other["evaluated"]
        assert tokens == reference.tokens[0]
        if run.model.dropout:  # only training drops
            continue
        assert abs(loss / tokens - reference.losses[0]) <= TOLERANCE * reference.losses[0]


def held_bytes(rank: int, world: int, run: RunSpec) -> tuple[int, int, int]:
    """Most blocks that were away, activations at most, and what of them was on the host."""
    session = Session.start(run, rank)
    assert session.model.documents is not None
    rows = [rows_of(global_batch(run, 1, documents=False), at, at + 1) for at in range(4)]
    parts = [batch.part for batch in session.model.documents(rows)]
    meter = ActivationMeter(session)
    with meter.watch():
        session.train_step(1, rows)
    return max(part.away for part in parts if part is not None), meter.peak_bytes, host_bytes(session) or 0


@pytest.mark.parametrize("plan", [{}, {"pp": 2}, {"pp": 2, "schedule": "gpipe"}], ids=str)
def test_what_is_on_the_host_is_not_held(ranks: Ranks, plan: dict[str, Any]) -> None:
    """22 tokens with all activations, against at most 13 tokens' worth; over pp of each micro-batch that is held."""
    plan, stages = {**plan, "cp": 2, "context_groups": "dynamic"}, plan.get("pp", 1)
    layers = 8 * stages
    stays = ranks.run(held_bytes, 2 * stages, run_of({}, {**plan, "context_tokens": 23}, layers=layers))
    goes = ranks.run(held_bytes, 2 * stages, run_of({}, {**plan, "context_tokens": 13, "offload": True}, layers=layers))
    assert all(away == host == 0 for away, _, host in stays)
    assert max(away for away, _, _ in goes) >= 4 and max(host for _, _, host in goes) > 0
    for (_, held, _), (_, before, _) in zip(goes, stays, strict=True):
        assert held <= 0.6 * before


def sent_bytes(rank: int, world: int, run: RunSpec) -> tuple[int, int]:
    """Bytes that this rank sends for attention in one step, and what they should be by the closed form."""
    session, model = Session.start(run, rank), run.model
    rows = rows_at(run, 1)
    session.train_step(1, rows)
    block: Any = session.model.stack.blocks[-1]
    attend, asked = block.attention.attend, 0
    heads = Heads(rows=1, heads=model.num_heads, kv_heads=model.kv_heads, head_size=model.head_size, element_bytes=8)
    for batch in session.model.documents(rows) if session.model.documents else ():
        for section in batch.part.sections if batch.part else ():
            shares, index = section.shares, rank - section.first
            for kind in map(model.attention_of, range(model.num_layers)):
                if kind == "softmax":
                    one = sequence_volume(attend.arrangement(section), shares, index, heads)
                else:
                    one = state_volume(run.plan.linear_context, kind, shares, index, heads)
                asked += one.forward + one.backward
    return attend.wire.sent, asked


def test_recomputed_blocks_send_nothing_again_and_short_documents_nothing_at_all(ranks: Ranks) -> None:
    plan = {"cp": 2, "context_groups": "dynamic", "context_tokens": 12}
    once = ranks.run(sent_bytes, 2, run_of({}, plan))
    assert [sent for sent, _ in ranks.run(sent_bytes, 2, run_of({}, {**plan, "recompute": "full"}))] == [
        sent for sent, _ in once
    ]
    static = ranks.run(sent_bytes, 2, run_of({}, {"cp": 2}))
    assert all(0 < mine < other for (mine, _), (other, _) in zip(once, static, strict=True))


def test_groups_send_what_the_formula_says(ranks: Ranks) -> None:
    for changes, way in (
        ({}, {"context": "ulysses"}),
        ({}, {"context": "mesh", "ulysses": 2}),
        (STATES, {"linear_context": "ring"}),
        (STATES, CONTIGUOUS),
    ):
        plan = {"cp": 4, "context_groups": "dynamic", "context_tokens": 7, **way}
        assert all(sent == asked > 0 for sent, asked in ranks.run(sent_bytes, 4, run_of(changes, plan)))
