"""Starts the ranks of a benchmark on two nodes (namespaces.py), and ends ranks and nodes whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessContext, start_processes

from benchmarks.namespaces import Nodes, die_with, two_nodes

SILENT = timedelta(minutes=3)
"""A collective that takes longer ends the benchmark."""
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Rows = list[dict[str, Any]]
Rank = Callable[[int, Nodes, str], Rows]
"""What a rank measures: given its number, the nodes, and the interface by which others reach it."""


def run_on_nodes(rank: Rank, num_ranks: int) -> Rows:
    """What rank 0 of ``num_ranks``, half of them on each node, finds."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for number in ENDS:
        signal.signal(number, _leave)
    with two_nodes() as nodes, tempfile.TemporaryDirectory() as folder:
        given = (rank, num_ranks, nodes, folder, os.getpid())
        ranks = start_processes(_work, given, nprocs=num_ranks, join=False, start_method="fork")
        assert isinstance(ranks, ProcessContext)
        try:
            while not ranks.join():
                pass
        finally:
            for process in ranks.processes:
                process.kill()
                process.join()
        found: Rows = json.loads((Path(folder) / "rows.json").read_text())
        return found


def _leave(number: int, frame: FrameType | None) -> None:
    """A signal to end: so that what was started is ended too."""
    sys.exit(128 + number)


def _work(index: int, rank: Rank, num_ranks: int, nodes: Nodes, folder: str, parent: int) -> None:
    die_with(parent)
    interface = nodes.enter(index // (num_ranks // 2))
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    for number in ENDS:
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)
    with _process_group(index, num_ranks, folder):
        rows = rank(index, nodes, interface)
        if index == 0:
            (Path(folder) / "rows.json").write_text(json.dumps(rows))


@contextlib.contextmanager
def _process_group(index: int, num_ranks: int, folder: str) -> Iterator[None]:
    store = (Path(folder) / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=index, world_size=num_ranks, timeout=SILENT)
    yield
    dist.barrier()
    dist.destroy_process_group()
