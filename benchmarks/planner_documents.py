"""The planner on runs whose documents have groups of their own: predicted against measured, step by step.

    OMP_NUM_THREADS=1 python -m benchmarks.planner_documents                     # some 4 minutes on a quiet machine
    OMP_NUM_THREADS=1 python -m benchmarks.planner_documents --calibration calibration.toml    # of this machine

The demo model trains on documents whose lengths are log-normal (median 250 bytes, sigma 1.2, 24 to 2,048) under
plans with dynamic groups, four processes.  Each step holds other documents; each is predicted from their lengths, as
``stretto train`` does before its first step, and held against what it took.  Memory is that of the first step, which is
the one whose tensors are tracked.  Asked: memory within 10%; steps as near as those of static plans
(``benchmarks.planner_cpu``: median 14%).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.pairs import RESULTS, machine
from stretto.data import Corpus, Loader, Share
from stretto.data.lengths import lengths_of_steps
from stretto.planner.document_memory import document_memory
from stretto.planner.document_step import document_step
from stretto.planner.request import Request
from stretto.spec import toml
from stretto.spec.cluster import ClusterSpec
from stretto.spec.data import DataSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_model import model_preset
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.corpus import prepare_corpus

ROW, ROWS, STEPS, WARM = 2048, 8, 12, 2
PLANS: dict[str, dict[str, Any]] = {
    "dp4": {"dp_replicate": 4, "context_tokens": 2048},
    "dp4, 640 tokens a rank": {"dp_replicate": 4, "context_tokens": 640},
    "dp4 zero 3, 640 tokens": {"dp_shard": 4, "zero": 3, "context_tokens": 640},
    "cp2 x dp2, full recompute, 640 tokens": {"cp": 2, "dp_shard": 2, "recompute": "full", "context_tokens": 640},
    "cp2 x tp2, 1024 tokens": {"cp": 2, "tp": 2, "context_tokens": 1024},
    "cp2 x pp2, 1024 tokens": {"cp": 2, "pp": 2, "context_tokens": 1024},
    "dp4, 640 tokens, offload": {"dp_replicate": 4, "context_tokens": 640, "offload": True},
}
COMMAND = (sys.executable, "-m", "stretto.cli.main")
MEMORY = 0.10
"""What predictions of tracked tensors may be off at most."""


def write_corpus(folder: Path) -> None:
    """Enough documents for all steps."""
    draw = random.Random(0)
    folder.mkdir()
    for number in range(600):
        length = min(ROW, max(24, round(draw.lognormvariate(math.log(250), 1.2))))
        (folder / f"{number:04}.txt").write_text("".join(draw.choice("etaoin shrdlu") for _ in range(length)))


def run_of(folder: Path, number: int, plan: dict[str, Any], calibration: Path) -> RunSpec:
    """The run of a plan, in a directory of its own."""
    return RunSpec(
        run=RunSettings(dir=str(folder / f"run-{number}"), device="cpu", trace="off"),
        model=model_preset("demo", max_positions=ROW),
        cluster=ClusterSpec(name="local-cpu:4", devices_per_node=4, calibration=str(calibration)),
        plan=PlanSpec(context_groups="dynamic", **plan),
        training=TrainingSpec(steps=STEPS, global_batch_size=ROWS, sequence_length=ROW, learning_rate=1e-4),
        data=DataSpec(path=str(folder / "corpus"), cache=str(folder / "tokens"), packing="whole"),
    )


def measured(run: RunSpec) -> dict[str, Any]:
    """What its steps took, and what each was predicted to take."""
    path = Path(f"{run.run.dir}.toml")
    toml.save(run, path)
    subprocess.run([*COMMAND, "train", str(path)], check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (Path(run.run.dir) / "metrics.jsonl").read_text().splitlines()]
    share = Share(global_batch_size=ROWS, micro_batch_size=run.plan.micro_batch_size, seed=run.run.seed)
    corpus = prepare_corpus(run)
    assert isinstance(corpus, Corpus)
    lengths = lengths_of_steps(Loader(corpus, share), range(1, STEPS + 1))
    request = Request(run=run)
    held = max(rank.total for rank in document_memory(request, lengths[0]))
    steps = [
        {"seconds": record["step_s"], "predicted": document_step(request, documents).total}
        for record, documents in zip(records[WARM:], lengths[WARM:], strict=True)
    ]
    return {"steps": steps, "bytes": records[0]["memory_bytes"], "bytes_predicted": held}


def line(name: str, found: dict[str, Any]) -> str:
    """One row of the table."""
    ratios = [step["predicted"] / step["seconds"] for step in found["steps"]]
    took = statistics.median(step["seconds"] for step in found["steps"])
    spread = statistics.median(abs(ratio / statistics.median(ratios) - 1) for ratio in ratios)
    memory = found["bytes_predicted"] / found["bytes"] - 1
    return (
        f"{name:40} {took:8.3f} s  predicted {statistics.median(ratios) - 1:+6.1%}  step from step {spread:5.1%}  "
        f"memory {memory:+6.1%}{'' if abs(memory) <= MEMORY else '  MISSED'}"
    )


def main() -> None:
    """Run all plans and keep what was found."""
    parser = argparse.ArgumentParser(description="planner against runs with dynamic groups")
    parser.add_argument("--calibration", type=Path, help="of this machine; made anew where it isn't given")
    parser.add_argument("--plans", type=int, default=len(PLANS), help="the first so many")
    parser.add_argument("--out", type=Path, default=RESULTS / "planner_documents.json")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calibration = options.calibration or folder / "calibration.toml"
        if options.calibration is None:
            asked = ["diagnose", "--calibrate", "--out", str(calibration)]
            subprocess.run([*COMMAND, *asked], check=True, stdout=subprocess.DEVNULL)
        write_corpus(folder / "corpus")
        for number, (label, plan) in enumerate(list(PLANS.items())[: options.plans]):
            found[label] = measured(run_of(folder, number, plan, calibration.resolve()))
            print(line(label, found[label]), flush=True)
    options.out.write_text(json.dumps({"machine": machine(), "plans": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
