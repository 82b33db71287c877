"""Bounds: below every schedule there is, equal to proven optima, and what the least memory is."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.schedule.placement import loop, zigzag
from stretto.schedule.synthesize import exact, relax, replay
from stretto.schedule.synthesize.bounds import Bound, least_memory, lower_bound
from stretto.schedule.synthesize.problem import Problem
from stretto.schedule.synthesize.relax import everything

UNIT = (1.0, 1.0, 1.0, 0.0)
ZB_PAPER = (18.5, 18.1, 9.3, 0.6)
SLOW_COMM = (1.0, 1.0, 1.0, 0.1)


@pytest.fixture(autouse=True, scope="module")
def no_clock() -> Iterator[None]:
    """Let effort alone end searches: a busy machine must not change what they prove."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relax, "GUARD", 1000.0)
        yield


def problem(
    shape: tuple[int, int, int], costs: tuple = UNIT, *, limit: float = math.inf, turn: bool = True, act_w: float = 1
) -> Problem:
    """Ranks, micro-batches, chunks; costs of a rank's whole share; ``turn``: zigzag, else loop."""
    ranks, microbatches, chunks = shape
    stages = ranks * chunks
    placement = (zigzag if turn else loop)(ranks, stages)
    F, I, W, comm = costs  # noqa: E741
    return Problem(
        placement=placement,
        ranks=ranks,
        microbatches=microbatches,
        F=np.full(stages, F / chunks),
        I=np.full(stages, I / chunks),
        W=np.full(stages, W / chunks),
        comm=np.array([comm * (placement[s] != placement[s + 1]) for s in range(stages - 1)]),
        activation=np.full(stages, 1 / chunks),
        act_w=np.full(stages, act_w),
        limit=np.full(ranks, float(limit)),
    )


# Optima that exact search elsewhere proved, or its best value where a bound of ours proves that it is one.
OPTIMA = [
    ((4, 8, 1), UNIT, 4 / 3, True, 72.0),
    ((4, 8, 1), UNIT, 2.0, True, 41.0),
    ((4, 8, 1), UNIT, 4.0, True, 27.0),
    ((4, 8, 1), SLOW_COMM, 2.0, True, 43.0),
    ((4, 8, 1), ZB_PAPER, 2.0, True, 699.3),
    ((4, 8, 2), UNIT, 4 / 3, True, 50.5),
    ((4, 8, 2), UNIT, 2.0, True, 29.5),
    ((4, 8, 2), UNIT, 8 / 3, True, 28.0),
    ((4, 8, 2), UNIT, 4.0, True, 25.5),
    ((4, 8, 2), UNIT, 2.0, False, 31.5),
    ((4, 8, 2), ZB_PAPER, 4 / 3, True, 889.05),
    ((4, 8, 2), ZB_PAPER, 2.0, True, 531.15),
    ((4, 8, 2), ZB_PAPER, 4.0, True, 400.8),
    ((4, 8, 2), SLOW_COMM, 2.0, True, 33.1),
]


@pytest.mark.parametrize(("shape", "costs", "limit", "turn", "optimum"), OPTIMA)
def test_published_optima(shape: tuple, costs: tuple, limit: float, turn: bool, optimum: float) -> None:
    bound = lower_bound(problem(shape, costs, limit=limit, turn=turn), time_budget=5, upper=optimum + 0.01)
    assert bound.value == pytest.approx(optimum)


def test_closed_forms_alone() -> None:
    v_half = lower_bound(problem((4, 8, 2), limit=2.0), time_budget=0)
    assert v_half == Bound(value=29.5, reason="memory of rank 3: idle until its first I and after its last F")
    assert lower_bound(problem((4, 8, 1), limit=1.0), time_budget=0).value == 72.0
    long = lower_bound(problem((64, 512, 2), ZB_PAPER, limit=64 * 2 / 3), time_budget=0)
    assert long.value > 512 * 45.9 * 1.05


