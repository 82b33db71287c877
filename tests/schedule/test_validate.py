"""The verifier: each way to break a schedule is named, and pointed at in the grid."""

import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.schedule import Kind, Op, Schedule
from stretto.schedule.families import build
from stretto.schedule.passes.communication import lower
from stretto.schedule.passes.split_backward import split_backward
from stretto.schedule.validate import validate
from stretto.spec.errors import ScheduleError

Orders = list[list[Op]]


def edited(schedule: Schedule, edit: Callable[[Orders], object]) -> Schedule:
    """The schedule with its orders changed in place by ``edit``."""
    orders = [schedule.ops(rank) for rank in range(schedule.num_ranks)]
    edit(orders)
    return schedule.with_orders(orders)


def move(rank: int, token: str, to: int) -> Callable[[Orders], None]:
    """Move an operation of a rank to another position."""

    def edit(orders: Orders) -> None:
        order = orders[rank]
        order.insert(to, order.pop([str(op) for op in order].index(token)))

    return edit


def refused(schedule: Schedule, *, semantics: str = "buffered") -> tuple[str, str]:
    """The error's sentence, and the token that its grid points at."""
    with pytest.raises(ScheduleError) as error:
        validate(schedule, semantics=semantics)
    sentence, *picture = str(error.value).splitlines()
    pointer = next(line for line in picture if "^" in line)
    row = picture[picture.index(pointer) - 1]
    start, end = pointer.index("^"), pointer.rindex("^") + 1
    assert all(len(line) <= 120 for line in picture)
    return sentence, f"{row.split('│')[0].strip()}: {row[start:end].strip()}".strip()


PLAIN = build("1f1b", ranks=4, microbatches=6)
LOWERED = lower(PLAIN)


def test_a_missing_forward_points_behind_the_rank() -> None:
    sentence, cell = refused(edited(PLAIN, lambda orders: orders[2].pop(0)))
    assert sentence == "1f1b: 2F0 is missing from rank 2."
    assert cell == "rank 2:"


def test_a_missing_backward_points_at_its_forward() -> None:
    sentence, cell = refused(edited(PLAIN, lambda orders: orders[1].remove(Op.parse("1B3"))))
    assert "stage 1, micro-batch 3 has no backward on rank 1" in sentence
    assert cell == "rank 1: 1F3"


def test_half_a_split_backward_is_incomplete() -> None:
    sentence, cell = refused(edited(split_backward(PLAIN), lambda orders: orders[3].remove(Op.parse("3W5"))))
    assert "has the backward operations I on rank 3; it needs either B, or I and W" in sentence
    assert cell == "rank 3: 3F5"


def test_an_operation_done_twice_points_at_the_second() -> None:
    sentence, cell = refused(edited(PLAIN, lambda orders: orders[0].insert(5, Op.parse("0F1"))))
    assert "rank 0 runs 0F1, which has run already" in sentence
    assert cell == "rank 0: 0F1"


def test_an_operation_on_the_wrong_rank() -> None:
    sentence, cell = refused(edited(PLAIN, lambda orders: orders[0].append(orders[1].pop())))
    assert sentence == "1f1b: rank 0 runs 1B5, but stage 1 lies on rank 1 for micro-batch 5."
    assert cell == "rank 0: 1B5"


def test_a_backward_before_its_forward() -> None:
    sentence, cell = refused(edited(PLAIN, move(2, "2B0", 0)))
    assert sentence == "1f1b: rank 2 runs 2B0 before 2F0, which it needs."
    assert cell == "rank 2: 2B0"


def test_weights_before_inputs() -> None:
    sentence, cell = refused(edited(split_backward(PLAIN), move(3, "3W0", 1)))
    assert sentence == "1f1b: rank 3 runs 3W0 before 3I0, which it needs."
    assert cell == "rank 3: 3W0"


def test_a_deadlock_names_the_circle_of_waits() -> None:
    # Rank 0 wants the gradient of micro-batch 0 before it gives micro-batch 1, rank 1 the other way round.
    orders = [["0F0", "0B0", "0F1", "0B1"], ["1F0", "1F1", "1B0", "1B1"]]
    sentence, cell = refused(two_ranks(orders))
    assert sentence == "mine: deadlock: rank 0 waits in 0B0 for 1B0 of rank 1, rank 1 waits in 1F1 for 0F1 of rank 0."
    assert cell == "rank 0: 0B0"


def two_ranks(orders: list[list[str]], **flow: object) -> Schedule:
    """A schedule of two ranks with a stage each and two micro-batches."""
    parsed = [[Op.parse(token) for token in order] for order in orders]
    return Schedule.from_orders(parsed, name="mine", num_stages=2, num_microbatches=2, placement=[[0, 1]], **flow)


def test_a_send_without_its_receive() -> None:
    sentence, cell = refused(
        edited(LOWERED, lambda orders: orders[1].remove(Op(Kind.RECV_F, stage=1, microbatch=4, peer=0)))
    )
    assert sentence == "1f1b: rank 0 runs 0SEND_F4, but rank 1 has no 1RECV_F4 to meet it."
    assert cell == "rank 0: 0SEND_F4"


def test_an_operand_that_is_never_sent() -> None:
    def edit(orders: Orders) -> None:
        orders[0].remove(Op(Kind.SEND_F, stage=0, microbatch=4, peer=1))
        orders[1].remove(Op(Kind.RECV_F, stage=1, microbatch=4, peer=0))

    sentence, cell = refused(edited(LOWERED, edit))
    assert sentence == "1f1b: rank 1 runs 1F4, but never receives what it needs; add 1RECV_F4."
    assert cell == "rank 1: 1F4"


