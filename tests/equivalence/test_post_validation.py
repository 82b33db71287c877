"""Without a barrier at the update, the training is that with one.

Float64, six steps with a warm-up and decay of the learning rate and weight decay; the limit of the norm lies between
the steps' norms, so that some are clipped and some not, and one step has a gradient that isn't a number.  Every
update is made early (patience 0), so every clipped or skipped one is rolled back.  Weights are bitwise equal up to
the first clipped step; behind it they differ by the order in which the norm's squares are added: 1e-12.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from equivalence.plan_run import Pieces, batches_of, plain, together
from equivalence.reference import error
from equivalence.test_plans import LLAMA
from ranks import Ranks
from stretto.parallel.collectives import DONE, Pending
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.session import Session

STEPS, BROKEN = 6, 4
TOLERANCE = 1e-12
TRAINING = TrainingSpec(
    steps=STEPS,
    global_batch_size=8,
    sequence_length=8,
    dtype="float64",
    learning_rate=0.03,
    schedule="cosine",
    warmup_steps=2,
)
MODELS = {"llama": LLAMA, "tied": replace(LLAMA, tied_embeddings=True, dropout=0.2)}
PLANS: list[tuple[str, float, dict[str, Any]]] = [
    ("llama", 8.6, {"pp": 4, "schedule": "zb-h2"}),
    ("tied", 9.5, {"pp": 2, "schedule": "zb-h1", "tp": 2}),
    ("tied", 9.5, {"pp": 2, "schedule": "interleaved", "chunks": 2, "dp_shard": 2, "zero": 2}),
    (
        "llama",
        5.0,
        {"pp": 2, "schedule": "zb-v", "chunks": 2, "dp_shard": 2, "zero": 3, "passes": ("vocabulary", "sharding")},
    ),
    ("llama", 8.6, {"pp": 2, "schedule": "1f1b", "cp": 2, "recompute": "full", "offload": True}),
    ("llama", 8.6, {"pp": 2, "schedule": "zeropp", "dp_replicate": 2}),
    ("tied", 9.5, {"pp": 2, "schedule": "dualpipe"}),
    ("tied", 9.5, {"pp": 4, "schedule": "1f1b", "passes": ("vocabulary:algorithm=2",)}),
]
"""Model, limit of the norm, plan."""


def weights_of(session: Session) -> Pieces:
    return plain([p for m in session.model.masters for p in m.pieces("model", m.tensor)])


def break_gradient(session: Session) -> None:
    """Make a gradient of the last pipeline rank that counts any NaN in step BROKEN, when it is reduced."""
    units = [unit for unit in session.model.units if any(m.counted for m in unit.masters)]
    last = session.mesh.size("pp") - 1 if session.run.plan.schedule != "dualpipe" else 0
    if session.mesh.index("pp") != last:
        return
    step, play, unit = session.step, session.step.play, units[-1]
    settle, under_way = unit.settle, [0]

    def noted(number: int, *args: Any, **given: Any) -> Any:
        found = play(number, *args, **given)
        under_way[0] = number
        return found

    def broken(phase: int) -> Pending:
        pending = settle(phase)
        pending.wait()
        if under_way[0] == BROKEN:
            gradients = [m.tensor.grad for m in unit.masters if m.counted and m.tensor.grad is not None]
            gradients[0].view(-1)[0] = math.nan
        return DONE

    step.play, unit.settle = noted, broken  # type: ignore[method-assign]


def train_on_rank(rank: int, world: int, run: RunSpec, patience: int) -> dict[str, Any]:
    session = Session.start(run, rank)
    break_gradient(session)
    if session.unbarred is not None:
        session.unbarred.patience = patience
        session.unbarred._calm = patience
    results, weights = [], []
    for step in range(1, STEPS + 1):
        results += session.advance(step, batches_of(run, step, session.mesh.dp_index, documents=True))
        weights.append(weights_of(session))
    results += session.settle()
    weights[-1] = weights_of(session)
    return {
        "results": results,
        "weights": weights,
        "rollbacks": session.unbarred.rollbacks if session.unbarred else 0,
        "updates": session.step.updates,
        "steps": {float(state["step"]) for state in session.optimizer.state.values()},
    }


def name_of(case: tuple[str, float, dict[str, Any]]) -> str:
    return "-".join([case[0], *(f"{k}={v}" for k, v in case[2].items())])


@pytest.mark.parametrize("case", PLANS, ids=name_of)
def test_no_barrier_changes_nothing(ranks: Ranks, case: tuple[str, float, dict[str, Any]]) -> None:
    model, limit, plan = case
    training = replace(TRAINING, clip_norm=limit)
    barred = RunSpec(run=RunSettings(seed=2), model=MODELS[model], plan=PlanSpec(**plan), training=training)
    expected = train(ranks, barred)
    found = train(ranks, replace(barred, plan=PlanSpec(**plan, optimizer_barrier=False)))
    clipped = [r.step for r in expected[0]["results"] if r.grad_norm > limit]
    assert clipped == [2] if limit > 8 else len(clipped) >= 2
    for mine, theirs in zip(found, expected, strict=True):
        compare(mine, theirs)
    # With dualpipe the first rank holds all that counts, so that it knows the norm before anybody updates.
    assert max(mine["rollbacks"] for mine in found) >= (plan["schedule"] != "dualpipe")
    first = min([*clipped, BROKEN])
    for step, tolerance in ((first - 1, 0.0), (STEPS, TOLERANCE))[first == 1 :]:
        mine, theirs = (together([each["weights"][step - 1] for each in side]) for side in (found, expected))
        assert all(error(mine[name], theirs[name]) <= tolerance for name in theirs)


def train(ranks: Ranks, run: RunSpec) -> list[dict[str, Any]]:
    return ranks.run(train_on_rank, run.plan.num_ranks, run, 0)


def compare(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Every step has a result, in order, and it is the one with a barrier."""
    assert [r.step for r in mine["results"]] == list(range(1, STEPS + 1))
    for a, b in zip(mine["results"], theirs["results"], strict=True):
        assert (a.tokens, a.updated) == (b.tokens, b.updated)
        assert b.updated == (b.step != BROKEN)
        assert a.loss == pytest.approx(b.loss, rel=TOLERANCE)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=TOLERANCE, nan_ok=True)
    assert mine["updates"] == theirs["updates"] == STEPS - 1
    assert mine["steps"] == theirs["steps"] == {STEPS - 1.0}
