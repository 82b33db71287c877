"""A video transformer's layer over several ranks: the cut moves (DSP), heads are split (Ulysses), or a ring.

    OMP_NUM_THREADS=1 python -m benchmarks.video              # 8 ranks on virtual devices, one to two minutes

Each rank begins with a part of the frames. Attention over patches needs nothing; attention over frames needs them all:

dsp     the cut moves to patches and back: two all-to-alls of x
heads   q, k and v go to ranks that have all frames and some heads, the output comes back: four all-to-alls
ring    keys and values go round, each hop under a block of attention; backward their gradients go with them

Messages are real and carried by links of limited rate (virtual_context.py), compute is a wait in proportion to its
operations, the same for all three. Shapes are those of a published model (Open-Sora: 28 layers of 1,152 channels, 16
heads), rates those of a cluster preset at half its peak, all slowed down alike; one layer, forward and backward. Bytes
are asserted to be the closed forms:

    dsp 2 M/n (n-1)/n     heads 4 M/n (n-1)/n     ring 2 M/n (n-1)     of M = e D frames patches; backward the same,
                                                                       a ring's twice
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from benchmarks.pairs import RESULTS, command, machine
from benchmarks.processes import free_port
from benchmarks.virtual_context import Links, VirtualWire
from stretto.models.video import FRAMES, PATCHES
from stretto.parallel.pipeline.virtual import wait_until, wake_on_time
from stretto.parallel.sequence.switch import CutSwitch
from stretto.parallel.wire import Wire
from stretto.spec.presets_cluster import CLUSTERS

CHANNELS, HEADS = 1152, 16
EFFICIENCY = 0.5
"""Share of the peak that compute reaches."""
BACKWARD = 2
"""Forwards that a backward takes."""
HEAD_DIM = 3
"""Where heads are in what travels, [1, frames, patches, heads]: one number a head stands for all of its channels."""
WAYS = ("dsp", "heads", "ring")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of a video, in tokens, and how fast the world is."""

    frames: int
    patches: int
    ranks: int
    seconds_per_operation: float

    def compute(self) -> dict[str, float]:
        """Seconds of a rank's forward: attention over patches, over frames, and everything else."""
        tokens = self.frames * self.patches / self.ranks
        one = 4 * tokens * CHANNELS * self.seconds_per_operation
        rest = 2 * tokens * CHANNELS**2 * (4 + 4 + 8) * self.seconds_per_operation
        return {"patches": one * self.patches, "frames": one * self.frames, "rest": rest}


