"""What the runtime costs by itself: host time of an operation with next to nothing to compute and no message.

    OMP_NUM_THREADS=1 python -m benchmarks.host_overhead

One rank plays 32 micro-batches through four stages, each a layer of 4 features, in the order of interleaved 1F1B with
and without a split backward.  The figures are medians over all operations of a kind, in microseconds, with what
autograd itself takes inside them; ``best_step`` is the
fastest step divided by its operations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from benchmarks.pairs import RESULTS, command, machine
from stretto.parallel.mesh import build_mesh
from stretto.parallel.pipeline.runtime import Runtime, Seat
from stretto.parallel.pipeline.virtual import virtual_stages
from stretto.schedule.families import build
from stretto.schedule.passes.split_backward import split_backward
from stretto.spec.contract import Batch
from stretto.spec.plan import PlanSpec

MICROBATCHES, STAGES, WIDTH = 32, 4, 4
WANTED = 60.0
"""Microseconds, at the median of all operations."""


class Clock:
    """An Observer that notes when operations begin and end."""

    step = 0

    def __init__(self) -> None:
        self.names: list[str] = []
        self.begun: list[float] = []
        self.ended: list[float] = []

    def begin(self, operation: str, /, *, peer: int | None = None) -> None:
        """Note it."""
        self.names.append(operation)
        self.begun.append(time.perf_counter())

    def end(self) -> None:
        """Note it."""
        self.ended.append(time.perf_counter())


def measure(*, split: bool, steps: int) -> dict[str, Any]:
    """Medians in microseconds."""
    schedule = build("interleaved", ranks=1, microbatches=MICROBATCHES, chunks=STAGES)
    schedule = split_backward(schedule) if split else schedule
    clock, mesh = Clock(), build_mesh(PlanSpec(), 0)
    stages = virtual_stages(schedule, 0, mesh=mesh, width=WIDTH)
    runtime = Runtime(stages, schedule, Seat(rank=0, observer=clock))
    tokens = torch.ones(1, 1, dtype=torch.int64)
    batch = Batch(tokens=tokens, labels=tokens, positions=tokens, documents=None, samples=tokens[:, 0])
    one, whole = torch.ones(()), []
    for step in range(steps + 2):
        if step == 2:
            clock.names, clock.begun, clock.ended = [], [], []
        start = time.perf_counter()
        runtime.step([batch] * MICROBATCHES, lambda _: None, lambda: one)
        whole.append(1e6 * (time.perf_counter() - start) / schedule.num_ops)
    taken = [1e6 * (end - begin) for begin, end in zip(clock.begun, clock.ended, strict=True)]
    kinds = ["".join(c for c in name if c.isalpha()) for name in clock.names]
    found = {kind: statistics.median(t for t, k in zip(taken, kinds, strict=True) if k == kind) for kind in set(kinds)}
    return {
        "backward": "split" if split else "whole",
        "median": statistics.median(taken),
        "best_step": min(whole[2:]),
        **dict(sorted(found.items())),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(split=split, steps=args.steps) for split in (False, True)]
    for row in rows:
        figures = "  ".join(f"{name} {value:.1f}" for name, value in row.items() if name != "backward")
        print(f"{row['backward']:6} backward, microseconds per operation: {figures}   (wanted: median <= {WANTED:.0f})")
    record = {"command": command("host_overhead"), "machine": machine(), "wanted": WANTED, "rows": rows}
    (RESULTS / "host_overhead.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
