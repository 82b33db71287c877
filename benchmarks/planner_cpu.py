"""The planner on this very machine: predicted against measured, by a calibration made in the same sitting.

    OMP_NUM_THREADS=1 python -m benchmarks.planner_cpu --fresh    # some 6 minutes; without --fresh what isn't there yet
    OMP_NUM_THREADS=1 python -m benchmarks.planner_cpu --rounds 2 --out /tmp/try.json    # whether it runs

calibration   ``stretto diagnose --calibrate``
plans         12 plans of the demo model, 4 processes on the cores there are: median step over alternating rounds, and
              peak of the tracked tensors.  Asked: plans whose medians differ by more than 15% ranked right, memory
              within 10%.
virtual       schedules on virtual devices (compute is a wait).  Asked: predicted within 5% of measured.

Each part is kept in the results as soon as it is done.  The machine must be quiet: neighbours share the cores, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from benchmarks.pairs import RESULTS, machine
from benchmarks.virtual_sides import ours
from stretto.parallel.mesh import build_mesh
from stretto.parallel.pipeline.virtual import wake_on_time
from stretto.planner.machine import Machine
from stretto.planner.measured_step import measured_step
from stretto.planner.profile import profile
from stretto.planner.request import Request
from stretto.planner.tracked import tracked
from stretto.schedule.families import build
from stretto.schedule.op import Kind
from stretto.spec.check import check
from stretto.spec.cluster import ClusterSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_model import model_preset
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.calibrate import calibrate
from stretto.trainer.measure import packed_batch
from stretto.trainer.memory import ActivationMeter, passing_bytes, persistent_bytes
from stretto.trainer.schedules import lowered_and_valid
from stretto.trainer.session import Session

RANKS = 4
SEQUENCES, LENGTH = 16, 256
PLANS: dict[str, dict[str, Any]] = {
    "pp4 1f1b": {"pp": 4, "micro_batch_size": 2},
    "pp4 1f1b, micro-batch 1": {"pp": 4},
    "pp4 gpipe, micro-batch 4": {"pp": 4, "micro_batch_size": 4, "schedule": "gpipe"},
    "pp4 zb-h1": {"pp": 4, "micro_batch_size": 2, "schedule": "zb-h1"},
    "pp2 interleaved x dp2": {
        "pp": 2,
        "chunks": 2,
        "schedule": "interleaved",
        "dp_replicate": 2,
        "micro_batch_size": 2,
    },
    "pp2 x dp2": {"pp": 2, "dp_replicate": 2, "micro_batch_size": 2},
    "pp2 x dp2, full recompute": {"pp": 2, "dp_replicate": 2, "micro_batch_size": 2, "recompute": "full"},
    "pp2 x tp2": {"pp": 2, "tp": 2, "micro_batch_size": 2},
    "tp2 x dp2": {"tp": 2, "dp_replicate": 2, "micro_batch_size": 2},
    "dp4": {"dp_replicate": 4, "micro_batch_size": 4},
    "dp4 zero 1": {"dp_shard": 4, "micro_batch_size": 2},
    "dp4 zero 3, micro-batch 1": {"dp_shard": 4, "zero": 3},
}  # fmt: skip
ROUNDS, WARM = 21, 2
VIRTUAL = {"gpipe": 1, "1f1b": 1, "zb-h1": 1, "interleaved": 2, "zb-v": 2, "dualpipe-v": 2}
"""Families on virtual devices, and their chunks."""
VIRTUAL_SECONDS, MICROBATCHES, TURNS = 0.01, 8, 5
PARTS = ("work", "bubble", "data_communication", "optimizer", "tensor_communication")
DIFFERENT = 0.15
"""From which difference of medians two plans must be ranked right."""
STEP, MEMORY = 0.05, 0.10
"""What predictions may be off at most: steps on virtual devices, peaks of tracked tensors."""


def run_of(plan: dict[str, Any]) -> RunSpec:
    """The demo model under a plan."""
    run = replace(
        RunSpec(),
        run=RunSettings(device="cpu"),
        model=model_preset("demo"),
        cluster=ClusterSpec(name="local-cpu:4", devices_per_node=RANKS),
        plan=PlanSpec(**plan),
        training=TrainingSpec(global_batch_size=SEQUENCES, sequence_length=LENGTH),
    )
    check(run, data=False)
    return run


def in_processes(work: Callable[..., Any], *args: Any) -> Any:
    """What rank 0 of four new processes returns from ``work(rank, *args)``."""
    with tempfile.TemporaryDirectory() as folder:
        store, target = (Path(folder) / "store").as_uri(), str(Path(folder) / "found.json")
        start_processes(_join, (work, args, store, target), nprocs=RANKS, start_method="spawn")
        return json.loads(Path(target).read_text())


def _join(rank: int, work: Callable[..., Any], args: tuple[Any, ...], store: str, target: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    found = work(rank, *args)
    if rank == 0:
        Path(target).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure_plans(rank: int, rounds: int) -> dict[str, Any]:
    """Seconds of every round, and bytes of the fullest rank, of each plan; rounds alternate between the plans."""
    steps: dict[str, Callable[[], object]] = {}
    found: dict[str, Any] = {name: {"seconds": []} for name in PLANS}
    for name, plan in PLANS.items():
        steps[name], found[name]["bytes"] = _session(rank, run_of(plan))
    for turn in range(WARM + rounds):
        for name, step in steps.items():
            seconds = _timed(step)
            if turn >= WARM:
                found[name]["seconds"].append(seconds)
    return found


def _session(rank: int, run: RunSpec) -> tuple[Callable[[], object], float]:
    session = Session.start(run, rank)
    size = run.plan.micro_batch_size
    batches = [packed_batch(size, LENGTH)] * run.num_microbatches
    numbers = iter(range(1, 10_000))

    def step() -> None:
        session.train_step(next(numbers), batches)

    meter = ActivationMeter(session)
    with meter.watch():
        step()
    held = persistent_bytes(session) + passing_bytes(session) + meter.peak_bytes
    return step, _largest(float(held))


def _timed(step: Callable[[], object]) -> float:
    """Of the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    step()
    return _largest(time.perf_counter() - start)


