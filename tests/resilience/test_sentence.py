"""The sentence: who waits for what from whom; where a process is, even a frozen one; what a drill says."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from stretto.resilience import Drill, DrillError, OpLog, read_log
from stretto.resilience.beat import Beat
from stretto.resilience.diagnose import WORDS, causes, sentence
from stretto.resilience.place import Line, Place, lines_in, place_of
from stretto.resilience.stack import ask
from stretto.resilience.stall import Stalls, read_stalls
from stretto.schedule.op import Kind
from stretto.spec.contract import Silent
from stretto.spec.drill import OPERATIONS, PHASES, faults_of
from stretto.spec.errors import ConfigError

BEAT = Beat(count=1, life="a", host="elsewhere", pid=9, file="log", step=3, place="model.py:7 (forward)")
RECEIVES = replace(BEAT, operation="1RECV_F4", peer=2)


def test_a_receive_names_what_it_waits_for_before_a_collective_does() -> None:
    ranks = {0: replace(BEAT, operation="REDUCE_GRAD", waits=True), 1: RECEIVES, 2: replace(BEAT, operation="0F4")}
    assert sentence(ranks, {2: "was killed by SIGKILL"}) == (
        "rank 1 waits for the input of stage 1, micro-batch 4 (1RECV_F4, step 3) from rank 2 (host elsewhere, pid 9), "
        "which was killed by SIGKILL in F of stage 0, micro-batch 4 (0F4), step 3, at model.py:7 (forward); its log is "
        "log"
    )


def test_a_line_seen_before_the_last_operation_is_called_so() -> None:
    told = sentence({0: replace(BEAT, operation="OPT", is_there=False)}, {0: "has been silent for 46 s"})
    assert told == (
        "rank 0 (host elsewhere, pid 9) has been silent for 46 s in the optimizer's update (OPT), step 3, last seen "
        "before it at model.py:7 (forward); its log is log"
    )


def test_several_that_are_gone_are_all_named() -> None:
    told = sentence({0: BEAT, 1: BEAT, 2: BEAT}, {1: "has been silent for 46 s", 2: "has been silent for 47 s"})
    assert told.endswith("; rank 2 has been silent for 47 s, too")


def test_a_circle_is_told_as_one() -> None:
    ranks = {0: replace(BEAT, operation="0RECV_B1", peer=1), 1: replace(BEAT, operation="1RECV_F2", peer=0)}
    assert sentence(ranks, {}) == (
        "rank 0 waits for the gradient of what stage 0 put out, micro-batch 1 (0RECV_B1, step 3) from rank 1; rank 1 "
        "waits for the input of stage 1, micro-batch 2 (1RECV_F2, step 3) from rank 0, which waits for it in turn"
    )


def test_who_is_busy_inside_a_receive_is_the_cause_where_all_others_wait() -> None:
    waiting = replace(BEAT, operation="0RECV_B1", peer=1, waits=True, place="transport.py:76 (wait)")
    busy = replace(BEAT, operation="1RECV_F2", peer=0)
    assert causes({0: waiting, 1: busy}) == [1]
    assert causes({0: waiting, 1: replace(busy, is_there=False)}) == []


def test_vocabulary_passes_and_sums_along_the_pipeline_name_whom_they_wait_for() -> None:
    busy = replace(BEAT, operation="1F2")
    waiting = replace(BEAT, waits=True, place="stretto/parallel/pipeline/vocabulary/background.py:7 (result)")
    of_all = "of every rank of its pipeline, so for"
    cases = {
        "for the output of the last stage, micro-batch 4 (0S4, step 3) from": replace(waiting, operation="0S4", peer=1),
        f"in T of vocabulary shard 0, micro-batch 4 (0T4), step 3 for S {of_all}": replace(waiting, operation="0T4"),
        f"in I of stage 0, micro-batch 4 (0I4), step 3 for S or T {of_all}": replace(waiting, operation="0I4"),
        "for the partial sum of the gradient's norm (NORM, step 3) from": replace(BEAT, operation="NORM", peer=1),
        "for the whole sum of the gradient's norm (VALIDATE, step 3) from": replace(BEAT, operation="VALIDATE", peer=1),
    }
    for told, beat in cases.items():
        said = sentence({0: beat, 1: busy}, {1: "has been silent for 46 s"})
        assert said == (
            f"rank 0 waits {told} rank 1 (host elsewhere, pid 9), which has been silent for 46 s in F of stage 1, "
            "micro-batch 2 (1F2), step 3, at model.py:7 (forward); its log is log"
        )
    circle = {0: replace(waiting, operation="0T4", finished=9), 1: replace(waiting, operation="1S4", peer=0)}
    assert sentence(circle, {}).startswith(
        "rank 1 waits for the output of the last stage, micro-batch 4 (1S4, step 3) from rank 0; rank 0 waits in T of "
        "vocabulary shard 0, micro-batch 4 (0T4), step 3 for S of every rank of its pipeline, so for rank 1, which got "
        "least far: it waits in S of vocabulary shard 1, micro-batch 4 (1S4), step 3, at stretto/"
    )


def test_a_place_is_the_innermost_line_above_the_libraries() -> None:
    below = Line("/x/site-packages/torch/distributed/distributed_c10d.py", 9, "barrier")
    mine = Line("/home/me/model.py", 7, "forward")
    assert place_of([mine, below]) == Place(text="/home/me/model.py:7 (forward)", waits=False)
    assert place_of([below, mine]) == Place(text="/home/me/model.py:7 (forward)", waits=True)
    dump = 'Thread 0x1 (most recent call first):\n  File "a.py", line 1 in f\n\nCurrent thread 0x2 (most'
    assert lines_in(f'{dump} recent call first):\n  File "b.py", line 2 in g\n') == [Line("b.py", 2, "g")]


def test_a_frozen_process_is_asked_and_stays_frozen(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from stretto.resilience import OpLog, answer\n"
        "log = OpLog(Path(sys.argv[1]), 0); answer(log.path); print('on', flush=True)\n"
        "def stuck():\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "stuck()\n"
    )
    script = tmp_path / "frozen.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"on\n"
        assert os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT) is not None
        place = ask(process.pid, tmp_path / "rank-0")
        assert place is not None and place.text == f"{script}:5 (stuck)"
        assert ask(os.getpid(), tmp_path / "rank-0") is None, "a process that doesn't have that log isn't touched"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def test_the_log_names_ranks_of_the_world_and_where_its_heart_saw_it(tmp_path: Path) -> None:
    log = OpLog(tmp_path, 5)
    log.meet([1, 5])
    log.begin("1RECV_F0", peer=0)
    log.beat(Place(text="channel.py:3 (receive)", waits=True))
    seen = read_log(log.path)
    assert seen.current is not None and seen.current.peer == 1
    assert (seen.beats, seen.place, seen.is_there) == (1, Place(text="channel.py:3 (receive)", waits=True), True)
    log.begin("1F0")
    assert not read_log(log.path).is_there


def test_a_drill_strikes_once_its_rank_in_its_step(tmp_path: Path) -> None:
    drill = Drill(Silent(), faults_of("raise rank 1 step 2 at F; delay 0.05 rank 1 at OPT; kill rank 0 at F"), 1)
    drill.step = 1
    drill.begin("0F0")
    start = time.monotonic()
    drill.begin("OPT")
    assert time.monotonic() - start >= 0.05
    drill.step = 2
    with pytest.raises(DrillError, match="0F3"):
        drill.begin("0F3")
    drill.begin("0F4")
    with pytest.raises(ConfigError, match=r'run\.drill = "freeze everything" is no fault; write ACTION rank N'):
        faults_of("freeze everything")
    with pytest.raises(ConfigError, match="no rank ever does FF; write one of F, B, I"):
        faults_of("freeze rank 0 at 0FF1")
    assert {kind.name for kind in Kind} <= set(OPERATIONS)
    assert set(WORDS) <= {*OPERATIONS, *PHASES} and {"FLUSH", "NORM", "VALIDATE"} <= set(WORDS)


def test_a_stall_that_goes_on_is_one(tmp_path: Path) -> None:
    stalls = Stalls(tmp_path)
    assert read_stalls(tmp_path) == []
    stalls.note(10.0, [1], "first", now=12.0)
    stalls.note(10.0, [1], "still", now=15.0)
    stalls.note(20.0, [0, 2], "other", now=21.0)
    assert [(s.seconds, s.ranks, s.sentence) for s in read_stalls(tmp_path)] == [
        (5.0, (1,), "still"),
        (1.0, (0, 2), "other"),
    ]
