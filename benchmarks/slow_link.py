"""The 2D mesh of Ulysses and ring against both of them, over real links: two nodes with a slow link between them.

    OMP_NUM_THREADS=1 python -m benchmarks.slow_link                       # 8 ranks; as root
    OMP_NUM_THREADS=1 python -m benchmarks.slow_link --ranks 4 --slower 4

Nodes are network namespaces (namespaces.py): inside a node messages go over loopback, between nodes through one link
that all its ranks share and that the kernel holds to a rate.  Messages, processes and gloo are real; compute is a wait
in proportion to its work (virtual_context.py), which leaves the processors to the messages.  At ``1x`` the link carries
the keys and values of one rank, as many heads of each as of queries, in a quarter of a block's forward.

Wanted: the best mesh never slower than the better of ring and Ulysses.  A time is that of the slowest rank, of the
fastest turn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from typing import Any

import torch.distributed as dist

from benchmarks.namespaces import Nodes
from benchmarks.node_ranks import run_on_nodes
from benchmarks.pairs import RESULTS, command, machine
from benchmarks.virtual_context import HEADS, Side, best_of
from stretto.parallel.pipeline.virtual import wake_on_time
from stretto.parallel.wire import Wire
from stretto.spec.plan import PlanSpec

HEAD_SIZE = 4
"""So many numbers of a head travel: a few hundred kilobytes of keys and values a rank."""


def ways(ranks: int) -> dict[str, dict[str, Any]]:
    """Plans by name; ``inside``: what neighbours do."""
    found: dict[str, dict[str, Any]] = {"ring": {}, "ulysses": {"context": "ulysses"}}
    found["double ring"] = {"inner_ring": ranks // 2}
    for ulysses in sorted({2, ranks // 2}):
        for inner in ("ulysses", "ring"):
            name = f"mesh {ulysses}x{ranks // ulysses}, {inner} inside"
            found[name] = {"context": "mesh", "ulysses": ulysses, "context_inner": inner}
    rings = [name for name in found if "ring inside" not in name and name != "ulysses"]
    return found | {f"{name}, keys kept": {**found[name], "context_keep": True} for name in rings}


def side_of(args: argparse.Namespace, wire: Wire, way: dict[str, Any], kv_heads: int) -> Side:
    """One plan."""
    plan = PlanSpec(cp=args.ranks, **way)
    return Side(plan, wire, tokens=args.tokens, compute=args.compute, shape=(kv_heads, HEAD_SIZE))


def figures(times: dict[str, float], slower: float, kv_heads: int) -> dict[str, Any]:
    """One row."""
    mesh, parent = (
        min((t, name) for name, t in times.items() if name.startswith(kind)) for kind in ("mesh", ("ring", "ulysses"))
    )
    told = ", ".join(f"{name} {t:.2f}" for name, t in times.items())
    what = f"heads {HEADS}:{kv_heads}, link {slower:g}x slower: {parent[1]} / {mesh[1]} ({told} s)"
    row = {"what": what, "figure": parent[0] / mesh[0], "wanted": ">= 1"}
    return {**row, "kv_heads": kv_heads, "slower": slower, "seconds": times}


def measure(args: argparse.Namespace, rank: int, nodes: Nodes) -> list[dict[str, Any]]:
    """All rows, on one rank."""
    wake_on_time()
    wire, rows = Wire(dist.group.WORLD), []
    for kv_heads, slower in itertools.product(args.kv_heads, args.slower):
        sides = {name: side_of(args, wire, way, kv_heads) for name, way in ways(args.ranks).items()}
        if rank == 0:
            nodes.limit(8.0 * HEADS * HEAD_SIZE * args.tokens / args.ranks / (args.compute / args.ranks / 4) / slower)
        dist.barrier()
        times = {name: row["seconds"] for name, row in best_of(sides, args.turns).items()}
        rows.append(row := figures(times, slower, kv_heads))
        if rank == 0:
            print(f"{row['figure']:8.3f}  {row['wanted']:6} {row['what']}", flush=True)
    return rows


def main() -> None:
    """Measure, and keep the figures of a whole run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8, choices=(4, 8), help="processes, half of them on each node")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--compute", type=float, default=1.0, help="seconds of a rank's forward, where work is equal")
    parser.add_argument("--slower", type=float, nargs="+", default=[1.0, 4.0, 16.0], help="how slow the link is")
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[8, 2], help=f"key/value heads of {HEADS} heads")
    args = parser.parse_args()
    rows = run_on_nodes(lambda rank, nodes, _: measure(args, rank, nodes), args.ranks)
    if len(sys.argv) == 1:
        record = {"command": command("slow_link"), "machine": machine(), "turns": args.turns, "rows": rows}
        (RESULTS / "slow_link.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
