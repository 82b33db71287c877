"""How many operations a second are built and simulated, on one core.

    OMP_NUM_THREADS=1 python -m benchmarks.simulate_speed

Construction is a family and the pass that splits its backward in I and W; simulation is everything that
``stretto simulate --json`` prints.  Verification is measured beside them.  Each figure is the median of the
turns, after one turn that imports and compiles.  The first case is what is judged: 1,000,000 operations a
second, construction and simulation together.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stretto.schedule import Schedule
from stretto.schedule.families import build
from stretto.schedule.passes.split_backward import split_backward
from stretto.schedule.simulate import run, simulate
from stretto.schedule.validate import validate

RESULTS = Path(__file__).parent / "results"
WANTED = 1e6
"""Operations a second, construction and simulation together."""
SHAPES = ((64, 4, 512), (32, 2, 256), (8, 2, 64), (64, 4, 1024))
"""Ranks, chunks, micro-batches."""
HEAD = "ranks chunks micro-batches operations  build, s  simulate, s  verify, s  operations/s  bytes/operation"


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9, help="measurements of each figure")
    turns = parser.parse_args().turns
    print(HEAD)
    rows = []
    for shape in SHAPES:
        row = measured(shape, turns)
        rows.append(row)
        print(
            f"{row['ranks']:>5}{row['chunks']:>7}{row['microbatches']:>14}{row['operations']:>11}{row['build_s']:>10.3f}"
            f"{row['simulate_s']:>13.3f}{row['verify_s']:>11.3f}{row['operations_per_s']:>14,.0f}"
            f"{row['bytes_per_operation']:>17.0f}",
            flush=True,
        )
    first = rows[0]["operations_per_s"]
    print(f"first case: {first / WANTED:.1f} times the {WANTED:,.0f} operations a second that are wanted")
    machine = {"processor": platform.machine(), "python": platform.python_version()}
    document = {"rows": rows, "machine": machine, "turns": turns, "wanted": WANTED}
    (RESULTS / "simulate_speed.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def measured(shape: tuple[int, int, int], turns: int) -> dict[str, Any]:
    """One row."""
    ranks, chunks, microbatches = shape

    def construct() -> Schedule:
        return split_backward(build("interleaved", ranks=ranks, microbatches=microbatches, chunks=chunks))

    schedule = construct()
    build_s = seconds(construct, turns)
    simulate_s = seconds(lambda: simulate(schedule), turns)
    return {
        "ranks": ranks,
        "chunks": chunks,
        "microbatches": microbatches,
        "operations": schedule.num_ops,
        "build_s": build_s,
        "simulate_s": simulate_s,
        "verify_s": seconds(lambda: validate(schedule), turns),
        "operations_per_s": schedule.num_ops / (build_s + simulate_s),
        "bytes_per_operation": _most_memory(lambda: run(schedule)) / schedule.num_ops,
    }


def seconds(work: Callable[[], object], turns: int) -> float:
    """Median time of one turn, the first left out."""
    work()
    times = []
    for _ in range(turns):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _most_memory(work: Callable[[], object]) -> int:
    """Bytes that the work allocates at most."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


if __name__ == "__main__":
    main()
