"""Hanayo: the bubble shrinks with the waves, memory stays that of 1F1B, any number of micro-batches."""

import importlib

import pytest

from stretto.schedule import Schedule
from stretto.schedule.families import build
from stretto.schedule.passes.communication import lower
from stretto.schedule.render.text import draw
from stretto.schedule.simulate import Costs, run, simulate
from stretto.schedule.validate import validate
from stretto.spec.errors import ScheduleError


def hanayo(ranks: int, microbatches: int, waves: int = 1, memory_limit: float | None = None) -> Schedule:
    return build("hanayo", ranks=ranks, microbatches=microbatches, options={"waves": waves}, memory_limit=memory_limit)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("waves", [1, 2, 3])
def test_full_groups_have_the_bubble_of_the_wave_and_the_memory_of_1f1b(ranks: int, waves: int) -> None:
    for groups in (1, 2, 4):
        figures = simulate(hanayo(ranks, groups * ranks, waves))
        assert figures.makespan == pytest.approx(3 * groups * ranks + 2 * (ranks - 1) / waves)
        assert max(figures.peak_activation) == pytest.approx(ranks)


@pytest.mark.parametrize(
    ("ranks", "microbatches", "reached"), [(4, 4, 19.5), (4, 16, 55.5), (8, 16, 64.5), (8, 32, 112.5)]
)
def test_one_wave_is_faster_than_the_published_1f1b_in_a_v(ranks: int, microbatches: int, reached: float) -> None:
    assert simulate(hanayo(ranks, microbatches)).makespan < reached


@pytest.mark.parametrize("ranks", [1, 3, 4])
@pytest.mark.parametrize("waves", [1, 2])
def test_any_number_of_microbatches_and_a_group_more_costs_no_more_than_its_work(ranks: int, waves: int) -> None:
    for microbatches in range(1, 3 * ranks + 1):
        schedule = hanayo(ranks, microbatches, waves)
        validate(schedule)
        validate(lower(schedule))
        bubble = simulate(schedule).makespan - 3 * microbatches
        assert microbatches < ranks or bubble == pytest.approx(2 * (ranks - 1) / waves)


def test_less_memory_makes_smaller_groups_until_there_is_an_error_that_says_the_least() -> None:
    makespans = []
    for limit in (7, 4, 3, 2):
        figures = simulate(hanayo(4, 7, waves=2, memory_limit=limit))
        assert max(figures.peak_activation) <= limit
        makespans.append(figures.makespan)
    assert makespans == sorted(makespans) and makespans[0] < makespans[-1]
    with pytest.raises(ScheduleError, match=r"keeps 1 micro-batches .* at least.*; the memory limit is 0\.5"):
        hanayo(4, 7, waves=2, memory_limit=0.5)


@pytest.mark.parametrize("waves", ["0", "two", "1.5", "-1", True])
def test_waves_are_a_whole_number(waves: object) -> None:
    with pytest.raises(ScheduleError, match=r"Option waves is .*, but it is a whole number of at least 1"):
        build("hanayo", ranks=2, microbatches=2, options={"waves": waves})


def test_the_figure_in_the_docstring_is_what_is_built() -> None:
    picture = draw(run(hanayo(2, 3), Costs()), width=116)
    docstring = importlib.import_module("stretto.schedule.families.wave").__doc__
    assert "\n".join(f"    {line}" for line in picture.splitlines()) in docstring
