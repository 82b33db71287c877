"""Ranks frozen in each phase of real training: the sentence names who waits for what from whom, and where that one is.

The ranks are the pool's, so that one start serves many faults: a frozen rank is let go on when the verdict is there,
and freezes again in the next operation of the drill.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ranks import Ranks
from stretto.resilience import Lookout, StopRequest, read_log
from stretto.resilience.stall import read_stalls
from stretto.spec.run import RunSpec
from stretto.trainer.hooks import Hooks
from stretto.trainer.loop import train_rank
from stretto.trainer.member import Vital
from stretto.trainer.world import World
from trainer.small import MODEL, small_run, write_corpus

SILENT = 1.0
"""Seconds."""
CHANCES = 5
"""A busy machine may starve a healthy rank for that long, and it is accused; a defect would accuse it every time."""


def train_watched(rank: int, world: int, run: RunSpec) -> dict[str, Any]:
    place = World(rank=rank, world_size=world, local_rank=rank)
    vital = Vital.start(run, place)
    hooks = Hooks(observer=vital.observer, should_stop=StopRequest(), say=lambda line: None, pipeline=vital.log.meet)
    try:
        return train_rank(run, place, hooks)
    finally:
        vital.heart.stop()


class Drilled:
    """A run on the pool's ranks, and the look-out that a launcher would keep over them."""

    def __init__(self, ranks: Ranks, run: RunSpec) -> None:
        self.run, self.folder = run, Path(run.run.dir)
        self.results: list[Any] = []
        self.deadline = time.monotonic() + 110  # the pool's own limit is 120
        world = run.plan.num_ranks
        self.thread = threading.Thread(target=lambda: self.results.extend(ranks.run(train_watched, world, run)))
        self.thread.start()
        self.pids = {rank: self._pid(rank) for rank in range(world)}

    def _pid(self, rank: int) -> int:
        while time.monotonic() < self.deadline:
            try:
                return read_log(self.folder / "oplog" / f"rank-{rank}").pid
            except (OSError, ValueError):
                time.sleep(0.02)
        raise AssertionError(f"rank {rank} did not start")

    def verdict(self, rank: int) -> str:
        """What is said once ``rank`` is frozen, which then goes on."""
        found = ""
        for _ in range(CHANCES):
            while not is_stopped(self.pids[rank]):
                self._wait()
            found = self._verdict()
            if re.search(rf"rank {rank} \(host .*, pid \d+\), which has been silent for", found):
                break
        os.kill(self.pids[rank], signal.SIGCONT)
        return found

    def _verdict(self) -> str:
        lookout = Lookout(self.run.run, self.pids)
        while (found := lookout.look({})) is None:
            self._wait()
        return found

    def _wait(self) -> None:
        assert time.monotonic() < self.deadline and self.thread.is_alive(), "nothing was noticed"
        time.sleep(0.02)

    def finish(self) -> None:
        """It trains to its end."""
        self.thread.join()
        assert len(self.results) == self.run.plan.num_ranks


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def drilled(folder: Path, plan: dict[str, Any], drill: str, *, silent: float = SILENT, **training: Any) -> RunSpec:
    write_corpus(folder / "corpus")
    run = small_run(
        folder / "run", plan, steps=3, model=replace(MODEL, num_layers=4), eval_every=3, eval_steps=1, **training
    )
    return replace(run, run=replace(run.run, silent_seconds=silent, drill=drill))


CASES: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    (
        {"pp": 2, "schedule": "zb-h1"},
        [
            ("rank 0 step 1 at F", r"rank 1 waits for the input of stage 1, micro-batch 0 .* from rank 0 .* in F of"),
            ("rank 1 step 2 at W", r"rank 0 waits for the gradient of what stage 0 put out, .* from rank 1 .* in W of"),
            (
                "rank 0 step 2 at OPT",
                r"rank 1 waits for the input of stage 1, .* from rank 0 .* the optimizer's update",
            ),
            ("rank 1 step 3 at EVAL", r"rank 0 waits in .* for rank 1 .* in the evaluation \(EVAL\), step 3"),
            ("rank 0 at SAVE", r"rank 1 waits in saving a checkpoint .* for rank 0 .* in saving a checkpoint"),
        ],
    ),
    (
        {"pp": 2, "dp_shard": 2, "zero": 3, "schedule": "zeropp", "chunks": 2},
        [
            ("rank 2 step 2 at UNSHARD", r"rank \d waits .* rank 2 .* gathering the parameters of block"),
            ("rank 1 step 3 at REDUCE_GRAD", r"rank \d waits .* rank 1 .* reducing the gradients of block"),
        ],
    ),
    (
        {"pp": 2, "schedule": "1f1b", "passes": ("vocabulary:algorithm=1",), "optimizer_barrier": False},
        [
            (
                "rank 0 step 1 at S",
                r"rank 1 waits in T of vocabulary shard 1, .* for S of every rank .*, so for rank 0 ",
            ),
            (
                "rank 0 step 2 at NORM",
                r"rank 1 waits for the partial sum of the gradient's norm \(NORM, .* from rank 0 ",
            ),
            ("rank 1 step 3 at NORM", r"rank 0 waits for the whole sum of the gradient's norm \(VALIDATE, .* rank 1 "),
        ],
    ),
    (
        {"pp": 2, "tp": 2, "schedule": "dualpipe"},
        [
            ("rank 3 step 2 at B", r"rank \d waits .* rank 3 .* in B of stage"),
            ("rank 0 step 3 at RECV_F", r"rank \d waits .* rank 0 .* waiting for the input of stage"),
        ],
    ),
]


@pytest.mark.parametrize(("plan", "faults"), CASES, ids=lambda value: value.get("schedule") if "pp" in value else "")
def test_a_frozen_rank_is_named_in_each_phase(
    ranks: Ranks, tmp_path: Path, plan: dict[str, Any], faults: list[tuple[str, str]]
) -> None:
    drill = "; ".join(f"freeze {where}" for where, _ in faults)
    run = Drilled(ranks, drilled(tmp_path, plan, drill, global_batch_size=8))
    for where, wanted in faults:
        rank = int(where.split()[1])
        told = run.verdict(rank)
        assert re.search(wanted, told), f"{where}: {told}"
        assert re.search(rf"rank {rank} \(host .*, pid \d+\), which has been silent for \d s in ", told), told
        assert re.search(r", at \S+\.py:\d+ \(\w+\); its log is ", told), told
    run.finish()


def test_a_slow_rank_is_left_alone_and_noted(ranks: Ranks, tmp_path: Path) -> None:
    plan, silent, delay = {"pp": 2, "schedule": "zb-h1"}, 5.0, 2.25  # noted after a third of ``silent``
    drill = f"delay {delay} rank 1 step 2 at I"
    run = Drilled(ranks, drilled(tmp_path, plan, drill, silent=silent, global_batch_size=4))
    lookout = Lookout(run.run.run, run.pids)
    while run.thread.is_alive():
        assert lookout.look({}) is None
        time.sleep(0.02)
    run.finish()
    wanted = r"rank 0 waits for .* from rank 1 .*, which is still in I of stage 1, .* at \S+:\d+ "
    noted = [stall for stall in read_stalls(run.folder) if re.search(wanted, stall.sentence)]
    assert len(noted) == 1 and noted[0].ranks == (1,) and silent / 3 < noted[0].seconds
