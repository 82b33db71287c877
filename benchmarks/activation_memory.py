"""Peak activation memory of real training beside what the simulator says, rank by rank.

    OMP_NUM_THREADS=1 python -m benchmarks.activation_memory [--only zb-h1]

Four processes train a Llama of 8 layers under every common family.  Measured is what autograd and the pipeline keep
for backward passes, the stash between I and W included, at its most in a step (trainer/memory.py).  Simulated is the
peak of the same schedule, where a stage keeps what its median micro-batch was seen to keep between its F and its I
(or B), and between I and W; under full recompute, I and B hold besides what they were seen to run again.  So the two
differ by whatever is let go too late, kept twice, or not counted.  What vocabulary passes keep the simulator counts by
the sizes of their tensors (schedule/simulate/vocabulary_memory.py).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.model import LENGTH, MODEL, batches_of
from stretto.schedule.op import Kind, Op
from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate.costs import Costs
from stretto.schedule.simulate.memory import peak_activation
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.memory import ActivationMeter
from stretto.trainer.session import Session

RANKS, MICROBATCHES = 4, 8
SIZE = 4
"""Bytes of a float32."""
PLANS: dict[str, dict[str, Any]] = {
    "gpipe": {},
    "1f1b": {},
    "interleaved": {"chunks": 2},
    "breadth-first": {"chunks": 2},
    "zb-h1": {},
    "zb-h2": {},
    "zb-auto": {},
    "zb-v": {"chunks": 2},
    "v-half": {"chunks": 2},
    "v-min": {"chunks": 2},
    "hanayo": {"chunks": 2},
    "chimera": {},
    "bitpipe": {"chunks": 2},
    "dualpipe": {},
    "dualpipe-v": {"chunks": 2},
    "zeropp": {"chunks": 2},
    "group-interleaved": {"chunks": 2},
    "modular": {"chunks": 2},
    "skip-pipe": {"chunks": 2},
    "1f1b, full recompute": {"schedule": "1f1b", "recompute": "full"},
    "zb-h1, selective recompute": {"schedule": "zb-h1", "recompute": "selective"},
    "zb-h1, full recompute": {"schedule": "zb-h1", "recompute": "full"},
    "1f1b, recompute": {"schedule": "1f1b", "passes": ("recompute",)},
    "zb-v, recompute": {"schedule": "zb-v", "chunks": 2, "passes": ("recompute:stages=0-3",)},
    "1f1b, offload": {"schedule": "1f1b", "passes": ("offload:fraction=0.5",)},
    "1f1b, vocabulary 1": {"schedule": "1f1b", "passes": ("vocabulary:algorithm=1",)},
    "1f1b, vocabulary 2": {"schedule": "1f1b", "passes": ("vocabulary:algorithm=2",)},
    "zb-v, vocabulary 1": {"schedule": "zb-v", "chunks": 2, "passes": ("vocabulary:algorithm=1",)},
    "zb-v, vocabulary 2": {"schedule": "zb-v", "chunks": 2, "passes": ("vocabulary:algorithm=2",)},
    "1f1b, 2bp": {"schedule": "1f1b", "passes": ("2bp:when=end",)},
    "zb-v, sharding": {"schedule": "zb-v", "chunks": 2, "passes": ("sharding:blocks=2",)},
}
"""What is trained, by name; the schedule is the name where it isn't said."""
RESULTS = Path(__file__).parent / "results" / "activation_memory.json"
BOUND = 0.05
"""What measured and simulated peaks may differ by."""


@dataclass(slots=True)
class Kept:
    """Hears a rank's operations and notes what its micro-batches keep."""

    meter: ActivationMeter | None = None
    before: tuple[int, int] = (0, 0)
    """Bytes of the layers, and of all, before the operation."""
    peak: int = 0
    operation: Op | None = None
    seen: dict[tuple[Kind, int], list[tuple[int, int]]] = field(default_factory=dict)
    """Of the operations of each kind on each stage: the bytes more that its layers left, and that all held at most."""

    def begin(self, name: str, *, peer: int | None = None) -> None:
        """An operation starts."""
        self.operation = Op.parse(name) if name[0].isdigit() else None
        if self.meter is not None:
            self.before = self.meter.layer_bytes, self.meter.held_bytes
            self.peak, self.meter.peak_bytes = self.meter.peak_bytes, 0

    def end(self) -> None:
        """It has ended."""
        if self.meter is not None:
            most, self.meter.peak_bytes = self.meter.peak_bytes, max(self.peak, self.meter.peak_bytes)
            if self.operation is not None:
                key = (self.operation.kind, self.operation.stage)
                change = (self.meter.layer_bytes - self.before[0], max(0, most - self.before[1]))
                self.seen.setdefault(key, []).append(change)

    def medians(self) -> dict[tuple[Kind, int], tuple[int, int]]:
        """The same of a typical micro-batch."""
        return {
            key: (median_low(a for a, _ in each), median_low(b for _, b in each)) for key, each in self.seen.items()
        }