class Layer:
    """One way to run a layer on a rank."""

    def __init__(self, wire: Wire, sizes: Sizes) -> None:
        self.wire, self.sizes = wire, sizes
        self.switch = CutSwitch(wire=wire, ranks=sizes.ranks)
        self.x = torch.zeros(1, sizes.frames // sizes.ranks, sizes.patches, HEADS, requires_grad=True)

    def step(self, way: str) -> float:
        """Seconds of a forward and backward, of the slowest rank."""
        dist.barrier()
        begun = time.perf_counter()
        run: Callable[[], None] = {"dsp": self._dsp, "heads": self._heads, "ring": self._ring}[way]
        run()
        mine = torch.tensor(time.perf_counter() - begun, dtype=torch.float64)
        dist.all_reduce(mine, dist.ReduceOp.MAX)
        return float(mine)

    def _work(self, *parts: str, times: float = 1.0) -> None:
        seconds = self.sizes.compute()
        wait_until(time.perf_counter() + times * sum(seconds[part] for part in parts))

    def _dsp(self) -> None:
        sizes = self.sizes
        self._work("patches")
        moved = self.switch(self.x, FRAMES, PATCHES, sizes.frames)
        self._work("frames", "rest")
        back = self.switch(moved, PATCHES, FRAMES, sizes.patches)
        self._differentiated(back)

    def _heads(self) -> None:
        sizes = self.sizes
        self._work("patches")
        q, k, v = (self.switch(self.x, FRAMES, HEAD_DIM, sizes.frames) for _ in range(3))
        self._work("frames")
        back = self.switch(q + k + v, HEAD_DIM, FRAMES, HEADS)
        self._work("rest")
        self._differentiated(back)

    def _differentiated(self, out: Tensor) -> None:
        """Messages go the way back; the backward's compute is the same wherever in it they are."""
        self._work("patches", "frames", "rest", times=BACKWARD)
        torch.autograd.grad(out, self.x, torch.zeros_like(out))

    def _ring(self) -> None:
        self._work("patches")
        self._round(1.0, tensors=1)
        self._work("rest")
        self._work("patches", "rest", times=BACKWARD)
        self._round(BACKWARD, tensors=2)

    def _round(self, times: float, *, tensors: int) -> None:
        """Keys and values (and their gradients) go round, each hop under a block."""
        ranks, me = self.sizes.ranks, self.wire.index
        travelling = [torch.zeros(2, *self.x.shape) for _ in range(tensors)]
        for hop in range(ranks):
            coming = [torch.empty_like(tensor) for tensor in travelling]
            transfer = None
            if hop < ranks - 1:
                transfer = self.wire.start(
                    [(tensor, (me + 1) % ranks) for tensor in travelling],
                    [(tensor, (me - 1) % ranks) for tensor in coming],
                )
            self._work("frames", times=times / ranks)
            if transfer is not None:
                travelling = transfer.wait()
        self.wire.flush()


def formula(way: str, sizes: Sizes) -> int:
    """Bytes that a rank sends forward and backward, of one layer."""
    whole, ranks = 4 * HEADS * sizes.frames * sizes.patches, sizes.ranks
    if way == "ring":
        return 3 * 2 * whole * (ranks - 1) // ranks
    return 2 * {"dsp": 2, "heads": 4}[way] * whole * (ranks - 1) // ranks**2


def measure(where: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All ways where ranks are on one node or on several."""
    preset = CLUSTERS[args.cluster]
    rate = preset.network_bytes_per_second if where == "apart" else preset.link_bytes_per_second
    seconds = args.slower / (EFFICIENCY * preset.peak_flops_bfloat16)
    sizes = Sizes(frames=args.frames, patches=args.patches, ranks=args.ranks, seconds_per_operation=seconds)
    carried = rate / args.slower * (4 * HEADS) / (2 * CHANNELS)  # what travels here stands for bfloat16 channels
    wire = VirtualWire(dist.group.WORLD, Links(node=args.ranks, inside=carried, between=carried))
    counted = Layer(Wire(dist.group.WORLD), sizes)
    layer = Layer(wire, sizes)
    ideal = (1 + BACKWARD) * sum(sizes.compute().values())
    rows = []
    for way in WAYS:
        counted.wire.sent_to.clear()
        counted.step(way)
        assert counted.wire.sent == formula(way, sizes), (way, counted.wire.sent, formula(way, sizes))
        turns = min(layer.step(way) for _ in range(args.turns))
        rows.append({"ranks_are": where, "way": way, "seconds": turns, "compute": ideal, "sent": formula(way, sizes)})
    return rows


def work(rank: int, args: argparse.Namespace, port: int) -> None:
    """One rank."""
    torch.set_num_threads(1)
    wake_on_time()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.ranks)
    rows = [row for where in ("apart", "together") for row in measure(where, args)]
    if rank == 0:
        for row in rows:
            print("{ranks_are:8} {way:5} {seconds:.3f} s ({compute:.3f} s compute), {sent:,} bytes".format(**row))
        if args.write:
            record = {"command": command("video"), "machine": machine(), "settings": vars(args), "rows": rows}
            (RESULTS / "video.json").write_text(json.dumps(record, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Start the ranks."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--patches", type=int, default=1024, help="of a frame")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--slower", type=float, default=60.0, help="than the preset's devices and links")
    parser.add_argument("--cluster", default="h100", choices=[n for n, c in CLUSTERS.items() if c.peak_flops_bfloat16])
    parser.add_argument("--no-write", dest="write", action="store_false", help="don't write benchmarks/results")
    args = parser.parse_args()
    start_processes(work, (args, free_port()), nprocs=args.ranks, start_method="fork")


if __name__ == "__main__":
    main()
