"""Sharding: parameters are there when they are used, gradients are reduced when they are whole.

The check here walks each rank's order with a set of what is gathered; it knows nothing of the verifier.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.schedule import Kind, Op, Schedule
from stretto.schedule.families import build
from stretto.schedule.op import PER_BLOCK
from stretto.schedule.passes.communication import lower, without_messages
from stretto.schedule.passes.offload import offload
from stretto.schedule.passes.sharding import sharding
from stretto.schedule.passes.split_backward import split_backward
from stretto.schedule.simulate import Costs, simulate
from stretto.schedule.validate import validate
from stretto.spec.errors import ScheduleError


def walk(schedule: Schedule, rank: int, blocks: int) -> int:
    """Walk a rank's order; the most stages that are gathered at once."""
    gathered: set[tuple[int, int]] = set()
    owed: set[tuple[int, int]] = set()
    most = 0
    for op in schedule.ops(rank):
        block = (op.stage, op.microbatch)
        if op.kind is Kind.UNSHARD:
            assert block not in gathered
            gathered.add(block)
        elif op.kind is Kind.RESHARD:
            gathered.remove(block)
        elif op.kind is Kind.REDUCE_GRAD:
            owed.discard(block)
        elif op.kind in (Kind.F, Kind.B, Kind.I, Kind.R):
            assert {(op.stage, index) for index in range(blocks)} <= gathered
        if op.kind in (Kind.B, Kind.W):
            owed |= {(op.stage, index) for index in range(blocks)}
        if op.kind is Kind.OPT:
            assert not owed
        most = max(most, len({stage for stage, _ in gathered}))
    assert not gathered
    return most


@given(
    name=st.sampled_from(["gpipe", "1f1b", "interleaved", "zb-h2", "dualpipe-v", "forward-only"]),
    ranks=st.integers(2, 4),
    microbatches=st.integers(8, 10),
    blocks=st.integers(1, 3),
    reshard=st.sampled_from(["turn", "each", "never"]),
    prefetch=st.integers(0, 3),
    reduce=st.sampled_from(["last", "each"]),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_is_gathered_when_used_and_reduced_at_last(
    name: str, ranks: int, microbatches: int, **options: object
) -> None:
    schedule = build(name, ranks=ranks, microbatches=microbatches)
    sharded = sharding(schedule, **options)
    validate(sharded)
    validate(lower(sharded))
    for rank in range(ranks):
        walk(sharded, rank, options["blocks"])
        bare = [op for op in sharded.ops(rank) if op.kind not in PER_BLOCK | {Kind.OPT}]
        assert bare == schedule.ops(rank)


def tokens(schedule: Schedule, rank: int) -> str:
    return " ".join(map(str, schedule.ops(rank)))


def test_by_turns_and_each_time_and_never() -> None:
    schedule = build("breadth-first", ranks=1, microbatches=2, chunks=2)
    assert tokens(schedule, 0) == "0F0 0F1 1F0 1F1 1B0 1B1 0B0 0B1"
    assert tokens(sharding(schedule, prefetch=0), 0) == (
        "0UNSHARD0 0F0 0F1 0RESHARD0 1UNSHARD0 1F0 1F1 1B0 1B1 1RESHARD0 1REDUCE_GRAD0 "
        "0UNSHARD0 0B0 0B1 0RESHARD0 0REDUCE_GRAD0 OPT"
    )
    assert tokens(sharding(schedule, reshard="never", reduce="each", optimizer=False), 0) == (
        "0UNSHARD0 0F0 1UNSHARD0 0F1 1F0 1F1 1B0 1REDUCE_GRAD0 1B1 1RESHARD0 1REDUCE_GRAD0 "
        "0B0 0REDUCE_GRAD0 0B1 0RESHARD0 0REDUCE_GRAD0"
    )
    assert tokens(sharding(build("1f1b", ranks=1, microbatches=1), reshard="each"), 0) == (
        "0UNSHARD0 0F0 0RESHARD0 0UNSHARD0 0B0 0RESHARD0 0REDUCE_GRAD0 OPT"
    )


def test_blocks_go_backwards_in_the_backward() -> None:
    sharded = sharding(build("1f1b", ranks=1, microbatches=1), blocks=[2], reshard="each")
    assert tokens(sharded, 0) == (
        "0UNSHARD0 0UNSHARD1 0F0 0RESHARD0 0RESHARD1 0UNSHARD1 0UNSHARD0 0B0 0RESHARD1 0RESHARD0 "
        "0REDUCE_GRAD1 0REDUCE_GRAD0 OPT"
    )


def test_prefetch_hides_what_gathering_takes() -> None:
    schedule, costs = build("breadth-first", ranks=2, microbatches=4, chunks=2), Costs(UNSHARD=0.8, REDUCE_GRAD=0.8)
    late, early = (simulate(sharding(schedule, prefetch=ahead), costs).makespan for ahead in (0, 2))
    assert simulate(schedule, costs).makespan < early < late
    assert walk(sharding(schedule, prefetch=0), 0, 1) == 1


def test_w_needs_no_parameters() -> None:
    sharded = sharding(split_backward(build("1f1b", ranks=1, microbatches=1)), reshard="each")
    order = sharded.ops(0)
    assert order.index(Op(Kind.W, stage=0, microbatch=0)) > max(
        at for at, op in enumerate(order) if op.kind is Kind.RESHARD
    )


def test_messages_and_offload_go_with_it() -> None:
    schedule = build("1f1b", ranks=3, microbatches=4)
    assert without_messages(sharding(lower(schedule))) == sharding(schedule)
    validate(sharding(offload(schedule)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"reshard": "no"}, "can't have reshard='no'; it is one of turn, each, never"),
        ({"reduce": "no"}, "can't have reduce='no'; it is one of last, each"),
        ({"prefetch": -1}, "can't prefetch -1 operations ahead"),
        ({"blocks": 0}, "can't have blocks=0"),
        ({"blocks": [1, 2, 3]}, "one for each of the 2 stages"),
    ],
)
def test_options_that_cannot_be(options: dict, says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        sharding(build("1f1b", ranks=2, microbatches=2), **options)


def test_it_comes_once() -> None:
    with pytest.raises(ScheduleError, match="has OPT, REDUCE_GRAD, RESHARD, UNSHARD already"):
        sharding(sharding(build("1f1b", ranks=2, microbatches=2)))
