"""A calibration refined by runs' traces: how far off steps are predicted before and after.

    OMP_NUM_THREADS=1 python -m benchmarks.planner_refine            # some 4 minutes; wants a quiet machine

Each plan of the demo model is trained twice.  The first run's trace refines the calibration, the second run's median
step judges it.  ``own``: refined by that plan's first run.  ``others``: by the first runs of all the other plans, none
of which has this plan's shape.  Asked: nearer than before for each plan's own, and in the median for others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import stretto
from benchmarks.pairs import RESULTS, machine
from stretto.planner.calibration_file import written
from stretto.planner.machine import Machine
from stretto.planner.measured_step import measured_step
from stretto.planner.observed import observe
from stretto.planner.refine import refine
from stretto.planner.request import Request
from stretto.schedule.measured.trace import load
from stretto.spec.cluster import ClusterSpec
from stretto.spec.data import DataSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_model import model_preset
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.calibrate import calibrate

PLANS: dict[str, dict[str, Any]] = {
    "pp4 1f1b": {"pp": 4, "micro_batch_size": 2},
    "pp2 x dp2": {"pp": 2, "dp_replicate": 2, "micro_batch_size": 2},
    "tp2 x dp2": {"tp": 2, "dp_replicate": 2, "micro_batch_size": 2},
    "dp4, zero 1": {"dp_shard": 4, "micro_batch_size": 4},
}
STEPS = 24
"""Of a run; all but the first are recorded."""


def run_of(name: str, folder: Path) -> RunSpec:
    """The demo model under one of the plans."""
    return RunSpec(
        run=RunSettings(device="cpu", dir=str(folder), trace=f"2-{STEPS}"),
        model=model_preset("demo"),
        cluster=ClusterSpec(name="local-cpu:4", devices_per_node=4),
        plan=PlanSpec(**PLANS[name]),
        training=TrainingSpec(global_batch_size=16, sequence_length=256, steps=STEPS),
        data=DataSpec(path="stdlib"),
    )


def predicted(known: Machine, run: RunSpec) -> float:
    """Seconds of a step."""
    return measured_step(Request(run=run).work(run.plan), known).total


def compare(known: Machine, folder: Path) -> list[dict[str, Any]]:
    """Train every plan twice, refine, and lay predictions beside the second runs."""
    runs: dict[str, tuple[RunSpec, RunSpec]] = {}
    for number, name in enumerate(PLANS):
        both = [run_of(name, folder / f"{number}-{turn}") for turn in ("first", "second")]
        for run in both:
            stretto.train(run)
        runs[name] = (both[0], both[1])
    own = {name: refine(known, Path(first.run.dir)).machine for name, (first, _) in runs.items()}
    rows = []
    for name, (_, second) in runs.items():
        measured = observe(load(Path(second.run.dir))).step
        seconds = {
            "before": predicted(known, second),
            "own": predicted(own[name], second),
            "others": predicted(_by_others(known, runs, name), second),
        }
        rows.append({"name": name, "measured_s": measured, "predicted_s": seconds})
    return rows


def _by_others(known: Machine, runs: Mapping[str, tuple[RunSpec, RunSpec]], name: str) -> Machine:
    for other, (first, _) in runs.items():
        if other != name:
            known = refine(known, Path(first.run.dir)).machine
    return known


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "planner_refine.json")
    parser.add_argument("--calibration", type=Path, help="refine this file instead of measuring the machine first")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    known = calibrate(processes=4) if args.calibration is None else written(args.calibration)["machine"]
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(replace(known, refinements=()), Path(folder))
    args.out.write_text(json.dumps({"rows": rows, "machine": machine()}, indent=1) + "\n")
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    print(f"{'plan':<14}{'measured':>12}" + "".join(f"{name:>22}" for name in ("before", "own", "others")))
    off: dict[str, list[float]] = {"before": [], "own": [], "others": []}
    for row in rows:
        cells = ""
        for name, seconds in row["predicted_s"].items():
            wrong = seconds / row["measured_s"] - 1
            off[name].append(abs(wrong))
            cells += f"{1e3 * seconds:>12.1f} ms {wrong:>+6.1%}"
        print(f"{row['name']:<14}{1e3 * row['measured_s']:>9.1f} ms{cells}")
    nearer = sum(own < before for own, before in zip(off["own"], off["before"], strict=True))
    medians = ", ".join(f"{name} {statistics.median(some):.1%}" for name, some in off.items())
    print(f"asked: nearer by its own run, all {len(rows)}; got {nearer}.  Median error: {medians}")


if __name__ == "__main__":
    main()
