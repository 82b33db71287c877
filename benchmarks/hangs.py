"""Drills: a rank is killed, frozen, delayed or raises, in each phase, under several plans; what the run says, and when.

    python -m benchmarks.hangs                        # the whole matrix; rows that are known are kept
    python -m benchmarks.hangs --only freeze --again  # some rows, anew

Each row is a run as a user starts it (``run.drill``), watched with silent_seconds = 3: too short for a machine so busy
that a process gets no processor for so long, so run it on a quiet one.  "stops" are seconds from the
fault to the end of the launcher.  A delay of 1.5 x silent_seconds must not end the run, and ``stretto diagnose`` must
name the rank.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stretto
from benchmarks.pairs import RESULTS, machine
from stretto.resilience import read_log
from stretto.spec import toml
from stretto.spec.data import DataSpec
from stretto.spec.drill import faults_of
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.training import TrainingSpec

SILENT_SECONDS = 3.0
SLACK_SECONDS = 5.0
"""How much longer than that a run may take to stop."""
FILE = RESULTS / "hangs.json"
PLANS = {
    "zb-h1": PlanSpec(pp=2, schedule="zb-h1"),
    "dualpipe": PlanSpec(pp=2, schedule="dualpipe"),
    "tp 2": PlanSpec(pp=2, tp=2, schedule="1f1b"),
    "zero 3": PlanSpec(pp=2, dp_shard=2, zero=3, schedule="zeropp", chunks=2),
}
MODEL = ModelSpec(
    vocab_size=260, hidden_size=32, intermediate_size=48, num_layers=4, num_heads=4, num_kv_heads=2, max_positions=64
)
PHASES = {
    "start": "at START",
    "rendezvous": "at JOIN",
    "build": "at BUILD",
    "data": "step 2 at DATA",
    "warm-up F": "step 1 at F",
    "steady F": "step 2 at {stage}F2",
    "I": "step 2 at I",
    "W": "step 2 at W",
    "B": "step 2 at B",
    "receive": "step 2 at {receive}",
    "flush": "step 2 at FLUSH",
    "unshard": "step 2 at UNSHARD",
    "reduce": "step 2 at REDUCE_GRAD",
    "optimizer": "step 2 at OPT",
    "evaluation": "step 3 at EVAL",
    "save": "at SAVE",
    "leave": "at LEAVE",
}
ALL = ("kill", "freeze", "delay", "raise")
MATRIX: dict[str, dict[str, tuple[str, ...]]] = {
    # How long a start takes nobody knows, so one that is slow isn't told.
    "zb-h1": {phase: ALL for phase in PHASES if phase not in ("start", "B", "unshard")}
    | {"start": ("kill", "freeze", "raise")},
    "dualpipe": dict.fromkeys(("warm-up F", "steady F", "B", "receive", "reduce", "save"), ("freeze",)),
    "tp 2": dict.fromkeys(("warm-up F", "steady F", "B", "receive", "reduce", "optimizer", "save"), ("freeze",)),
    "zero 3": dict.fromkeys(("warm-up F", "steady F", "unshard", "reduce", "optimizer", "save"), ("freeze",)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run."""

    plan: str
    """Key of PLANS."""
    phase: str
    """Key of PHASES."""
    action: str
    """What happens."""

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.action} {self.phase}, {self.plan}"

    @property
    def rank(self) -> int:
        """Whom it strikes: the last rank, but those whom all meet at, rank 0 too."""
        return 0 if self.phase in ("rendezvous", "save", "optimizer") else PLANS[self.plan].num_ranks - 1

    @property
    def drill(self) -> str:
        """As ``run.drill`` says it."""
        last = self.rank != 0
        plan = PLANS[self.plan]
        stage = plan.num_stages - 1 if last and plan.chunks == 1 else 0 if not last else 1
        at = PHASES[self.phase].format(stage=stage, receive="RECV_F" if last else "RECV_B")
        seconds = f" {1.5 * SILENT_SECONDS:g}" if self.action == "delay" else ""
        return f"{self.action}{seconds} rank {self.rank} {at}"


