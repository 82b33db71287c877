"""Time of attention cut over cp where no fused kernel does it: tile by tile, each step over a tile's scores a kernel.

That is so under ``plan.attention_backend = "blockwise"`` and where attention weights are dropped.  A cut row is then
computed in tiles of ``TILE`` x ``TILE`` scores in plain PyTorch (``parallel/sequence/blockwise``), which go through
memory many times, and that costs more than the products themselves:

    per score        forward 64 bytes, backward 86     products 4 K operations forward, 10 K backward
    per row of a tile and channel   38 and 36 bytes    merging outputs; adding gradients
    per tile         24 and 22 kernels

Bytes of a score forward: written 2, to float32 6, scaled 8, log-sum-exp 24 (maximum 4, subtracted 8, exponential 8, sum
4), subtracted 8, exponential 8, to 16 bit 6, read 2.  Backward: written, to float32 and scaled 16, subtracted 8,
exponential 8; gradients of weights written 2, to float32 6; weights to 16 bit 6, read 2; delta subtracted 8, times
weights 12, scaled 8; to 16 bit 6, read twice 4.

A zigzag seat of n holds two of 2n chunks.  With c tiles to a chunk it sees (2n - 1) c^2 whole tiles and, on its two
diagonals, c (c + 1); the last seat of a contiguous cut (n - 1) c^2 + c (c + 1) / 2.
"""

from __future__ import annotations

from math import ceil

from stretto.planner.calibration import Calibration
from stretto.planner.flops import keys_per_query
from stretto.planner.workload import Workload

TILE = 512
"""Queries, and keys, of a tile."""
SCORE_BYTES = (64, 86)
"""Read and written per score, forward and backward."""
ROW_BYTES = (38, 36)
"""Per row of a tile and channel."""
KERNELS = (24, 22)
"""Per tile."""
ALIVE_BYTES = 16
"""Of a tile's scores at once, backward: scores, weights and their gradients in float32, two of them in 16 bit."""
OPERATIONS = (4, 10)
"""Per score and channel: two products forward, five backward."""


def tiles(work: Workload) -> tuple[float, float]:
    """Tiles that the fullest rank works on for each row and layer, and the tokens of their sides."""
    plan, length = work.plan, work.sequence_length
    seats = plan.cp // sharers(work)
    zigzag = seats > 1 and plan.context_layout == "zigzag"
    chunk = length / (2 * seats if zigzag else seats)
    across = ceil(chunk / TILE)
    number: float
    if zigzag:
        number = (2 * seats - 1) * across**2 + across * (across + 1)
    else:
        number = (seats - 1) * across**2 + across * (across + 1) / 2
    seen = keys_per_query(work.model, length) / ((length + 1) / 2)  # a window leaves tiles out
    return number * seen, chunk / across


def sharers(work: Workload) -> int:
    """Cp ranks that share the heads of a seat."""
    plan = work.plan
    return {"ulysses": plan.cp, "mesh": plan.ulysses}.get(plan.context, 1)


def blockwise_seconds(work: Workload, calibration: Calibration) -> tuple[float, float]:
    """Attention of one layer and micro-batch on the fullest rank, forward and backward."""
    cluster, model = work.cluster, work.model
    number, side = tiles(work)
    heads = model.num_heads / work.plan.tp / sharers(work) * work.plan.micro_batch_size
    scores, rows = number * side * side * heads, number * side * heads * model.head_size
    matmul, memory = (
        cluster.peak_flops_bfloat16 * calibration.matmul,
        cluster.memory_bytes_per_second * calibration.memory,
    )
    forward, backward = (
        OPERATIONS[way] * model.head_size * scores / matmul
        + (SCORE_BYTES[way] * scores + ROW_BYTES[way] * rows) / memory
        + KERNELS[way] * number * calibration.kernel_latency
        for way in (0, 1)
    )
    return forward, backward


def cut_by_us(work: Workload) -> bool:
    """Whether attention is cut over cp by our runtime, which keeps results and sums as the functions below say."""
    return work.plan.cp > 1 and work.model.video is None and work.stack.context_kernel == "blockwise"


def cut_by_tiles(work: Workload) -> bool:
    """Whether it runs in tiles besides, without a fused kernel."""
    return cut_by_us(work) and (work.plan.attention_backend == "blockwise" or work.model.dropout > 0)


def kept_bytes(work: Workload) -> float:
    """What full recompute keeps of a layer's attention: its output in 16 bit, and the log-sum-exp of each head."""
    return work.tokens * work.model.num_heads / work.plan.tp * (2 * work.model.head_size + 4)


def brought_bytes(work: Workload) -> float:
    """Keys and values in 16 bit that a layer keeps beside a rank's share of them.

    These are heads that several ranks of a seat have, where there are fewer heads than ranks, and those of other seats
    with ``plan.context_keep``.
    """
    plan, own = work.plan, work.model.kv_heads / work.plan.tp
    if plan.cp == 1:
        return 0.0
    held = max(own, sharers(work)) if sharers(work) > 1 else own
    seats = plan.cp // sharers(work) if plan.context_keep else 1
    return work.tokens * 2 * 2 * work.model.head_size * (held * seats - own)


def temporary_bytes(work: Workload) -> float:
    """What a layer's attention holds while it is differentiated.

    A tile of scores, where there are tiles; the gradients of all queries in float32; two other seats' keys and values
    in 16 bit and their gradients in float32.
    """
    model, tp = work.model, work.plan.tp
    side, heads = tiles(work)[1], model.num_heads / tp / sharers(work) * work.plan.micro_batch_size
    keys = 2 * model.kv_heads * model.head_size * (2 + 4)
    scores = ALIVE_BYTES * side * side * heads if cut_by_tiles(work) else 0.0
    return scores + work.tokens / tp * (4 * model.num_heads * model.head_size + 2 * keys)