def _largest(number: float) -> float:
    value = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)


def measure_virtual(rank: int) -> dict[str, list[float]]:
    """Seconds of every turn of each family on virtual devices."""
    wake_on_time()
    mesh = build_mesh(PlanSpec(pp=RANKS), rank)
    steps = {}
    for name, chunks in VIRTUAL.items():
        schedule = build(name, ranks=RANKS, microbatches=MICROBATCHES, chunks=chunks)
        steps[name] = ours(lowered_and_valid(schedule), mesh, VIRTUAL_SECONDS, VIRTUAL_SECONDS)
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM + TURNS):
        for name, step in steps.items():
            seconds = _timed(step)
            if turn >= WARM:
                found[name].append(seconds)
    return found


def compare_plans(known: Machine, measured: dict[str, Any]) -> dict[str, Any]:
    """Predicted beside measured, and the pairs that are ranked wrong."""
    rows = []
    for name, plan in PLANS.items():
        run = run_of(plan)
        work = Request(run=run).work(run.plan)
        time_of = measured_step(work, known)
        median = statistics.median(measured[name]["seconds"])
        held = max(rank.total for rank in tracked(work))
        rows.append(
            {
                "name": name,
                "measured_s": median,
                "predicted_s": time_of.total,
                "expected_error": time_of.expected_error,
                "measured_bytes": measured[name]["bytes"],
                "predicted_bytes": held,
                "parts": {
                    part: getattr(time_of, part) for part in ("work", "bubble", "data_communication", "optimizer")
                },
            }
        )
    told = [(a, b) for a, b in combinations(rows, 2) if _apart(a["measured_s"], b["measured_s"])]
    wrong = [
        [a["name"], b["name"]]
        for a, b in told
        if (a["measured_s"] < b["measured_s"]) != (a["predicted_s"] < b["predicted_s"])
    ]
    return {"rows": rows, "pairs": len(told), "wrong": wrong}


def _apart(one: float, other: float) -> bool:
    return max(one, other) > (1 + DIFFERENT) * min(one, other)


