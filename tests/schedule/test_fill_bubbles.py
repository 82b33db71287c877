"""Filling bubbles: all frozen work runs, where ranks idle, in the order of its layers; the pipeline doesn't wait."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.schedule import Kind
from stretto.schedule.families import build
from stretto.schedule.passes import change
from stretto.schedule.passes.communication import lower, without_messages
from stretto.schedule.passes.fill_bubbles import fill_bubbles, with_frozen
from stretto.schedule.passes.sharding import sharding
from stretto.schedule.passes.vocabulary import vocabulary
from stretto.schedule.simulate import Costs, peak_activation, run, simulate
from stretto.schedule.validate import validate
from stretto.spec.errors import ScheduleError


@given(
    name=st.sampled_from(["gpipe", "1f1b", "interleaved", "zb-h1", "dualpipe", "forward-only"]),
    ranks=st.sampled_from([2, 4]),
    microbatches=st.integers(8, 10),
    frozen=st.lists(st.lists(st.floats(0.1, 1.5), min_size=1, max_size=3), min_size=1, max_size=2),
    units=st.integers(1, 12),
    comm=st.sampled_from([0.0, 0.3]),
)
@settings(max_examples=40, deadline=None)
def test_any_shape_runs_every_layer_of_every_unit_and_delays_nothing(
    name: str, ranks: int, microbatches: int, frozen: list[list[float]], units: int, comm: float
) -> None:
    schedule, costs = build(name, ranks=ranks, microbatches=microbatches + microbatches % 2), Costs(comm=comm)
    filled = fill_bubbles(schedule, frozen=frozen, units=units, costs=costs)
    validate(filled)
    validate(lower(filled))
    assert filled.num_microbatches == schedule.num_microbatches + units * len(frozen)
    done = [op for rank in range(ranks) for op in filled.ops(rank) if op.stage >= schedule.num_stages]
    assert len(done) == units * sum(map(len, frozen))
    assert {op.kind for op in done} == {Kind.F}
    costs_filled = with_frozen(costs, schedule, frozen=frozen)
    before, after = run(schedule, costs), run(filled, costs_filled)
    for rank in range(ranks):
        rows = zip(filled.ops(rank), after.start[after.rows(rank)].tolist(), strict=True)
        starts = [start for op, start in rows if op.stage < schedule.num_stages]
        assert starts == pytest.approx(before.start[before.rows(rank)].tolist())
        assert [op for op in filled.ops(rank) if op.stage < schedule.num_stages] == schedule.ops(rank)


@pytest.mark.parametrize(
    ("name", "ranks", "gain"), [("1f1b", 4, 1.24), ("gpipe", 4, 1.24), ("chimera", 4, 1.14), ("1f1b", 8, 1.17)]
)
def test_it_is_faster_than_the_frozen_work_in_front(name: str, ranks: int, gain: float) -> None:
    schedule, work = build(name, ranks=ranks, microbatches=8), {"frozen": [0.25] * 4, "units": 8 * ranks}
    if name == "chimera":
        work["units"] = 4 * ranks
    costs = with_frozen(Costs(), schedule, **work)
    filled, front = (simulate(fill_bubbles(schedule, where=where, **work), costs) for where in ("bubbles", "front"))
    assert sum(filled.busy) == pytest.approx(sum(front.busy))
    assert front.makespan >= gain * filled.makespan
    assert filled.peak_activation == pytest.approx(peak_activation(schedule))


def test_bubbles_that_are_filled_are_gone() -> None:
    schedule, frozen = build("chimera", ranks=4, microbatches=8), "0.5+0.5"
    before = simulate(schedule, Costs())
    after = simulate(fill_bubbles(schedule, frozen=frozen), with_frozen(Costs(), schedule, frozen=frozen))
    assert (before.makespan, after.makespan) == (28, 28)
    assert before.bubble_rate == pytest.approx(4 / 28)
    assert after.bubble_rate == pytest.approx(0)


def test_what_does_not_fit_ends_as_early_as_it_can() -> None:
    schedule = build("1f1b", ranks=3, microbatches=6)
    frozen = [1.0]
    filled = simulate(fill_bubbles(schedule, frozen=frozen, units=30), with_frozen(Costs(), schedule, frozen=frozen))
    assert filled.makespan == pytest.approx((3 * 6 * 3 + 30) / 3)  # no bubble at all


def test_layers_longer_than_every_bubble_wait_for_the_end() -> None:
    schedule, frozen = build("1f1b", ranks=2, microbatches=4), [50.0]
    filled = fill_bubbles(schedule, frozen=frozen, units=2)
    assert [filled.ops(rank)[-1].stage for rank in range(2)] == [2, 2]
    assert {op.microbatch for rank in range(2) for op in filled.ops(rank)[-1:]} == {4, 5}


def test_a_unit_goes_through_its_layers_on_one_rank() -> None:
    schedule = build("1f1b", ranks=4, microbatches=8)
    filled = fill_bubbles(schedule, frozen="0.3+0.7/1.1", units=5)
    holders: dict[int, set[int]] = {}
    for rank in range(4):
        for op in filled.ops(rank):
            if op.stage >= 4:
                holders.setdefault(op.microbatch, set()).add(rank)
    assert [len(ranks) for ranks in holders.values()] == [1] * 10
    assert sorted(filled.path(m) for m in range(8, 18)) == [(4, 5)] * 5 + [(6,)] * 5


def test_costs_of_stages_keep_their_memory_and_their_times() -> None:
    schedule = build("1f1b", ranks=2, microbatches=4)
    costs = Costs(F=(1.0, 2.0), I=(1.0, 1.0), W=(1.0, 1.0), activation_bytes=(30.0, 10.0), comm=(0.25,), OPT=0.5)
    filled, priced = change(schedule, "fill-bubbles", options={"frozen": 0.5, "units": 2}, costs=costs)
    before, after = simulate(schedule, costs), simulate(filled, priced)
    assert after.peak_activation == pytest.approx(before.peak_activation)
    assert sum(after.busy) == pytest.approx(sum(before.busy) + 2 * 0.5)


def test_messages_stay() -> None:
    schedule = build("1f1b", ranks=3, microbatches=4)
    assert without_messages(fill_bubbles(lower(schedule), frozen=[0.5])) == fill_bubbles(schedule, frozen=[0.5])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"frozen": "0.5+x"}, "are no times of frozen layers; write 0.5\\+0.5"),
        ({"frozen": []}, "are no times of frozen layers"),
        ({"frozen": [0.0]}, "each above 0"),
        ({"frozen": [1.0], "units": -1}, "with -1 units"),
        ({"frozen": [1.0], "where": "back"}, "can't go 'back'; it goes to bubbles or front"),
    ],
)
def test_options_that_cannot_be(options: dict, says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        fill_bubbles(build("1f1b", ranks=2, microbatches=2), **options)


def test_vocabulary_passes_are_refused() -> None:
    with pytest.raises(ScheduleError, match="has vocabulary passes, which frozen work has no use for"):
        fill_bubbles(vocabulary(build("1f1b", ranks=2, microbatches=2)), frozen=[0.5])


def test_an_optimizer_step_is_refused() -> None:
    with pytest.raises(ScheduleError, match="has OPT already, after which no frozen work can come; fill it before"):
        fill_bubbles(sharding(build("1f1b", ranks=2, microbatches=2)), frozen=[0.5])
    validate(sharding(fill_bubbles(build("1f1b", ranks=2, microbatches=2), frozen=[0.5])))
