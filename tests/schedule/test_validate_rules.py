"""The verifier's rules for what comes besides forwards and backwards: each way to break one is named and pointed at."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from stretto.schedule import Op, Schedule, compiled
from stretto.schedule.families import build
from stretto.schedule.passes.communication import lower
from stretto.schedule.passes.rendezvous import lower_rendezvous
from stretto.schedule.passes.split_backward import split_backward
from stretto.schedule.progress import rounds
from stretto.schedule.validate import validate
from stretto.spec.errors import ScheduleError


def op(token: str) -> Op:
    """An operation; with a + behind it, joined to the next."""
    return replace(Op.parse(token.rstrip("+")), joined=token.endswith("+"))


def schedule(*orders: str, num_microbatches: int = 2, **flow: object) -> Schedule:
    """One stage per rank."""
    parsed = [
        [replace(Op.parse(token.rstrip("+")), joined=token.endswith("+")) for token in order.split()]
        for order in orders
    ]
    ranks = len(orders)
    values: dict = {"num_stages": ranks, "placement": [range(ranks)]}
    return Schedule.from_orders(parsed, name="mine", num_microbatches=num_microbatches, **(values | flow))


def refused(broken: Schedule, **how: str) -> tuple[str, str]:
    """The error's sentence, and what its grid points at."""
    with pytest.raises(ScheduleError) as error:
        validate(broken, **how)
    sentence, *picture = str(error.value).splitlines()
    pointer = next(line for line in picture if "^" in line)
    row = picture[picture.index(pointer) - 1]
    start, end = pointer.index("^"), pointer.rindex("^") + 1
    return sentence, f"{row.split('│')[0].strip()}: {row[start:end].strip()}".strip()


ALGORITHM_1 = ("0F0 0F1 0S0 0S1 0T0 0T1 0B0 0B1", "1F0 1F1 1S0 1S1 1T0 1T1 1B0 1B1")
ALGORITHM_2 = ("0F0 0F1 0S0 0S1 0B0 0B1 0T0 0T1", "1F0 1F1 1S0 1S1 1B0 1B1 1T0 1T1")


@pytest.mark.parametrize("orders", [ALGORITHM_1, ALGORITHM_2])
def test_both_vocabulary_algorithms_are_right_in_every_form(orders: tuple[str, str]) -> None:
    right = schedule(*orders)
    validate(right)
    validate(lower(right))
    validate(lower_rendezvous(right), semantics="rendezvous")


@pytest.mark.parametrize(
    ("orders", "said", "cell"),
    [
        (
            ("0F0 0F1 0S0 0S1 0T0 0B0 0B1", ALGORITHM_1[1]),
            "mine: 0T1 is missing from rank 0.",
            "rank 0:",
        ),
        (
            ("0F0 0F1 0S0 0T0 0T1 0B0 0B1", ALGORITHM_1[1]),
            "mine: 0S1 is missing from rank 0.",
            "rank 0:",
        ),
        (
            ("0F0 0F1 1S0 0S1 0T0 0T1 0B0 0B1", ALGORITHM_1[1]),
            "mine: rank 0 runs 1S0, but it holds the vocabulary shard 0 alone.",
            "rank 0: 1S0",
        ),
        (
            (ALGORITHM_1[0], "1F0 1F1 1S1 1S0 1T0 1T1 1B0 1B1"),
            "mine: rank 1 runs 1S1, where rank 0 runs 0S0; their collectives meet in one order on all ranks.",
            "rank 1: 1S1",
        ),
        (
            (ALGORITHM_1[0], "1F0 1S0 1S1 1F1 1T0 1T1 1B0 1B1"),
            "mine: rank 1 runs 1S1 before 1F1, which it needs.",
            "rank 1: 1S1",
        ),
        (
            ("0F0 0F1 0T0 0S0 0S1 0T1 0B0 0B1", ALGORITHM_1[1]),
            "mine: rank 0 runs 0T0 before 0S0, which it needs.",
            "rank 0: 0T0",
        ),
        (
            # algorithm 1 on rank 1, whose backward waits for a T that rank 0 runs after its own backward
            (ALGORITHM_2[0], ALGORITHM_1[1]),
            "mine: deadlock: rank 0 waits in 0B0 for 1B0 of rank 1, rank 1 waits in 1B0 for 0T0 of rank 0.",
            "rank 0: 0B0",
        ),
        (
            (ALGORITHM_2[0], "1F0 1F1 1B0 1S0 1S1 1B1 1T0 1T1"),
            "mine: rank 1 runs 1B0 before 1S0, which it needs.",
            "rank 1: 1B0",
        ),
    ],
)
def test_vocabulary_passes(orders: tuple[str, str], said: str, cell: str) -> None:
    assert refused(schedule(*orders)) == (said, cell)


