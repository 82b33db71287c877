"""Attention over cut rows against yunchang (USP) and ring-flash-attention: forward, and forward with backward, on CPUs.

    pip install --no-deps --target /tmp/peers yunchang ring-flash-attn          # anywhere but in this environment
    OMP_NUM_THREADS=1 python -m benchmarks.attention_peers --peer-path /tmp/peers

Both sides live in the same processes (four, gloo), get the same tensors (plain causal), and take turns.  A time is that
of the slowest rank, a ratio is peer / ours of one pair of turns, and what counts is the median.  Both peers are made
for 16 bit: in float32 gradients that they add up share memory with buffers that they write again, so compare backward
with --dtype bfloat16 too.

as it comes   yunchang with AttnType.TORCH_MATH, its one plain-torch path that runs on a CPU; wanted >= 1.2 forward
same kernel   both peers with the CPU's fused kernel in the place of flash_attn (peer_kernel.py): how they circulate and
              merge, against how we do

Outputs and gradients of both sides are compared with one rank in float64; what a peer can't do is told, not left out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from benchmarks import peer_kernel
from benchmarks.pairs import RESULTS, command, machine
from benchmarks.processes import free_port
from benchmarks.virtual_context import CutRows, NoDropout
from stretto.parallel.sequence.backends import kernel_for
from stretto.parallel.sequence.opening import ContextAttend
from stretto.parallel.wire import Wire
from stretto.spec.contract import SequencePart
from stretto.spec.plan import PlanSpec
from stretto.spec.sequence import Arrangement, cut_sequence

WANTED = 1.2
EXACT = {"bfloat16": 0.03, "float32": 1e-4, "float64": 1e-6}
"""The largest error, over the largest value, that rounding explains."""
ROOM = 4
"""Tables of scores that yunchang's plain-torch path holds at once, about."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of own tokens: q, k, v -> out, in the shapes of a side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One comparison."""

    name: str
    plan: dict[str, Any]
    """Our way."""
    package: str
    """The peer's."""
    way: str
    """What of the peer: ``ring`` or ``zigzag``; of yunchang, by ``ulysses`` and these."""
    ulysses: int = 1
    as_it_comes: bool = False

    @property
    def layout(self) -> str:
        """Which tokens a rank holds; the same on both sides."""
        return "zigzag" if self.way == "zigzag" and self.ulysses < 4 else "contiguous"


def rows() -> list[Row]:
    """What is compared, on four ranks."""
    ulysses: dict[str, Any] = {"context": "ulysses"}
    mesh: dict[str, Any] = {"context": "mesh", "ulysses": 2}
    return [
        Row(name="yunchang Ulysses", plan=ulysses, package="yunchang", way="ring", ulysses=4, as_it_comes=True),
        Row(name="yunchang mesh 2x2", plan=mesh, package="yunchang", way="zigzag", ulysses=2, as_it_comes=True),
        Row(name="yunchang zigzag ring", plan={}, package="yunchang", way="zigzag", as_it_comes=True),
        Row(name="yunchang mesh 2x2", plan=mesh, package="yunchang", way="zigzag", ulysses=2),
        Row(name="ring-flash-attention ring", plan={}, package="ring_flash_attn", way="ring"),
        Row(name="ring-flash-attention zigzag", plan={}, package="ring_flash_attn", way="zigzag"),
    ]


