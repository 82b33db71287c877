"""Moving W: nothing else changes places, no rank waits with a W that fits, memory stays within the limit."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.schedule import Kind, Schedule
from stretto.schedule.families import build
from stretto.schedule.families.late_weights import late_weights
from stretto.schedule.passes.split_backward import split_backward
from stretto.schedule.simulate import Costs, run, simulate
from stretto.schedule.validate import peak_memory, validate


def without_weights(schedule: Schedule) -> list[list[str]]:
    return [[str(op) for op in schedule.ops(rank) if op.kind is not Kind.W] for rank in range(schedule.num_ranks)]


@given(
    name=st.sampled_from(["gpipe", "1f1b", "interleaved", "hanayo"]),
    ranks=st.integers(1, 5),
    microbatches=st.integers(1, 9),
    work=st.tuples(*[st.sampled_from([0.5, 1.0, 2.5])] * 3),
    comm=st.sampled_from([0.0, 0.3]),
)
@settings(max_examples=60, deadline=None)
def test_only_w_moves_and_memory_stays_within_the_limit(
    name: str, ranks: int, microbatches: int, work: tuple[float, float, float], comm: float
) -> None:
    split = split_backward(build(name, ranks=ranks, microbatches=microbatches))
    costs = Costs(F=work[0], I=work[1], W=work[2], comm=comm)
    limit = max(peak_memory(split))
    moved = late_weights(split, costs, limit=limit)
    validate(moved)
    assert without_weights(moved) == without_weights(split)
    assert max(peak_memory(moved)) <= limit + 1e-9


def test_1f1b_gains_the_bubble_that_w_fills_without_more_memory() -> None:
    split = split_backward(build("1f1b", ranks=4, microbatches=8))
    moved = late_weights(split, Costs(), limit=4)
    assert simulate(moved).makespan < simulate(split).makespan
    assert max(peak_memory(moved)) == 4


def test_a_rank_that_waits_has_no_w_that_would_be_over_in_time() -> None:
    costs = Costs(F=1, I=2, W=0.5, comm=0.25)
    moved = late_weights(split_backward(build("gpipe", ranks=3, microbatches=5)), costs, limit=5)
    timeline = run(moved, costs)
    for rank in range(3):
        due, free = 0, 0.0
        rows = timeline.rows(rank)
        for op, start, end in zip(moved.ops(rank), timeline.start[rows], timeline.end[rows], strict=True):
            assert due == 0 or start - free < costs.W + 1e-9 or op.kind is Kind.W
            due += {Kind.I: 1, Kind.W: -1}.get(op.kind, 0)
            free = end


def test_many_operations_take_the_compiled_loop_to_the_same_order() -> None:
    small, large = (split_backward(build("1f1b", ranks=4, microbatches=m)) for m in (300, 1700))
    orders = [late_weights(split, Costs(comm=0.1), limit=4).ops(0)[:2000] for split in (small, large)]
    assert large.num_ops > 20_000 > small.num_ops
    assert orders[0][:800] == orders[1][:800]


@pytest.mark.parametrize("limit", [2, 3])
def test_a_tighter_limit_brings_w_earlier(limit: int) -> None:
    split = split_backward(build("1f1b", ranks=2, microbatches=6))
    assert max(peak_memory(late_weights(split, Costs(F=0.5, I=3, W=2), limit=limit))) <= limit
