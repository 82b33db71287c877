"""The recorder: what is noted, what is passed on, what comes back from the file."""

from __future__ import annotations

import time
from pathlib import Path

from stretto.resilience import OpLog, log_path, read_log
from stretto.resilience.recorder import KEPT, Recorder, epoch_of_clock
from stretto.schedule.measured.format import Source, path_of, read
from stretto.schedule.op import Kind
from stretto.spec.contract import Silent

SOURCE = Source(rank=2, world_size=4, position=1, pipeline=0, host="a", epoch=7, device="cpu")


def play(recorder: Recorder, step: int) -> None:
    recorder.step = step
    for name, peer in (("1RECV_F3", 0), ("1F3", None), ("1B3", None)):
        recorder.begin(name, peer=peer)
        if peer is not None:
            time.sleep(0.002)
            recorder.carried(24)
            recorder.carried(8)
        recorder.end()
    for name in ("REDUCE_GRAD", "OPT", "SAVE"):
        recorder.begin(name)
        recorder.end()
    recorder.finish_step()


def test_operations_come_back(tmp_path: Path) -> None:
    before = time.perf_counter_ns()
    recorder = Recorder(Silent(), tmp_path, source=SOURCE, wanted=lambda step: step > 1)
    play(recorder, 1)
    play(recorder, 2)
    found = read(path_of(tmp_path, 2))
    assert found.source == SOURCE and list(found.steps) == [2]
    rows = found.steps[2].rows
    assert rows["kind"].tolist() == [Kind.RECV_F, Kind.F, Kind.B, Kind.REDUCE_GRAD, Kind.OPT]
    assert rows["stage"].tolist() == [1, 1, 1, -1, -1] and rows["microbatch"].tolist() == [3, 3, 3, -1, -1]
    assert rows["peer"].tolist() == [0, -1, -1, -1, -1] and rows["bytes"].tolist() == [32, 0, 0, 0, 0]
    assert rows["wait"][0] == rows["end"][0] - rows["start"][0] >= 2_000_000 and not rows["wait"][1:].any()
    times = [before, found.steps[2].begin, *zip(rows["start"], rows["end"], strict=True), found.steps[2].end]
    flat = [int(t) for each in times for t in (each if isinstance(each, tuple) else (each,))]
    assert flat == sorted(flat) and flat[-1] <= time.perf_counter_ns()


def test_the_last_steps_are_kept_until_the_end(tmp_path: Path) -> None:
    recorder = Recorder(Silent(), tmp_path, source=SOURCE, wanted=None)
    for step in range(1, KEPT + 4):
        play(recorder, step)
    assert not path_of(tmp_path, 2).exists()
    recorder.schedule = "{}"
    recorder.flush()
    assert list(read(path_of(tmp_path, 2)).steps) == list(range(4, KEPT + 4))
    assert (tmp_path / "schedule.json").read_text() == "{}"


def test_an_earlier_trace_stays_until_there_is_a_newer_one(tmp_path: Path) -> None:
    for step in (3, 4):
        recorder = Recorder(Silent(), tmp_path, source=SOURCE, wanted=lambda step: True)
        recorder.flush()
        if step == 4:
            assert list(read(path_of(tmp_path, 2)).steps) == [3]
        play(recorder, step)
        assert list(read(path_of(tmp_path, 2)).steps) == [step]


def test_a_trace_that_can_not_be_written_ends_the_recording_alone(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("a file where the folder should be")
    recorder = Recorder(Silent(), tmp_path / "trace", source=SOURCE, wanted=lambda step: True)
    play(recorder, 1)
    play(recorder, 2)
    assert isinstance(recorder.failure, OSError)


def test_everything_is_passed_on(tmp_path: Path) -> None:
    log = OpLog(tmp_path / "oplog", 2)
    recorder = Recorder(log, tmp_path, source=SOURCE, wanted=lambda step: False)
    play(recorder, 5)
    seen = read_log(log_path(tmp_path / "oplog", 2))
    assert [(op.name, op.peer, op.step) for op in seen.operations[:2]] == [("1RECV_F3", 0, 5), ("1F3", None, 5)]
    assert recorder.step == log.step == 5 and seen.current is None


def test_nested_and_unfinished_operations(tmp_path: Path) -> None:
    recorder = Recorder(Silent(), tmp_path, source=SOURCE, wanted=lambda step: True)
    recorder.begin("1F0")  # before the first step
    recorder.end()
    recorder.step = 1
    recorder.begin("1F1")
    recorder.begin("OPT")
    recorder.end()
    recorder.end()
    recorder.begin("1B1")
    recorder.finish_step()
    recorder.end()
    recorder.begin("1F2")  # evaluation
    recorder.end()
    rows = read(path_of(tmp_path, 2)).steps[1].rows
    assert rows["kind"].tolist() == [Kind.F, Kind.OPT] and rows["end"][0] >= rows["end"][1]


def test_the_clock_has_its_place_in_time() -> None:
    assert abs(epoch_of_clock() + time.perf_counter_ns() - time.time_ns()) < 1e9


def test_noting_costs_a_microsecond_or_two(tmp_path: Path) -> None:
    recorder = Recorder(Silent(), tmp_path, source=SOURCE, wanted=None)
    best = float("inf")
    for step in range(20):  # the best of many, as other processes share the cores
        recorder.step = step
        start = time.perf_counter()
        for _ in range(1000):
            recorder.begin("1RECV_F3", peer=1)
            recorder.end()
        best = min(best, time.perf_counter() - start)
    assert best / 1000 < 4e-6
