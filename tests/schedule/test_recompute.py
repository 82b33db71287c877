"""Recompute: R before the backward of the chosen stages, and what it saves."""

import pytest

from stretto.schedule import Kind
from stretto.schedule.families import build
from stretto.schedule.passes.communication import lower, without_messages
from stretto.schedule.passes.offload import offload
from stretto.schedule.passes.recompute import recompute
from stretto.schedule.passes.split_backward import split_backward
from stretto.schedule.simulate import Costs, peak_activation, simulate
from stretto.schedule.validate import validate
from stretto.spec.errors import ScheduleError


def test_every_backward_of_a_chosen_stage_has_its_forward_again_right_before_it() -> None:
    schedule = recompute(build("interleaved", ranks=2, microbatches=4, chunks=2), stages="0+2-3")
    validate(schedule)
    for rank in range(2):
        order = schedule.ops(rank)
        for before, op in zip([None, *order], order, strict=False):
            if op.kind is Kind.B and op.stage != 1:
                assert before is not None
                assert (before.kind, before.stage, before.microbatch) == (Kind.R, op.stage, op.microbatch)
        assert [op for op in order if op.kind is not Kind.R] == build(
            "interleaved", ranks=2, microbatches=4, chunks=2
        ).ops(rank)
    again = [op for rank in range(2) for op in schedule.ops(rank) if op.kind is Kind.R]
    assert {op.stage for op in again} == {0, 2, 3}
    assert len(again) == 3 * 4


def test_left_alone_it_spares_stages_whose_backward_follows_at_once() -> None:
    schedule = recompute(build("1f1b", ranks=3, microbatches=4))
    assert {op.stage for rank in range(3) for op in schedule.ops(rank) if op.kind is Kind.R} == {0, 1}


def test_memory_falls_to_one_micro_batch_and_waiting_ranks_recompute_for_nothing() -> None:
    schedule = build("1f1b", ranks=4, microbatches=8)
    cheap = recompute(schedule, stages="0-3")
    assert max(peak_activation(schedule)) == 4
    assert max(peak_activation(cheap)) == 1
    longer_backward = simulate(schedule, Costs(I=2)).makespan
    assert simulate(schedule, Costs()).makespan == 33
    assert simulate(cheap, Costs()).makespan == longer_backward - 3 == 41  # all but the last rank wait for a gradient


def test_with_messages_with_split_backward_and_in_overlapped_pairs() -> None:
    schedule = build("1f1b", ranks=3, microbatches=4)
    assert without_messages(recompute(lower(schedule))) == recompute(schedule)
    validate(recompute(split_backward(schedule)))
    folded = recompute(build("dualpipe", ranks=4, microbatches=8))
    validate(folded)
    assert (folded.kind == Kind.R).sum() == 4 * 8


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        (4, "no stage 4 to choose; stages are 0 to 1"),
        ("1-", "stages='1-' is no choice of stages; write 2, 0-3 or 0-1\\+6"),
        ("a", "is no choice of stages"),
        ([0.5], "is no choice of stages"),
    ],
)
def test_choices_that_cannot_be(stages: object, says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        recompute(build("1f1b", ranks=2, microbatches=2), stages=stages)


def test_stages_without_backward_cannot_be_chosen() -> None:
    with pytest.raises(ScheduleError, match="Stage 0 has no backward"):
        recompute(build("forward-only", ranks=2, microbatches=2), stages=0)


def test_it_comes_once_and_before_offload() -> None:
    schedule = build("1f1b", ranks=3, microbatches=4)
    for other in (recompute, offload):
        with pytest.raises(ScheduleError, match="recompute comes once, and before offload"):
            recompute(other(schedule))