def peer_of(row: Row, args: argparse.Namespace) -> Attend:
    """The peer's attention of [B, T, H, K], in process groups of its own: what it leaves under way disturbs nobody."""
    if row.package == "ring_flash_attn":
        package = importlib.import_module("ring_flash_attn")
        function = package.zigzag_ring_flash_attn_func if row.way == "zigzag" else package.ring_flash_attn_func
        group = dist.new_group()
        return lambda q, k, v: function(q, k, v, causal=True, group=group)
    package = importlib.import_module("yunchang")
    kind = importlib.import_module("yunchang.kernels").AttnType
    package.set_seq_parallel_pg(row.ulysses, args.ranks // row.ulysses, dist.get_rank(), args.ranks)
    layer = package.LongContextAttention(
        ring_impl_type="zigzag" if row.way == "zigzag" else "basic",
        attn_type=kind.TORCH_MATH if row.as_it_comes else kind.FA,
    )
    return lambda q, k, v: layer(q, k, v, causal=True)


def ours_of(row: Row, args: argparse.Namespace) -> tuple[Attend, tuple[Any, ...]]:
    """Our attention of [B, H, T, K], and the tokens of each rank."""
    plan = PlanSpec(cp=args.ranks, context_layout=row.layout, **row.plan)
    arrangement = Arrangement.of(plan)
    shares = list(cut_sequence(args.tokens, arrangement.seats, row.layout))
    if row.ulysses > 1:  # those who share a seat share its tokens, in the order in which the peer takes them
        shares = [split_of(shares[arrangement.place(r)[0]], arrangement, r) for r in range(args.ranks)]
    part = SequencePart(shares=tuple(shares), tokens=torch.empty(0), documents=None)
    attend = ContextAttend(
        wire=Wire(dist.group.WORLD),
        arrangement=arrangement,
        local=NoDropout(),
        kernel=kernel_for(torch.device("cpu"), args.backend),
    )
    return lambda q, k, v: attend(q, k, v, CutRows(part)), tuple(shares)


def split_of(seat: Any, arrangement: Arrangement, rank: int) -> Any:
    """A rank's part of the tokens of its seat."""
    tokens = torch.cat([torch.arange(*part) for part in seat])
    mine = tokens.chunk(arrangement.ulysses)[arrangement.place(rank)[1]]
    cuts = [0, *((mine.diff() != 1).nonzero().flatten() + 1).tolist(), len(mine)]
    return tuple((int(mine[a]), int(mine[b - 1]) + 1) for a, b in pairwise(cuts))


class Problem:
    """Tensors of all ranks, what one rank makes of them in float64, and this rank's part."""

    def __init__(self, args: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (1, args.heads, args.tokens, args.size)
        self.whole = [torch.randn(shape, generator=generator).to(getattr(torch, args.dtype)) for _ in range(4)]
        self.truth = [torch.zeros(shape, dtype=torch.float64) for _ in range(4)]
        if dist.get_rank() == 0:
            q, k, v, dout = (x.double().requires_grad_() for x in self.whole)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            found = [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]
            self.truth = [x.contiguous() for x in found]
        for x in self.truth:
            dist.broadcast(x, 0)

    def own(self, shares: tuple[Any, ...], *, theirs: bool) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's q, k, v, dout, and what is to come out, in the shapes of a side."""
        index = torch.cat([torch.arange(*part) for part in shares[dist.get_rank()]])

        def cut(x: Tensor) -> Tensor:
            mine = x[:, :, index]
            return (mine.transpose(1, 2) if theirs else mine).contiguous()

        return [cut(x) for x in self.whole], [cut(x) for x in self.truth]


class Side:
    """One side's attention on one rank."""

    def __init__(self, attend: Attend, own: tuple[list[Tensor], list[Tensor]]) -> None:
        self.attend = attend
        (*qkv, self.dout), self.truth = own
        self.qkv = [x.requires_grad_() for x in qkv]

    def run(self, *, backward: bool) -> list[Tensor]:
        """Output, and gradients if they are asked for."""
        if not backward:
            with torch.no_grad():
                return [self.attend(*self.qkv)]
        out = self.attend(*self.qkv)
        return [out, *torch.autograd.grad(out, self.qkv, self.dout)]

    def errors(self, *, backward: bool) -> float:
        """The largest difference from one rank, over the largest value, of all ranks."""
        worst = 0.0
        for found, expected in zip(self.run(backward=backward), self.truth, strict=False):
            worst = max(worst, float((found.detach().double() - expected).abs().max() / expected.abs().max()))
        return over_ranks(worst)

    def turn(self, *, backward: bool) -> tuple[float, float]:
        """Seconds of one turn, of the slowest rank; processor seconds of all ranks."""
        dist.barrier()
        start, start_cpu = time.perf_counter(), time.process_time()
        self.run(backward=backward)
        cpu = time.process_time() - start_cpu
        return over_ranks(time.perf_counter() - start), over_ranks(cpu, total=True)


def over_ranks(value: float, *, total: bool = False) -> float:
    """The largest of all ranks' values, or their sum."""
    found = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.SUM if total else dist.ReduceOp.MAX)
    return float(found)


def compare(row: Row, problem: Problem, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row's figures: forward, then forward with backward, as far as the peer can."""
    attend, shares = ours_of(row, args)
    ours = Side(attend, problem.own(shares, theirs=False))
    found = []
    for backward in (False, True):
        peer = Side(peer_of(row, args), problem.own(shares, theirs=True))
        figures: dict[str, Any] = {
            "name": row.name,
            "kernel": "as it comes" if row.as_it_comes else "same kernel",
            "what": "forward and backward" if backward else "forward",
            "wanted": WANTED if row.as_it_comes and not backward else None,
            "dtype": args.dtype,
            "error_ours": ours.errors(backward=backward),
        }
        try:
            figures["error_peer"] = peer.errors(backward=backward)
        except Exception as error:  # whatever a peer raises is its answer
            figures["peer_cannot"] = str(error).split("\n")[0][:120]
        found.append(figures if "peer_cannot" in figures else figures | pairs(ours, peer, args, backward=backward))
    return found


def pairs(ours: Side, peer: Side, args: argparse.Namespace, *, backward: bool) -> dict[str, Any]:
    """Alternating turns."""
    turns: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    for pair in range(args.pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            turns[side].append((ours, peer)[side].turn(backward=backward))
    (mine, mine_cpu), (theirs, theirs_cpu) = (tuple(zip(*side, strict=True)) for side in turns)
    low, middle, high = statistics.quantiles([b / a for a, b in zip(mine, theirs, strict=True)], n=4)
    return {
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "processor_time_ratio": statistics.median(b / a for a, b in zip(mine_cpu, theirs_cpu, strict=True)),
        "seconds": {"ours": statistics.median(mine), "peer": statistics.median(theirs)},
        "all_seconds": {"ours": mine, "peer": theirs},
    }


def line(figures: dict[str, Any]) -> str:
    """One line of the table."""
    start = f"{figures['name']:28} {figures['kernel']:12} {figures['what']:21} error {figures['error_ours']:.0e} : "
    if "peer_cannot" in figures:
        return f"{start}peer can't: {figures['peer_cannot']}"
    wrong = "  (the peer's result is wrong)" if figures["error_peer"] > EXACT[figures["dtype"]] else ""
    seconds = figures["seconds"]
    wanted = "" if figures["wanted"] is None else f", wanted >= {figures['wanted']}"
    return (
        f"{start}{figures['error_peer']:.0e}  ours {seconds['ours']:6.2f} s, peer {seconds['peer']:6.2f} s, "
        f"ratio {figures['ratio']:.2f} (processor time {figures['processor_time_ratio']:.2f}){wanted}{wrong}"
    )


def fits(row: Row, args: argparse.Namespace) -> bool:
    """Whether yunchang's tables of scores, of whole rows under Ulysses, fit into memory."""
    if not row.as_it_comes:
        return True
    side = args.tokens * row.ulysses // args.ranks
    tables = args.ranks * ROOM * 4 * side**2 * args.heads // row.ulysses
    return tables < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


def work(rank: int, args: argparse.Namespace, port: int) -> None:
    """One rank."""
    torch.set_num_threads(1)
    sys.path += args.peer_path
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.ranks)
    peer_kernel.install()
    problem, found = Problem(args), []
    for row in rows():
        if args.only not in f"{row.name}, {'as it comes' if row.as_it_comes else 'same kernel'}":
            continue
        if not fits(row, args):
            if rank == 0:
                print(f"{row.name:28} as it comes  left out: its tables of scores don't fit into memory", flush=True)
            continue
        for figures in compare(row, problem, args):
            found.append(figures)
            if rank == 0:
                print(line(figures), flush=True)
    if rank == 0 and not (args.only or args.no_write):
        sizes = {"tokens": args.tokens, "heads": args.heads, "head_size": args.size, "ranks": args.ranks}
        record = {"command": command("attention_peers"), "machine": machine(), "pairs": args.pairs, **sizes}
        path = RESULTS / f"attention_peers_{args.tokens}_{args.dtype}.json"
        path.write_text(json.dumps(record | {"rows": found}, indent=1) + "\n")
    dist.barrier()
    os._exit(0)  # messages that a peer left under way are nobody's to wait for


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-path", action="append", default=[], help="a folder that holds the peers' packages")
    parser.add_argument("--tokens", type=int, default=8192, help="of the whole row; a multiple of 8 x ranks")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--size", type=int, default=64, help="of a head")
    parser.add_argument("--dtype", choices=sorted(EXACT), default="float32")
    parser.add_argument("--pairs", type=int, default=7, help="alternating pairs")
    parser.add_argument("--backend", default="auto", help="our plan.attention_backend: auto, blockwise or flash")
    parser.add_argument("--only", default="", help="rows that contain this, for example 'same kernel'; writes nothing")
    parser.add_argument("--no-write", action="store_true", help="leave the results file as it is")
    return parser.parse_args()


def main() -> None:
    """Start the ranks."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args = arguments()
    args.ranks = 4
    sys.path += args.peer_path
    missing = [name for name in ("yunchang", "ring_flash_attn") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"{' and '.join(missing)} can't be imported; install them into a folder of their own (pip install "
            "--no-deps --target /tmp/peers yunchang ring-flash-attn) and name it with --peer-path /tmp/peers."
        )
    start_processes(work, (args, free_port()), nprocs=args.ranks, start_method="fork")


if __name__ == "__main__":
    main()
