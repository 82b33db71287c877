"""Schedules that a plan asks for other than by a family's name give what one plain rank gives.

Searched (``auto``), read from a file, changed by passes; and skip-pipe, which leaves stages out, against one rank
that leaves out the same layers.  Tolerance as in test_plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equivalence.orders import any_order
from equivalence.plan_run import train_plan
from equivalence.reference import Record, build_reference, error, rows_of, train_reference, worst_gradient, worst_of
from equivalence.test_plans import TOLERANCE
from equivalence.test_schedules import STEPS, layers_of, reference_of, run_of
from ranks import Ranks
from stretto.schedule.document import load, save
from stretto.spec.check import check
from stretto.spec.contract import Batch, Place
from stretto.spec.run import RunSpec
from stretto.trainer.planned import planned
from stretto.trainer.schedules import searched


def equal(found: Record, reference: Record) -> None:
    assert worst_of(found.losses, reference.losses) <= TOLERANCE
    gradient_error, name = worst_gradient(found, reference)
    assert gradient_error <= TOLERANCE, name
    assert worst_of(found.norms, reference.norms) <= TOLERANCE
    for name in reference.weights:
        assert error(found.weights[name], reference.weights[name]) <= TOLERANCE, name


SEARCH = {"schedule": "auto", "options": {"time_budget": 0.1}}
SEARCHED: list[tuple[int, str, dict[str, Any]]] = [
    (4, "tied", {"pp": 2, "chunks": 2, "memory_limit": 1.5, **SEARCH}),
    (3, "dropout", {"pp": 2, "passes": ("sharding:blocks=2",), "dp_shard": 2, "zero": 3, **SEARCH}),
]


@pytest.mark.parametrize("case", SEARCHED, ids=str)
def test_what_was_searched_for_equals_one_rank(ranks: Ranks, case: tuple[int, str, dict[str, Any]]) -> None:
    microbatches, model, plan = case
    rows = microbatches * run_of(model, plan, 1).plan.dp
    run = run_of(model, plan, rows)
    check(run, data=False)
    equal(train_plan(ranks, run, STEPS), reference_of(model, rows))


def test_a_file_of_any_order_equals_one_rank(ranks: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    save(any_order("uneven2", microbatches=4, seed=5), path)
    stages = load(path).num_stages
    plan = {"pp": 2, "schedule_file": str(path), "stages": layers_of("tied", stages), "dp_shard": 2, "zero": 2}
    run = run_of("tied", {**plan, "passes": ("recompute:stages=0", "2bp:when=end", "sharding:reduce=each")}, 8)
    check(run, data=False)
    equal(train_plan(ranks, run, STEPS), reference_of("tied", 8))


def test_a_finished_run_plays_what_was_found_again(tmp_path: Path) -> None:
    run = run_of("tied", {"pp": 2, **SEARCH, "passes": ("recompute",)}, 4)
    run = replace(run, run=replace(run.run, dir=str(tmp_path)))
    again = searched(run)
    assert again.plan.schedule_file == str(tmp_path / "schedule.json") and searched(again) == again
    check(again, data=False)
    assert planned(again) == planned(run)


class Skipping(nn.Module):
    """A model of which each row of the batch goes through layers of its own."""

    def __init__(self, model: Any, layers: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.blocks, self._model, self._layers = (), [model], layers

    def named_parameters(self, *args: Any, **options: Any) -> Any:
        return self._model[0].named_parameters()

    def context(self, batch: Batch, place: Place) -> tuple[Batch, Place]:
        return batch, place

    def inputs(self, whole: Batch, context: tuple[Batch, Place]) -> Tensor:
        model, rows = self._model[0], []
        for row, layers in enumerate(self._layers):
            batch = rows_of(whole, row, row + 1)
            context_of_row = model.context(batch, context[1])
            x = model.inputs(batch, context_of_row)
            for layer in layers:
                x = model.blocks[layer](x, context_of_row)
            rows.append(model.outputs(x, context_of_row))
        return torch.cat(rows)

    def outputs(self, x: Tensor, context: Any) -> Tensor:
        return x

    def loss(self, logits: Tensor, batch: Batch) -> Any:
        return self._model[0].loss(logits, batch)


def layers_of_rows(run: RunSpec) -> list[list[int]]:
    """Layers that each micro-batch of one row goes through, in its order."""
    schedule, per_stage = planned(run), run.model.num_layers // run.plan.num_stages
    paths = [schedule.path(m) for m in range(schedule.num_microbatches)]
    return [[stage * per_stage + i for stage in path for i in range(per_stage)] for path in paths]


@pytest.mark.parametrize(
    ("rows", "model", "plan"),
    [
        (5, "tied", {"pp": 4, "chunks": 2}),
        (5, "dropout", {"pp": 2, "chunks": 2, "tp": 2, "passes": ("2bp", "recompute")}),
    ],
    ids=str,
)
def test_skipping_equals_one_rank_that_skips(ranks: Ranks, rows: int, model: str, plan: dict[str, Any]) -> None:
    run = run_of(model, {**plan, "schedule": "skip-pipe"}, rows)
    check(run, data=False)
    layers = layers_of_rows(run)
    assert all(len(some) < run.model.num_layers for some in layers)
    assert any(some != sorted(some) for some in layers) == (run.plan.num_stages > 4)
    built = build_reference(run, torch.float64)
    equal(train_plan(ranks, run, STEPS), train_reference(run, STEPS, model=Skipping(built, layers)))