def test_a_micro_batch_without_backward_has_s_alone() -> None:
    frozen = {"num_microbatches": 1, "forward_only": True}
    validate(schedule("0F0 0S0", "1F0 1S0", **frozen))
    sentence, cell = refused(schedule("0F0 0S0 0T0", "1F0 1S0 1T0", **frozen))
    assert sentence == "mine: rank 0 runs 0T0, but micro-batch 0 has no backward that could use it."
    assert cell == "rank 0: 0T0"


@pytest.mark.parametrize(
    ("order", "said", "cell"),
    [
        ("0F0 0O0 0F1 0B1 0B0", "rank 0 runs 0O0, but no rank runs 0L0, which brings it back", "0O0"),
        ("0F0 0L0 0F1 0B1 0B0", "rank 0 runs 0L0, which needs 0O0; no rank runs that", "0L0"),
        ("0F0 0O0 0F1 0B1 0B0 0L0", "rank 0 runs 0B0 before 0L0, which it needs", "0B0"),
        ("0F0 0L0 0F1 0O0 0B1 0B0", "rank 0 runs 0L0 before 0O0, which it needs", "0L0"),
        ("0O0 0F0 0F1 0B1 0L0 0B0", "rank 0 runs 0O0 before 0F0, which it needs", "0O0"),
        ("0F0 0O0 0O0 0F1 0B1 0L0 0B0", "rank 0 runs 0O0, which has run already", "0O0"),
        ("0F0 0O0 0F1 0B1 0R0 0L0 0B0", "rank 0 runs 0R0 before 0L0, which it needs", "0R0"),
        ("0F0 0F1 0B1 0B0 0R0", "rank 0 runs 0B0 before 0R0, which it needs", "0B0"),
        ("0R0 0F0 0F1 0B1 0B0", "rank 0 runs 0R0 before 0F0, which it needs", "0R0"),
        ("0F0 0F1 0R1 0B1 0R0 0R0 0B0", "rank 0 runs 0R0, which has run already", "0R0"),
    ],
)
def test_offload_and_recompute(order: str, said: str, cell: str) -> None:
    sentence, found = refused(schedule(order))
    assert sentence.startswith(f"mine: {said}")
    assert found == f"rank 0: {cell}"


def test_a_stage_without_backward_neither_recomputes_nor_offloads() -> None:
    for token in ("0R0", "0O0"):
        sentence, _ = refused(schedule(f"0F0 {token}", forward_only=True, num_microbatches=1))
        assert sentence == f"mine: rank 0 runs {token}, but the schedule is forward only."


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("0F0 0UNSHARD0 0B0", "rank 0 runs 0F0, but block 0 of stage 0 is not gathered there"),
        ("0UNSHARD0 0F0 0RESHARD0 0B0", "rank 0 runs 0B0, but block 0 of stage 0 is not gathered there"),
        ("0UNSHARD0 0F0 0UNSHARD1 0B0", "rank 0 runs 0F0, but block 1 of stage 0 is not gathered there"),
        ("0UNSHARD0 0F0 0RESHARD0 0R0 0UNSHARD0 0B0", "rank 0 runs 0R0, but block 0 of stage 0 is not gathered"),
        ("0UNSHARD0 0UNSHARD0 0F0 0B0", "rank 0 runs 0UNSHARD0, but the block is gathered there"),
        ("0UNSHARD0 0F0 0RESHARD0 0RESHARD0", "rank 0 runs 0RESHARD0, but the block is not gathered there"),
        ("0F0 0I0 0REDUCE_GRAD0 0W0", "no 0REDUCE_GRAD0 follows the last gradient of stage 0 on rank 0"),
        ("0UNSHARD0 0UNSHARD1 0F0 0B0 0REDUCE_GRAD1", "no 0REDUCE_GRAD0 follows the last gradient of stage 0"),
        ("0F0 OPT 0B0", "rank 0 runs OPT, but has work left behind it"),
        ("0F0 0B0 OPT 0REDUCE_GRAD0", "rank 0 runs OPT, but has work left behind it"),
        ("0F0 0B0 OPT OPT", "rank 0 runs OPT, which has run already; a rank steps once"),
        ("0F0 0B0 1UNSHARD0", "Rank 0, operation 2: 1UNSHARD0 has a stage that isn't there"),
    ],
)
def test_sharding_and_the_optimizer(order: str, said: str) -> None:
    if "0RESHARD0 0RESHARD0" in order:
        order += " 0UNSHARD0 0B0"
    with pytest.raises(ScheduleError) as error:
        validate(schedule(order, num_microbatches=1))
    assert said in str(error.value)


def test_sharding_that_is_right() -> None:
    validate(schedule("0UNSHARD0 0F0 0F1 0B0 0I1 0RESHARD0 0W1 0REDUCE_GRAD0 OPT"))
    validate(
        schedule(
            "0UNSHARD0 0UNSHARD1 0F0 0F1 0RESHARD1 0UNSHARD1 0B0 0REDUCE_GRAD0 0B1 0REDUCE_GRAD1 0REDUCE_GRAD0 "
            "0RESHARD0 OPT 0RESHARD1 0UNSHARD0"
        )
    )


