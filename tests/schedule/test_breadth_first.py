"""Breadth-first: its bubble, and that each stage is gathered and reduced as rarely as can be."""

import importlib
from itertools import groupby

import pytest

from stretto.schedule import Kind
from stretto.schedule.families import build
from stretto.schedule.render.text import draw
from stretto.schedule.simulate import Costs, run, simulate
from stretto.schedule.validate import peak_memory, validate
from stretto.spec.errors import ScheduleError


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_the_bubble_is_that_of_interleaved_1f1b_for_any_number_of_microbatches(ranks: int, chunks: int) -> None:
    for microbatches in (ranks, ranks + 1, 3 * ranks + 1):
        schedule = build("breadth-first", ranks=ranks, microbatches=microbatches, chunks=chunks)
        validate(schedule)
        assert simulate(schedule).makespan == pytest.approx(3 * microbatches + 3 * (ranks - 1) / chunks)
        assert peak_memory(schedule) == pytest.approx((microbatches,) * ranks)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 2), (3, 2, 3), (4, 1, 1)])
def test_sharded_gathers_a_stage_once_a_pass_and_reduces_it_once_right_after_its_last_backward(
    shape: tuple[int, int, int],
) -> None:
    ranks, microbatches, chunks = shape
    schedule = build(
        "breadth-first", ranks=ranks, microbatches=microbatches, chunks=chunks, options={"sharded": "true"}
    )
    validate(schedule)
    for rank in range(ranks):
        open_stages: set[int] = set()
        gathered = dict.fromkeys(schedule.stages_of(rank), 0)
        for op in schedule.ops(rank):
            if op.kind is Kind.UNSHARD:
                open_stages.add(op.stage)
                gathered[op.stage] += 1
            elif op.kind is Kind.RESHARD:
                open_stages.remove(op.stage)
            elif op.kind in (Kind.F, Kind.B):
                assert op.stage in open_stages
            assert len(open_stages) <= 2
        assert not open_stages
        assert gathered == {s: 1 if s == rank + (chunks - 1) * ranks else 2 for s in schedule.stages_of(rank)}
        runs = [key for key, _ in groupby((op.kind, op.stage) for op in schedule.ops(rank))]
        for stage in schedule.stages_of(rank):
            last = runs.index((Kind.B, stage))
            assert runs[last : last + 3] == [(Kind.B, stage), (Kind.RESHARD, stage), (Kind.REDUCE_GRAD, stage)]


def test_the_figure_in_the_docstring_is_what_is_built() -> None:
    picture = draw(run(build("breadth-first", ranks=2, microbatches=3, chunks=2), Costs()), width=116)
    docstring = importlib.import_module("stretto.schedule.families.breadth_first").__doc__
    assert "\n".join(f"    {line}" for line in picture.splitlines()) in docstring


def test_sharded_is_true_or_false() -> None:
    with pytest.raises(ScheduleError, match="Option sharded is 'maybe', but it is true or false"):
        build("breadth-first", ranks=2, microbatches=2, options={"sharded": "maybe"})
