"""A frozen front computed in the bubbles of the step before, against the same layers in the pipeline: virtual devices.

    OMP_NUM_THREADS=1 python -m benchmarks.frozen_front                        # 32 layers, 8 frozen, 4 ranks x 8
    OMP_NUM_THREADS=1 python -m benchmarks.frozen_front --layers 16 --frozen 4 --only zb-v

Three sides take turns in one sitting: ``filled`` plays the pass ``fill-bubbles``; ``front`` the same frozen work and
messages, but before the step's other work; ``pipeline`` has no such pass: the frozen layers lie in the first stages,
which have no backward there, and layers are moved between stages at random as long as the simulated step gets shorter.
Compute is a wait (stretto/parallel/pipeline/virtual.py), all else is real; a step's time is that of its slowest rank.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.virtual_rows import Table, play
from stretto.parallel.mesh import Mesh
from stretto.parallel.pipeline.channel import PeerChannel
from stretto.parallel.pipeline.landing import Landing
from stretto.parallel.pipeline.runtime import Runtime, Seat
from stretto.parallel.pipeline.segment import Segment, Value
from stretto.parallel.pipeline.stage import Stage
from stretto.parallel.pipeline.virtual import WIDTH, virtual_stages, wait_until
from stretto.schedule.families import build
from stretto.schedule.op import Kind, Op
from stretto.schedule.passes import change
from stretto.schedule.passes.freeze import freeze
from stretto.schedule.passes.hand_over import Front, drained, hand_over, with_landing
from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate import simulate
from stretto.schedule.simulate.costs import Costs
from stretto.spec.contract import Batch
from stretto.spec.stages import balanced
from stretto.trainer.schedules import lowered_and_valid

NAMES = ("1f1b", "zb-h1", "zb-v", "chimera")
CPU = torch.device("cpu")
WARM = 2
TRIES = 600
"""Layouts of the layers that are simulated for the pipeline without the pass."""
LEAST = 1e-9
"""Of an operation that a stage doesn't have."""

Side = tuple[Schedule, Costs, Front | None]
"""What is played, what it costs in seconds, and where its front is."""


class StageDevice:
    """A virtual device on which operations of each stage take their own time."""

    def __init__(self, seconds: Mapping[tuple[Kind, int], float]) -> None:
        self._seconds = seconds
        self._began = 0.0

    def begin(self, op: Op) -> None:
        """Note the time."""
        self._began = time.perf_counter()

    def end(self, op: Op) -> None:
        """Wait for the rest."""
        wait_until(self._began + self._seconds[op.kind, op.stage])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--layers", type=int, default=32, help="of the whole model")
    parser.add_argument("--frozen", type=int, default=8, help="of them, in front")
    parser.add_argument("--ms", type=float, default=2.0, help="duration of F, I and W of one layer")
    parser.add_argument("--turns", type=int, default=7, help="steps of each side that are timed")
    parser.add_argument("--only", default="", help="run only the rows whose name contains this; writes nothing")
    return parser.parse_args()


def costs_of(layers: tuple[int, ...], frozen: int, layer: float) -> Costs:
    """Seconds per stage where the first ``frozen`` of all layers have no backward."""
    trained, at = [], 0
    for number in layers:
        trained.append(max(0, at + number - max(at, frozen)))
        at += number
    backward = [max(LEAST, number * layer) for number in trained]
    return Costs(F=[number * layer for number in layers], I=backward, W=backward)


def in_the_pipeline(name: str, args: argparse.Namespace) -> Side:
    """No pass; layers lie as is best under the simulator."""
    layer, bare = args.ms / 1e3, build(name, ranks=args.ranks, microbatches=args.microbatches)

    def side(layers: tuple[int, ...]) -> Side:
        whole = next(i for i in range(len(layers)) if sum(layers[: i + 1]) > args.frozen)
        schedule = freeze(bare, stages=list(range(whole))) if whole else bare
        return schedule, costs_of(layers, args.frozen, layer), None

    def step(layers: tuple[int, ...]) -> float:
        return simulate(*side(layers)[:2]).makespan

    best, draw = balanced(args.layers, bare.num_stages), random.Random(0)
    least = step(best)
    for _ in range(TRIES):
        other = best
        for _ in range(draw.randint(1, 3)):
            source, target = draw.sample(range(len(best)), 2)
            other = moved(other, source, target) if other[source] > 1 else other
        if (found := step(other)) <= least:
            best, least = other, found
    return side(best)


def moved(layers: tuple[int, ...], source: int, target: int) -> tuple[int, ...]:
    """One layer fewer in one stage and one more in another."""
    return tuple(n - (i == source) + (i == target) for i, n in enumerate(layers))


