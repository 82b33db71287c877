"""The runtime by itself: measured step over simulated step on virtual devices, beside a floor loop and torch's runtime.

    OMP_NUM_THREADS=1 python -m benchmarks.virtual_pipeline                     # 4 ranks x 8, 10 ms and 1 ms
    OMP_NUM_THREADS=1 python -m benchmarks.virtual_pipeline --ranks 8 --microbatches 16 --only zb

Compute is a wait, all else is real (stretto/parallel/pipeline/virtual.py).  Every family is played by our runtime and
by the floor loop; every schedule of torch.distributed.pipelining by all three in the very same order.  The sides take
turns in one sitting; a step's time is that of its slowest rank.  The row ``best`` holds the schedule that our search
finds within 1F1B's activation memory to ZBVZeroBubble, torch's fastest schedule in that memory, for the same work.
The search is told how long a message takes (--message): the shortest schedule for messages that take no time has
ranks that wait for each other at every operation, and loses 8% to them.  Rows with vocabulary passes (S and T
take half as long as F) have neither a floor nor torch beside them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.virtual_rows import Table, play
from benchmarks.virtual_sides import TORCH, Floor, Step, ours, torch_pipeline
from stretto.parallel.mesh import Mesh
from stretto.schedule.document import load, save
from stretto.schedule.families import build
from stretto.schedule.passes.vocabulary import vocabulary
from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate import simulate
from stretto.schedule.simulate.costs import Costs
from stretto.spec import capabilities
from stretto.trainer.schedules import lowered_and_valid

BEST = "best"
"""The row of the best schedules in 1F1B's memory."""
CHUNKS = 2
"""Of ZBVZeroBubble."""
SHARE = 0.5
"""Time of S and T beside that of F of a rank's whole share."""
WARM = 2
"""Steps of each side before timing starts."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--ms", type=float, nargs="+", default=[10.0, 1.0], help="duration of F, I and W of a stage")
    parser.add_argument("--turns", type=int, default=7, help="steps of each side that are timed")
    parser.add_argument("--message", type=float, default=0.5, help="milliseconds of a message, for the row best")
    parser.add_argument("--only", default="", help="run only the rows whose name contains this; writes nothing")
    return parser.parse_args()


def names() -> Iterator[str]:
    """The rows: torch's schedules, then our families."""
    yield from (f"torch {name}" for name in TORCH)
    yield BEST
    yield from (name for name in capabilities.SCHEDULES if name not in ("auto", "skip-pipe"))
    yield from (f"{name}, vocabulary {algorithm}" for name in ("1f1b", "zb-v") for algorithm in (1, 2))


def family(name: str, ranks: int, microbatches: int) -> Schedule:
    """A family's schedule with its own number of chunks, two where it can have any; with vocabulary passes."""
    name, _, algorithm = name.partition(", vocabulary ")
    if algorithm:
        bare = family(name, ranks, microbatches)
        return vocabulary(bare, algorithm=int(algorithm), costs=Costs(S=SHARE, T=SHARE))
    if len(capabilities.SCHEDULES[name]) == 1 or name == "hanayo":
        return build(name, ranks=ranks, microbatches=microbatches)
    return build(name, ranks=ranks, microbatches=microbatches, chunks=2)


def best(milliseconds: float, args: argparse.Namespace) -> Schedule:
    """The schedule that the search finds in 1F1B's memory, where a stage of ZBVZeroBubble takes so long."""
    return build(
        "auto",
        ranks=args.ranks,
        microbatches=args.microbatches,
        costs=Costs(comm=args.message / (CHUNKS * milliseconds)),
        memory_limit=float(args.ranks),
    )


def sides_of(name: str, mesh: Mesh, seconds: float, args: argparse.Namespace) -> tuple[dict[str, Step], float]:
    """What plays a row, and its simulated step in seconds."""
    sides: dict[str, Step] = {}
    if name == BEST:
        schedule = load(args.best[seconds * 1e3])
        sides["torch"], other = torch_pipeline("ZBVZeroBubble", mesh, args.microbatches, seconds)
        seconds *= other.num_stages / schedule.num_stages
    elif name.startswith("torch "):
        peer, schedule = torch_pipeline(name.removeprefix("torch "), mesh, args.microbatches, seconds)
        sides["torch"] = peer
    else:
        schedule = family(name, mesh.size("pp"), args.microbatches)
    share = seconds * schedule.num_stages / schedule.num_ranks
    scored = SHARE * share
    simulated = simulate(schedule, Costs(F=share, I=share, W=share, S=scored, T=scored)).makespan
    lowered = lowered_and_valid(schedule)
    if "vocabulary" not in name:
        sides["floor"] = Floor(lowered, mesh, seconds)
    return {"ours": ours(lowered, mesh, seconds, scored), **sides}, simulated


def measure(case: tuple[str, float], mesh: Mesh, args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    name, milliseconds = case
    sides, simulated = sides_of(name, mesh, milliseconds / 1e3, args)
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(WARM + args.turns):
        for side, step in sides.items():
            dist.barrier()
            start = time.perf_counter()
            step()
            taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            if turn >= WARM:
                times[side].append(float(taken))
    row: dict[str, Any] = {"name": name, "ms": milliseconds, "simulated_ms": simulated * 1e3}
    for side, found in times.items():
        row[f"{side}_over_simulated"] = statistics.median(found) / simulated
    for other in ("floor", "torch"):
        if other in times:
            row[f"ours_over_{other}"] = ratio(times["ours"], times[other])
    return row


def ratio(ours: list[float], other: list[float]) -> float:
    """Median over the turns."""
    return statistics.median(a / b for a, b in zip(ours, other, strict=True))


def cases(args: argparse.Namespace) -> list[tuple[str, float]]:
    """All that ``--only`` leaves, by name and milliseconds."""
    return [(name, milliseconds) for milliseconds in args.ms for name in names() if args.only in name]


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    columns = (
        "ours_over_simulated",
        "floor_over_simulated",
        "torch_over_simulated",
        "ours_over_floor",
        "ours_over_torch",
    )
    cells = "".join(f"{row[column]:8.3f}" if column in row else " " * 8 for column in columns)
    return f"{row['name']:24}{row['ms']:5g} ms{row['simulated_ms']:9.1f}{cells}"


def main() -> None:
    """Start the ranks."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args = arguments()
    print(f"{'':32}simulated    ours   floor   torch  /floor  /torch")
    with tempfile.TemporaryDirectory() as folder:
        args.best = {ms: Path(folder) / f"best-{ms}.json" for ms in args.ms if args.only in BEST}
        for ms, path in args.best.items():
            save(best(ms, args), path)
        play(
            Table(script="virtual_pipeline", cases=cases, measure=measure, line=line),
            args,
            keep=f"virtual_pipeline_{args.ranks}x{args.microbatches}.json",
        )


if __name__ == "__main__":
    main()