def compare_virtual(known: Machine, measured: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Predicted beside measured: the planner's chains, with sleeps and messages as measured."""
    rows = []
    for name, chunks in VIRTUAL.items():
        plan = PlanSpec(pp=RANKS, schedule=name, chunks=chunks)
        count = RANKS * chunks
        one = [VIRTUAL_SECONDS + known.sleep_seconds] * count
        passes = {Kind.F: one, Kind.I: one, Kind.W: one}
        predicted = profile(plan, MICROBATCHES).makespan(passes, known.messages.at(64 * 64 * 4))
        median = statistics.median(measured[name])
        rows.append({"name": name, "measured_s": median, "predicted_s": predicted})
    return rows


def main() -> None:
    """Measure what isn't there, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "planner_cpu.json")
    parser.add_argument("--fresh", action="store_true", help="measure all parts again")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="times that each plan is measured")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() and not args.fresh else {}
    parts: dict[str, Callable[[], Any]] = {
        "calibration": lambda: calibrate(processes=RANKS).as_data(),
        "plans": lambda: in_processes(measure_plans, args.rounds),
        "virtual": lambda: in_processes(measure_virtual),
    }
    for name, measure in parts.items():
        if name not in found:
            start = time.perf_counter()
            found |= {name: measure(), "machine": machine()}
            args.out.write_text(json.dumps(found) + "\n")
            print(f"{name}: measured in {time.perf_counter() - start:.0f} s", flush=True)
    known = Machine.of_data(found["calibration"])
    found["compared"] = compare_plans(known, found["plans"])
    found["compared_virtual"] = compare_virtual(known, found["virtual"])
    args.out.write_text(json.dumps(found) + "\n")
    show(found)


def show(found: dict[str, Any]) -> None:
    """The tables."""
    compared = found["compared"]
    print(f"{'plan':<28}{'measured':>11}{'predicted':>11}{'ratio':>8}{'memory':>11}{'predicted':>11}{'ratio':>8}")
    for row in sorted(compared["rows"], key=lambda row: row["measured_s"]):
        seconds, held = (row["predicted_s"] / row["measured_s"], row["predicted_bytes"] / row["measured_bytes"])
        print(
            f"{row['name']:<28}{1e3 * row['measured_s']:>8.1f} ms{1e3 * row['predicted_s']:>8.1f} ms{seconds:>8.2f}"
            f"{row['measured_bytes'] / 1e6:>8.2f} MB{row['predicted_bytes'] / 1e6:>8.2f} MB{held:>8.3f}"
        )
    wrong = compared["wrong"]
    print(f"{compared['pairs']} pairs differ by more than {DIFFERENT:.0%}; ranked wrong: {len(wrong)} {wrong or ''}")
    for row in found["compared_virtual"]:
        ratio = row["predicted_s"] / row["measured_s"]
        seconds = f"{1e3 * row['measured_s']:>8.1f} ms{1e3 * row['predicted_s']:>8.1f} ms"
        print(f"virtual {row['name']:<20}{seconds}{ratio:>8.3f}")
    print(f"\n{'':<56}{'asked':>8}{'got':>10}")
    for what, asked, got, reached in verdicts(found):
        verdict = "" if reached is None else "reached" if reached else "MISSED"
        print(f"{what:<56}{asked:>8}{got:>10}  {verdict}")


def verdicts(found: dict[str, Any]) -> list[tuple[str, str, str, bool | None]]:
    """What is asked, what was got, and whether that is enough (None: it isn't asked)."""
    compared, rows = found["compared"], found["compared"]["rows"]
    held = max(abs(row["predicted_bytes"] / row["measured_bytes"] - 1) for row in rows)
    off = max(abs(row["predicted_s"] / row["measured_s"] - 1) for row in found["compared_virtual"])
    steps = [abs(row["predicted_s"] / row["measured_s"] - 1) for row in rows]
    wrong, pairs = len(compared["wrong"]), compared["pairs"]
    return [
        (f"plans apart by more than {DIFFERENT:.0%}, pairs ranked right", "all", f"{pairs - wrong}/{pairs}", not wrong),
        ("virtual devices: step time, worst error", f"{STEP:.0%}", f"{off:.1%}", off <= STEP),
        ("memory of tracked tensors, worst error", f"{MEMORY:.0%}", f"{held:.1%}", held <= MEMORY),
        ("step time of the plans, median error", "", f"{statistics.median(steps):.1%}", None),
    ]


if __name__ == "__main__":
    main()
