"""The exact solver: proven optima that were published, the memory limit, hints, windows and repeatability."""

import numpy as np
import pytest

from stretto.schedule import Schedule
from stretto.schedule.op import Kind, Op
from stretto.schedule.placement import loop, zigzag
from stretto.schedule.simulate import Costs, simulate
from stretto.schedule.synthesize import exact, replay, window
from stretto.schedule.synthesize.bounds import lower_bound
from stretto.schedule.synthesize.problem import Problem

ZB_PAPER = Costs(F=18.5, I=18.1, W=9.3, comm=0.6)


def problem(
    ranks: int,
    microbatches: int,
    *,
    chunks: int = 1,
    costs: Costs | None = None,
    limit: float = np.inf,
    turn: bool = True,
) -> Problem:
    """Equal stages; ``turn``: zigzag, else loop."""
    costs = costs or Costs()
    stages = ranks * chunks
    placement = (zigzag if turn else loop)(ranks, stages)
    across = [placement[s] != placement[s + 1] for s in range(stages - 1)]
    return Problem(
        placement=placement,
        ranks=ranks,
        microbatches=microbatches,
        F=np.full(stages, costs.F / chunks),
        I=np.full(stages, costs.I / chunks),
        W=np.full(stages, costs.W / chunks),
        comm=np.array(across, dtype=float) * costs.comm,
        activation=np.full(stages, 1 / chunks),
        act_w=np.full(stages, costs.act_w),
        limit=np.full(ranks, limit),
    )


def as_schedule(given: Problem, orders: list) -> Schedule:
    """Orders as a schedule that the simulator takes."""
    rows = [[Op(Kind(k), stage=s, microbatch=m) for k, s, m in order.tolist()] for order in orders]
    return Schedule.from_orders(
        rows,
        name="exact",
        num_stages=given.stages,
        num_microbatches=given.microbatches,
        placement=[given.placement],
    )


# Proven optima of an exact solver elsewhere: ranks, micro-batches, chunks, costs, limit, makespan.
PROVEN = [
    ((4, 8, 1), Costs(), 2.0, 41.0),
    ((4, 8, 1), Costs(), 4.0, 27.0),
    ((4, 8, 1), Costs(comm=0.1), 2.0, 43.0),
    ((4, 8, 1), ZB_PAPER, 4 / 3, 1274.4),
    ((4, 4, 2), Costs(), 2.0, 17.5),
    ((4, 4, 2), Costs(), 8 / 3, 16.0),
    ((4, 4, 2), Costs(), 4 / 3, 26.5),
]


@pytest.mark.parametrize(("shape", "costs", "limit", "makespan"), PROVEN)
def test_published_optima(shape: tuple, costs: Costs, limit: float, makespan: float) -> None:
    ranks, microbatches, chunks = shape
    given = problem(ranks, microbatches, chunks=chunks, costs=costs, limit=limit)
    solution = exact.solve(given, time_budget=20)
    assert solution is not None and solution.optimal
    assert solution.makespan == pytest.approx(makespan)
    figures = simulate(as_schedule(given, solution.orders), costs)
    assert figures.makespan == pytest.approx(makespan)
    assert max(figures.peak_activation) <= limit + 1e-6


def test_the_same_seed_gives_the_same_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "GUARD", 1000.0)  # work alone ends it, however busy the machine is
    given = problem(3, 4, chunks=2, costs=ZB_PAPER, limit=2.0)
    first, second = (exact.solve(given, time_budget=0.3, seed=5) for _ in range(2))
    assert first is not None and second is not None
    assert [order.tolist() for order in first.orders] == [order.tolist() for order in second.orders]


def test_a_hint_is_kept_where_no_time_is_left() -> None:
    given = problem(2, 3, limit=2.0)
    slow = replay.one_by_one(given)
    solution = exact.solve(given, time_budget=1e-9, hint=slow)
    assert solution is not None
    assert solution.makespan <= replay.makespan(slow, given) == 15
    assert lower_bound(given, time_budget=0).value <= solution.bound <= solution.makespan


def test_activation_that_inputs_give_back() -> None:
    whole = exact.solve(problem(2, 4, costs=Costs(W=3), limit=1.0), time_budget=5)
    none = exact.solve(problem(2, 4, costs=Costs(W=3, act_w=0), limit=1.0), time_budget=5)
    assert whole is not None and none is not None
    assert (whole.makespan, none.makespan) == (28.0, 22.0)


def test_uneven_activation_without_common_measure() -> None:
    given = problem(2, 4, chunks=2, limit=1.7)
    uneven = Problem(
        **{name: getattr(given, name) for name in Problem.__slots__ if name != "activation"},
        activation=np.array([np.pi, 0.5, np.e, 1.0]) / 5,
    )
    solution = exact.solve(uneven, time_budget=5)
    assert solution is not None and replay.fits(solution.orders, uneven)
    assert solution.bound <= solution.makespan * (1 + 1e-9)


@pytest.mark.parametrize("ranks", [None, frozenset({1, 2})])
def test_a_window_changes_nothing_else(ranks: frozenset | None) -> None:
    given = problem(4, 8, chunks=2, costs=ZB_PAPER, limit=8 / 3)
    plain = exact.solve(given, time_budget=0.5, seed=1)
    assert plain is not None
    part = window.Window(begin=100.0, end=220.0, ranks=ranks)
    better = window.improve(given, plain.orders, part, time_budget=0.3)
    assert better is not None and better.makespan <= plain.makespan + 1e-9
    assert replay.fits(better.orders, given)
    times = replay.starts(replay.in_turn(plain.orders), replay.Durations.of(given))
    assert times is not None
    for rank, (before, after) in enumerate(zip(plain.orders, better.orders, strict=True)):
        inside = [100.0 <= times[tuple(row)] < 220.0 for row in before.tolist()]
        if ranks is not None and rank not in ranks:
            inside = [False] * len(inside)
        kept = ~np.array(inside)
        assert (before[kept] == after[kept]).all()
        assert sorted(before.tolist()) == sorted(after.tolist())


def test_windows_reach_the_optimum_of_a_bad_start() -> None:
    given = problem(2, 4, limit=2.0)
    bad = replay.one_by_one(given)
    best = exact.solve(given, time_budget=5)
    found = window.improve(given, bad, window.Window(begin=0, end=np.inf), time_budget=5)
    assert best is not None and found is not None
    assert found.makespan == best.makespan == found.bound


def test_orders_that_wait_for_each_other_never_end() -> None:
    given = problem(2, 1)
    assert (
        replay.makespan([[(Kind.I, 0, 0), (Kind.F, 0, 0), (Kind.W, 0, 0)], [(Kind.F, 1, 0), (Kind.B, 1, 0)]], given)
        is None
    )
    assert replay.makespan([[(Kind.F, 0, 0), (Kind.B, 0, 0)], [(Kind.F, 1, 0), (Kind.B, 1, 0)]], given) == 5