def test_every_rank_with_gradients_steps_and_reduces_where_one_does() -> None:
    sentence, cell = refused(schedule("0F0 0B0 OPT", "1F0 1B0", num_microbatches=1))
    assert sentence == "mine: OPT is missing from rank 1, which has gradients as the ranks that run it."
    assert cell == "rank 1:"
    sentence, cell = refused(schedule("0F0 0B0 0REDUCE_GRAD0", "1F0 1B0", num_microbatches=1))
    assert sentence == "mine: no 1REDUCE_GRAD0 follows the last gradient of stage 1 on rank 1."
    assert cell == "rank 1: 1B0"


def test_a_rank_shards_what_it_holds() -> None:
    sentence, cell = refused(schedule("1UNSHARD0 0F0 0B0", "1F0 1B0", num_microbatches=1))
    assert sentence == "mine: rank 0 runs 1UNSHARD0, but doesn't hold stage 1."
    assert cell == "rank 0: 1UNSHARD0"


PAIRS = ("0F0 0F1+ 0B0 0F2+ 0B1 0B2", "1F0 1B0 1F1 1B1 1F2 1B2")


def test_an_overlapped_pair_is_right_in_every_form() -> None:
    right = schedule(*PAIRS, num_microbatches=3)
    validate(right)
    buffered, rendezvous = lower(right), lower_rendezvous(right)
    validate(buffered)
    validate(rendezvous, semantics="rendezvous")
    assert str(buffered).splitlines()[1].split(": ")[1].split()[:8] == (
        ["0F0", "0SEND_F0", "0RECV_B0", "0F1", "0B0", "0SEND_F1", "0RECV_B1", "0F2"]
    )
    for lowered in (buffered, rendezvous):
        assert [str(each) for each in lowered.ops(0) if each.joined] == ["0F1", "0F2"]


def test_a_pair_starts_only_when_both_of_its_operations_can() -> None:
    # 1F1 needs 0F1, which is joined to 0B0, which needs 1B0, which stands behind 1F1
    sentence, cell = refused(schedule("0F0 0F1+ 0B0 0B1", "1F0 1F1 1B0 1B1"))
    assert sentence == "mine: deadlock: rank 0 waits in 0B0 for 1B0 of rank 1, rank 1 waits in 1F1 for 0F1 of rank 0."
    assert cell == "rank 0: 0B0"
    validate(schedule("0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1"))


@pytest.mark.parametrize(
    ("order", "cell"),
    [
        ("0F0+ 0F1 0B0 0B1", "0F0"),
        ("0F0 0F1+ 0B1 0B0", "0F1"),
        ("0F0 0B0+ 0F1 0B1", "0B0"),
    ],
)
def test_what_is_no_pair(order: str, cell: str) -> None:
    sentence, found = refused(schedule(order))
    assert sentence.endswith("joined to no B or I of another micro-batch; a pair is an F and such a backward.")
    assert found == f"rank 0: {cell}"


def test_replicas_keep_their_micro_batches_apart() -> None:
    # Rank 0 holds stage 0 of one replica and stage 1 of the other.
    both = {"num_stages": 2, "placement": [[0, 1], [1, 0]], "voice": [0, 1]}
    validate(schedule("0F0 1F1 1B1 0B0", "0F1 1F0 1B0 0B1", **both))
    sentence, cell = refused(schedule("0F0 1F1 1B1 0B0 0F1", "1F0 1B0 0B1", **both))
    assert sentence == "mine: rank 0 runs 0F1, but stage 0 lies on rank 1 for micro-batch 1."
    assert cell == "rank 0: 0F1"


def test_vocabulary_shards_that_no_rank_can_have_are_refused_whatever_their_number() -> None:
    sentence, _ = refused(schedule("0F0 999999999S0 0B0", num_microbatches=1))
    assert sentence == "mine: rank 0 runs 999999999S0, but it holds the vocabulary shard 0 alone."


def test_compiled_and_plain_loops_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    some = lower(split_backward(build("interleaved", ranks=4, microbatches=9, chunks=2)))
    plain = rounds(some)
    monkeypatch.setattr(compiled, "WORTH_IT", 0)
    assert rounds(some).tolist() == plain.tolist()


def test_half_a_million_operations_are_made_and_validated_in_no_time() -> None:
    def seconds() -> tuple[float, float]:
        start = time.perf_counter()
        large = split_backward(build("interleaved", ranks=64, microbatches=512, chunks=4))
        made = time.perf_counter()
        validate(large)
        assert large.num_ops == 393_216
        return made - start, time.perf_counter() - made

    tries = [seconds() for _ in range(3)]
    assert min(made for made, _ in tries) < 0.15
    assert min(validated for _, validated in tries) < 1
