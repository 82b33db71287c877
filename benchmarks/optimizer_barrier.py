"""What the barrier at the optimizer step costs, and that it is gone: steady steps on virtual devices.

    OMP_NUM_THREADS=1 python -m benchmarks.optimizer_barrier                  # 4 ranks x 8, zb-h2, zb-v and 1f1b
    OMP_NUM_THREADS=1 python -m benchmarks.optimizer_barrier --only zb-h2 --ms 20

Compute is a wait (stretto/parallel/pipeline/virtual.py) and so is the update; messages, norms, validation and copies
for the rollback are those of training.  With a barrier a step takes the makespan of the schedule and the update.
Without, ranks begin the next step as they finish this one, and a step takes the longest *span* of a rank and the
update (Qi et al. 2023, section 4).  The sides take turns of a few steps; a turn's figure is the time between the ends
of its steps, of the slowest rank.  ``ratio`` is barrier / free, median over the turns, beside what the simulator says.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist

from benchmarks.virtual_rows import Table, play
from stretto.assemble.rank_model import RankModel
from stretto.parallel.mesh import Mesh
from stretto.parallel.pipeline.channel import PeerChannel
from stretto.parallel.pipeline.relay import Relay
from stretto.parallel.pipeline.runtime import Runtime, Seat
from stretto.parallel.pipeline.virtual import VirtualDevice, virtual_stages, wait_until
from stretto.schedule.families import build
from stretto.schedule.op import Kind
from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate import simulate
from stretto.schedule.simulate.costs import Costs
from stretto.spec.contract import Batch, Silent
from stretto.spec.training import TrainingSpec
from stretto.trainer.optimizer import build_optimizer
from stretto.trainer.post_validation import PostValidation
from stretto.trainer.schedules import lowered_and_valid
from stretto.trainer.step import TrainStep

NAMES = ("zb-h2", "zb-v", "zb-h1", "1f1b")
CPU = torch.device("cpu")
WARM = 3
"""Steps at the start of a turn that aren't timed: the ranks' starts spread out."""


class TimedOptimizer:
    """AdamW whose step takes as long as it is told."""

    def __init__(self, optimizer: torch.optim.AdamW, seconds: float) -> None:
        self._optimizer, self._seconds = optimizer, seconds
        self.param_groups, self.state = optimizer.param_groups, optimizer.state

    def step(self) -> None:
        """Update, and wait for the rest of the time."""
        start = time.perf_counter()
        self._optimizer.step()
        wait_until(start + self._seconds)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--ms", type=float, default=10.0, help="duration of F, I and W of a rank, and of the update")
    parser.add_argument("--turns", type=int, default=7, help="turns of each side")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a turn")
    parser.add_argument("--only", default="", help="run only the rows whose name contains this; writes nothing")
    return parser.parse_args()


def sides_of(schedule: Schedule, mesh: Mesh, seconds: float) -> dict[str, Callable[[int], Any]]:
    """What runs one step, with a barrier and without; each side has a model of its own."""
    chunks = schedule.num_stages // schedule.num_ranks
    times = dict.fromkeys((Kind.F, Kind.I, Kind.W), seconds / chunks)
    lowered = lowered_and_valid(schedule)
    rank = mesh.index("pp")
    found: dict[str, Callable[[int], Any]] = {}
    for side in ("barrier", "free"):
        stages = virtual_stages(lowered, rank, mesh=mesh)
        seat = Seat(rank=rank, channel=PeerChannel(mesh, CPU, [lowered]), device=VirtualDevice(times))
        runtime = Runtime(stages, lowered, seat)
        model = RankModel(
            stack=cast(Any, SimpleNamespace(context=lambda batch, place: None)),
            stages=stages,
            units=runtime.units,
            mesh=mesh,
            num_heads=1,
        )
        training = TrainingSpec(clip_norm=1e9)
        optimizer = cast(Any, TimedOptimizer(build_optimizer(model.masters, training), seconds))
        step = TrainStep(model, runtime, optimizer, training=training, seed=0, observer=Silent())
        tokens = torch.ones(1, 1, dtype=torch.int64)
        batch = Batch(tokens=tokens, labels=tokens, positions=tokens, documents=None, samples=tokens[:, 0])
        batches = [batch] * schedule.num_microbatches
        run = step.run if side == "barrier" else PostValidation(step, Relay(mesh), patience=0).advance
        found[side] = lambda number, run=run, batches=batches: run(number, batches)  # type: ignore[misc]
    return found


def measure(name: str, mesh: Mesh, args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    seconds = args.ms / 1e3
    schedule = build(name, ranks=args.ranks, microbatches=args.microbatches)
    figures = simulate(schedule, Costs(F=seconds, I=seconds, W=seconds))
    sides = sides_of(schedule, mesh, seconds)
    times: dict[str, list[float]] = {side: [] for side in sides}
    number = 0
    for turn in range(1 + args.turns):
        for side, step in sides.items():
            dist.barrier()
            for at in range(WARM + args.steps):
                if at == WARM:
                    start = time.perf_counter()
                number += 1
                step(number)
            taken = torch.tensor((time.perf_counter() - start) / args.steps, dtype=torch.float64)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            if turn:
                times[side].append(float(taken))
    simulated = {"barrier": figures.makespan + seconds, "free": figures.span + seconds}
    return {
        "name": name,
        "ms": args.ms,
        **{f"{side}_ms": statistics.median(found) * 1e3 for side, found in times.items()},
        **{f"simulated_{side}_ms": value * 1e3 for side, value in simulated.items()},
        "barrier_over_free": statistics.median(a / b for a, b in zip(times["barrier"], times["free"], strict=True)),
        "simulated_ratio": simulated["barrier"] / simulated["free"],
        "free_over_span": statistics.median(times["free"]) / simulated["free"],
    }


def cases(args: argparse.Namespace) -> list[str]:
    """All that ``--only`` leaves."""
    return [name for name in NAMES if args.only in name]


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    columns = ("barrier_ms", "simulated_barrier_ms", "free_ms", "simulated_free_ms")
    cells = "".join(f"{row[column]:10.1f}" for column in columns)
    return f"{row['name']:10}{cells}{row['barrier_over_free']:9.3f}{row['simulated_ratio']:9.3f}"


def main() -> None:
    """Start the ranks."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args = arguments()
    print(f"{'':10}   barrier simulated      free simulated    ratio  simulated")
    play(
        Table(script="optimizer_barrier", cases=cases, measure=measure, line=line), args, keep="optimizer_barrier.json"
    )


if __name__ == "__main__":
    main()
