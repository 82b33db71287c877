"""Handing frozen work over: every result lands where its micro-batch begins, and waits there for the next step."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.schedule import Kind
from stretto.schedule.families import build
from stretto.schedule.passes.communication import lower, without_messages
from stretto.schedule.passes.fill_bubbles import fill_bubbles, with_frozen
from stretto.schedule.passes.hand_over import Front, drained, evaluated, hand_over, primed, with_landing
from stretto.schedule.passes.sharding import sharding
from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate import Costs, peak_activation, simulate
from stretto.schedule.validate import validate
from stretto.spec.errors import ScheduleError

FAMILIES = ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "hanayo", "chimera", "dualpipe", "bitpipe"]


def filled(name: str, ranks: int, microbatches: int, layers: int) -> tuple[Schedule, Schedule, Front]:
    """The schedule before, what it becomes, and where the front stands."""
    before = build(name, ranks=ranks, microbatches=microbatches)
    front = Front(stages=before.num_stages, layers=layers, microbatches=microbatches)
    work = fill_bubbles(before, frozen=[0.25] * layers, units=microbatches)
    return before, hand_over(work, front), front


@given(
    name=st.sampled_from(FAMILIES),
    ranks=st.sampled_from([2, 4]),
    pairs=st.integers(4, 6),
    layers=st.integers(1, 3),
)
@settings(max_examples=20, deadline=None)
def test_the_four_schedules_are_right_for_any_family(name: str, ranks: int, pairs: int, layers: int) -> None:
    before, whole, front = filled(name, ranks, 2 * pairs, layers)
    last, first, forward = drained(whole, front), primed(whole, front), evaluated(whole, front)
    sharded = () if (whole.kind == Kind.REDUCE_GRAD).any() else (sharding(whole),)
    for schedule in (whole, last, first, forward, *sharded):
        lowered = lower(schedule)
        validate(lowered)
        assert without_messages(lowered) == schedule
    assert [last.ops(rank) for rank in range(ranks)] == [before.ops(rank) for rank in range(ranks)]
    for microbatch in range(2 * pairs):
        home = before.rank_of(0, before.voice[microbatch])
        assert whole.rank_of(front.landing, whole.voice[2 * pairs + microbatch]) == home
        assert first.rank_of(front.landing, first.voice[microbatch]) == home
        runs = {forward.rank_of(stage, forward.voice[microbatch]) for stage in front.first_layers()}
        assert runs == {first.rank_of(stage, first.voice[microbatch]) for stage in front.first_layers()}
        assert len(runs) == 1
    assert {Kind(kind) for kind in forward.kind.tolist()} == {Kind.F}


@pytest.mark.parametrize("name", ["1f1b", "zb-v", "chimera"])
def test_it_costs_no_time_but_the_memory_of_first_inputs(name: str) -> None:
    before, whole, front = filled(name, 4, 8, 2)
    size = 30.0
    costs = Costs(
        **dict.fromkeys("FIW", (1.0,) * before.num_stages),
        activation_bytes=(100.0,) * before.num_stages,
        input_bytes=(size,) * before.num_stages,
    )
    work = fill_bubbles(before, frozen=[0.25] * 2, units=8, costs=costs)
    whole = hand_over(work, front)
    priced = with_frozen(costs, before, frozen=[0.25] * 2)
    assert simulate(whole, with_landing(priced)).makespan == pytest.approx(simulate(work, priced).makespan)
    unit = costs.of(before).unit_bytes
    assert unit is not None
    for rank, peak in enumerate(peak_activation(whole, with_landing(priced))):
        assert peak * unit == pytest.approx(by_hand(whole, front, rank, size))
    assert peak_activation(work, priced) == pytest.approx(peak_activation(before, costs))


def by_hand(schedule: Schedule, front: Front, rank: int, size: float) -> float:
    """Bytes of a rank at its fullest: 100 for each activation of the pipeline, ``size`` for each first input."""
    home = [schedule.rank_of(front.landing, schedule.voice[front.microbatches + m]) == rank for m in range(8)]
    alive, waiting, most = 0.0, size * sum(home), 0.0
    for op in schedule.ops(rank):
        if op.kind is Kind.F and op.stage < front.stages:
            alive += 100
            waiting -= size * (op.stage == 0)
        elif op.kind is Kind.F and op.stage == front.landing:
            waiting += size
        most = max(most, alive + waiting)
        if op.kind in (Kind.B, Kind.W):
            alive -= 100
    return max(most, size * sum(home))


@pytest.mark.parametrize(
    ("frozen", "units", "front"),
    [
        ("0.5", 3, Front(stages=2, layers=1, microbatches=4)),
        ("0.5+0.5", 4, Front(stages=2, layers=1, microbatches=4)),
        ("0.5/0.5", 4, Front(stages=2, layers=2, microbatches=4)),
    ],
)
def test_units_that_are_not_micro_batches_are_refused(frozen: str, units: int, front: Front) -> None:
    work = fill_bubbles(build("1f1b", ranks=2, microbatches=4), frozen=frozen, units=units)
    with pytest.raises(ScheduleError, match="in 4 units, one for each micro-batch"):
        hand_over(work, front)