def test_receives_in_another_order_than_their_sends() -> None:
    sentence, cell = refused(edited(LOWERED, move(1, "1RECV_F1", 0)))
    assert "rank 1 receives 1RECV_F1 from rank 0 where the channel brings 0SEND_F0" in sentence
    assert cell == "rank 1: 1RECV_F1"


def test_a_send_to_the_wrong_rank() -> None:
    def edit(orders: Orders) -> None:
        at = [str(op) for op in orders[0]].index("0SEND_F2")
        orders[0][at] = Op(Kind.SEND_F, stage=0, microbatch=2, peer=3)

    sentence, cell = refused(edited(LOWERED, edit))
    assert sentence == "1f1b: rank 0 runs 0SEND_F2, but its peer is rank 3, while stage 1 lies on rank 1."
    assert cell == "rank 0: 0SEND_F2"


def test_a_message_that_crosses_nothing() -> None:
    sentence, _ = refused(edited(LOWERED, lambda orders: orders[3].append(Op.parse("3SEND_F5"))))
    assert sentence == "1f1b: rank 3 runs 3SEND_F5, but nothing crosses ranks there."


def test_a_send_before_its_producer() -> None:
    sentence, cell = refused(edited(LOWERED, move(0, "0SEND_F0", 0)))
    assert sentence == "1f1b: rank 0 runs 0SEND_F0 before 0F0, which it needs."
    assert cell == "rank 0: 0SEND_F0"


def test_1f1b_lowered_for_buffers_deadlocks_where_sends_block() -> None:
    validate(LOWERED, semantics="buffered")
    sentence, cell = refused(LOWERED, semantics="rendezvous")
    assert "deadlock: rank 2 waits in 2SEND_F1 for 3RECV_F1 of rank 3, rank 3 waits in 3SEND_B0" in sentence
    assert cell == "rank 2: 2SEND_F1"


def test_gpipe_needs_no_buffers() -> None:
    validate(lower(build("gpipe", ranks=4, microbatches=6)), semantics="rendezvous")


def test_unknown_semantics() -> None:
    with pytest.raises(ScheduleError, match="buffered or rendezvous"):
        validate(PLAIN, semantics="eager")


def test_complete_is_relative_to_paths_frozen_stages_and_forward_only() -> None:
    skipping = two_ranks([["0F0", "0B0"], ["1F0", "1B0", "1F1", "1B1"]], paths=[[0, 1], [1]])
    frozen = two_ranks([["0F0", "0F1"], ["1F0", "1B0", "1F1", "1B1"]], frozen=[0])
    forward = two_ranks([["0F0", "0F1"], ["1F0", "1F1"]], forward_only=True)
    for schedule in (skipping, frozen, forward):
        validate(schedule)
        validate(lower(schedule))
    assert [op.kind for op in lower(frozen).ops(1)].count(Kind.SEND_B) == 0
    assert not any(op.microbatch == 1 and op.kind is Kind.RECV_F for op in lower(skipping).ops(1))


def test_what_the_flow_does_not_ask_for_is_refused() -> None:
    full = [["0F0", "0F1", "0B0", "0B1"], ["1F0", "1B0", "1F1", "1B1"]]
    assert "stage 0 is frozen" in refused(two_ranks(full, frozen=[0]))[0]
    assert "the schedule is forward only" in refused(two_ranks(full, forward_only=True))[0]
    assert "micro-batch 1 doesn't visit stage 0" in refused(two_ranks(full, paths=[[0, 1], [1]]))[0]


def test_paths_may_run_against_the_numbering() -> None:
    paths = [[0, 1], [1, 0]]
    validate(lower(two_ranks([["0F0", "0F1", "0B1", "0B0"], ["1F1", "1F0", "1B0", "1B1"]], paths=paths)))
    sentence, _ = refused(two_ranks([["0F1", "0F0", "0B1", "0B0"], ["1F0", "1F1", "1B0", "1B1"]], paths=paths))
    assert "deadlock" in sentence


def test_replicas_place_the_same_stage_on_two_ranks() -> None:
    orders = [["0F0", "1F1", "1B1", "0B0"], ["0F1", "1F0", "1B0", "0B1"]]
    parsed = [[Op.parse(token) for token in order] for order in orders]
    both = Schedule.from_orders(
        parsed, name="both ways", num_stages=2, num_microbatches=2, placement=[[0, 1], [1, 0]], voice=[0, 1]
    )
    validate(both)
    validate(lower(both))


@given(seed=st.randoms(use_true_random=False), chunks=st.integers(1, 3), lowered=st.booleans())
@settings(max_examples=60, deadline=None)
def test_dropping_any_operation_is_noticed(seed: object, chunks: int, lowered: bool) -> None:
    schedule = build("interleaved", ranks=3, microbatches=5, chunks=chunks)
    schedule = lower(schedule) if lowered else schedule

    def drop(orders: Orders) -> None:
        order = seed.choice(orders)
        order.pop(seed.randrange(len(order)))

    with pytest.raises(ScheduleError):
        validate(edited(schedule, drop))


def test_validation_is_fast_enough_to_precede_every_run() -> None:
    schedule = lower(build("1f1b", ranks=8, microbatches=64))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        validate(schedule)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05
