"""Passes: what lowering and splitting put in, and that they change nothing else."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.schedule import Kind, Op, Schedule
from stretto.schedule.families import build
from stretto.schedule.passes.communication import lower, without_messages
from stretto.schedule.passes.rendezvous import lower_rendezvous
from stretto.schedule.passes.split_backward import split_backward
from stretto.schedule.placement import zigzag
from stretto.schedule.simulate import Costs, simulate
from stretto.schedule.validate import validate
from stretto.spec.errors import ScheduleError


def test_messages_stand_next_to_who_makes_and_who_needs_them() -> None:
    assert str(lower(build("1f1b", ranks=2, microbatches=2))).splitlines()[1:] == [
        "rank 0: 0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
        "rank 1: 1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1",
    ]
    assert [op.peer for op in lower(build("1f1b", ranks=2, microbatches=2)).ops(0)] == [-1, 1, -1, 1, 1, -1, 1, -1]


def test_a_split_backward_sends_before_its_weights() -> None:
    split = lower(split_backward(build("1f1b", ranks=2, microbatches=1)))
    assert str(split).splitlines()[1:] == [
        "rank 0: 0F0 0SEND_F0 0RECV_B0 0I0 0W0",
        "rank 1: 1RECV_F0 1F0 1I0 1SEND_B0 1W0",
    ]
    assert split_backward(lower(build("1f1b", ranks=2, microbatches=1))) == split


def v_shape(num_microbatches: int) -> Schedule:
    """All forwards, then all backwards, in a V over two ranks."""
    orders = [
        [
            Op(kind, stage=stage, microbatch=m)
            for kind, stages in ((Kind.F, held), (Kind.B, held[::-1]))
            for stage in stages
            for m in range(num_microbatches)
        ]
        for held in ((0, 3), (1, 2))
    ]
    return Schedule.from_orders(
        orders, name="v", num_stages=4, num_microbatches=num_microbatches, placement=[zigzag(2, 4)]
    )


def test_nothing_is_sent_inside_a_rank() -> None:
    lowered = lower(v_shape(2))
    validate(lowered)
    sends = [op for rank in range(2) for op in lowered.ops(rank) if op.kind in (Kind.SEND_F, Kind.SEND_B)]
    assert {(op.kind.name, op.stage, op.peer) for op in sends} == {
        ("SEND_F", 0, 1),
        ("SEND_F", 2, 0),
        ("SEND_B", 3, 1),
        ("SEND_B", 1, 0),
    }


def test_one_rank_has_no_messages() -> None:
    alone = build("interleaved", ranks=1, microbatches=3, chunks=2)
    assert lower(alone) == lower_rendezvous(alone) == alone


def test_a_receive_comes_early_where_the_channel_brings_it_early() -> None:
    # Rank 1 consumes micro-batch 1 first, but rank 0 sends micro-batch 0 first.
    tokens = [["0F0", "0F1"], ["1F1", "1F0"]]
    orders = [[Op.parse(token) for token in order] for order in tokens]
    schedule = Schedule.from_orders(
        orders, name="swapped", num_stages=2, num_microbatches=2, placement=[[0, 1]], forward_only=True
    )
    lowered = lower(schedule)
    validate(lowered)
    assert str(lowered).splitlines()[2] == "rank 1: 1RECV_F0 1RECV_F1 1F1 1F0"


@given(ranks=st.integers(1, 6), microbatches=st.integers(1, 12), chunks=st.integers(1, 3), rendezvous=st.booleans())
@settings(max_examples=60, deadline=None)
def test_lowering_adds_one_pair_per_arrow_between_ranks_and_keeps_the_rest(
    ranks: int, microbatches: int, chunks: int, rendezvous: bool
) -> None:
    schedule = build("interleaved", ranks=ranks, microbatches=microbatches, chunks=chunks)
    lowered = lower_rendezvous(schedule) if rendezvous else lower(schedule)
    assert without_messages(lowered) == schedule
    assert lower(lowered) == lower(schedule)
    arrows = (ranks * chunks - 1) * microbatches if ranks > 1 else 0
    counted = Counter(Kind(kind) for kind in lowered.kind.tolist())
    assert [counted[kind] for kind in (Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B)] == [arrows] * 4


def test_rendezvous_lowering_refuses_what_can_not_finish() -> None:
    orders = [[Op.parse(t) for t in order] for order in (["0F0", "0B0", "0F1", "0B1"], ["1F0", "1F1", "1B0", "1B1"])]
    stuck = Schedule.from_orders(orders, name="stuck", num_stages=2, num_microbatches=2, placement=[[0, 1]])
    with pytest.raises(ScheduleError, match="deadlock"):
        lower_rendezvous(stuck)


@given(ranks=st.integers(1, 6), microbatches=st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_splitting_replaces_each_backward_and_never_slows_down(ranks: int, microbatches: int) -> None:
    schedule = build("1f1b", ranks=ranks, microbatches=microbatches)
    split = split_backward(schedule)
    before, after = Counter(schedule.kind.tolist()), Counter(split.kind.tolist())
    assert after == {Kind.F: before[Kind.F], Kind.I: before[Kind.B], Kind.W: before[Kind.B]}
    costs = Costs(F=2, I=2, W=1)
    assert simulate(split, costs).makespan <= simulate(schedule, costs).makespan + 1e-9
