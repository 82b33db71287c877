"""Each schedule of torch.distributed.pipelining: our runtime over torch's, the very same order, real compute.

    OMP_NUM_THREADS=1 python -m benchmarks.pipeline_schedules            # rows that are measured already are kept
    OMP_NUM_THREADS=1 python -m benchmarks.pipeline_schedules --again    # measures all of them anew

Four processes on as many cores as there are; a Llama of 8 layers (benchmarks/model.py), 8 micro-batches of 2
sequences.  Both sides run the same modules cut in the same places; losses and gradient norms of three steps must
agree before anything is timed.  Afterwards two compositions are tried on both sides (pipeline_composed.py).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from benchmarks import pipeline
from benchmarks.model import ours, run_of
from benchmarks.pairs import RESULTS, Case, Effort, Side, command, machine
from benchmarks.pipeline import MICRO_BATCH, Part
from benchmarks.pipeline_composed import CHECKS, check
from benchmarks.processes import measure
from benchmarks.virtual_sides import FOLDED, SINGLE, TORCH, ops_of
from stretto.models.loss import cross_entropy_sum
from stretto.schedule import placement
from stretto.schedule.document import save
from stretto.schedule.families import build
from stretto.schedule.passes.communication import without_messages
from stretto.schedule.schedule import Schedule
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec

RANKS = 4
CPU = torch.device("cpu")
FILE = RESULTS / "pipeline_schedules.json"


def run_for(name: str) -> RunSpec:
    """The run of a row."""
    chunks = 1 if name in SINGLE else 2
    return run_of(PlanSpec(pp=RANKS, chunks=chunks, micro_batch_size=MICRO_BATCH))


def holders_of(name: str, run: RunSpec) -> tuple[int, ...]:
    """The rank of each stage."""
    return (placement.zigzag if name in FOLDED else placement.loop)(run.plan.pp, run.plan.num_stages)


def torch_schedule(name: str, run: RunSpec, modules: dict[int, nn.Module], loss: Callable[..., Tensor]) -> Any:
    """torch's schedule over this rank's ``modules`` by stage."""
    stages: list[Any] = [PipelineStage(module, i, run.plan.num_stages, CPU) for i, module in modules.items()]
    kind: Any = get_schedule_class(name)
    return kind(
        stages[0] if name in SINGLE else stages, n_microbatches=run.num_microbatches, loss_fn=loss, scale_grads=False
    )


def same_order(name: str, run: RunSpec, rank: int) -> Schedule:
    """torch's order as our schedule."""
    if name in SINGLE:
        return without_messages(build(SINGLE[name], ranks=RANKS, microbatches=run.num_microbatches))
    holders = holders_of(name, run)
    modules: dict[int, nn.Module] = {i: nn.Identity() for i, holder in enumerate(holders) if holder == rank}
    theirs = torch_schedule(name, run, modules, lambda y, _: y.sum())
    return Schedule.from_orders(
        [list(ops_of(theirs.pipeline_order[r])) for r in range(RANKS)],
        name=name,
        num_stages=run.plan.num_stages,
        num_microbatches=run.num_microbatches,
        placement=[holders],
    )


def our_side(name: str, rank: int) -> Side:
    """Our runtime on torch's order."""
    run = run_for(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "schedule.json"
        save(same_order(name, run, rank), path)
        return ours(replace(run, plan=replace(run.plan, schedule_file=str(path))), rank)


def torch_side(name: str, rank: int) -> Side:
    """A plain loop on torch's pipeline."""
    run = run_for(name)
    tokens = run.training.global_batch_size * run.training.sequence_length
    parts = {i: Part(run, i) for i, holder in enumerate(holders_of(name, run)) if holder == rank}
    first, last = 0 in parts, run.plan.num_stages - 1 in parts

    def share(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy_sum(logits, labels) / tokens

    schedule = torch_schedule(name, run, dict(parts), share)
    parameters = [p for part in parts.values() for p in part.parameters()]
    return pipeline.torch_side(run, schedule, parameters, first=first, last=last)


def sides(name: str, rank: int) -> tuple[Callable[[], Side], Callable[[], Side]]:
    """What builds both sides."""
    return partial(our_side, name, rank), partial(torch_side, name, rank)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=11, help="alternating pairs (default 11)")
    parser.add_argument("--turn", type=int, default=2, help="steps that a side runs in its turn (default 2)")
    parser.add_argument("--only", default="", help="run only the rows whose name contains this")
    parser.add_argument("--again", action="store_true", help="forget what was measured before")
    parser.add_argument("--no-write", action="store_true", help="leave the results file as it is")
    return parser.parse_args()


def rows(args: argparse.Namespace, known: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each row as it is there: known, or measured now."""
    effort = Effort(pairs=args.pairs, turn=args.turn)
    for name in TORCH:
        if args.only not in name:
            continue
        if name in known:
            yield known[name]
            continue
        case = Case(name=name, num_ranks=RANKS, make=partial(sides, name), wanted=1.0)
        yield measure(case, effort)
    for name in CHECKS:
        if args.only in name:
            yield known[name] if name in known else check(name)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    if "ratio" not in row:
        return f"{row['name']}\n    ours:  {row['ours']}\n    torch: {row['torch']}"
    low, high = row["ratio_quartiles"]
    ours_ms, torch_ms = (1e3 * row["seconds"][side] for side in ("ours", "peer"))
    return (
        f"{row['name']:24}{ours_ms:8.1f}{torch_ms:8.1f}{1 / row['ratio']:9.3f}   {1 / high:.3f} - {1 / low:.3f}"
        f"{row['processor_time_ratio']:8.3f}{row['memory_ratio']:8.3f}{row['loss_and_norm_difference']:10.1e}"
    )


def main() -> None:
    """Print the table, row by row, and write each at once, so that a run that is ended can go on."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    args = arguments()
    before = [] if args.again or not FILE.exists() else json.loads(FILE.read_text())["rows"]
    known = {row["name"]: row for row in before}
    print(
        f"{'':24}{'ours':>8}{'torch':>8}{'speed':>9}   {'quartiles':13}{'cpu':>8}{'memory':>8}{'differs':>10}\n"
        "ours, torch: ms a step of the slowest rank; speed: throughput, ours / torch; cpu, memory: ours / torch"
    )
    for row in rows(args, known):
        print(line(row), flush=True)
        known[row["name"]] = row
        if not args.no_write:
            record = {
                "command": command("pipeline_schedules"),
                "machine": machine(),
                "steps_per_turn": args.turn,
                "rows": [known[name] for name in (*TORCH, *CHECKS) if name in known],
            }
            FILE.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
