"""The figures: against closed forms, against each other, and against published values."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.schedule import Op, Schedule
from stretto.schedule.families import build
from stretto.schedule.passes.communication import lower
from stretto.schedule.passes.sharding import sharding
from stretto.schedule.passes.split_backward import split_backward
from stretto.schedule.simulate import Costs, lower_bound, peak_activation, run, simulate
from stretto.schedule.simulate.bound import _one_machine
from stretto.spec.errors import ScheduleError

whole_costs = st.builds(
    Costs, F=st.integers(1, 9), I=st.integers(1, 9), W=st.integers(1, 9), comm=st.integers(0, 9).map(float)
)


@given(
    name=st.sampled_from(["gpipe", "1f1b", "interleaved", "forward-only"]),
    ranks=st.integers(1, 4),
    microbatches=st.integers(1, 6),
    chunks=st.integers(1, 2),
    costs=whole_costs,
)
@settings(max_examples=60, deadline=None)
def test_figures_hold_together(name: str, ranks: int, microbatches: int, chunks: int, costs: Costs) -> None:
    chunks = 1 if name in ("gpipe", "1f1b") else chunks
    schedule = build(name, ranks=ranks, microbatches=microbatches, chunks=chunks)
    figures = simulate(schedule, costs)
    assert figures.span <= figures.makespan + 1e-9
    assert simulate(lower(schedule), costs) == figures
    if name != "forward-only":
        assert figures.lower_bound <= figures.makespan + 1e-9
        assert figures.busy == pytest.approx([microbatches * (costs.F + costs.I + costs.W)] * ranks)


@given(ranks=st.integers(1, 6), microbatches=st.integers(1, 12), costs=whole_costs)
@settings(max_examples=60, deadline=None)
def test_no_schedule_beats_the_bound(ranks: int, microbatches: int, costs: Costs) -> None:
    for schedule in (build(name, ranks=ranks, microbatches=microbatches) for name in ("1f1b", "gpipe", "forward-only")):
        for form in (schedule, split_backward(schedule)):
            assert lower_bound(form, costs) <= run(form, costs).makespan + 1e-9


@given(jobs=st.dictionaries(st.tuples(st.integers(0, 9), st.integers(0, 9)), st.integers(1, 9), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_one_machine_is_the_largest_sum_over_all_sets(jobs: dict) -> None:
    largest = max(
        min(head for head, _ in some) + sum(jobs[job] for job in some) + min(tail for _, tail in some)
        for size in range(1, len(jobs) + 1)
        for some in itertools.combinations(jobs, size)
    )
    assert _one_machine(jobs) == largest


def test_the_bound_is_reached_where_there_is_nothing_to_wait_for() -> None:
    alone = simulate(build("1f1b", ranks=1, microbatches=5), Costs(F=2, I=3, W=4))
    assert alone.lower_bound == alone.makespan == 45
    forward = simulate(build("forward-only", ranks=4, microbatches=8))
    assert forward.lower_bound == forward.makespan == 11


# Makespan, span rate and peak that other generators give, timed by another simulator (p, m, v, costs).
PUBLISHED = [
    (("1f1b", 4, 8, 1), Costs(), 33.0, 4.0),
    (("1f1b", 4, 4, 1), Costs(F=18.5, I=18.1, W=9.3, comm=0.6), 327.3, 4.0),
    (("1f1b", 4, 4, 1), Costs(comm=0.1), 22.0, 4.0),
    (("interleaved", 4, 4, 2), Costs(), 16.5, 4.0),
    (("interleaved", 4, 4, 2), Costs(F=18.5, I=18.1, W=9.3, comm=0.6), 260.85, 4.0),
    (("interleaved", 4, 4, 4), Costs(F=18.5, I=18.1, W=9.3, comm=0.6), 236.025, 4.0),
    (("interleaved", 4, 4, 4), Costs(comm=0.1), 17.25, 4.0),
]


@pytest.mark.parametrize(("shape", "costs", "makespan", "peak"), PUBLISHED)
def test_published_values(shape: tuple, costs: Costs, makespan: float, peak: float) -> None:
    name, ranks, microbatches, chunks = shape
    figures = simulate(build(name, ranks=ranks, microbatches=microbatches, chunks=chunks), costs)
    assert figures.makespan == figures.span == pytest.approx(makespan, abs=1e-9)
    assert max(figures.peak_activation) == pytest.approx(peak)
    work = microbatches * (costs.F + costs.I + costs.W)
    assert figures.bubble_rate == figures.bubble_rate_span == pytest.approx(1 - work / makespan)


def test_span_is_shorter_than_makespan_where_no_rank_runs_throughout() -> None:
    tokens = [["0F0"], ["1F0"]]
    orders = [[Op.parse(token) for token in order] for order in tokens]
    once = Schedule.from_orders(
        orders, name="once", num_stages=2, num_microbatches=1, placement=[[0, 1]], forward_only=True
    )
    figures = simulate(once, Costs(F=3, comm=2))
    assert (figures.makespan, figures.span, figures.busy) == (8.0, 3.0, (3.0, 3.0))
    assert (figures.bubble_rate, figures.bubble_rate_span) == (1 - 6 / 16, 0.0)


def test_the_fields_are_the_contract() -> None:
    names = [field.name for field in dataclasses.fields(simulate(build("gpipe", ranks=1, microbatches=1)))]
    assert names == [
        "name", "ranks", "stages", "microbatches", "makespan", "span", "lower_bound",
        "bubble_rate", "bubble_rate_span", "busy", "peak_activation",
    ]  # fmt: skip


def test_a_chunk_holds_its_part_of_a_rank() -> None:
    assert peak_activation(build("interleaved", ranks=4, microbatches=8, chunks=2)) == (5.5, 4.5, 3.5, 2.5)


def test_a_deadlock_is_said_not_waited_for() -> None:
    tokens = [["0F0", "0B0", "0F1", "0B1"], ["1F0", "1F1", "1B0", "1B1"]]
    orders = [[Op.parse(token) for token in order] for order in tokens]
    stuck = Schedule.from_orders(orders, name="stuck", num_stages=2, num_microbatches=2, placement=[[0, 1]])
    with pytest.raises(ScheduleError, match="deadlock"):
        run(stuck, Costs())


def test_costs_read_from_the_command_line() -> None:
    assert Costs.parse("F=20, I=36,W=6,comm=0.5,act_w=0.3") == Costs(F=20, I=36, W=6, comm=0.5, act_w=0.3)
    assert Costs.parse("") == Costs()


@pytest.mark.parametrize(
    ("given_costs", "said"),
    [
        ("F=0", "Cost F is 0, but an operation takes a time above 0"),
        ("W=-1", "Cost W is -1"),
        ("I=nan", "Cost I is nan"),
        ("comm=-0.1", "Cost comm is -0.1, but a latency is 0 or more"),
        ("act_w=2", "Cost act_w is 2, but a fraction"),
        ("act=1", "no cost 'act'; did you mean 'act_w'"),
        ("F", "Cost F has no value; write F=1"),
        ("F=fast", "Cost F is 'fast', which is not a number"),
        ("F=1,F=2", "Cost F is given twice"),
    ],
)
def test_impossible_costs(given_costs: str, said: str) -> None:
    with pytest.raises(ScheduleError) as error:
        Costs.parse(given_costs)
    assert said in str(error.value)


def test_parameters_gathered_ahead_are_no_part_of_the_span() -> None:
    plain = build("forward-only", ranks=4, microbatches=4)
    costs = Costs(UNSHARD=0.5)
    assert simulate(sharding(plain)).span == simulate(plain).span == 4
    figures = simulate(sharding(plain), costs)
    assert (figures.span, figures.bubble_rate_span) == (4, 0)
