"""Measures two sides against each other, and prints what was found.

Both sides live in the same processes and take turns, so that whatever else the machine does hits both.
A pair is one turn of each; the side that goes first changes from pair to pair:

    pair 0            pair 1            pair 2
    ours ours │ peer peer      peer peer │ ours ours      ours ...        (a turn is some steps)

The ratio of a pair is ours / peer, of the slowest rank's times.  What counts is the median of the ratios.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.memory import MemoryCounter

RESULTS = Path(__file__).parent / "results"
WARM_STEPS = 3
"""Steps before timing starts, whose losses and gradient norms must agree."""
AGREEMENT = 2e-4
"""Largest relative difference of losses and norms; float32 sums in another order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two that are compared."""

    step: Callable[[int], tuple[float, float]]
    """Run optimizer step n (from 1); return the mean loss and the gradient norm before clipping."""
    finish: Callable[[], None] = lambda: None
    """Wait for what the last step left under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of a benchmark."""

    name: str
    """Ours and peer, in words."""
    num_ranks: int
    """Processes."""
    make: Callable[[int], tuple[Callable[[], Side], Callable[[], Side]]]
    """Given the rank: what builds our side, what builds the peer's; picklable."""
    wanted: float | None = None
    """Largest ratio that is good enough; None: for information."""
    count: Callable[[Callable[[], Side]], dict[str, float]] | None = None
    """Given what builds a side: its memory, where operations can't be watched one by one because they are compiled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a turn took, per step."""

    seconds: float
    """Of the slowest rank, by the clock."""
    cpu: float
    """Processor seconds of all ranks and their threads: what doesn't change when others use the machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to measure."""

    pairs: int
    """Pairs of turns."""
    turn: int
    """Steps in a turn."""


def arguments(description: str) -> argparse.Namespace:
    """The command line that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--pairs", type=int, default=15, help="alternating pairs (default 15)")
    parser.add_argument("--turn", type=int, default=3, help="steps that a side runs in its turn (default 3)")
    parser.add_argument("--only", default="", help="run only the rows whose name contains this; writes nothing")
    parser.add_argument("--no-write", action="store_true", help="leave the results file as it is")
    return parser.parse_args()


def compare(case: Case, effort: Effort, rank: int) -> dict[str, Any]:
    """Measure one case on this rank; every rank returns the same figures.

    Memory is counted first, each side alone from its construction on.
    """
    build_ours, build_peer = case.make(rank)
    count = case.count or _memory
    memory = [count(build_ours), count(build_peer)]
    sides = build_ours(), build_peer()
    difference = _agree(sides)
    turns: list[list[Turn]] = [[], []]
    step = WARM_STEPS
    for pair in range(effort.pairs):
        for index in (0, 1) if pair % 2 == 0 else (1, 0):
            turns[index].append(_turn(sides[index], step, effort.turn))
        step += effort.turn
    return _figures(case, turns, memory, difference)


def _turn(side: Side, step: int, count: int) -> Turn:
    """Run some steps."""
    gc.collect()
    _barrier()
    start, start_cpu = time.perf_counter(), time.process_time()
    for i in range(count):
        side.step(step + 1 + i)
    side.finish()
    cpu = time.process_time() - start_cpu
    return Turn(seconds=_over_ranks((time.perf_counter() - start) / count), cpu=_over_ranks(cpu / count, total=True))


def _agree(sides: tuple[Side, Side]) -> float:
    """Largest relative difference of losses and norms over the warm-up."""
    worst = 0.0
    for step in range(1, WARM_STEPS + 1):
        ours, peer = (side.step(step) for side in sides)
        worst = max([worst, *(abs(a - b) / abs(b) for a, b in zip(ours, peer, strict=True))])
    for side in sides:
        side.finish()
    assert worst <= AGREEMENT, f"the two sides don't compute the same: losses or norms differ by {worst:.1e}"
    return worst


def _memory(build: Callable[[], Side]) -> dict[str, float]:
    """Bytes of live tensors between steps and at the peak of a step, of the fullest rank."""
    gc.collect()
    with MemoryCounter() as counter:
        side = build()
        side.step(1)
        side.step(2)
        side.finish()
        gc.collect()
        between = counter.start_peak()
        side.step(3)
        side.finish()
        found = {"between_steps": between, "peak": counter.peak_bytes}
    return {key: _over_ranks(float(value)) for key, value in found.items()}


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _over_ranks(value: float, *, total: bool = False) -> float:
    """The largest of all ranks' values, or their sum."""
    if not dist.is_initialized():
        return value
    found = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.SUM if total else dist.ReduceOp.MAX)
    return float(found)


