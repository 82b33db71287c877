"""Rows of a benchmark on virtual devices, one after the other on the same ranks: printed as they come, then kept."""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from benchmarks.pairs import RESULTS, command, machine
from stretto.parallel.mesh import Mesh, build_mesh
from stretto.parallel.pipeline.virtual import wake_on_time
from stretto.spec.plan import PlanSpec

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What a benchmark measures; its functions are a module's own, since other processes call them."""

    script: str
    """The benchmark's name."""
    cases: Callable[[argparse.Namespace], Iterable[Any]]
    """What makes the rows, one each; picklable."""
    measure: Callable[[Any, Mesh, argparse.Namespace], Row]
    """A row, on all ranks together."""
    line: Callable[[Row], str]
    """Shows one."""


def play(table: Table, args: argparse.Namespace, *, keep: str) -> None:
    """Measure on ``args.ranks`` processes; ``keep``: the results' file, not written where ``args.only`` chose rows."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_work, (table, args, keep, folder), nprocs=args.ranks, start_method="spawn")


def _work(rank: int, table: Table, args: argparse.Namespace, keep: str, folder: str) -> None:
    torch.set_num_threads(1)
    wake_on_time()
    rows = []
    for number, case in enumerate(table.cases(args)):
        # Each row has groups of its own, and none of the rows before: every group of gloo's has a thread that wakes a
        # hundred times a second, so that those of some twenty rows on eight ranks would keep two cores busy.
        store = (Path(folder) / str(number)).as_uri()
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=args.ranks)
        rows.append(table.measure(case, build_mesh(PlanSpec(pp=args.ranks), rank), args))
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()
        if rank == 0:
            print(table.line(rows[-1]), flush=True)
    if rank == 0 and not args.only:
        record = {"command": command(table.script), "machine": machine(), "turns": args.turns, "rows": rows}
        (RESULTS / keep).write_text(json.dumps(record, indent=1) + "\n")
