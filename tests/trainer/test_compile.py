"""plan.compile: blocks go through torch.compile and nothing changes; no compiler is needed to see that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from equivalence.plan_run import batches_of
from ranks import Ranks
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.session import Session

RUN = RunSpec(
    model=ModelSpec(vocab_size=61, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, dropout=0.1),
    training=TrainingSpec(global_batch_size=4, sequence_length=8, dtype="float64", learning_rate=0.01),
)


def train_on_rank(rank: int, world: int, run: RunSpec) -> tuple[list[tuple[float, float]], int]:
    """Losses and norms of three steps and an evaluation, and how many graphs were compiled."""
    compiler, graphs = torch.compile, []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch.compile = lambda module: compiler(module, backend=backend)  # type: ignore[assignment,misc]
    torch._dynamo.reset()
    try:
        session = Session.start(run, rank)
        found = []
        for step in (1, 2, 3):
            batches = batches_of(run, step, session.mesh.dp_index, documents=True)
            result = session.train_step(step, batches)
            found.append((result.loss, result.grad_norm))
        found.append((session.evaluate(batches)[0], 0.0))
        return found, len(graphs)
    finally:
        torch.compile = compiler


PLANS: list[dict[str, Any]] = [
    {},
    {"recompute": "full"},
    {"recompute": "selective"},
    {"dp_shard": 2, "zero": 3},
    {"tp": 2},
    {"pp": 2},
    {"pp": 2, "schedule": "zb-h1"},
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_compiled_blocks_give_the_same(ranks: Ranks, plan: dict[str, Any]) -> None:
    run = replace(RUN, plan=PlanSpec(**plan))
    expected = ranks.run(train_on_rank, run.plan.num_ranks, run)
    found = ranks.run(train_on_rank, run.plan.num_ranks, replace(run, plan=PlanSpec(**plan, compile=True)))
    for (mine, graphs), (reference, none) in zip(found, expected, strict=True):
        assert none == 0 and graphs > 0
        for a, b in zip(mine, reference, strict=True):
            assert a == pytest.approx(b, rel=1e-12)