def run_of(name: str) -> RunSpec:
    """The run of a row."""
    plan = PlanSpec(pp=RANKS, **{"schedule": name, **PLANS[name]})
    return RunSpec(
        model=MODEL, plan=plan, training=TrainingSpec(global_batch_size=MICROBATCHES, sequence_length=LENGTH)
    )


def measure(name: str, rank: int, *, width: int = MODEL.hidden_size) -> dict[str, Any]:
    """One row: peaks in bytes, of each rank."""
    run, kept = run_of(name), Kept()
    run = replace(run, model=replace(run.model, hidden_size=width))
    session = Session.start(run, rank, observer=kept)
    session.train_step(1, batches_of(run, 1, 0))
    kept.meter = ActivationMeter(session)
    with kept.meter.watch():
        session.train_step(2, batches_of(run, 2, 0))
    found: list[Any] = [None] * RANKS
    dist.all_gather_object(found, (kept.meter.peak_bytes, kept.medians()))
    measured = [peak for peak, _ in found]
    seen = {key: value for _, each in found for key, value in each.items()}
    shards = vocabulary_bytes(run) if session.runtime.vocabulary is not None else {}
    simulated = simulate(session.schedule, seen, shards, reruns=run.plan.recompute == "full")
    errors = [a / b - 1 for a, b in zip(measured, simulated, strict=True)]
    return {"name": name, "measured_bytes": measured, "simulated_bytes": simulated, "worst": max(errors, key=abs)}


def vocabulary_bytes(run: RunSpec) -> dict[str, list[float]]:
    """What a shard of a rank makes of a micro-batch (Costs); tokens are drawn evenly, so that all look up alike."""
    numbers = run.plan.micro_batch_size * run.training.sequence_length * SIZE
    stages, ranks = run.plan.num_stages, run.plan.pp
    return {
        "vocabulary_bytes": [numbers * run.model.vocab_size / ranks] * stages,
        "output_bytes": [numbers * run.model.hidden_size] * stages,
        "row_bytes": [numbers * run.model.hidden_size / ranks] * stages,
    }


def simulate(
    schedule: Schedule,
    seen: Mapping[tuple[Kind, int], tuple[int, int]],
    shards: Mapping[str, Sequence[float]],
    *,
    reruns: bool,
) -> list[float]:
    """Peak of each rank in bytes, where each stage keeps what was seen of it, and each shard ``shards``."""
    whole, kept, again, stash = [], [], [], []
    for stage in range(schedule.num_stages):
        forward, after_r = seen[Kind.F, stage][0], seen.get((Kind.R, stage), (0, 0))[0]
        whole.append(forward + after_r)
        kept.append(forward if after_r else 0)
        freed, held = seen.get((Kind.I, stage), (0, 0))
        stash.append(max(0, whole[-1] + freed))
        again.append(max(held, seen.get((Kind.B, stage), (0, 0))[1]) if reruns else 0)
    costs = Costs(activation_bytes=whole, input_bytes=kept, rerun_bytes=again, stash_bytes=stash, **shards)
    unit = costs.of(schedule).unit_bytes
    assert unit is not None
    return [peak * unit for peak in peak_activation(schedule, costs)]


def work(rank: int, names: Sequence[str], store: str, pipe: Connection) -> None:
    """Measure all rows as one of the ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(minutes=5))
    for name in names:
        row = measure(name, rank)
        if rank == 0:
            pipe.send(row)
    dist.barrier()
    dist.destroy_process_group()


def rows_of(names: Sequence[str]) -> list[dict[str, Any]]:
    """All rows, printed as they come."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        store = (Path(folder) / "store").as_uri()
        workers = [context.Process(target=work, args=(rank, names, store, sender)) for rank in range(RANKS)]
        for worker in workers:
            worker.start()
        sender.close()
        try:
            for _ in names:
                rows.append(receiver.recv())
                print(line(rows[-1]), flush=True)
        except EOFError:
            raise SystemExit("the processes of the benchmark ended early") from None
        finally:
            if len(rows) < len(names):
                for worker in workers:
                    worker.kill()
            for worker in workers:
                worker.join()
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the table: measured and simulated kilobytes of each rank, and the largest difference."""
    cells = [
        f"{measured / 1e3:>7.0f}/{simulated / 1e3:<7.0f}"
        for measured, simulated in zip(row["measured_bytes"], row["simulated_bytes"], strict=True)
    ]
    return f"{row['name']:<28}{''.join(cells)} {row['worst']:+.1%}"


def main() -> None:
    """Measure, print, write."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run only the rows whose name contains this; writes nothing")
    args = parser.parse_args()
    names = [name for name in PLANS if args.only in name]
    print(f"{'peak activations, kB':<28}" + "".join(f"{f'rank {rank}':^15}" for rank in range(RANKS)))
    rows = rows_of(names)
    far = [row["name"] for row in rows if abs(row["worst"]) > BOUND]
    print(f"beyond {BOUND:.0%}: {', '.join(far) or 'none'}")
    if not args.only:
        RESULTS.write_text(json.dumps({"ranks": RANKS, "microbatches": MICROBATCHES, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
