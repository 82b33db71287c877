"""The schedule as columns: what it holds, how it compares, what it refuses; and placements."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest

from stretto.schedule import Kind, Op, Schedule
from stretto.schedule.families import build
from stretto.schedule.placement import loop, zigzag
from stretto.spec.errors import ScheduleError

JOINED = Op(Kind.F, stage=0, microbatch=1, joined=True)


def schedule(**changes: object) -> Schedule:
    """Two ranks, two stages, two micro-batches, one forward each."""
    values: dict = {
        "orders": [[Op.parse("0F0"), Op.parse("0F1")], [Op.parse("1F0"), Op.parse("1F1")]],
        "name": "mine",
        "num_stages": 2,
        "num_microbatches": 2,
        "placement": [[0, 1]],
        "forward_only": True,
    }
    return Schedule.from_orders(**(values | changes))


def test_columns_hold_the_rows_rank_after_rank() -> None:
    s = build("1f1b", ranks=2, microbatches=2)
    assert s.kind.tolist() == [Kind.F, Kind.F, Kind.B, Kind.B, Kind.F, Kind.B, Kind.F, Kind.B]
    assert s.stage.tolist() == [0] * 4 + [1] * 4
    assert s.microbatch.tolist() == [0, 1, 0, 1, 0, 0, 1, 1]
    assert s.offsets.tolist() == [0, 4, 8]
    assert all(getattr(s, name).dtype == np.int32 for name in ("kind", "stage", "microbatch", "peer", "offsets"))
    with pytest.raises(ValueError, match="read-only"):
        s.kind[0] = 1


def test_equality_is_by_value() -> None:
    s, other = (build("interleaved", ranks=2, microbatches=4, chunks=2) for _ in range(2))
    assert s == other and hash(s) == hash(other)
    assert s == pickle.loads(pickle.dumps(s)) == copy.deepcopy(s)
    assert s != build("interleaved", ranks=2, microbatches=3, chunks=2)
    assert schedule() != schedule(name="other")
    assert schedule() != "mine"


def test_other_orders_and_columns_keep_the_flow() -> None:
    s = schedule(paths=[[0, 1], [1]], frozen=[0], voice=[0, 0])
    assert s.with_orders([s.ops(0), s.ops(1)]) == s
    assert s.with_columns(kind=s.kind, stage=s.stage, microbatch=s.microbatch, offsets=s.offsets) == s


def test_columns_and_orders_make_the_same_schedule() -> None:
    pair = [Op(Kind.F, stage=0, microbatch=1, joined=True), Op(Kind.B, stage=0, microbatch=0)]
    orders = [[Op(Kind.F, stage=0, microbatch=0), Op(Kind.SEND_F, stage=0, microbatch=0), *pair], []]
    by_columns = Schedule.from_columns(
        kind=[Kind.F, Kind.SEND_F, Kind.F, Kind.B],
        stage=[0, 0, 0, 0],
        microbatch=[0, 0, 1, 0],
        offsets=[0, 4, 4],
        joined=[0, 0, 1, 0],
        name="mine",
        num_stages=2,
        num_microbatches=2,
        placement=[[0, 1]],
    )
    assert by_columns == schedule(orders=orders, forward_only=False)
    assert by_columns.peer.tolist() == [-1, 1, -1, -1]
    assert [op.joined for op in by_columns.ops(0)] == [False, False, True, False]
    assert by_columns != schedule(orders=[[replace(op, joined=False) for op in orders[0]], []], forward_only=False)
    assert schedule().joined is None


def test_neighbours_follow_the_path_and_gradients_pass_over_frozen_stages() -> None:
    s = schedule(
        orders=[[], []],
        num_stages=4,
        placement=[[0, 1, 0, 1]],
        paths=[[0, 1, 2, 3], [3, 0]],
        frozen=[1],
        forward_only=False,
    )
    assert [s.next_stage(stage, 0) for stage in range(4)] == [1, 2, 3, None]
    assert [s.previous_stage(stage, 0) for stage in range(4)] == [None, 0, 1, 2]
    assert (s.next_stage(3, 1), s.previous_stage(0, 1)) == (0, 3)
    assert (s.gradient_source(0, 0), s.gradient_target(2, 0)) == (2, 0)
    assert s.num_chunks == 2 and s.stages_of(1) == (1, 3)
    with pytest.raises(ScheduleError, match="doesn't visit stage 2"):
        s.next_stage(2, 1)


def test_messages_get_their_peers_from_the_placement() -> None:
    s = schedule(orders=[[Op.parse("0SEND_F0"), Op.parse("0SEND_F1")], [Op.parse("1RECV_F0")]])
    assert s.peer.tolist() == [1, 1, 0]
    assert s.lowered and not schedule().lowered


def test_text_form() -> None:
    assert str(schedule()) == "mine: 2 ranks, 2 stages, 2 micro-batches\nrank 0: 0F0 0F1\nrank 1: 1F0 1F1"
    assert repr(schedule()) == "Schedule('mine', ranks=2, stages=2, microbatches=2, ops=4)"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"orders": []}, "at least one of its ranks"),
        ({"num_stages": 0, "placement": [[]]}, "at least one of its stages"),
        ({"num_microbatches": 0}, "at least one of its micro-batches"),
        ({"placement": []}, "placement is empty"),
        ({"placement": [[0]]}, r"placement\[0\] places 1 stages, but there are 2"),
        ({"placement": [[0, 2]]}, "puts stage 1 on rank 2; ranks are 0 to 1"),
        ({"voice": [0]}, "voice has 1 entries"),
        ({"voice": [0, 1]}, r"voice\[1\] is 1"),
        ({"paths": [[0]]}, "paths has 1 entries"),
        ({"paths": [[0, 0], [1]]}, r"paths\[0\] is \[0, 0\]"),
        ({"paths": [[0], []]}, r"paths\[1\] is \[\]"),
        ({"paths": [[0], [2]]}, r"paths\[1\] is \[2\]"),
        ({"frozen": [2]}, r"frozen names stages \[2\]"),
        ({"orders": [[], [Op.parse("1F0"), Op.parse("2F0")]]}, "Rank 1, operation 1: 2F0 has a stage that isn't there"),
        ({"orders": [[Op.parse("0F2")], []]}, "Rank 0, operation 0: 0F2 has a micro-batch that isn't there"),
        ({"orders": [[Op(Kind.F)], []]}, "has a stage that isn't there"),
        ({"orders": [[Op.parse("0F0"), JOINED], []]}, "Rank 0, operation 1: 0F1 is joined to what follows it; a pair"),
        ({"orders": [[JOINED, JOINED, JOINED], []]}, "Rank 0, operation 0: 0F1 is joined to what follows it; a pair"),
        ({"orders": [[], [JOINED]]}, "Rank 1, operation 0: 0F1 is joined to what follows it; a pair"),
        ({"orders": [[Op(Kind.SEND_F, stage=0, microbatch=0, peer=2)], []]}, "has a peer that isn't there"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        schedule(**changes)


def test_vocabulary_shards_and_blocks_are_counted_apart() -> None:
    tokens = ["5S1", "0UNSHARD7", "OPT"]
    assert [str(op) for op in schedule(orders=[[Op.parse(token) for token in tokens], []]).ops(0)] == tokens


def test_placements() -> None:
    assert loop(3, 6) == (0, 1, 2, 0, 1, 2)
    assert zigzag(3, 6) == (0, 1, 2, 2, 1, 0)
    assert zigzag(2, 8) == (0, 1, 1, 0, 0, 1, 1, 0)