def _figures(case: Case, turns: list[list[Turn]], memory: list[dict[str, float]], difference: float) -> dict[str, Any]:
    ratios = [ours.seconds / peer.seconds for ours, peer in zip(*turns, strict=True)]
    cpu_ratios = [ours.cpu / peer.cpu for ours, peer in zip(*turns, strict=True)]
    seconds = [[turn.seconds for turn in side] for side in turns]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "name": case.name,
        "processes": case.num_ranks,
        "wanted": case.wanted,
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "ratio_range": [min(ratios), max(ratios)],
        "pairs": len(ratios),
        "processor_time_ratio": statistics.median(cpu_ratios),
        "seconds": {"ours": statistics.median(seconds[0]), "peer": statistics.median(seconds[1])},
        "memory_bytes": {"ours": memory[0], "peer": memory[1]},
        "memory_ratio": memory[0]["peak"] / memory[1]["peak"],
        "loss_and_norm_difference": difference,
        "all_seconds": {"ours": seconds[0], "peer": seconds[1]},
    }


def report(name: str, rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print the table and write the results file."""
    width = max(len(row["name"]) for row in rows)
    print(
        f"{'':{width}}  {'ours':>7}  {'peer':>7}  {'ratio':>6}  {'quartiles':>13}  {'min - max':>13}  {'wanted':>7}"
        f"  {'cpu':>5}  {'memory':>15}  {'ratio':>5}"
    )
    for row in rows:
        print(_line(row, width))
    print(
        f"ours, peer: ms per step of the slowest rank; cpu: ratio of processor time; memory: MB at the peak of the "
        f"fullest rank; {rows[0]['pairs']} pairs"
    )
    if not (args.no_write or args.only):
        RESULTS.mkdir(exist_ok=True)
        record = {"command": command(name), "machine": machine(), "steps_per_turn": args.turn, "rows": list(rows)}
        (RESULTS / f"{name}.json").write_text(json.dumps(_rounded(record), indent=1) + "\n")


def _line(row: dict[str, Any], width: int) -> str:
    ours, peer = (1e3 * row["seconds"][side] for side in ("ours", "peer"))
    low, high = row["ratio_quartiles"]
    least, most = row["ratio_range"]
    memory = [row["memory_bytes"][side]["peak"] / 1e6 for side in ("ours", "peer")]
    wanted = "" if row["wanted"] is None else f"<= {row['wanted']:.2f}"
    return (
        f"{row['name']:{width}}  {ours:7.1f}  {peer:7.1f}  {row['ratio']:6.3f}  {low:5.3f} - {high:5.3f}"
        f"  {least:5.3f} - {most:5.3f}  {wanted:>7}  {row['processor_time_ratio']:5.3f}"
        f"  {memory[0]:6.1f} : {memory[1]:6.1f}  {row['memory_ratio']:5.3f}"
    )


def command(name: str) -> str:
    """What reproduces a results file; of a folder of this machine only the name is kept."""
    given = (Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:])
    return " ".join(["OMP_NUM_THREADS=1", "python", "-m", f"benchmarks.{name}", *given])


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _rounded(value: Any) -> Any:
    """Five digits are more than the machine can tell."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
