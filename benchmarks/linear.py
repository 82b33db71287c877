"""Layers that keep a state against blockwise softmax attention: CPU seconds of a forward and backward, one process.

    OMP_NUM_THREADS=1 python -m benchmarks.linear
    OMP_NUM_THREADS=1 python -m benchmarks.linear --calibration calibration.toml     # instead: what the planner says

With a calibration (``stretto diagnose --calibrate``) of this machine: training steps of a linear, a delta, a hybrid and
a softmax model on one rank, predicted and measured, and the peak of their tracked tensors.  Wants a quiet machine; a
minute.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor
from torch.nn import functional

from stretto.models.chunked import Tokens, summarise
from stretto.parallel.sequence.blockwise import Blockwise
from stretto.parallel.sequence.pieces import Task, attend_over
from stretto.parallel.sequence.ring import Ring
from stretto.parallel.sequence.sight import Sight
from stretto.parallel.wire import Wire
from stretto.planner.request import Request
from stretto.planner.step import step_time
from stretto.planner.tracked import tracked
from stretto.spec.cluster import ClusterSpec
from stretto.spec.contract import Batch
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.memory import ActivationMeter, persistent_bytes
from stretto.trainer.session import Session

KINDS = ("softmax", "linear", "delta")
HEADS, SIZE, TIMES = 4, 64, 3


def run(kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One layer's attention, or what is in its place."""
    length = q.shape[2]
    if kind == "softmax":
        alone = Ring(wire=Wire(None), members=(0,), seat=0, inner=1)
        return attend_over(alone, Task(kernel=Blockwise(), seats=(((0, length),),), sight=Sight(None)), q, k, v)
    decay = torch.full((1, HEADS, length), -0.05, requires_grad=True)
    write = torch.full((1, HEADS, length), 0.5, requires_grad=True) if kind == "delta" else None
    tokens = Tokens(q=q, k=functional.normalize(k, dim=-1), v=v, log_decay=decay, write=write)
    return summarise(tokens).output(torch.zeros(1, HEADS, SIZE, SIZE))


def seconds(kind: str, length: int) -> float:
    """The best of some forwards and backwards; CPU time, since the machine may be busy."""
    heads = [torch.randn(1, HEADS, length, SIZE).requires_grad_() for _ in range(3)]
    found = []
    for _ in range(TIMES):
        started = time.process_time()
        run(kind, *heads).sum().backward()
        found.append(time.process_time() - started)
    return min(found)


def run_of(pattern: tuple[str, ...], calibration: str) -> RunSpec:
    """Two rows of 1,024 tokens through a small model."""
    model = ModelSpec(
        vocab_size=257, hidden_size=256, intermediate_size=704, num_layers=4, num_heads=4, max_positions=1024,
        attention=pattern,
    )  # fmt: skip
    training = TrainingSpec(steps=9, global_batch_size=2, sequence_length=1024, dtype="float32")
    return RunSpec(model=model, plan=PlanSpec(), training=training, cluster=ClusterSpec(calibration=calibration))


def predicted(calibration: str, turns: int) -> None:
    """Print what the planner says of steps, and what they take."""
    print("| layers | step, ms | predicted | memory, MB | predicted |")
    print("|---|---|---|---|---|")
    for pattern in (("softmax",), ("linear",), ("delta",), ("linear", "delta", "linear", "softmax")):
        run = run_of(pattern, calibration)
        session = Session.start(run, 0)
        tokens = torch.randint(0, run.model.vocab_size, (1, 1024))
        positions = torch.arange(1024).expand(1, 1024)
        batches = [
            Batch(tokens=tokens, labels=tokens, positions=positions, documents=None, samples=torch.tensor([row]))
            for row in range(2)
        ]
        meter = ActivationMeter(session)
        with meter.watch():
            session.train_step(1, batches)
        took = []
        for turn in range(2, turns + 2):
            started = time.process_time()  # one thread on one rank: what a quiet machine takes
            session.train_step(turn, batches)
            took.append(time.process_time() - started)
        held = persistent_bytes(session) + meter.peak_bytes
        request = Request(run=run)
        work = request.work(run.plan)
        seconds, peak = step_time(work, request.calibration).total, tracked(work, packed=False)[0].total
        figures = (1e3 * statistics.median(took), 1e3 * seconds, held / 1e6, peak / 1e6)
        print(f"| {', '.join(pattern)} | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |", flush=True)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 16384], help="tokens")
    parser.add_argument("--calibration", metavar="FILE", help="of this machine: compare the planner's figures with it")
    parser.add_argument("--turns", type=int, default=9, help="steps whose median counts, with --calibration")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if options.calibration is not None:
        predicted(options.calibration, options.turns)
        return
    print("| tokens | softmax, ms | linear, ms | delta, ms | softmax / linear | softmax / delta |")
    print("|---|---|---|---|---|---|")
    for length in options.lengths:
        of = {kind: 1e3 * seconds(kind, length) for kind in KINDS}
        ratios = [of["softmax"] / of[kind] for kind in ("linear", "delta")]
        print(f"| {length} | " + " | ".join(f"{of[kind]:.0f}" for kind in KINDS), end=" | ")
        print(" | ".join(f"{ratio:.1f}" for ratio in ratios), end=" |\n", flush=True)


if __name__ == "__main__":
    main()
