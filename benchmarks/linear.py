"""Layers that keep a state against blockwise softmax attention: CPU seconds of a forward and backward, one process.

OMP_NUM_THREADS=1 python -m benchmarks.linear
"""

from __future__ import annotations

import argparse
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


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 16384], help="tokens")
    torch.manual_seed(0)
    print("| tokens | softmax, ms | linear, ms | delta, ms | softmax / linear | softmax / delta |")
    print("|---|---|---|---|---|---|")
    for length in parser.parse_args().lengths:
        of = {kind: 1e3 * seconds(kind, length) for kind in KINDS}
        ratios = [of["softmax"] / of[kind] for kind in ("linear", "delta")]
        print(f"| {length} | " + " | ".join(f"{of[kind]:.0f}" for kind in KINDS), end=" | ")
        print(" | ".join(f"{ratio:.1f}" for ratio in ratios), end=" |\n", flush=True)


if __name__ == "__main__":
    main()
