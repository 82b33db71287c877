"""What recording costs: the same steps with and without a recorder, in turns.

    OMP_NUM_THREADS=1 python -m benchmarks.trace_overhead

One rank plays 32 micro-batches through four stages of interleaved 1F1B with a split backward (384 operations a step).
Three sides take turns: the operation log that every run keeps, the same with a recorder that keeps its steps in memory
(``run.trace = "last"``), and with one that writes each step to the disk (``run.trace = "1-1000"``).  Layers of 4
features are the worst case, where an operation costs nothing but the host's own time; those of 256 features take half a
millisecond.  Figures are medians over the turns of the ratio to the first side; ``ns`` is what an operation with a
message costs more, by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.pairs import RESULTS, command, machine
from stretto.parallel.mesh import build_mesh
from stretto.parallel.pipeline.runtime import Runtime, Seat
from stretto.parallel.pipeline.virtual import virtual_stages
from stretto.resilience import OpLog
from stretto.resilience.recorder import Recorder
from stretto.schedule.families import build
from stretto.schedule.measured.format import Source
from stretto.schedule.passes.split_backward import split_backward
from stretto.spec.contract import Batch, Observer
from stretto.spec.plan import PlanSpec

MICROBATCHES, STAGES = 32, 4
WIDTHS = (4, 256)
WANTED = 0.01
"""Largest share of a step."""
SOURCE = Source(rank=0, world_size=1, position=0, pipeline=0, host="here", epoch=0, device="cpu")


def observers(folder: Path) -> dict[str, Observer]:
    """The sides."""
    logs = [OpLog(folder / side / "oplog", 0) for side in ("log", "kept", "written")]
    return {
        "log": logs[0],
        "kept": Recorder(logs[1], folder / "kept", source=SOURCE, wanted=None),
        "written": Recorder(logs[2], folder / "written", source=SOURCE, wanted=lambda step: True),
    }


def stepper(width: int, observer: Observer) -> Callable[[int], None]:
    """Plays a step, as the training loop would have it recorded."""
    schedule = split_backward(build("interleaved", ranks=1, microbatches=MICROBATCHES, chunks=STAGES))
    stages = virtual_stages(schedule, 0, mesh=build_mesh(PlanSpec(), 0), width=width)
    runtime = Runtime(stages, schedule, Seat(rank=0, observer=observer))
    tokens = torch.ones(1, 1, dtype=torch.int64)
    batch = Batch(tokens=tokens, labels=tokens, positions=tokens, documents=None, samples=tokens[:, 0])
    one = torch.ones(())

    def step(number: int) -> None:
        observer.step = number
        runtime.step([batch] * MICROBATCHES, lambda _: None, lambda: one)
        if isinstance(observer, Recorder):
            observer.finish_step()

    return step


def measure(width: int, turns: int, folder: Path) -> dict[str, Any]:
    """One row."""
    sides = {side: stepper(width, observer) for side, observer in observers(folder).items()}
    taken: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(turns + 2):
        order = list(sides) if turn % 2 else list(reversed(sides))
        for side in order:
            start = time.perf_counter()
            sides[side](turn + 1)
            if turn >= 2:
                taken[side].append(time.perf_counter() - start)
    count = STAGES * MICROBATCHES * 3
    row: dict[str, Any] = {"width": width, "operation_us": 1e6 * statistics.median(taken["log"]) / count}
    for side in ("kept", "written"):
        row[side] = statistics.median(a / b for a, b in zip(taken[side], taken["log"], strict=True)) - 1
    return row


def alone(folder: Path) -> float:
    """Nanoseconds that noting an operation with a message adds, the best of many."""
    best = {}
    for side, observer in observers(folder).items():
        recorder = observer if isinstance(observer, Recorder) else None
        rounds = []
        for number in range(100):
            observer.step = number
            start = time.perf_counter_ns()
            for _ in range(400):
                observer.begin("1RECV_F3", peer=1)
                if recorder is not None:
                    recorder.carried(100)
                observer.end()
            rounds.append((time.perf_counter_ns() - start) / 400)
        best[side] = min(rounds)
    return best["kept"] - best["log"]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        nanoseconds = alone(folder / "alone")
        print(f"noting an operation with a message: {nanoseconds:.0f} ns")
        rows = [measure(width, args.turns, folder / str(width)) for width in WIDTHS]
    for row in rows:
        share = f"kept {row['kept']:+.2%}, written {row['written']:+.2%} of the step"
        print(f"operations of {row['operation_us']:7.1f} us: {share}   (wanted: below {WANTED:.0%})")
    record = {"command": command("trace_overhead"), "machine": machine(), "ns": nanoseconds, "rows": rows}
    (RESULTS / "trace_overhead.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
