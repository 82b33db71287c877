"""Worker processes that multi-rank tests share.

Importing torch takes seconds, so processes are forked from one that has done so, once per session, and each test
runs a function on the first ``world`` of them, inside a fresh gloo group:

    def total(rank: int, world: int, x: float) -> float:
        t = torch.tensor(x * rank); dist.all_reduce(t); return t.item()

    def test_total(ranks):
        assert ranks.run(total, 4, 1.0) == [6.0] * 4

The function must be importable (top level of a test module).  If one rank raises or the time is
up, all workers are ended and new ones are started for the next test.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any


class RankFailure(AssertionError):
    """A function raised on a rank, a rank died, or the time was up."""


def _work(pipe: multiprocessing.connection.Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        function, args, rank, world, rendezvous = job
        try:
            dist.init_process_group(
                "gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=timedelta(seconds=120)
            )
            result = function(rank, world, *args)
            dist.barrier()
            dist.destroy_process_group()
            pipe.send((True, result))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class Ranks:
    """Up to ``limit`` processes, started when first needed."""

    def __init__(self, limit: int = 8) -> None:
        self.limit = limit
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["stretto.trainer.session"])
        self._workers: list[tuple[Any, multiprocessing.connection.Connection]] = []

    def run(self, function: Callable[..., Any], world: int, *args: Any, timeout: float = 120) -> list[Any]:
        """Call ``function(rank, world, *args)`` on ``world`` ranks; return what each returned."""
        assert world <= self.limit
        while len(self._workers) < world:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        with tempfile.TemporaryDirectory() as folder:
            rendezvous = (Path(folder) / "store").as_uri()
            for rank, (_, pipe) in enumerate(self._workers[:world]):
                pipe.send((function, args, rank, world, rendezvous))
            return self._collect(world, time.monotonic() + timeout)

    def _collect(self, world: int, deadline: float) -> list[Any]:
        results: list[Any] = [None] * world
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._workers[:world])}
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self.stop()
                raise RankFailure(f"ranks {sorted(waiting.values())} did not finish in time")
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[arg-type]
                try:
                    good, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    good, value = False, "the process died"
                if not good:
                    self.stop()
                    raise RankFailure(f"rank {rank} of {world}:\n{value}")
                results[rank] = value
        return results

    def stop(self) -> None:
        """End all workers."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers.clear()
