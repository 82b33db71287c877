"""Runs the cases of a benchmark, each in as many processes as it needs."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.pairs import Case, Effort, arguments, compare, report

SILENT = timedelta(minutes=3)
"""A collective that takes longer ends the benchmark."""
LIMIT_SECONDS = 1800.0
"""So does a case that isn't finished after so long."""


def free_port() -> int:
    """A port of this host that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(name: str, description: str, cases: Sequence[Case]) -> None:
    """Measure, print and write what the command line asks for."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    args = arguments(description)
    effort = Effort(pairs=args.pairs, turn=args.turn)
    chosen = [case for case in cases if args.only in case.name]
    if not chosen:
        raise SystemExit(f"no row contains {args.only!r}; there are: {'; '.join(case.name for case in cases)}.")
    report(name, [measure(case, effort) for case in chosen], args)


def measure(case: Case, effort: Effort) -> dict[str, Any]:
    """The figures of one case."""
    if case.num_ranks == 1:
        return compare(case, effort, 0)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        store = (Path(folder) / "store").as_uri()
        workers = [
            context.Process(target=_work, args=(case, effort, rank, store, theirs)) for rank in range(case.num_ranks)
        ]
        for worker in workers:
            worker.start()
        theirs.close()
        try:
            return _collect(ours, workers)
        finally:
            for worker in workers:
                worker.kill()
                worker.join()


def _collect(pipe: Connection, workers: Sequence[Any]) -> dict[str, Any]:
    """What rank 0 sends, once all workers have ended well."""
    found: dict[str, Any] = {}
    running = {worker.sentinel: worker for worker in workers}
    end = time.monotonic() + LIMIT_SECONDS
    while running:
        if time.monotonic() > end:
            raise SystemExit(f"the benchmark was not finished after {LIMIT_SECONDS:.0f} s")
        for ready in wait([*running, *([] if found else [pipe])], timeout=10):
            if ready is pipe:
                try:
                    found = pipe.recv()
                except EOFError:
                    raise SystemExit("the processes of the benchmark ended without a result") from None
                continue
            worker = running.pop(ready)
            worker.join()
            if worker.exitcode:
                raise SystemExit(f"a process of the benchmark failed with exit code {worker.exitcode}")
    return found


def _work(case: Case, effort: Effort, rank: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=case.num_ranks, timeout=SILENT)
    found = compare(case, effort, rank)
    if rank == 0:
        pipe.send(found)
    dist.barrier()
    dist.destroy_process_group()
