"""The synthesizer: what it returns fits, is as good as known optima and families, and says how good it can be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stretto.schedule.families import build
from stretto.schedule.simulate import Costs, simulate
from stretto.schedule.synthesize.auto import Result, synthesize
from stretto.schedule.synthesize.bounds import lower_bound
from stretto.schedule.synthesize.search import Search
from stretto.schedule.synthesize.space import Layout, layouts, problem_of
from stretto.schedule.synthesize.symbols import to_schedule, to_symbols
from stretto.schedule.validate import validate
from stretto.spec.errors import ScheduleError

ZERO_BUBBLE = Costs(F=18.5, I=18.1, W=9.3, comm=0.6)


def held_to_the_simulator(result: Result, costs: Costs, limit: float) -> None:
    """The schedule is valid, as long as the result says, within the limit and not below the bound."""
    validate(result.schedule)
    figures = simulate(result.schedule, costs)
    assert figures.makespan == pytest.approx(result.makespan, rel=1e-9)
    assert max(figures.peak_activation) <= limit + 1e-6
    assert result.makespan >= result.lower_bound * (1 - 1e-9)


# Proven by exact search with a public solver: 4 ranks, 8 micro-batches, F = I = W = 1, messages free.
@pytest.mark.parametrize(
    ("layout", "limit", "optimum"),
    [
        ("loop 1", 4 / 3, 72.0), ("loop 1", 2, 41.0), ("loop 1", 8 / 3, 41.0), ("loop 1", 4, 27.0),
        ("zigzag 2", 4 / 3, 50.5), ("zigzag 2", 2, 29.5), ("zigzag 2", 8 / 3, 28.0), ("zigzag 2", 4, 25.5),
    ],
)  # fmt: skip
def test_small_problems_reach_their_proven_optimum(layout: str, limit: float, optimum: float) -> None:
    place = next(each for each in layouts(4) if each.name == layout)
    problem = problem_of(place, microbatches=8, costs=Costs().of(place), limit=[limit] * 4)
    search = Search(problem, seed=1, target=optimum)
    for _ in range(6):
        search.explore(0.3)
        search.anneal(0.3)
    assert search.best is not None
    assert search.best.makespan == pytest.approx(optimum)
    assert lower_bound(problem, time_budget=0.0).value <= optimum + 1e-9


def test_equal_seeds_find_equal_schedules() -> None:
    layout = next(each for each in layouts(4) if each.name == "zigzag 3")
    problem = problem_of(layout, microbatches=9, costs=ZERO_BUBBLE.of(layout), limit=[2.0] * 4)
    found = []
    for seed in (7, 7, 8):
        search = Search(problem, seed=seed)
        search.explore(0.02)
        search.anneal(0.02)
        assert search.best is not None
        found.append(search.best.order)
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_problem_gets_a_schedule_that_fits(data: st.DataObject) -> None:
    ranks, chunks = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    layout = data.draw(st.sampled_from(layouts(ranks, chunks=(chunks,))))
    times = [
        data.draw(st.lists(st.integers(1, 9), min_size=layout.num_stages, max_size=layout.num_stages)) for _ in "FIW"
    ]
    costs = Costs(F=times[0], I=times[1], W=times[2], comm=data.draw(st.sampled_from([0.0, 0.5])), act_w=0.5)
    limits = [1 + data.draw(st.integers(0, 3)) for _ in range(ranks)]
    microbatches = data.draw(st.integers(1, 6))
    result = synthesize(microbatches=microbatches, space=[layout], costs=costs, memory_limit=limits, effort=0.05)
    held_to_the_simulator(result, costs, max(limits))
    for peak, limit in zip(simulate(result.schedule, costs).peak_activation, limits, strict=True):
        assert peak <= limit + 1e-6


@pytest.mark.parametrize(("name", "limit"), [("1f1b", 4), ("zb-h1", 4), ("zb-h2", 7), ("interleaved", 6), ("zb-v", 4)])
def test_no_family_is_better_in_the_same_memory(name: str, limit: float) -> None:
    chunks = 2 if name == "interleaved" else None
    family = build(name, ranks=4, microbatches=6, chunks=chunks, costs=ZERO_BUBBLE, memory_limit=limit)
    result = synthesize(
        microbatches=6, space=layouts(4), costs=ZERO_BUBBLE, memory_limit=limit, time_budget=60, effort=0.3
    )
    assert result.makespan <= simulate(family, ZERO_BUBBLE).makespan * (1 + 1e-9)


def test_there_is_a_schedule_even_without_time() -> None:
    for limit in (1.0, 4.0):
        result = synthesize(microbatches=8, space=layouts(4), costs=ZERO_BUBBLE, memory_limit=limit, time_budget=0.0)
        held_to_the_simulator(result, ZERO_BUBBLE, limit)


def test_a_limit_that_no_schedule_keeps_is_refused_with_the_least_that_one_can() -> None:
    with pytest.raises(ScheduleError, match=r"memory limit of 0\.5: .* must be 1 or more"):
        synthesize(microbatches=4, space=layouts(4), costs=Costs(), memory_limit=0.5)
    with pytest.raises(ScheduleError, match="memory_limit has 2 entries, but there are 4 ranks"):
        synthesize(microbatches=4, space=layouts(4), costs=Costs(), memory_limit=[1.0, 2.0])


def test_costs_may_differ_from_layout_to_layout() -> None:
    def price(layout: Layout) -> Costs:
        share = layout.num_ranks / layout.num_stages
        return Costs(
            F=[share * (1.5 if rank == 1 else 1) for rank in layout.placement[0]],
            I=[share] * layout.num_stages,
            W=[share] * layout.num_stages,
        )

    result = synthesize(microbatches=4, space=layouts(2), costs=price, effort=0.3)
    layout = next(each for each in layouts(2) if each.placement == result.schedule.placement)
    held_to_the_simulator(result, price(layout), float("inf"))


def test_auto_is_a_family_whose_chunks_may_be_left_open() -> None:
    options = {"time_budget": 0.2}
    assert build("auto", ranks=2, microbatches=4, chunks=2, options=options).num_stages == 4
    assert build("auto", ranks=2, microbatches=4, options=options).num_stages in (2, 4, 6, 8)
    per_stage = Costs(F=(1, 2, 1, 1), I=(1, 2, 1, 1), W=(1, 1, 1, 1))
    assert build("auto", ranks=2, microbatches=4, costs=per_stage, options=options).num_stages == 4
    with pytest.raises(ScheduleError, match="costs are for 4 stages, which is not a multiple of 3 ranks"):
        build("auto", ranks=3, microbatches=4, costs=per_stage, options=options)
    with pytest.raises(ScheduleError, match="time_budget"):
        build("auto", ranks=2, microbatches=4, options={"time_budget": "long"})


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb-h2"])
def test_symbols_and_schedules_turn_into_each_other(name: str) -> None:
    schedule = build(name, ranks=3, microbatches=7, chunks=2 if name == "interleaved" else None)
    layout = Layout(name=name, num_ranks=3, placement=schedule.placement[:1])
    problem = problem_of(layout, microbatches=7, costs=Costs().of(layout), limit=[9.0] * 3)
    order = to_symbols(schedule)
    assert order is not None
    again = to_schedule(order, problem, name=name)
    validate(again)
    assert simulate(again).makespan <= simulate(schedule).makespan
    assert np.array_equal(to_symbols(again), order)


def test_what_the_search_does_not_know_has_no_symbols() -> None:
    assert to_symbols(build("chimera", ranks=2, microbatches=4)) is None
    assert to_symbols(build("forward-only", ranks=2, microbatches=4)) is None
