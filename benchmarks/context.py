"""Ways of cutting attention over cp, on virtual devices and links; and what a rank keeps for backward, for real.

    OMP_NUM_THREADS=1 python -m benchmarks.context                     # 8 ranks, 8k tokens
    OMP_NUM_THREADS=1 python -m benchmarks.context --only memory       # or: zigzag, hidden, mesh

zigzag   a causal ring with zigzag shares against contiguous ones, messages free: ratio of times, wanted >= 1.7, and the
         fullest rank's work over the mean, wanted <= 1.03
hidden   the share of message time that compute hides where a block's compute exceeds its message, wanted >= 0.9
mesh     two nodes of four with a link between them from equal to 16 times slower: the 2D mesh against the better of
         ring and Ulysses, wanted never slower
memory   bytes that a real small model keeps for backward, cp = 1, 2, 4, wanted 1/cp within 10%

Compute and links are waits (virtual_context.py); the rest is what training runs.  A time is that of the slowest rank,
of the best turn, since on a busy machine processes wake late, which only adds.  Nothing here says how fast a kernel is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from benchmarks.pairs import RESULTS, command, machine
from benchmarks.processes import free_port
from benchmarks.virtual_context import HEAD_SIZE, KV_HEADS, Links, Side, VirtualWire, best_of
from stretto.parallel.pipeline.virtual import wake_on_time
from stretto.spec.contract import Batch
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.memory import ActivationMeter
from stretto.trainer.session import Session

RING: dict[str, Any] = {"context": "ring"}


def sides_of(args: argparse.Namespace, links: Links, plans: dict[str, dict[str, Any]]) -> dict[str, Side]:
    """Ways of cutting, by their plans, all on the same links."""
    found = {}
    for name, way in plans.items():
        plan = PlanSpec(cp=args.ranks, **way)
        found[name] = Side(plan, VirtualWire(dist.group.WORLD, links), tokens=args.tokens, compute=args.compute)
    return found


def links_of(args: argparse.Namespace, *, message: float, slower: float = 1.0) -> Links:
    """Links on which a rank's own keys and values take ``message`` seconds, and between nodes ``slower`` times that."""
    num_bytes = 2 * KV_HEADS * HEAD_SIZE * 4 * args.tokens / args.ranks
    return Links(node=max(1, args.ranks // 2), inside=num_bytes / message, between=num_bytes / message / slower)


def zigzag(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Balanced against plain."""
    links = links_of(args, message=1e-6)
    sides = sides_of(args, links, {layout: {"context_layout": layout} for layout in ("zigzag", "contiguous")})
    found = best_of(sides, args.turns)
    ratio = found["contiguous"]["seconds"] / found["zigzag"]["seconds"]
    ideal = args.compute * 3.5
    return [
        {"what": "contiguous ring / zigzag ring, time", "figure": ratio, "wanted": ">= 1.7"},
        {"what": "zigzag: fullest rank / mean work", "figure": found["zigzag"]["balance"], "wanted": "<= 1.03"},
        {"what": "contiguous: fullest rank / mean work", "figure": found["contiguous"]["balance"], "wanted": ""},
        {"what": "zigzag: time / compute alone", "figure": found["zigzag"]["seconds"] / ideal, "wanted": ""},
    ]


def hidden(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Messages of half a block's compute."""
    links = links_of(args, message=args.compute / args.ranks / 2)
    ways: dict[str, dict[str, Any]] = {
        "ring": RING,
        "double ring": {"inner_ring": args.ranks // 2},
        "token-ring": {"context": "token-ring"},
        "all-gather": {"context": "all-gather"},
    }
    sides = sides_of(args, links, ways)
    return [
        {"what": f"{name}: share of message time hidden", "figure": row["hidden"], "wanted": ">= 0.9"}
        for name, row in best_of(sides, args.turns).items()
    ]


def mesh(args: argparse.Namespace) -> list[dict[str, Any]]:
    """2D against its parents."""
    rows = []
    for slower in (1, 4, 16):
        links = links_of(args, message=args.compute / args.ranks / 4, slower=slower)
        ways: dict[str, dict[str, Any]] = {"ring": RING, "ulysses": {"context": "ulysses"}}
        for ulysses, inner in itertools.product((2, args.ranks // 2), ("ulysses", "ring")):
            name = f"mesh {ulysses}x{args.ranks // ulysses}, {inner} inside"
            ways[name] = {"context": "mesh", "ulysses": ulysses, "context_inner": inner}
        ways["double ring"] = {"inner_ring": args.ranks // 2}
        sides = sides_of(args, links, ways)
        times = {name: row["seconds"] for name, row in best_of(sides, args.turns).items()}
        parents = min(times["ring"], times["ulysses"])
        best = min(t for name, t in times.items() if name.startswith("mesh"))
        told = ", ".join(f"{name} {1e3 * t:.0f}" for name, t in times.items())
        what = f"link between nodes {slower}x slower: better parent / mesh ({told} ms)"
        rows.append({"what": what, "figure": parents / best, "wanted": ">= 1", "seconds": times})
    return rows


MODEL = ModelSpec(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_layers=3, num_heads=8, num_kv_heads=4, max_positions=4096
)


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Bytes kept for backward."""
    length, rank = 2048, dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 64, (1, length), generator=generator)
    batch = Batch(
        tokens=tokens,
        labels=tokens,
        positions=torch.arange(length).unsqueeze(0),
        documents=None,
        samples=torch.zeros(1, dtype=torch.int64),
    )
    rows, peaks = [], {}
    for cp in (1, 2, 4):
        plan = PlanSpec(cp=cp, dp_replicate=args.ranks // cp)
        training = TrainingSpec(sequence_length=length, global_batch_size=plan.dp)
        session = Session.start(RunSpec(model=MODEL, plan=plan, training=training), rank)
        meter = ActivationMeter(session)
        with meter.watch():
            session.train_step(1, [batch])
        peak = torch.tensor(float(meter.peak_bytes))
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        peaks[cp] = float(peak)
        what = f"cp {cp}: kept for backward x cp / that of one rank ({peaks[cp] / 2**20:.1f} MiB)"
        rows.append({"what": what, "figure": peaks[cp] * cp / peaks[1], "wanted": "0.9 - 1.1"})
    return rows


PARTS = {"zigzag": zigzag, "hidden": hidden, "mesh": mesh, "memory": memory}


def work(rank: int, args: argparse.Namespace, port: int) -> None:
    """One rank."""
    torch.set_num_threads(1)
    wake_on_time()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.ranks)
    rows = []
    for name, part in PARTS.items():
        if args.only in name:
            for row in part(args):
                rows.append({"part": name, **row})
                if rank == 0:
                    print(f"{row['figure']:8.3f}  {row['wanted']:10} {row['what']}", flush=True)
    if rank == 0 and not args.only:
        record = {"command": command("context"), "machine": machine(), "turns": args.turns, "rows": rows}
        (RESULTS / "context.json").write_text(json.dumps(record, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Start the ranks."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8, help="processes; a multiple of 4")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--compute", type=float, default=0.5, help="seconds of a rank's forward, where work is equal")
    parser.add_argument("--only", default="", help="a part: " + ", ".join(PARTS))
    args = parser.parse_args()
    port = free_port()
    start_processes(work, (args, port), nprocs=args.ranks, start_method="fork")


if __name__ == "__main__":
    main()
