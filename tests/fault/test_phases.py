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
from stretto.trainer.loop import Hooks, train_rank
from stretto.trainer.member import Vital
from stretto.trainer.world import World
from trainer.small import MODEL, small_run, write_corpus

SILENT = 1.5
"""Seconds; a busy machine may keep a healthy rank waiting for one."""


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
        world = run.plan.num_ranks
        self.thread = threading.Thread(target=lambda: self.results.extend(ranks.run(train_watched, world, run)))
        self.thread.start()
        self.pids = {rank: self._pid(rank) for rank in range(world)}

    def _pid(self, rank: int) -> int:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                return read_log(self.folder / "oplog" / f"rank-{rank}").pid
            except (OSError, ValueError):
                time.sleep(0.02)
        raise AssertionError(f"rank {rank} did not start")

    def verdict(self) -> str:
        """The next one; whoever is frozen goes on after it."""
        lookout = Lookout(self.run.run, self.pids)
        deadline = time.monotonic() + 60
        while (found := lookout.look({})) is None:
            assert time.monotonic() < deadline and self.thread.is_alive(), "nothing was noticed"
            time.sleep(0.02)
        for pid in self.pids.values():
            os.kill(pid, signal.SIGCONT)
        return found

    def finish(self) -> None:
        """It trains to its end."""
        self.thread.join()
        assert len(self.results) == self.run.plan.num_ranks


def drilled(folder: Path, plan: dict[str, Any], drill: str, **training: Any) -> RunSpec:
    write_corpus(folder / "corpus")
    run = small_run(
        folder / "run", plan, steps=3, model=replace(MODEL, num_layers=4), eval_every=3, eval_steps=1, **training
    )
    return replace(run, run=replace(run.run, silent_seconds=SILENT, drill=drill))


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
        told = run.verdict()
        assert re.search(wanted, told), f"{where}: {told}"
        rank = where.split()[1]
        assert re.search(rf"rank {rank} \(host .*, pid \d+\), which has been silent for \d s in ", told), told
        assert re.search(r", at \S+\.py:\d+ \(\w+\); its log is ", told), told
    run.finish()


def test_a_slow_rank_is_left_alone_and_noted(ranks: Ranks, tmp_path: Path) -> None:
    plan = {"pp": 2, "schedule": "zb-h1"}
    run = Drilled(ranks, drilled(tmp_path, plan, f"delay {SILENT * 1.5} rank 1 step 2 at I", global_batch_size=4))
    lookout = Lookout(run.run.run, run.pids)
    while run.thread.is_alive():
        assert lookout.look({}) is None
        time.sleep(0.02)
    run.finish()
    longest = read_stalls(run.folder)[0]
    assert longest.ranks == (1,) and SILENT / 3 < longest.seconds < SILENT * 3
    assert re.search(
        r"rank 0 waits for .* from rank 1 .*, which is still in I of stage 1, .* at \S+:\d+ ", longest.sentence
    )
