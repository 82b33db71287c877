"""Groups of their own for the documents of a step, against a static mesh of the size that the longest needs.

    OMP_NUM_THREADS=1 python -m benchmarks.dynamic_groups              # 8 ranks, seeds 0, 1 and 2

Lengths from a long tail: log-normal, mu = ln 2048, sigma = 1.4, clipped to 64 and 65,536 tokens.  A rank has memory for
8,192 tokens of a micro-batch, so that the longest document needs 8 ranks.

everywhere   rows of 65,536 tokens, packed best-fit, cut in zigzag over 8 ranks, attention within documents; all keys go
             all the way round, as in the papers' static meshes
packed       `plan.cp = 8`: the same, but keys go only to those who see some, as this version's static mesh does
dynamic      `plan.context_groups = "dynamic"`: each document over ranks of its own
offloaded    the same with `plan.offload` and full recompute: of long documents the activations of some blocks are on
             the host, as many as their own forward hides, so that they need fewer ranks (copies are waits, too)
exchanged    `plan.context = "ulysses"` with dynamic groups, FlexSP's way: the ranks of a document share its heads
packed_exchanged   the static mesh that does so

Processes, messages and the placing are real; compute is a wait in proportion to counted work (linear layers by
tokens, attention by pairs that see each other), messages one in proportion to bytes (virtual_context.py). The figures
are those of one layer of a model on devices of a cluster preset, at half their peak, all of it slowed down alike
(`--slower`), so that this machine keeps up. Ranks are on different nodes (`apart`: what groups save are messages over
the network) or on one (`together`: only balance is left to win). Bytes are those that training in bfloat16 sends
(keys and values in 2 bytes, their gradients in 4); gathering parameters isn't counted. A time is that of the slowest
rank, of the best turn. `ideal` is computed, not played: a static mesh that has no imbalance and hides all messages
that it can.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from benchmarks.pairs import RESULTS, command, machine
from benchmarks.processes import free_port
from benchmarks.virtual_context import BACKWARD, CutRows, Links, NoDropout, VirtualKernel, VirtualWire
from stretto.data.packing import best_fit
from stretto.parallel.pipeline.virtual import wait_until, wake_on_time
from stretto.parallel.sequence.groups import GroupedAttend
from stretto.parallel.sequence.opening import ContextAttend
from stretto.parallel.sequence.sight import Sight
from stretto.planner.document_costs import HOST_BYTES_PER_SECOND, Costs, Host, host_of
from stretto.planner.document_groups import Placement, assign
from stretto.planner.document_mix import static_time
from stretto.planner.flops import parameters
from stretto.planner.group_messages import Links as LinkCosts
from stretto.planner.group_messages import token_cost
from stretto.planner.sequence_volume import Heads
from stretto.spec.contract import SequencePart
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_cluster import CLUSTERS
from stretto.spec.presets_model import model_preset
from stretto.spec.reach import Reach
from stretto.spec.sequence import Arrangement, Section, count, cut_sequence, group_sizes

SHORTEST, LONGEST, MEDIAN, SIGMA = 64, 65536, 2048, 1.4
EFFICIENCY = 0.5
"""Share of the peak that compute reaches."""
VIRTUAL_BYTES = 4
"""Bytes of a token's key and value here: one head of size one, bfloat16."""
PASSED = 4
"""Bytes passed on in forward and backward, in those of keys and values: these twice, and their gradients in float32."""
ASKED = 1.8
EVERYWHERE = "everywhere"
SHARED_HEADS = 8
"""Query heads of the sides that share them, each of size one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """What things take, forward."""

    pair: float
    token: float
    heads: Heads
    """Of the layer."""
    host: Host
    """Where activations can be; of the whole model, whose copies each layer has its share of."""

    @property
    def token_bytes(self) -> int:
        """Of keys and values of one token."""
        return 2 * self.heads.kv_heads * self.heads.head_size * self.heads.element_bytes

    def costs(self, rate: float, ranks: int, *, away: bool = False, exchanged: bool = False) -> Costs:
        """Forward and backward, where a link carries ``rate`` bytes a second (of this slowed-down world)."""
        links = LinkCosts(near=0, near_byte=1 / rate, byte=1 / rate)
        groups = [Arrangement(ranks=n, ulysses=n) for n in group_sizes(ranks) if n > 1]
        return Costs(
            pair=(1 + BACKWARD) * self.pair,
            token=3 * self.token,
            exchange=PASSED * self.token_bytes / rate,
            host=self.host if away else None,
            messages={who.ranks: token_cost(who, self.heads, links) for who in groups} if exchanged else None,
        )

    def virtual_heads(self, exchanged: bool) -> tuple[int, int]:
        """Query and key/value heads of size one that stand for the layer's: as few as the side needs."""
        kv_heads = max(1, SHARED_HEADS * self.heads.kv_heads // self.heads.heads)
        return (SHARED_HEADS, kv_heads) if exchanged else (1, 1)


def seconds_of(model_name: str, cluster: str, slower: float) -> Seconds:
    """Of one layer."""
    model = model_preset(model_name)
    rate = EFFICIENCY * CLUSTERS[cluster].peak_flops_bfloat16 / slower
    return Seconds(
        pair=4 * model.num_heads * model.head_size / rate,
        token=2 * parameters(model).layer_matrices / model.num_layers / rate,
        heads=Heads(rows=1, heads=model.num_heads, kv_heads=model.kv_heads, head_size=model.head_size, element_bytes=2),
        host=host_of(model, "full", element_bytes=2, per_byte=slower / HOST_BYTES_PER_SECOND / model.num_layers),
    )


def lengths_of(seed: int, tokens: int) -> list[int]:
    """Documents until there are ``tokens``."""
    draw, found = random.Random(seed), list[int]()
    while sum(found) < tokens:
        found.append(min(LONGEST, max(SHORTEST, round(draw.lognormvariate(math.log(MEDIAN), SIGMA)))))
    return found


def packed(lengths: Sequence[int], rank: int, ranks: int) -> list[CutRows]:
    """Rows of ``LONGEST`` tokens at most, each cut over all ranks."""
    order = sorted(lengths, reverse=True)
    row_of = best_fit(np.array(order), LONGEST)
    found = []
    for row in range(int(row_of.max()) + 1):
        documents = [n for n, r in zip(order, row_of, strict=True) if r == row]
        starts = np.cumsum([0, *documents[:-1]])
        shares = cut_sequence(sum(documents), ranks, "zigzag")
        tokens = torch.cat([torch.arange(*part) for part in shares[rank]])
        first = torch.from_numpy(np.repeat(starts, documents)).unsqueeze(0)
        found.append(CutRows(SequencePart(shares=shares, tokens=tokens, documents=None), first))
    return found


def placed(lengths: Sequence[int], rank: int, placement: Placement) -> list[CutRows]:
    """The micro-batches of a placement."""
    found: list[CutRows] = []
    for number in range(placement.micro_batches):
        sections, at, longest, away = [], 0, 1, 0
        for piece in placement.pieces:
            if piece.micro_batch == number and piece.first <= rank < piece.first + piece.ranks:
                length = lengths[piece.document]
                shares = cut_sequence(length, piece.ranks, "zigzag")
                sections.append(Section(first=piece.first, shares=shares, start=at))
                at, longest = at + count(shares[rank - piece.first]), max(longest, length)
                away = piece.away
        if sections:
            part = SequencePart(
                shares=(((0, longest),),),
                tokens=torch.zeros(at),
                documents=None,
                sections=tuple(sections),
                away=away,
            )
            found.append(CutRows(part))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One way to place documents and to cut them."""

    attend: Callable[..., Tensor]
    contexts: list[CutRows]
    """The micro-batches of this rank."""
    exchanged: bool = False
    """Whether ranks share heads."""


class Layer:
    """Linear layers and attention, forward and backward, on virtual devices."""

    def __init__(self, seconds: Seconds, kernel: VirtualKernel, wire: VirtualWire, rate: float) -> None:
        self.seconds, self.kernel, self.wire, self.rate = seconds, kernel, wire, rate
        self.tokens = 0

    def step(self, side: Side) -> float:
        """Seconds of a step on the slowest rank."""
        heads = self.seconds.virtual_heads(side.exchanged)
        self.kernel.seconds_per_pair = self.seconds.pair / heads[0]
        carried = self.rate * VIRTUAL_BYTES * heads[1] / self.seconds.token_bytes
        self.wire.links = Links(node=dist.get_world_size(), inside=carried, between=carried)
        self.tokens = self.kernel.pairs = 0
        dist.barrier()
        start = time.perf_counter()
        for context in side.contexts:
            self._micro_batch(side.attend, context, heads)
        mine = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(mine, dist.ReduceOp.MAX)
        return float(mine)

    def _micro_batch(self, attend: Callable[..., Tensor], context: CutRows, heads: tuple[int, int]) -> None:
        tokens = len(context.part.tokens)
        self.tokens += tokens
        copied = self.seconds.host.copy * context.part.away * tokens
        start = time.perf_counter()
        shapes = [(1, number, tokens, 1) for number in (heads[0], heads[1], heads[1])]
        qkv = [torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
        wait_until(start + self.seconds.token * tokens)
        out = attend(*qkv, context)
        wait_until(start + copied)
        start = time.perf_counter()
        torch.autograd.grad(out, qkv, torch.zeros_like(out))
        wait_until(time.perf_counter() + 2 * self.seconds.token * tokens)
        wait_until(start + copied)

    def work(self) -> list[float]:
        """Seconds of compute of each rank in the last step."""
        pairs = (1 + BACKWARD) * self.kernel.seconds_per_pair * self.kernel.pairs
        mine = torch.tensor([3 * self.seconds.token * self.tokens + pairs], dtype=torch.float64)
        all_ranks = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(all_ranks, mine)
        return [float(x) for x in all_ranks]


def sides_of(
    lengths: Sequence[int], costs: Sequence[Costs], wire: VirtualWire, kernel: VirtualKernel
) -> tuple[dict[str, Side], dict[str, Any]]:
    """What each side plays, and what is to be said of the placing; ``costs``: plain, with the host's memory, and where
    ranks share heads."""
    rank, ranks = wire.index, dist.get_world_size()

    def static(plan: PlanSpec) -> ContextAttend:
        return ContextAttend(wire=wire, arrangement=Arrangement.of(plan), local=NoDropout(), kernel=kernel)

    def grouped(plan: PlanSpec) -> GroupedAttend:
        arrange = partial(Arrangement.of_group, plan)
        return GroupedAttend(wire=wire, arrange=arrange, local=NoDropout(), kernel=kernel)

    ring, ulysses = PlanSpec(cp=ranks), PlanSpec(cp=ranks, context="ulysses")
    start = time.perf_counter()
    placement, away, exchanged = (assign(lengths, ranks, one, memory_tokens=LONGEST // ranks) for one in costs)
    took = (time.perf_counter() - start) / len(costs)
    rows = packed(lengths, rank, ranks)
    sides = {
        EVERYWHERE: Side(attend=static(ring), contexts=rows),
        "packed": Side(attend=static(ring), contexts=rows),
        "packed_exchanged": Side(attend=static(ulysses), contexts=rows, exchanged=True),
        "dynamic": Side(attend=grouped(ring), contexts=placed(lengths, rank, placement)),
        "offloaded": Side(attend=grouped(ring), contexts=placed(lengths, rank, away)),
        "exchanged": Side(attend=grouped(ulysses), contexts=placed(lengths, rank, exchanged), exchanged=True),
    }
    return sides, {
        "documents": len(lengths),
        "tokens": sum(lengths),
        "longest": max(lengths),
        "groups": groups_of(placement),
        "groups_offloaded": groups_of(away),
        "groups_exchanged": groups_of(exchanged),
        "documents_offloaded": sum(piece.away > 0 for piece in away.pieces),
        "placing_seconds": took,
        "placed_makespan": placement.makespan,
        "placed_makespan_offloaded": away.makespan,
        "placed_makespan_exchanged": exchanged.makespan,
        "lower_bound": placement.lower_bound,
        "ideal_static": sum(costs[0].time(length, ranks) for length in lengths),
        "estimated_packed": static_time(lengths, costs[0], cp=ranks, replicas=1, row=LONGEST),
    }


def groups_of(placement: Placement) -> dict[str, int]:
    """Documents by the number of their ranks."""
    sizes = sorted({piece.ranks for piece in placement.pieces})
    return {str(size): sum(piece.ranks == size for piece in placement.pieces) for size in sizes}


def measure(seed: int, where: str, args: argparse.Namespace) -> dict[str, Any]:
    """All sides on the documents of one seed."""
    seconds, cluster = seconds_of(args.model, args.cluster, args.slower), CLUSTERS[args.cluster]
    rate = cluster.network_bytes_per_second if where == "apart" else cluster.link_bytes_per_second
    rate /= args.slower
    wire = VirtualWire(dist.group.WORLD, Links(node=args.ranks, inside=rate, between=rate))
    kernel = VirtualKernel(seconds.pair)
    lengths = lengths_of(seed, args.tokens)
    costs = [seconds.costs(rate, args.ranks, **one) for one in ({}, {"away": True}, {"exchanged": True})]
    sides, row = sides_of(lengths, costs, wire, kernel)
    layer = Layer(seconds, kernel, wire, rate)
    for name, side in sides.items():
        whole = patch.object(Sight, "reach", lambda sight, seats: Reach.whole(seats))
        with whole if name == EVERYWHERE else nullcontext():
            turns = [layer.step(side) for _ in range(args.turns + 1)][1:]
        work = layer.work()
        row[name] = {
            "seconds": min(turns),
            "tokens_per_second": row["tokens"] / min(turns),
            "fullest_over_mean": max(work) / (sum(work) / len(work)),
            "compute_share": sum(work) / len(work) / min(turns),
        }
    best, away, exchanged = (row[name]["seconds"] for name in ("dynamic", "offloaded", "exchanged"))
    ratios = {
        "over_everywhere": row[EVERYWHERE]["seconds"] / best,
        "over_packed": row["packed"]["seconds"] / best,
        "over_ideal": row["ideal_static"] / best,
        "offloaded_over_everywhere": row[EVERYWHERE]["seconds"] / away,
        "offloaded_over_packed": row["packed"]["seconds"] / away,
        "exchanged_over_everywhere": row[EVERYWHERE]["seconds"] / exchanged,
        "exchanged_over_packed": row["packed"]["seconds"] / exchanged,
        "exchanged_over_packed_exchanged": row["packed_exchanged"]["seconds"] / exchanged,
        "estimated_over_packed": row["estimated_packed"] / row["placed_makespan"],
    }
    return {"seed": seed, "ranks_are": where, **ratios, **row}


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    names = (EVERYWHERE, "packed", "packed_exchanged", "dynamic", "offloaded", "exchanged")
    told = ", ".join(f"{name} {row[name]['seconds']:.2f} s" for name in names)
    return (
        f"{row['ranks_are']:8} seed {row['seed']}: {row['over_everywhere']:.2f}x the tokens/s of a static mesh "
        f"whose keys go everywhere, {row['over_packed']:.2f}x of ours ({row['estimated_over_packed']:.2f}x "
        f"estimated), offloaded {row['offloaded_over_everywhere']:.2f}x and {row['offloaded_over_packed']:.2f}x, "
        f"exchanged {row['exchanged_over_everywhere']:.2f}x, {row['exchanged_over_packed']:.2f}x and "
        f"{row['exchanged_over_packed_exchanged']:.2f}x a static mesh's that exchanges heads, too, "
        f"{row['over_ideal']:.2f}x an ideal one's ({told}, placed for {row['placed_makespan']:.2f} s, lower bound "
        f"{row['lower_bound']:.2f} s; {row['documents']} documents, groups {row['groups']}, offloaded "
        f"{row['groups_offloaded']}, {row['documents_offloaded']} of them in part on the host, balance "
        f"{row['dynamic']['fullest_over_mean']:.3f}, placed in {1e3 * row['placing_seconds']:.0f} ms)"
    )


def work(rank: int, args: argparse.Namespace, port: int) -> None:
    """One rank."""
    torch.set_num_threads(1)
    wake_on_time()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.ranks)
    rows = []
    for where in args.where:
        for seed in args.seeds:
            row = measure(seed, where, args)
            rows.append(row)
            if rank == 0:
                print(line(row), flush=True)
    if rank == 0 and args.write:
        asked = f"apart, over_everywhere >= {ASKED} for each seed"
        given = {
            "model": args.model,
            "cluster": args.cluster,
            "ranks": args.ranks,
            "turns": args.turns,
            "slower": args.slower,
        }
        record = {"command": command("dynamic_groups"), "machine": machine(), "asked": asked, **given, "rows": rows}
        (RESULTS / "dynamic_groups.json").write_text(json.dumps(record, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Start the ranks."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=524288, help="of a step, at least")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--where", nargs="+", default=["apart", "together"], choices=["apart", "together"])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--slower", type=float, default=8.0, help="than the preset's devices and links")
    parser.add_argument("--model", default="llama-2-7b")
    parser.add_argument("--cluster", default="h100", choices=[n for n, c in CLUSTERS.items() if c.peak_flops_bfloat16])
    parser.add_argument("--no-write", dest="write", action="store_false", help="don't write benchmarks/results")
    args = parser.parse_args()
    port = free_port()
    start_processes(work, (args, port), nprocs=args.ranks, start_method="fork")


if __name__ == "__main__":
    main()
