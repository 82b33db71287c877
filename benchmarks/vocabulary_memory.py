"""What vocabulary parallelism does to memory: the peak of each rank, with embedding and head split and not.

    OMP_NUM_THREADS=1 python -m benchmarks.vocabulary_memory                    # 4 ranks, 1f1b, a vocabulary of 32,000
    OMP_NUM_THREADS=1 python -m benchmarks.vocabulary_memory --schedule v-half --chunks 2 --vocabulary 8000

One step of a Llama on as many processes as ranks, float32.  ``kept`` is what lives between steps (values, gradients,
moments), ``peak`` the largest sum of live tensors during a step (benchmarks/memory.py), ``tracked`` what the metrics
report (kept, and the activations that autograd, the pipeline and S keep).  MB of each rank, from the first to the last.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.memory import MemoryCounter
from benchmarks.pairs import RESULTS, command, machine
from stretto.spec.contract import Batch
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.memory import ActivationMeter, passing_bytes, persistent_bytes
from stretto.trainer.session import Session

PASSES: dict[str, tuple[str, ...]] = {
    "whole": (),
    "algorithm 1": ("vocabulary:algorithm=1",),
    "algorithm 2": ("vocabulary:algorithm=2",),
}
MICROBATCHES, LENGTH, STEPS = 8, 128, 3


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--chunks", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    return parser.parse_args()


def run_of(args: argparse.Namespace, passes: tuple[str, ...]) -> RunSpec:
    """The run to measure."""
    plan = PlanSpec(pp=args.ranks, schedule=args.schedule, chunks=args.chunks, passes=passes)
    model = ModelSpec(
        vocab_size=args.vocabulary, hidden_size=128, intermediate_size=344, num_layers=8, num_heads=4, initial_std=0.1
    )
    training = TrainingSpec(global_batch_size=MICROBATCHES, sequence_length=LENGTH, dtype="float32")
    return RunSpec(model=model, plan=plan, training=training)


def batches(run: RunSpec, step: int) -> list[Batch]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(step)
    shape = (MICROBATCHES, LENGTH + 1)
    text = torch.randint(0, run.model.vocab_size, shape, generator=generator)
    positions = torch.arange(LENGTH).unsqueeze(0)
    rows = [text[m : m + 1] for m in range(MICROBATCHES)]
    return [
        Batch(
            tokens=row[:, :-1],
            labels=row[:, 1:].contiguous(),
            positions=positions,
            documents=None,
            samples=torch.tensor([m]),
        )
        for m, row in enumerate(rows)
    ]


def measure(run: RunSpec, rank: int) -> dict[str, Any]:
    """The figures of one rank."""
    with MemoryCounter() as counter:
        session = Session.start(run, rank)
        session.train_step(1, batches(run, 1))
        counter.start_peak()
        session.train_step(2, batches(run, 2))
        peak = counter.peak_bytes
    meter = ActivationMeter(session)
    with meter.watch():
        losses = [session.train_step(3, batches(run, 3)).loss]
    seconds = []
    for step in range(4, 4 + STEPS):
        start = time.perf_counter()
        losses.append(session.train_step(step, batches(run, step)).loss)
        seconds.append(time.perf_counter() - start)
    kept = persistent_bytes(session) + passing_bytes(session)
    return {
        "kept": kept,
        "peak": peak,
        "tracked": kept + meter.peak_bytes,
        "seconds": statistics.median(seconds),
        "loss": losses[-1],
    }


def work(rank: int, args: argparse.Namespace, store: str, results: Any) -> None:
    """One process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=args.ranks)
    results.put((rank, {name: measure(run_of(args, passes), rank) for name, passes in PASSES.items()}))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure, print and write."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args = arguments()
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = (Path(folder) / "store").as_uri()
        workers = [context.Process(target=work, args=(rank, args, store, results)) for rank in range(args.ranks)]
        for worker in workers:
            worker.start()
        found = dict(results.get() for _ in workers)
        for worker in workers:
            worker.join()
    rows = {name: [found[rank][name] for rank in range(args.ranks)] for name in PASSES}
    for name, ranks in rows.items():
        for figure in ("kept", "tracked", "peak"):
            megabytes = "  ".join(f"{rank[figure] / 1e6:7.1f}" for rank in ranks)
            print(f"{name:12} {figure:8} {megabytes}   MB")
        print(f"{name:12} a step   {ranks[0]['seconds']:.2f} s, loss {ranks[0]['loss']:.6f}")
    document = {"command": command("vocabulary_memory"), "machine": machine(), "rows": rows}
    (RESULTS / f"vocabulary_memory-{args.schedule}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