def run_of(row: Row, folder: Path) -> RunSpec:
    """A few steps of a small model on a few lines of text."""
    (folder / "corpus.txt").write_text("What voice enters before the last has finished?\n" * 200)
    settings = RunSettings(dir=str(folder / "run"), device="cpu", silent_seconds=SILENT_SECONDS, drill=row.drill)
    training = TrainingSpec(steps=3, global_batch_size=8, sequence_length=32, eval_every=3, eval_steps=1)
    data = DataSpec(path=str(folder / "corpus.txt"), validation_fraction=0.2)
    return RunSpec(run=settings, model=MODEL, plan=PLANS[row.plan], training=training, data=data)


def measure(row: Row) -> dict[str, Any]:
    """Run it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = toml.save(run_of(row, folder), folder / "given.toml")
        started_by = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"}
        environment = {k: v for k, v in os.environ.items() if k not in started_by} | {"OMP_NUM_THREADS": "1"}
        stretto = [sys.executable, "-m", "stretto.cli.main"]
        done = subprocess.run([*stretto, "train", str(file)], capture_output=True, text=True, env=environment)
        end = time.time()
        said = " ".join(_without_folders(done.stderr, folder).split())
        found = {"name": row.name, "drill": row.drill, "code": done.returncode, "said": said}
        if row.action == "delay":
            told = subprocess.run([*stretto, "diagnose", str(folder / "run")], capture_output=True, text=True)
            named = [line for line in told.stdout.splitlines() if re.match(r"Ranks? .* slow", line)]
            found["said"] = _without_folders(next(iter(named), told.stderr or "nothing"), folder)
        else:
            found["stops"] = end - _struck(folder / "run", row.drill)
        return {**found, "good": good(row, found)}


def _without_folders(said: str, run: Path) -> str:
    """What was said, with "..." for where the run, Stretto and Python are on this machine."""
    for place in (run, Path(stretto.__file__).parents[1], Path(os.__file__).parent):
        said = said.replace(str(place), "...")
    return said


def _struck(run: Path, drill: str) -> float:
    """When the fault struck: when the operation began in which it did."""
    (fault,) = faults_of(drill)
    log = read_log(run / "oplog" / f"rank-{fault.rank}")
    met = (
        op
        for op in log.operations
        if fault.step in (None, op.step) and fault.at in (op.name, op.name.strip("0123456789"))
    )
    return next((operation.began for operation in met), float("nan"))


def good(row: Row, found: dict[str, Any]) -> bool:
    """Whether the right rank is named, in time, with file and line where it can have one."""
    said = found["said"]
    if row.action == "delay":
        return found["code"] == 0 and re.match(rf"Rank {row.rank} was slow", said) is not None
    limit = {"freeze": SILENT_SECONDS}.get(row.action, 0.0) + SLACK_SECONDS
    what = {"kill": "was killed by SIGKILL", "freeze": "has been silent", "raise": "failed in"}[row.action]
    named = re.search(rf"rank {row.rank} \(host [^)]*\)(, which)? {what}", said) is not None
    placed = row.action == "kill" or re.search(r"\.py:\d+|line \d+", said) is not None
    return bool(found["code"] == 1 and named and placed and found["stops"] <= limit)


def rows() -> Iterator[Row]:
    """The matrix."""
    for plan, phases in MATRIX.items():
        for phase, actions in phases.items():
            for action in actions:
                yield Row(plan=plan, phase=phase, action=action)


def main() -> None:
    """Print each row as it is found, and write it at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run only the rows whose name contains this")
    parser.add_argument("--again", action="store_true", help="run rows anew that are known")
    args = parser.parse_args()
    asked = {row.name for row in rows()}
    before = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    known = {row["name"]: row for row in before if row["name"] in asked}
    for row in rows():
        if args.only not in row.name:
            continue
        if row.name not in known or args.again:
            known[row.name] = measure(row)
        found = known[row.name]
        seconds = f"{found['stops']:5.1f} s" if "stops" in found else "  goes on"
        print(f"{'good' if found['good'] else 'BAD ':4}  {row.name:32}{seconds:>9}  {found['said']}", flush=True)
        kept = [known[each.name] for each in rows() if each.name in known]
        record = {"command": "python -m benchmarks.hangs", "machine": machine(), "rows": kept}
        FILE.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{sum(row['good'] for row in known.values())} of {len(known)} rows good")


if __name__ == "__main__":
    main()
