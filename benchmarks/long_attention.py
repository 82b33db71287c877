"""Attention over one long row on a GPU, against the fused kernel as torch calls it: time, MFU, memory; needs CUDA.

    python -m benchmarks.long_attention                      # 128k tokens, 32 heads of 128, 8 key/value heads, bfloat16
    python -m benchmarks.long_attention --tokens 32768

whole       plain causal, through Stretto's opening with plan.attention_backend = "flash", against
            scaled_dot_product_attention under SDPBackend.FLASH_ATTENTION; wanted <= 1.03 times its time
documents   the same row packed with 1 to 64 documents, through "flash" (cut into squares) and "flex" (lists of tiles):
            time over that of one document, wanted no more than the share of pairs that see each other, and a tenth

A time is that of CUDA events around a forward and backward, the median of alternating turns after a warm-up.  MFU
counts pairs that see each other, 4 operations a channel forward and 8 backward, over --peak-flops.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.pairs import RESULTS, command, machine
from benchmarks.virtual_context import CutRows, NoDropout
from stretto.parallel.sequence.backends import kernel_for
from stretto.parallel.sequence.opening import ContextAttend
from stretto.parallel.sequence.sight import Sight
from stretto.parallel.wire import Wire
from stretto.spec.contract import SequencePart
from stretto.spec.plan import PlanSpec
from stretto.spec.sequence import Arrangement

SLOWER = 1.03
MORE = 1.1
"""Time over share of pairs that is still in proportion."""
DOCUMENTS = (1, 4, 16, 64)
OPERATIONS = 12
"""Per pair and channel, forward and backward; what backward computes again isn't counted."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's own."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def ours(backend: str, first: Tensor | None, tokens: int) -> Attend:
    """Stretto's attention of whole rows; ``first`` as in ``Sight``."""
    attend = ContextAttend(
        wire=Wire(None),
        arrangement=Arrangement.of(PlanSpec(attention_backend=backend)),
        local=NoDropout(),
        kernel=kernel_for(torch.device("cuda"), backend),
    )
    rows = CutRows(SequencePart(shares=(((0, tokens),),), tokens=torch.arange(tokens), documents=None), first)
    return lambda q, k, v: attend(q, k, v, rows)


def packed(tokens: int, documents: int) -> Tensor | None:
    """First tokens of a row of equally long documents."""
    if documents == 1:
        return None
    size = -(-tokens // documents)
    return (torch.arange(tokens) // size * size).unsqueeze(0)


class Side:
    """One way of attending, forward and backward."""

    def __init__(self, attend: Attend, args: argparse.Namespace) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        self.attend = attend

        def drawn(heads: int) -> Tensor:  # as projections give them: tokens before heads
            shape = (1, args.tokens, heads, args.size)
            return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

        self.dout = drawn(args.heads)
        self.qkv = [drawn(heads).requires_grad_() for heads in (args.heads, args.kv_heads, args.kv_heads)]

    def run(self) -> list[Tensor]:
        """Output and gradients."""
        out = self.attend(*self.qkv)
        return [out, *torch.autograd.grad(out, self.qkv, self.dout)]

    def seconds(self) -> float:
        """One turn."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak_bytes(self) -> int:
        """Allocated at most beyond what it is given."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def turns(sides: dict[str, Side], args: argparse.Namespace) -> dict[str, float]:
    """The median of each side's alternating turns."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(args.turns + 2):
        for name in sides if turn % 2 else reversed(sides):
            seconds = sides[name].seconds()
            if turn >= 2:
                taken[name].append(seconds)
    return {name: statistics.median(times) for name, times in taken.items()}


def mfu(seconds: float, pairs: int, args: argparse.Namespace) -> float:
    """Share of the peak."""
    return OPERATIONS * pairs * args.heads * args.size / seconds / args.peak_flops


def whole(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Plain causal rows."""
    sides = {"sdpa": Side(sdpa, args), "ours": Side(ours("flash", None, args.tokens), args)}
    worst = max(
        float((a.float() - b.float()).abs().max() / b.float().abs().max())
        for a, b in zip(sides["ours"].run(), sides["sdpa"].run(), strict=True)
    )
    memory = {name: side.peak_bytes() / 2**30 for name, side in sides.items()}
    times = turns(sides, args)
    pairs = args.tokens * (args.tokens + 1) // 2
    found = {name: f"{t:.3f} s, MFU {mfu(t, pairs, args):.3f}, {memory[name]:.2f} GiB" for name, t in times.items()}
    row = {
        "what": f"whole row: time / SDPA's ({found['ours']}; SDPA {found['sdpa']}; largest difference {worst:.0e})",
        "figure": times["ours"] / times["sdpa"],
        "wanted": f"<= {SLOWER}",
    }
    size = {"what": "whole row: memory / SDPA's", "figure": memory["ours"] / memory["sdpa"], "wanted": f"<= {SLOWER}"}
    return [row, size]


def documents(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Packed rows."""
    rows = []
    for backend in ("flash", "flex"):
        sides = {str(n): Side(ours(backend, packed(args.tokens, n), args.tokens), args) for n in DOCUMENTS}
        times = turns(sides, args)
        every = Sight(None).pairs((0, args.tokens), (0, args.tokens))
        for n in DOCUMENTS[1:]:
            share = Sight(packed(args.tokens, n)).pairs((0, args.tokens), (0, args.tokens)) / every
            faster = times[str(n)] / times["1"]
            what = f"{backend}, {n} documents: time / one's, over share of pairs ({share:.4f}); {times[str(n)]:.4f} s"
            rows.append({"what": what, "figure": faster / share, "wanted": f"<= {MORE}"})
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="of a head")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--peak-flops", type=float, default=989e12, help="of the device in bfloat16 (default: H100)")
    parser.add_argument("--no-write", action="store_true", help="leave the results file as it is")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "long_attention measures kernels of a GPU, and torch finds no CUDA device here; run it where there is one, "
            "or compare cut attention on CPUs with python -m benchmarks.attention_peers."
        )
    rows = [*whole(args), *documents(args)]
    for row in rows:
        print(f"{row['figure']:8.3f}  {row['wanted']:8} {row['what']}")
    if not args.no_write:
        sizes = {name: getattr(args, name) for name in ("tokens", "heads", "kv_heads", "size", "peak_flops")}
        place = machine() | {"device": torch.cuda.get_device_name()}
        record = {"command": command("long_attention"), "machine": place, **sizes, "rows": rows}
        (RESULTS / "long_attention.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