def test_least_memory_is_enough_and_less_is_not() -> None:
    given = problem((3, 2, 2))
    uneven = dataclasses.replace(given, activation=np.array([0.5, 0.25, 0.5, 0.5, 1.0, 0.125]))
    least = least_memory(uneven)
    assert least.tolist() == [0.625, 1.25, 1.0]
    enough = exact.solve(dataclasses.replace(uneven, limit=least), time_budget=0.2)
    assert enough is not None
    short = dataclasses.replace(uneven, limit=least - np.array([0, 1e-5, 0]))
    assert exact.solve(short, time_budget=0.2) is None
    assert lower_bound(short) == Bound(value=math.inf, reason="the memory limit admits no schedule")


def test_a_known_optimum_is_proven_at_once() -> None:
    given = problem((4, 8, 2), ZB_PAPER, limit=2.0)
    assert lower_bound(given, time_budget=5, upper=531.15).value == pytest.approx(531.15)
    assert lower_bound(given, time_budget=5, upper=600.0).value == pytest.approx(531.15)


@pytest.mark.parametrize(
    ("shape", "costs", "limit", "optimum"),
    [((4, 8, 2), ZB_PAPER, 4 / 3, 889.05), ((3, 6, 2), SLOW_COMM, 2.0, 21.7), ((4, 6, 1), UNIT, 3.0, 24.0)],
)
def test_looking_at_everything(shape: tuple, costs: tuple, limit: float, optimum: float) -> None:
    given = problem(shape, costs, limit=limit)
    proof = everything(given, time_budget=5)
    assert proof.complete and proof.orders is not None
    assert replay.fits(proof.orders, given)
    assert proof.value == pytest.approx(optimum)
    assert replay.makespan(proof.orders, given) == pytest.approx(optimum)
    assert everything(given, time_budget=5, upper=optimum).orders is None
    assert not everything(given, time_budget=1e-6).complete


def test_the_same_effort_gives_the_same_bound() -> None:
    given = problem((8, 16, 2), SLOW_COMM, limit=8 / 3)
    assert lower_bound(given, time_budget=0.3) == lower_bound(given, time_budget=0.3)


whole = st.integers(1, 9).map(float)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Small problems with uneven stages, any placement, and little memory."""
    ranks, chunks, microbatches = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 4))
    stages = ranks * chunks
    placement = tuple(draw(st.permutations([s % ranks for s in range(stages)])))
    comm = draw(st.sampled_from([0.0, 0.5, 3.0]))
    columns = {name: np.array(draw(st.lists(whole, min_size=stages, max_size=stages))) for name in "FIW"}
    parts = st.sampled_from([0.25, 0.5, 1.0, 0.7])
    given = Problem(
        placement=placement,
        ranks=ranks,
        microbatches=microbatches,
        **columns,
        comm=np.array([comm * (placement[s] != placement[s + 1]) for s in range(stages - 1)]),
        activation=np.array(draw(st.lists(parts, min_size=stages, max_size=stages))),
        act_w=np.full(stages, draw(st.sampled_from([1.0, 0.5, 0.0]))),
        limit=np.full(ranks, np.inf),
    )
    return dataclasses.replace(given, limit=least_memory(given) * draw(st.sampled_from([1.0, 1.3, 2.0, np.inf])))


@given(given=problems())
@settings(max_examples=60, deadline=None)
def test_no_schedule_is_below_a_bound(given: Problem) -> None:
    solution = exact.solve(given, time_budget=1)
    assert solution is not None and replay.fits(solution.orders, given)
    closed, searched = (lower_bound(given, time_budget=seconds) for seconds in (0, 0.3))
    cut = lower_bound(given, time_budget=0.3, upper=solution.makespan)
    most = solution.makespan * (1 + 1e-9)
    assert closed.value <= searched.value <= most
    assert cut.value <= most and solution.bound <= most
    best = everything(given, time_budget=0.5)
    if best.complete and best.orders is not None:
        time = replay.makespan(best.orders, given)
        assert replay.fits(best.orders, given)
        assert time is not None and best.value <= time * (1 + 1e-9)
        assert not solution.optimal or solution.makespan <= time * (1 + 1e-9)
