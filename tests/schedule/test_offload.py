"""Offload: memory falls as planned, nothing comes later, and what can't be is refused.

``away`` replays the two streams by hand, from the times of the schedule without offload.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.schedule import Kind, Schedule
from stretto.schedule.families import build
from stretto.schedule.passes.communication import lower, without_messages
from stretto.schedule.passes.offload import offload
from stretto.schedule.passes.recompute import recompute
from stretto.schedule.simulate import Costs, peak_activation, run, simulate
from stretto.schedule.validate import validate
from stretto.spec.errors import ScheduleError

HALF = Costs(O=0.5, L=0.5)


def away(schedule: Schedule, costs: Costs) -> list[float]:
    """Peak memory of each rank, by replaying O and L as queues beside the arithmetic."""
    timeline, share = run(without_messages(schedule), costs), schedule.num_ranks / schedule.num_stages
    peaks = []
    for rank in range(schedule.num_ranks):
        rows = timeline.rows(rank)
        changes, over, free, gone = [], 0.0, {Kind.O: 0.0, Kind.L: 0.0}, {}
        for op, start, end in zip(schedule.ops(rank), timeline.start[rows], timeline.end[rows], strict=True):
            key = (op.stage, op.microbatch)
            if op.kind in free:
                begun = max(over, free[op.kind], gone.get(key, 0.0) if op.kind is Kind.L else 0.0)
                free[op.kind] = begun + (costs.O if op.kind is Kind.O else costs.L) * share
                if op.kind is Kind.O:
                    gone[key] = free[op.kind]
                changes.append((begun, 1, share) if op.kind is Kind.L else (free[op.kind], 0, -share))
            else:
                over = end
                if op.kind is Kind.F:
                    changes.append((start, 1, share))
                elif op.kind in (Kind.B, Kind.W):
                    changes.append((end, 0, -share))
        level, peak = 0.0, 0.0
        for _, _, change in sorted((round(time, 6), order, change) for time, order, change in changes):
            level += change
            peak = max(peak, level)
        peaks.append(peak)
    return peaks


@given(
    name=st.sampled_from(["gpipe", "1f1b", "interleaved", "breadth-first", "zb-h2", "dualpipe-v"]),
    ranks=st.integers(2, 4),
    microbatches=st.integers(8, 12),
    move=st.sampled_from([0.2, 0.5, 1.5]),
    options=st.sampled_from([{}, {"fraction": 0.5}, {"stages": 0}]),
)
@settings(max_examples=40, deadline=None)
def test_any_shape_takes_no_longer_and_no_more_memory(
    name: str, ranks: int, microbatches: int, move: float, options: dict
) -> None:
    schedule, costs = build(name, ranks=ranks, microbatches=microbatches), Costs(O=move, L=move, comm=0.1)
    moved = offload(schedule, costs=costs, **options)
    validate(moved)
    validate(lower(moved))
    before, after = simulate(schedule, costs), simulate(moved, costs)
    assert after.makespan == pytest.approx(before.makespan)
    assert all(new <= old + 1e-9 for new, old in zip(after.peak_activation, before.peak_activation, strict=True))
    for rank in range(ranks):
        assert [op for op in moved.ops(rank) if op.kind not in (Kind.O, Kind.L)] == schedule.ops(rank)


@pytest.mark.parametrize("options", [{}, {"fraction": 0.5}, {"limit": 3}])
def test_peaks_are_those_of_streams_replayed_by_hand(options: dict) -> None:
    moved = offload(build("1f1b", ranks=4, microbatches=12), costs=HALF, **options)
    assert list(simulate(moved, HALF).peak_activation) == pytest.approx(away(moved, HALF))


def test_all_that_fits_leaves_two_micro_batches() -> None:
    schedule = build("1f1b", ranks=8, microbatches=32)
    figures = simulate(offload(schedule, costs=HALF), HALF)
    assert max(simulate(schedule, HALF).peak_activation) == 8
    assert max(figures.peak_activation) == 2  # one that is worked on, one on its way


def test_half_of_the_traffic_saves_more_than_half_of_the_memory() -> None:
    schedule = build("interleaved", ranks=8, microbatches=32, chunks=2)
    half = offload(schedule, fraction=0.5, costs=HALF)
    assert half == offload(schedule, stages="0-7", costs=HALF)  # the chunk that lives longer
    assert (half.kind == Kind.O).sum() == (schedule.kind == Kind.F).sum() / 2
    assert max(simulate(schedule, HALF).peak_activation) == 11.5
    assert max(simulate(half, HALF).peak_activation) == 5


@pytest.mark.parametrize("limit", [2, 3, 5, 6.5])
def test_a_limit_is_kept_and_moves_no_more_than_it_must(limit: float) -> None:
    schedule = build("1f1b", ranks=8, microbatches=32)
    moved, everything = offload(schedule, limit=limit, costs=HALF), offload(schedule, costs=HALF)
    assert max(simulate(moved, HALF).peak_activation) <= limit
    assert max(peak_activation(moved)) <= limit
    assert 0 < (moved.kind == Kind.O).sum() < (everything.kind == Kind.O).sum()
    assert moved.ops(7) == schedule.ops(7)  # keeps one micro-batch as it is


def test_a_limit_that_holds_anyway_moves_nothing() -> None:
    schedule = build("1f1b", ranks=4, microbatches=8)
    assert offload(schedule, limit=4, costs=HALF) == schedule


def test_a_limit_that_cannot_be_kept_says_the_least() -> None:
    schedule = build("1f1b", ranks=8, microbatches=32)
    with pytest.raises(
        ScheduleError, match=r"rank 0 below 1 micro-batches by offloading: the least .* is 2\. Allow that"
    ):
        offload(schedule, limit=1, costs=HALF)
    assert offload(schedule, limit=2, costs=HALF) is not None


def test_what_lives_too_short_for_its_traffic_stays() -> None:
    schedule, slow = build("1f1b", ranks=4, microbatches=8), Costs(O=3, L=3)
    moved = offload(schedule, costs=slow)
    assert {op.stage for rank in range(4) for op in moved.ops(rank) if op.kind is Kind.O} == {0, 1}
    assert simulate(moved, slow).makespan == simulate(schedule, slow).makespan


def test_recomputed_stages_have_nothing_to_move_and_messages_stay() -> None:
    schedule = build("1f1b", ranks=3, microbatches=6)
    moved = offload(recompute(schedule, stages=0))
    assert {op.stage for rank in range(3) for op in moved.ops(rank) if op.kind is Kind.O} == {1}
    assert without_messages(offload(lower(schedule))) == offload(schedule)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fraction": 0.5, "limit": 2}, "a fraction or a limit, not both"),
        ({"fraction": 2}, "can't move a fraction of 2"),
        ({"fraction": "half"}, "can't move a fraction of 'half'"),
        ({"limit": 0}, "can't keep a limit of 0"),
        ({"stages": 9}, "no stage 9"),
    ],
)
def test_options_that_cannot_be(options: dict, says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        offload(build("1f1b", ranks=2, microbatches=2), **options)


@pytest.mark.parametrize("name", ["modular", "zeropp", "chimera"])
def test_families_that_gather_and_reduce_keep_doing_so(name: str) -> None:
    schedule = build(name, ranks=4, microbatches=8)
    moved = offload(schedule, costs=HALF)
    validate(moved)
    for rank in range(4):
        assert [op for op in moved.ops(rank) if op.kind not in (Kind.O, Kind.L)] == schedule.ops(rank)
    assert sum(simulate(moved, HALF).peak_activation) < sum(simulate(schedule, HALF).peak_activation)


def test_half_of_one_stage_is_every_other_micro_batch() -> None:
    moved = offload(build("1f1b", ranks=4, microbatches=8), fraction=0.5, costs=HALF)
    assert [op.microbatch for op in moved.ops(0) if op.kind is Kind.O] == [1, 3, 5, 7]


def test_it_comes_once() -> None:
    with pytest.raises(ScheduleError, match="has O and L already; offload comes once"):
        offload(offload(build("1f1b", ranks=3, microbatches=4)))
