"""ZeroPP: no bubble but the start, units that hold memory down, each stage gathered twice a unit and reduced once."""

import importlib
from collections import Counter

import pytest

from stretto.schedule import Kind, Schedule
from stretto.schedule.families import build
from stretto.schedule.passes.communication import lower
from stretto.schedule.render.text import draw
from stretto.schedule.simulate import Costs, run, simulate
from stretto.schedule.validate import validate
from stretto.spec.errors import ScheduleError


def zeropp(ranks: int, microbatches: int, chunks: int, **options: object) -> Schedule:
    return build("zeropp", ranks=ranks, microbatches=microbatches, chunks=chunks, options=options)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_the_only_bubble_is_the_start(ranks: int, chunks: int) -> None:
    for microbatches in (2 * ranks - 1, 4 * ranks - 2, 6 * ranks - 3):
        figures = simulate(zeropp(ranks, microbatches, chunks))
        assert figures.makespan == pytest.approx(3 * microbatches + (ranks - 1) / chunks)
        assert max(figures.peak_activation) == pytest.approx(2 * ranks - 1)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("chunks", [2, 3])
def test_units_of_as_many_as_ranks_are_enough_with_several_chunks(ranks: int, chunks: int) -> None:
    for microbatches in (2 * ranks, 4 * ranks, 4 * ranks + 1):
        figures = simulate(zeropp(ranks, microbatches, chunks, unit=ranks))
        assert figures.makespan == pytest.approx(3 * microbatches + (ranks - 1) / chunks)
        assert max(figures.peak_activation) < 2 * ranks - 1 or ranks == 2


@pytest.mark.parametrize(("ranks", "chunks"), [(1, 1), (2, 3), (3, 2), (4, 1), (5, 2)])
@pytest.mark.parametrize("sharded", [True, False])
def test_any_number_of_microbatches_and_any_unit(ranks: int, chunks: int, sharded: bool) -> None:
    for microbatches in range(1, 3 * ranks + 1, 2):
        for unit in (1, 2, ranks, 2 * ranks, microbatches):
            schedule = zeropp(ranks, microbatches, chunks, unit=unit, sharded=sharded)
            validate(schedule)
            validate(lower(schedule))
            assert sharded or not set(schedule.kind.tolist()) & {Kind.UNSHARD, Kind.RESHARD, Kind.REDUCE_GRAD}


def test_a_stage_is_gathered_twice_a_unit_and_reduced_once() -> None:
    schedule = zeropp(4, 14, 3)  # two units of seven
    for rank in range(4):
        count = Counter((op.kind, op.stage) for op in schedule.ops(rank))
        last = rank + 8
        for stage in schedule.stages_of(rank):
            # The last chunk stays between F and I, the first one between the units.
            kept = {last: 2, rank: 1}.get(stage, 0)
            assert count[Kind.UNSHARD, stage] == count[Kind.RESHARD, stage] == 4 - kept
            assert count[Kind.REDUCE_GRAD, stage] == 2


def test_gathering_is_one_turn_ahead_and_never_more_than_two_stages() -> None:
    schedule = zeropp(3, 10, 3)
    for rank in range(3):
        held: set[int] = set()
        for op in schedule.ops(rank):
            if op.kind is Kind.UNSHARD:
                held.add(op.stage)
            elif op.kind is Kind.RESHARD:
                held.remove(op.stage)
            assert len(held) <= 2


def test_less_memory_makes_smaller_units_until_there_is_an_error_that_says_the_least() -> None:
    makespans = []
    for limit in (7, 6, 5, 3):
        schedule = build("zeropp", ranks=4, microbatches=14, chunks=2, memory_limit=limit)
        figures = simulate(schedule)
        assert max(figures.peak_activation) <= limit
        makespans.append(figures.makespan)
    assert makespans == sorted(makespans)
    with pytest.raises(ScheduleError, match=r"units of 1, its smallest, keeps 2\.5 .*; the memory limit is 2\."):
        build("zeropp", ranks=4, microbatches=14, chunks=2, memory_limit=2)
    with pytest.raises(ScheduleError, match=r"units of 7 keeps 7 .*; the memory limit is 5\."):
        build("zeropp", ranks=4, microbatches=14, chunks=2, memory_limit=5, options={"unit": "7"})


@pytest.mark.parametrize("costs", ["F=18.5,I=18.1,W=9.3,comm=0.6", "F=20,I=36,W=6,comm=0.5", "comm=0.1"])
def test_w_moves_with_the_costs_where_that_is_faster_at_no_more_memory(costs: str) -> None:
    given = Costs.parse(costs)
    fixed = simulate(zeropp(8, 32, 2), given)
    moved = simulate(build("zeropp", ranks=8, microbatches=32, chunks=2, costs=given), given)
    assert moved.makespan < fixed.makespan
    assert max(moved.peak_activation) <= max(fixed.peak_activation)


def test_the_figure_in_the_docstring_is_what_is_built() -> None:
    picture = draw(run(zeropp(2, 4, 2), Costs()), width=116)
    docstring = importlib.import_module("stretto.schedule.families.zeropp").__doc__
    assert "\n".join(f"    {line}" for line in picture.splitlines()) in docstring
