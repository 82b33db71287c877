"""Chimera and BitPipe: two replicas that share the ranks, their bubbles, and when gradients are reduced."""

import importlib

import pytest

from stretto.schedule import Kind, Schedule
from stretto.schedule.families import build
from stretto.schedule.passes.communication import lower
from stretto.schedule.render.text import draw
from stretto.schedule.simulate import Costs, run, simulate
from stretto.schedule.validate import validate
from stretto.spec.errors import ScheduleError

FAMILIES = ("chimera", "bitpipe")


# Scored with another event simulator from the order of the paper's code; the bubbles between its units are not here.
@pytest.mark.parametrize(
    ("ranks", "microbatches", "costs", "reached", "peak"),
    [
        (4, 4, "", 16, 4),
        (4, 16, "", 64, 4),
        (8, 8, "F=18.5,I=18.1,W=9.3,comm=0.6", 543, 8),
        (8, 32, "", 112, 20),
        (8, 32, "comm=0.1", 114.4, 20),
    ],
)
def test_chimera_is_no_slower_than_published_at_no_more_memory(
    ranks: int, microbatches: int, costs: str, reached: float, peak: float
) -> None:
    figures = simulate(build("chimera", ranks=ranks, microbatches=microbatches), Costs.parse(costs))
    assert figures.makespan <= reached + 1e-9
    assert max(figures.peak_activation) <= peak


@pytest.mark.parametrize("ranks", [2, 4, 6, 8])
@pytest.mark.parametrize("units", [1, 2, 4])
def test_full_units_have_the_bubble_of_half_the_ranks_and_the_memory_of_1f1b(ranks: int, units: int) -> None:
    for name, bubble in (("chimera", 2 * (ranks - 2)), ("bitpipe", ranks - 2)):
        figures = simulate(build(name, ranks=ranks, microbatches=units * ranks))
        assert figures.makespan == pytest.approx(3 * units * ranks + bubble)
        assert max(figures.peak_activation) == pytest.approx(ranks)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("ranks", [2, 4, 6])
def test_any_number_of_microbatches(name: str, ranks: int) -> None:
    for microbatches in range(1, 2 * ranks + 4):
        schedule = build(name, ranks=ranks, microbatches=microbatches)
        validate(schedule)
        validate(lower(schedule))
        assert schedule.voice == tuple(m % 2 for m in range(microbatches))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_second_replica_lies_on_the_ranks_in_reverse(name: str) -> None:
    first, second = build(name, ranks=4, microbatches=4).placement
    assert second == tuple(3 - rank for rank in first)


def reductions(schedule: Schedule, rank: int) -> list[int]:
    return [op.stage for op in schedule.ops(rank) if op.kind is Kind.REDUCE_GRAD]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("microbatches", [1, 4, 7, 8])
def test_each_stage_is_reduced_once_after_its_last_backward_in_one_order_on_the_ranks_that_share_it(
    name: str, microbatches: int
) -> None:
    schedule = build(name, ranks=4, microbatches=microbatches)
    for rank in range(4):
        held = {stage for voice in (0, 1) for stage in schedule.stages_of(rank, voice)}
        assert reductions(schedule, rank) == sorted(held, reverse=True) == reductions(schedule, 3 - rank)
        reduced: set[int] = set()
        for op in schedule.ops(rank):
            if op.kind is Kind.REDUCE_GRAD:
                reduced.add(op.stage)
            else:
                assert op.stage not in reduced


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_reduced_early_where_the_rank_idles_and_never_before_work_that_waits(name: str) -> None:
    schedule = build(name, ranks=4, microbatches=8)
    outer, middle = ([op.kind for op in schedule.ops(rank)] for rank in (0, 1))
    assert Kind.B in outer[outer.index(Kind.REDUCE_GRAD) :]
    assert Kind.B not in middle[middle.index(Kind.REDUCE_GRAD) :]
    plain = build(name, ranks=4, microbatches=8, options={"eager_sync": "false"})
    assert Kind.REDUCE_GRAD not in set(plain.kind.tolist())
    assert simulate(plain).makespan == simulate(schedule).makespan


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("ranks", "said"), [(1, "take 2 ranks"), (5, "take 4 or 6 ranks")])
def test_odd_ranks_are_refused_with_the_way_out(name: str, ranks: int, said: str) -> None:
    with pytest.raises(ScheduleError, match=f"{name} can't have {ranks} ranks.*{said}, or hanayo"):
        build(name, ranks=ranks, microbatches=4)


@pytest.mark.parametrize(("name", "ranks"), [("chimera", 4), ("bitpipe", 2)])
def test_the_figure_in_the_docstring_is_what_is_built(name: str, ranks: int) -> None:
    picture = draw(run(build(name, ranks=ranks, microbatches=4), Costs()), width=116)
    docstring = importlib.import_module(f"stretto.schedule.families.{name}").__doc__
    assert "\n".join(f"    {line}" for line in picture.splitlines()) in docstring
