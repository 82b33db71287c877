"""The cut of the warm-up: as late as it can be, and nothing before it needs what stands behind it."""

from __future__ import annotations

import pytest

from stretto.schedule.families import build
from stretto.schedule.op import Kind, Op
from stretto.schedule.passes.communication import lower
from stretto.schedule.schedule import Schedule
from stretto.schedule.warm_up import FORWARD_ONLY, lengths_of, warm_up

SHAPES = [
    ("1f1b", 1),
    ("gpipe", 1),
    ("zb-h2", 1),
    ("interleaved", 3),
    ("zb-v", 2),
    ("dualpipe", 1),
    ("zeropp", 2),
]


@pytest.mark.parametrize(("name", "chunks"), SHAPES)
def test_the_cut_is_closed_and_before_the_first_backward(name: str, chunks: int) -> None:
    schedule = lower(build(name, ranks=4, microbatches=8, chunks=chunks if chunks > 1 else None))
    lengths = lengths_of(schedule)
    done = {(op.kind, op.stage, op.microbatch) for rank, n in enumerate(lengths) for op in schedule.ops(rank)[:n]}
    assert all(op[0] in FORWARD_ONLY for op in done) and all(lengths)
    for kind, stage, microbatch in done:
        if kind is Kind.RECV_F:
            before = schedule.previous_stage(stage, microbatch)
            assert (Kind.SEND_F, before, microbatch) in done
    for rank, length in enumerate(lengths):
        order = schedule.ops(rank)
        following = order[length]
        if following.kind is Kind.RECV_F:  # held back only by a sender that is behind its own cut
            sender = schedule.previous_stage(following.stage, following.microbatch)
            assert (Kind.SEND_F, sender, following.microbatch) not in done
        else:
            assert following.kind not in FORWARD_ONLY


def test_what_others_send_and_what_is_held_are_known() -> None:
    schedule = lower(build("1f1b", ranks=2, microbatches=3))
    # Rank 0: 0F0 0SEND_F0 0F1 0SEND_F1 ┊ 0RECV_B0; rank 1 needs only the first before its own cut.
    assert warm_up(schedule, 1).sent == {(0, 0, 0), (0, 1, 0)} and warm_up(schedule, 1).length == 2
    gathering = Schedule.from_orders(
        [[Op.parse(token) for token in ["0UNSHARD0", "0UNSHARD1", "0F0", "0RESHARD1", "0B0", "0RESHARD0"]]],
        name="gathering",
        num_stages=1,
        num_microbatches=1,
        placement=[(0,)],
    )
    assert warm_up(gathering, 0).gathered == (Op.parse("0RESHARD0"),) and warm_up(gathering, 0).length == 4
