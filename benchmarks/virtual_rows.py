"""Rows of a benchmark on virtual devices, one after the other on the same ranks: printed as they come, then kept."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from benchmarks.pairs import RESULTS, command, machine
from benchmarks.processes import free_port
from stretto.parallel.mesh import Mesh, build_mesh
from stretto.parallel.pipeline.virtual import wake_on_time
from stretto.spec.plan import PlanSpec

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What a benchmark measures; its functions are a module's own, since other processes call them."""

    script: str
    """The benchmark's name."""
    rows: Callable[[Mesh, argparse.Namespace], Iterable[Row]]
    """Measures each row on all ranks together, when it is asked for."""
    line: Callable[[Row], str]
    """Shows one."""


def play(table: Table, args: argparse.Namespace, *, keep: str) -> None:
    """Measure on ``args.ranks`` processes; ``keep``: the results' file, not written where ``args.only`` chose rows."""
    given = (table, args, keep, free_port())
    start_processes(_work, given, nprocs=args.ranks, start_method="spawn")


def _work(rank: int, table: Table, args: argparse.Namespace, keep: str, port: int) -> None:
    torch.set_num_threads(1)
    wake_on_time()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.ranks)
    rows = []
    for row in table.rows(build_mesh(PlanSpec(pp=args.ranks), rank), args):
        rows.append(row)
        if rank == 0:
            print(table.line(row), flush=True)
    if rank == 0 and not args.only:
        record = {"command": command(table.script), "machine": machine(), "turns": args.turns, "rows": rows}
        (RESULTS / keep).write_text(json.dumps(record, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()