def ahead(name: str, where: str, args: argparse.Namespace) -> Side:
    """The front of the next step in this one."""
    layer, bare = args.ms / 1e3, build(name, ranks=args.ranks, microbatches=args.microbatches)
    front = Front(stages=bare.num_stages, layers=args.frozen, microbatches=args.microbatches)
    costs = costs_of(balanced(args.layers - args.frozen, bare.num_stages), 0, layer)
    options = {"frozen": "+".join([repr(layer)] * args.frozen), "units": args.microbatches, "where": where}
    filled, priced = change(bare, "fill-bubbles", options=options, costs=costs)
    return hand_over(filled, front), with_landing(priced), front


def player(side: Side, mesh: Mesh) -> Callable[[], Any]:
    """What plays one step after the other."""
    schedule, costs, front = side
    rank, lowered, found = mesh.index("pp"), lowered_and_valid(schedule), costs.of(schedule)
    times: dict[tuple[Kind, int], float] = {}
    for stage in range(schedule.num_stages):
        for kind in (Kind.F, Kind.I, Kind.W):
            times[kind, stage] = float(getattr(found, kind.name)[stage])
        times[Kind.B, stage] = times[Kind.I, stage] + times[Kind.W, stage]
    stages = virtual_stages(drained(schedule, front) if front else schedule, rank, mesh=mesh)
    landing = None
    if front is not None:
        stages |= {stage: frozen_stage(stage) for stage in front.first_layers()}
        homes = [
            schedule.rank_of(front.landing, schedule.voice[front.microbatches + m]) for m in range(front.microbatches)
        ]
        if rank in homes:
            landing = stages[front.landing] = Landing(front.landing, front.microbatches)
            for microbatch in (m for m, home in enumerate(homes) if home == rank):
                landing.keep(microbatch, torch.ones(WIDTH, WIDTH))
    channel = PeerChannel(mesh, CPU, [lowered])
    runtime = Runtime(stages, lowered, seat=Seat(rank=rank, channel=channel, device=StageDevice(times)))
    tokens = torch.ones(1, 1, dtype=torch.int64)
    batch = Batch(tokens=tokens, labels=tokens, positions=tokens, documents=None, samples=tokens[:, 0])
    batches, one = [batch] * schedule.num_microbatches, torch.ones(())

    def step() -> None:
        if landing is not None:
            landing.turn()
        runtime.step(batches, lambda _: None, lambda: one)

    return step


def frozen_stage(index: int) -> Stage:
    """A layer of the front: a product without a graph."""
    weight = torch.zeros(WIDTH, WIDTH)

    def run(x: Value, context: Any, batch: Any) -> torch.Tensor:
        return (x if isinstance(x, torch.Tensor) else torch.ones(WIDTH, WIDTH)) @ weight

    return Stage(index, [Segment(name=str(index), run=run, units=[])])


def measure(name: str, mesh: Mesh, args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    sides = {
        "filled": ahead(name, "bubbles", args),
        "front": ahead(name, "front", args),
        "pipeline": in_the_pipeline(name, args),
    }
    simulated = {key: simulate(schedule, costs).makespan for key, (schedule, costs, _) in sides.items()}
    steps = {key: player(side, mesh) for key, side in sides.items()}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(WARM + args.turns):
        for side, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            step()
            taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            if turn >= WARM:
                times[side].append(float(taken))
    row: dict[str, Any] = {"name": name, "ms": args.ms}
    for side, found in times.items():
        row[f"{side}_ms"] = statistics.median(found) * 1e3
        row[f"simulated_{side}_ms"] = simulated[side] * 1e3
    for side in ("front", "pipeline"):
        pairs = zip(times[side], times["filled"], strict=True)
        row[f"{side}_over_filled"] = statistics.median(a / b for a, b in pairs)
        row[f"simulated_{side}_over_filled"] = simulated[side] / simulated["filled"]
    return row


def cases(args: argparse.Namespace) -> list[str]:
    """All that ``--only`` leaves."""
    return [name for name in NAMES if args.only in name]


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    columns = [f"{kind}{side}_ms" for side in ("filled", "front", "pipeline") for kind in ("", "simulated_")]
    cells = "".join(f"{row[column]:10.1f}" for column in columns)
    ratios = "".join(f"{row[f'{kind}pipeline_over_filled']:10.3f}" for kind in ("", "simulated_"))
    return f"{row['name']:10}{cells}{ratios}"


def main() -> None:
    """Start the ranks."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args = arguments()
    heads = "".join(f"{head:>10}" for side in ("filled", "front", "pipeline") for head in (side, "simulated"))
    print(f"{'':10}{heads}{'ratio':>10}{'simulated':>10}")
    play(Table(script="frozen_front", cases=cases, measure=measure, line=line), args, keep="frozen_front.json")


if __name__ == "__main__":
    main()
