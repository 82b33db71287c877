"""Parameters, gradients and optimizer states divided over different ranks, over a slow link between two nodes.

    OMP_NUM_THREADS=1 python -m benchmarks.state_factors                 # 4 ranks; as root
    OMP_NUM_THREADS=1 python -m benchmarks.state_factors --rates 1e9     # bytes a second of the link

Nodes are network namespaces (namespaces.py) with two ranks each; training is real, in float32, with several
micro-batches a step.  P, G and O are the ranks that divide parameters, gradients and optimizer states.  A time is that
of the slowest rank, of the fastest step; the bytes over the link are the kernel's count of what left node 0; those of
the states are the largest rank's, measured, over what the planner says.

Wanted: with parameters and gradients inside the nodes (2, 2, 4) a step no slower than ZeRO-3 over all (4, 4, 4), with
fewer bytes than copies of whole shards (2, 2, 2).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.namespaces import Nodes
from benchmarks.node_ranks import run_on_nodes
from benchmarks.pairs import RESULTS, command, machine
from stretto.planner.memory import memory
from stretto.planner.request import Request
from stretto.spec.contract import Batch
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.memory import passing_bytes, persistent_bytes
from stretto.trainer.session import Session

RANKS = 4
MODEL = ModelSpec(vocab_size=512, hidden_size=256, intermediate_size=768, num_layers=6, num_heads=8)
TRAINING = TrainingSpec(global_batch_size=16, sequence_length=64)
FACTORS = ((1, 1, 1), (1, 1, 4), (1, 2, 4), (1, 4, 4), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4))


def run_of(factors: tuple[int, int, int]) -> RunSpec:
    """Data ranks alone, their states divided so."""
    p, g, o = factors
    plan = PlanSpec(dp_replicate=RANKS, shard_parameters=p, shard_gradients=g, shard_optimizer=o)
    return RunSpec(model=MODEL, plan=plan, training=TRAINING)


def batches_of(run: RunSpec, index: int) -> list[Batch]:
    """This rank's micro-batches: any tokens."""
    rows, length = run.plan.micro_batch_size, run.training.sequence_length
    generator = torch.Generator().manual_seed(index)
    found = []
    for _ in range(run.num_microbatches):
        tokens = torch.randint(MODEL.vocab_size, (rows, length + 1), generator=generator)
        numbers = torch.arange(length).expand(rows, length)
        found.append(
            Batch(
                tokens=tokens[:, :-1].contiguous(),
                labels=tokens[:, 1:].contiguous(),
                positions=numbers,
                documents=torch.zeros_like(numbers),
                samples=torch.arange(rows),
            )
        )
    return found


def sent_bytes(interface: str) -> int:
    """What has left this node over the link so far."""
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == interface:
            return int(counts.split()[8])
    raise SystemExit(f"there is no interface {interface} here.")


def state_bytes(session: Session) -> float:
    """Of the largest rank."""
    found = torch.tensor(float(persistent_bytes(session) + passing_bytes(session)))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def step(session: Session, number: int, interface: str) -> tuple[float, int]:
    """Seconds of the slowest rank, and the bytes that left this node."""
    batches = batches_of(session.run, session.mesh.dp_index)
    dist.barrier()
    sent, start = sent_bytes(interface), time.perf_counter()
    session.train_step(number, batches)
    for unit in session.model.units:
        unit.ready()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.barrier()
    sent = sent_bytes(interface) - sent
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds), sent


def measure(args: argparse.Namespace, rank: int, nodes: Nodes, interface: str) -> list[dict[str, Any]]:
    """A row for each choice of factors, its seconds by rate of the link; turns alternate between the choices."""
    sessions = {factors: Session.start(run_of(factors), rank) for factors in FACTORS}
    rows: dict[tuple[int, ...], dict[str, Any]] = {f: {"factors": f, "seconds": {}} for f in FACTORS}
    number = 0
    for rate in args.rates:
        if rank == 0:
            nodes.limit(rate)
        best = dict.fromkeys(FACTORS, float("inf"))
        for turn in range(args.turns + 1):
            number += 1
            for factors, session in sessions.items():
                seconds, sent = step(session, number, interface)
                if turn:  # the first one makes buffers and connections
                    best[factors] = min(best[factors], seconds)
                    rows[factors]["link_bytes"] = sent
        for factors in FACTORS:
            rows[factors]["seconds"][f"{rate:g}"] = best[factors]
    for factors, session in sessions.items():
        said = memory(Request(run=session.run).work(session.run.plan))[0]
        rows[factors]["state_bytes"] = state_bytes(session)
        rows[factors]["predicted_bytes"] = said.parameters + said.gradients + said.optimizer
    return list(rows.values())


def show(rows: list[dict[str, Any]]) -> None:
    """A table, a line for each choice."""
    rates = list(rows[0]["seconds"])
    print("  P  G  O   states  / planner's    over the link   seconds at " + ", ".join(f"{r} B/s" for r in rates))
    for row in rows:
        p, g, o = row["factors"]
        states = row["state_bytes"] / 1e6
        times = "  ".join(f"{row['seconds'][rate]:8.3f}" for rate in rates)
        ratio = row["state_bytes"] / row["predicted_bytes"]
        print(f"{p:3}{g:3}{o:3} {states:7.1f} MB  {ratio:6.3f}   {row['link_bytes'] / 1e6:11.1f} MB   {times}")


def main() -> None:
    """Measure, and keep the figures of a whole run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[400e6, 100e6, 25e6], help="bytes a second of the link"
    )
    args = parser.parse_args()
    rows = run_on_nodes(lambda rank, nodes, interface: measure(args, rank, nodes, interface), RANKS)
    show(rows)
    if len(sys.argv) == 1:
        record = {"command": command("state_factors"), "machine": machine(), "turns": args.turns, "rows": rows}
        (RESULTS / "state_factors.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
