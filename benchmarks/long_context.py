"""Real training of long sequences over cp: real compute, 8k to 32k tokens, ratios between ways of cutting.

    OMP_NUM_THREADS=1 python -m benchmarks.long_context                      # 4 processes, 8k, 16k and 32k tokens
    OMP_NUM_THREADS=1 python -m benchmarks.long_context --ranks 8 --tokens 8192 --only layout

layout   a step with contiguous shares against one with zigzag shares, of every length.  Where processes outnumber
         processors the wall clock says little of what more devices would do, so the processor time of the fullest rank
         stands beside it
ways     seconds of a step of the first length for every way of cutting
memory   of the first length, what is kept for backward, and by how much resident memory grows at the peak of a step,
         times cp, against one rank; wanted 1/cp within 10% of the first, and at most that of the second

The model is small (2 layers, 4 heads of 32), the sequence is what is long.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from benchmarks.pairs import RESULTS, command, machine
from benchmarks.processes import free_port
from stretto.spec.contract import Batch
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.memory import ActivationMeter
from stretto.trainer.session import Session

MODEL = ModelSpec(
    vocab_size=64,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_positions=65536,
)


MEASURES = ("kept for backward", "growth of resident memory")
MMAP_THRESHOLD = -3
"""glibc: ``mallopt`` option for the size from which on memory goes back to the system as soon as it is free."""


def batch_of(length: int) -> Batch:
    """One row of one document."""
    tokens = torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(length))
    return Batch(
        tokens=tokens,
        labels=tokens,
        positions=torch.arange(length).unsqueeze(0),
        documents=None,
        samples=torch.zeros(1, dtype=torch.int64),
    )


class Steps:
    """Training steps of one plan."""

    def __init__(self, plan: PlanSpec, length: int) -> None:
        training = TrainingSpec(sequence_length=length, global_batch_size=plan.dp)
        self.session = Session.start(RunSpec(model=MODEL, plan=plan, training=training), dist.get_rank())
        self._length, self._step = length, 0

    def once(self) -> dict[str, float]:
        """Seconds of the slowest rank, and processor seconds of the fullest rank and of the mean one."""
        self._step += 1
        dist.barrier()
        start, busy = time.perf_counter(), time.process_time()
        self.session.train_step(self._step, [batch_of(self._length)])
        mine = torch.tensor([time.perf_counter() - start, time.process_time() - busy], dtype=torch.float64)
        largest, total = mine.clone(), mine.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        dist.all_reduce(total)
        return {
            "seconds": float(largest[0]),
            "fullest": float(largest[1]),
            "mean": float(total[1]) / dist.get_world_size(),
        }

    def memory(self) -> tuple[float, float]:
        """Bytes of the fullest rank: kept for backward, and growth of resident memory at the peak of a step."""
        meter = ActivationMeter(self.session)
        with meter.watch():
            self.once()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _resident("VmRSS")
        self.once()
        peaks = torch.tensor([meter.peak_bytes, _resident("VmHWM") - before], dtype=torch.float64)
        dist.all_reduce(peaks, dist.ReduceOp.MAX)
        return float(peaks[0]), float(peaks[1])


def _resident(line: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(row.split()[1]) for row in status.splitlines() if row.startswith(line))


def layout(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Zigzag against contiguous."""
    rows = []
    for length in args.tokens:
        sides = {name: Steps(PlanSpec(cp=args.ranks, context_layout=name), length) for name in ("zigzag", "contiguous")}
        turns = [{name: side.once() for name, side in sides.items()} for _ in range(args.turns)]
        best = {name: min((turn[name] for turn in turns), key=lambda row: row["seconds"]) for name in sides}
        zigzag, plain = best["zigzag"], best["contiguous"]
        told = f"{length} tokens"
        rows += [
            {"what": f"{told}: contiguous / zigzag, seconds of a step", "figure": plain["seconds"] / zigzag["seconds"]},
            {
                "what": f"{told}: contiguous / zigzag, processor seconds of the fullest rank",
                "figure": plain["fullest"] / zigzag["fullest"],
            },
            {"what": f"{told}: zigzag, fullest rank / mean rank", "figure": zigzag["fullest"] / zigzag["mean"]},
            {"what": f"{told}: zigzag, seconds of a step", "figure": zigzag["seconds"]},
            {"what": f"{told}: zigzag, tokens a second", "figure": length / zigzag["seconds"]},
        ]
    return rows


def ways(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of a step, every way; those of the ring first."""
    plans: dict[str, dict[str, Any]] = {"ring": {}, "double ring": {"inner_ring": args.ranks // 2}}
    plans |= {name: {"context": name} for name in ("token-ring", "all-gather")}
    for inner in ("ulysses", "ring"):
        plans[f"mesh, {inner} inside"] = {"context": "mesh", "ulysses": 2, "context_inner": inner}
    if MODEL.num_heads % args.ranks == 0:
        plans["ulysses"] = {"context": "ulysses"}
    length = args.tokens[0]
    sides = {name: Steps(PlanSpec(cp=args.ranks, **plan), length) for name, plan in plans.items()}
    turns = [{name: side.once() for name, side in sides.items()} for _ in range(args.turns)]
    best = {name: min(turn[name]["seconds"] for turn in turns) for name in sides}
    told = f"{length} tokens"
    return [{"what": f"{told}: ring, seconds of a step", "figure": best["ring"]}] + [
        {"what": f"{told}: {name} / ring, seconds of a step", "figure": best[name] / best["ring"]}
        for name in sides
        if name != "ring"
    ]


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """1/cp."""
    rows: list[dict[str, Any]] = []
    found: dict[int, tuple[float, float]] = {}
    length = args.tokens[0]
    for cp in (n for n in (1, 2, 4, 8) if n <= args.ranks):
        found[cp] = Steps(PlanSpec(cp=cp, dp_replicate=args.ranks // cp), length).memory()
        for what, size, one in zip(MEASURES, found[cp], found[1], strict=True):
            told = f"{length} tokens, cp {cp}: {what} x cp / that of one rank ({size / 2**20:.1f} MiB)"
            rows.append({"what": told, "figure": size * cp / one})
    return rows


PARTS = {"layout": layout, "ways": ways, "memory": memory}


def work(rank: int, args: argparse.Namespace, port: int) -> None:
    """One rank."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**16)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.ranks)
    rows = []
    for name, part in PARTS.items():
        if args.only in name:
            for row in part(args):
                rows.append({"part": name, **row})
                if rank == 0:
                    print(f"{row['figure']:10.3f}  {row['what']}", flush=True)
    if rank == 0 and args.keep:
        record = {"command": command("long_context"), "machine": machine(), "turns": args.turns, "rows": rows}
        (RESULTS / "long_context.json").write_text(json.dumps(record, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Start the ranks."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, choices=(2, 4, 8), help="processes")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--only", default="", help="a part: " + ", ".join(PARTS))
    args = parser.parse_args()
    args.keep = len(sys.argv) == 1
    start_processes(work, (args, free_port()), nprocs=args.ranks, start_method="fork")


if __name__ == "__main__":
    main()
