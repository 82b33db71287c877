"""The log of operations: right, cheap, and there after the process is gone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stretto.resilience import OpLog, log_path, read_log


def test_operations_come_back_with_times_peer_and_step(tmp_path: Path) -> None:
    log = OpLog(tmp_path, 3)
    log.begin("2F7")
    log.end()
    log.step = 12
    log.begin("RECV_F 2 7", peer=1)
    seen = read_log(log_path(tmp_path, 3))
    assert (seen.rank, seen.pid, seen.begun, seen.finished) == (3, os.getpid(), 2, 1)
    first, second = seen.operations
    assert (first.name, first.peer, first.step) == ("2F7", None, 0)
    assert first.ended is not None and 0 <= first.ended - first.began < 1
    assert (second.name, second.peer, second.step, second.ended) == ("RECV_F 2 7", 1, 12, None)
    assert seen.current == second == log.current


def test_the_outer_operation_is_current_again_when_an_inner_one_ends(tmp_path: Path) -> None:
    log = OpLog(tmp_path, 0)
    log.begin("outer")
    log.begin("inner", peer=2)
    log.end()
    assert log.current is not None and log.current.name == "outer"
    log.end()
    assert log.current is None and read_log(log.path).current is None


def test_the_ring_keeps_the_last_operations(tmp_path: Path) -> None:
    log = OpLog(tmp_path, 0)
    for i in range(3000):
        log.begin(f"0F{i}")
        log.end()
    seen = read_log(log.path)
    assert [op.name for op in seen.operations] == [f"0F{i}" for i in range(3000 - 1024, 3000)]
    assert seen.finished == 3000


def test_a_long_name_is_cut_and_the_previous_log_is_kept(tmp_path: Path) -> None:
    OpLog(tmp_path, 0).begin("x" * 100)
    OpLog(tmp_path, 0).begin("new")
    assert read_log(tmp_path / "rank-0").operations[0].name == "new"
    assert read_log(tmp_path / "rank-0.previous").operations[0].name == "x" * 40
    (tmp_path / "other").write_text("no log")
    with pytest.raises(ValueError, match="is not an operation log"):
        read_log(tmp_path / "other")


def test_the_last_operation_is_there_after_sigkill(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from stretto.resilience import OpLog\n"
        "log = OpLog(Path(sys.argv[1]), 0); log.begin('1B3', peer=2); print('on', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"on\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    current = read_log(tmp_path / "rank-0").current
    assert current is not None and (current.name, current.peer) == ("1B3", 2)


def test_an_entry_costs_two_microseconds_at_most(tmp_path: Path) -> None:
    log = OpLog(tmp_path, 0)
    best = float("inf")
    for _ in range(20):  # the best of many, as other processes share the cores
        start = time.perf_counter()
        for _ in range(1000):
            log.begin("RECV_F 2 7", peer=1)
            log.end()
        best = min(best, time.perf_counter() - start)
    assert best / 1000 < 4e-6
