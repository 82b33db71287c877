"""Who is silent, what is a hang, and what is neither."""

from dataclasses import replace

import pytest

from stretto.resilience.beat import Beat
from stretto.resilience.judge import Judge

BEAT = Beat(count=1, life="a", host="h", pid=9, file="runs/x/oplog/rank-3")


class Ranks:
    """A judge that hears ranks which beat each second, on a clock of our own."""

    def __init__(self, *ranks: int, silent: float = 45, hang: float = 600) -> None:
        self.now = 0.0
        self.beats = {rank: replace(BEAT, life=str(rank)) for rank in ranks}
        self.judge = Judge(silent_seconds=silent, hang_seconds=hang, now=0.0)
        self.judge.expect(list(ranks), 0.0)

    def pass_time(self, seconds: int, *, beating: set[int] | None = None, working: bool = True) -> str | None:
        """Let time pass; returns the first verdict."""
        for _ in range(seconds):
            self.now += 1
            for rank in self.beats if beating is None else beating:
                beat = self.beats[rank]
                self.beats[rank] = replace(beat, count=beat.count + 1, finished=beat.finished + working)
                self.judge.hear(rank, self.beats[rank].text(), self.now)
            if verdict := self.judge.verdict(self.now):
                return verdict
        return None


def test_ranks_that_beat_and_work_are_left_alone() -> None:
    assert Ranks(0, 1, 2).pass_time(2000) is None


def test_a_silent_rank_is_named_with_what_it_did() -> None:
    ranks = Ranks(0, 1, 3)
    ranks.beats[3] = replace(ranks.beats[3], operation="2F7", peer=1, step=12)
    assert ranks.pass_time(10) is None
    assert ranks.pass_time(45, beating={0, 1}) is None
    assert ranks.pass_time(2, beating={0, 1}) == (
        "rank 3 (host h, pid 9) has been silent for 46 s in F of stage 2, micro-batch 7 (2F7), step 12; "
        "its log is runs/x/oplog/rank-3"
    )


def test_a_rank_that_never_comes_is_named() -> None:
    assert Ranks(0, 1).pass_time(440, beating={0}) is None  # its machine may be slow to start
    assert Ranks(0, 1).pass_time(460, beating={0}) == "rank 1 has never been heard, for 451 s"


def test_a_long_computation_is_no_silence_and_no_hang_while_others_work() -> None:
    ranks = Ranks(0, 1)
    ranks.beats[1] = replace(ranks.beats[1], operation="0F0")
    for _ in range(500):
        assert ranks.pass_time(1, beating={0}) is None
        assert ranks.pass_time(1, beating={1}, working=False) is None


def test_no_progress_anywhere_is_a_hang_that_names_the_rank_that_computes() -> None:
    ranks = Ranks(0, 1, 2)
    assert ranks.pass_time(5) is None
    ranks.beats[0] = replace(ranks.beats[0], operation="1RECV_F4", peer=2, step=3)
    ranks.beats[1] = replace(ranks.beats[1], operation="REDUCE_GRAD", waits=True, place="collectives.py:3 (wait)")
    ranks.beats[2] = replace(ranks.beats[2], operation="1B4", step=3, place="model.py:7 (forward)")
    assert ranks.pass_time(599, working=False) is None
    assert ranks.pass_time(10, working=False) == (
        "no operation has finished on any rank for 601 s: rank 0 waits for the input of stage 1, micro-batch 4 "
        "(1RECV_F4, step 3) from rank 2 (host h, pid 9), which is still in B of stage 1, micro-batch 4 (1B4), step 3, "
        "at model.py:7 (forward); its log is runs/x/oplog/rank-3"
    )


@pytest.mark.parametrize(("operation", "started"), [("SAVE", True), ("COMPILE", True), (None, False)])
def test_saving_a_checkpoint_and_loading_a_model_may_take_long(operation: str | None, started: bool) -> None:
    ranks = Ranks(0, 1)
    if started:
        assert ranks.pass_time(5) is None
    ranks.beats[1] = replace(ranks.beats[1], operation=operation)
    assert ranks.pass_time(3000, working=False) is None


def test_who_has_said_goodbye_is_not_missed() -> None:
    ranks = Ranks(0, 1)
    ranks.pass_time(3)
    ranks.beats[1] = replace(ranks.beats[1], left=True)
    ranks.pass_time(1)
    assert ranks.pass_time(500, beating={0}) is None


def test_a_beat_left_by_a_former_life_says_nothing() -> None:
    ranks = Ranks(0)
    old = replace(BEAT, verdict="rank 5 has been silent", life="before")
    ranks.judge.hear(0, old.text(), 0.0)
    assert ranks.pass_time(100) is None


def test_the_verdict_of_another_is_taken_over() -> None:
    ranks = Ranks(0)
    ranks.pass_time(2)
    ranks.beats[0] = replace(ranks.beats[0], verdict="rank 5 has been silent")
    assert ranks.pass_time(1) == "rank 5 has been silent"


def test_a_judge_that_slept_itself_accuses_nobody() -> None:
    ranks = Ranks(0, 1)
    ranks.pass_time(5)
    ranks.now += 1000
    assert ranks.judge.verdict(ranks.now) is None
    assert ranks.pass_time(60) is None
