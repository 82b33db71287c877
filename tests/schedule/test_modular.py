"""Modular pipeline: layered gradient accumulation on each rank, gathered and reduced as rarely as can be."""

import importlib
from collections import Counter

import pytest

from stretto.schedule import Kind
from stretto.schedule.families import build
from stretto.schedule.render.text import draw
from stretto.schedule.simulate import Costs, run, simulate
from stretto.schedule.validate import validate


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("layers", [1, 4])
def test_filling_the_pipeline_costs_layers_and_not_shares(ranks: int, layers: int) -> None:
    for microbatches in (ranks, 2 * ranks + 1):
        schedule = build("modular", ranks=ranks, microbatches=microbatches, chunks=layers)
        validate(schedule)
        assert simulate(schedule).makespan == pytest.approx(3 * microbatches + 3 * (ranks - 1) / layers)


def test_one_rank_is_layered_gradient_accumulation() -> None:
    plain = build("modular", ranks=1, microbatches=2, chunks=2, options={"sharded": "false"})
    assert " ".join(map(str, plain.ops(0))) == "0F0 0F1 1F0 1F1 1B0 1B1 0B0 0B1"


@pytest.mark.parametrize("microbatches", [1, 6])
def test_communication_does_not_grow_with_the_microbatches(microbatches: int) -> None:
    schedule = build("modular", ranks=2, microbatches=microbatches, chunks=3)
    for rank in range(2):
        count = Counter(op.kind for op in schedule.ops(rank))
        assert (count[Kind.UNSHARD], count[Kind.RESHARD], count[Kind.REDUCE_GRAD]) == (5, 5, 3)


def test_the_figure_in_the_docstring_is_what_is_built() -> None:
    picture = draw(run(build("modular", ranks=2, microbatches=4, chunks=2), Costs()), width=116)
    docstring = importlib.import_module("stretto.schedule.families.modular").__doc__
    assert "\n".join(f"    {line}" for line in picture.splitlines()) in docstring
