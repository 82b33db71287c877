"""Ranks that raise, die, freeze, hang or are asked to stop: one clear message, an exit code, nothing left behind."""

import re
import signal
import time
from pathlib import Path

import pytest
from tests.fault.launching import Launched, is_alive, small_run

from stretto.trainer.member import STOPPED


def test_a_good_run_ends_with_zero_and_keeps_its_resolved_run_file(tmp_path: Path) -> None:
    launched = Launched(small_run(tmp_path), "train")
    code, errors, _ = launched.finish()
    assert code == 0, errors
    assert (launched.folder / "done-0").exists() and (launched.folder / "done-1").exists()
    assert "[run]" in (launched.folder / "run.toml").read_text()
    assert errors == ""


def test_a_rank_that_raises_is_the_one_that_is_shown(tmp_path: Path) -> None:
    code, errors, _ = Launched(small_run(tmp_path), "raise_on_rank_1").finish()
    assert code == 1
    assert re.search(r"RankError: rank 1 \(host .*, pid \d+\) failed: KeyError: 'the culprit'\n", errors), errors
    assert "stubs.py" in errors and "rank 0" not in errors


def test_an_error_of_the_user_comes_as_it_is_once_and_is_not_tried_again(tmp_path: Path) -> None:
    code, errors, _ = Launched(small_run(tmp_path, max_restarts=3), "refuse_checkpoint").finish()
    assert code == 2
    assert errors.strip() == "CheckpointError: checkpoint x can't be used: shard 3 is damaged"


def test_a_killed_rank_is_named_and_the_run_starts_again(tmp_path: Path) -> None:
    launched = Launched(small_run(tmp_path, max_restarts=1), "killed_once")
    code, errors, _ = launched.finish()
    assert code == 0, errors
    assert re.search(r"rank 1 \(host .*, pid \d+\), which was killed by SIGKILL in F of stage 2, .*2F7", errors), errors
    assert "starting again from the last checkpoint (1 of 1)" in errors
    assert (launched.folder / "done-0").read_text() == (launched.folder / "done-1").read_text() == "1"


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_ends_the_run_within_the_limit(tmp_path: Path, frozen: int) -> None:
    launched = Launched(small_run(tmp_path, silent_seconds=3.0, seed=frozen), "stopped_by_signal")
    code, errors, seconds = launched.finish()
    assert code == 1
    silent = (
        rf"rank {frozen} \(host .*, pid \d+\), which has been silent for \d+ s in F of stage 3, micro-batch 1 \(3F1\)"
    )
    assert re.search(rf"rank {1 - frozen} waits in .*REDUCE_GRAD.* for {silent}, at .*stubs.py:\d+", errors), errors
    assert seconds < 40


def test_a_hang_names_who_is_waited_for(tmp_path: Path) -> None:
    code, errors, _ = Launched(small_run(tmp_path, silent_seconds=4.0, hang_seconds=3.0), "hang").finish()
    assert code == 1
    assert re.search(r"finished on any rank for \d+ s: rank 0 waits in .*REDUCE_GRAD.* for rank 1 .*1B4", errors), (
        errors
    )
    assert re.search(r", at .*stubs.py:\d+ \(hang\);", errors), errors


def test_a_long_operation_is_no_silence(tmp_path: Path) -> None:
    launched = Launched(small_run(tmp_path, silent_seconds=1.5), "long_compute")
    code, errors, _ = launched.finish()
    assert code == 0, errors
    assert (launched.folder / "done-1").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_all_ranks_stop_after_the_same_step(tmp_path: Path, number: signal.Signals) -> None:
    launched = Launched(small_run(tmp_path), "until_asked")
    launched.wait_for("pid-0")
    launched.wait_for("pid-1")
    launched.process.send_signal(number)
    code, errors, _ = launched.finish()
    assert code == STOPPED, errors
    assert "stopping: a checkpoint is written" in errors
    assert (launched.folder / "saved-0").read_text() == (launched.folder / "saved-1").read_text()


def test_no_rank_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    launched = Launched(small_run(tmp_path), "until_asked")
    pids = [int(launched.wait_for(f"pid-{rank}").read_text()) for rank in range(2)]
    launched.process.kill()
    launched.process.communicate()
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in pids)
