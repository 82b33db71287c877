"""V-Min, V-Half, ZB-V: memory as the paper says, no slower than public generators, any shape, any costs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stretto.schedule.families.v_shape as family
from stretto.schedule.families import build
from stretto.schedule.render.text import draw
from stretto.schedule.simulate import Costs, run, simulate
from stretto.schedule.validate import validate
from stretto.spec.errors import ScheduleError

UNIT, PROFILED = Costs(), Costs(F=18.5, I=18.1, W=9.3, comm=0.6)
MEMORY = {"v-min": lambda ranks: (ranks + 4) // 3, "v-half": lambda ranks: ranks // 2 + 1, "zb-v": lambda ranks: ranks}

# Makespan and peak memory of the zero-bubble authors' public generators, timed by the rules of the simulator.
PUBLIC = [
    ("v-min", 4, 8, UNIT, 29.5, 2),
    ("v-min", 4, 8, PROFILED, 561.75, 2),
    ("v-half", 4, 8, UNIT, 26.5, 3),
    ("v-half", 4, 8, PROFILED, 449.45, 3),
    ("v-half", 8, 16, UNIT, 56.5, 5),
    ("zb-v", 4, 8, UNIT, 25.5, 4),
    ("zb-v", 4, 8, PROFILED, 403.6, 4),
    ("zb-v", 8, 16, PROFILED, 820.15, 8),
]


@pytest.mark.parametrize(("name", "ranks", "microbatches", "costs", "makespan", "peak"), PUBLIC)
def test_no_slower_than_public_generators_at_their_memory(
    name: str, ranks: int, microbatches: int, costs: Costs, makespan: float, peak: float
) -> None:
    schedule = build(name, ranks=ranks, microbatches=microbatches, costs=costs)
    validate(schedule)
    figures = simulate(schedule, costs)
    assert figures.makespan <= makespan + 1e-6
    assert max(figures.peak_activation) <= peak


def test_zb_v_has_no_bubble_from_first_to_last_operation() -> None:
    assert simulate(build("zb-v", ranks=4, microbatches=12)).bubble_rate_span == pytest.approx(0, abs=1e-9)


costs = st.builds(
    Costs,
    F=st.sampled_from([1.0, 2.0]),
    I=st.sampled_from([1.0, 1.3]),
    W=st.sampled_from([0.4, 1.0]),
    comm=st.sampled_from([0.0, 0.2]),
    act_w=st.sampled_from([0.5, 1.0]),
)


@given(name=st.sampled_from(sorted(MEMORY)), ranks=st.integers(1, 6), microbatches=st.integers(1, 12), costs=costs)
@settings(max_examples=20, deadline=None)
def test_any_shape_is_complete_within_its_memory(name: str, ranks: int, microbatches: int, costs: Costs) -> None:
    schedule = build(name, ranks=ranks, microbatches=microbatches, costs=costs)
    validate(schedule)
    assert max(simulate(schedule, costs).peak_activation) <= MEMORY[name](ranks) + 1e-6


@pytest.mark.parametrize("limit", [1, 1.5, 2])
def test_a_lower_limit_is_kept(limit: float) -> None:
    figures = simulate(build("v-half", ranks=4, microbatches=8, costs=PROFILED, memory_limit=limit), PROFILED)
    assert max(figures.peak_activation) <= limit + 1e-6


def test_a_limit_below_one_microbatch_is_an_error_that_says_the_least() -> None:
    with pytest.raises(ScheduleError, match=r"is 0\.9, but one micro-batch keeps 1 alive .* least limit .* is 1"):
        build("v-min", ranks=4, microbatches=8, memory_limit=0.9)


def test_the_same_costs_give_the_same_schedule() -> None:
    first, second = (build("v-half", ranks=3, microbatches=7, costs=PROFILED) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", ["v-min", "v-half", "zb-v"])
def test_the_figures_in_the_docstring_are_what_is_built(name: str) -> None:
    picture = draw(run(build(name, ranks=4, microbatches=4), Costs()), width=116)
    assert "\n".join(f"    {line}" for line in picture.splitlines()) in str(family.__doc__)
