"""Layers that keep a state: what their chunked kernel computes, moves and keeps (``models/chunked``), counted by hand.

With H query and G key/value heads of size K, chunks of C tokens, per token, in products of one number with another:

    linear   q k^T and its use on v 2HCK        reading a state HKK       writing one GKK
    delta    besides k k^T and its solution 2GCK, the use on W HCK, W's share of a state GKK, chaining states GKKK/C

Nothing grows with the sequence.  All of it, and what it keeps, is in sums' type (float32 at least), since states are:

    linear   decays 4G + GC     k, e K, K^T 3 GK     q, q^T, K, M's operands 5 HK     scores 2HC     states (G + H) KK/C
    delta    decays 9G + 4GC    likewise 9 GK        7 HK (G < H, else 5)             2HC           (2G + H) KK/C

and the output twice in the run's own type, H numbers of its norm.  (Tests hold these to what autograd saves.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stretto.planner.calibration import Calibration
    from stretto.planner.machine import Machine
    from stretto.planner.workload import Workload
    from stretto.spec.model import ModelSpec

CHUNK = 64
"""Tokens of a chunk."""
KERNELS = {"linear": ((25, 2), (50, 5)), "delta": ((44, 2), (95, 5))}
"""Kernels and those for each chunk, whose states are chained one after the other; forward, backward."""
TOUCHED = (2, 4)
"""How often what is kept is read or written, forward and backward."""
SLOW_SUMS = 8.0
"""Products in float32 over those in 16 bit, where the machine doesn't say."""
GATES = {"softmax": 0, "linear": 1, "delta": 2}
"""Numbers a key/value head that a token gives besides k and v: decay, and what it writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Numbers that one token leaves for the backward pass, between the products of q, k, v and that of o."""

    own: float
    """In the run's type."""
    sums: float
    """In float32 at least."""


def gates(model: ModelSpec) -> int:
    """Columns of the weights of decays and writes of a layer, on average."""
    if len(set(model.attention)) == 1:
        return model.kv_heads * GATES[model.attention[0]]
    number = sum(GATES[model.attention_of(layer)] for layer in range(model.num_layers))
    return round(model.kv_heads * number / model.num_layers)


def kind_of(model: ModelSpec) -> str:
    """What all layers of a model of one kind are."""
    assert len(set(model.attention)) == 1, "layers differ"
    return model.attention[0]


@lru_cache(maxsize=64)
def model_of(model: ModelSpec, kind: str) -> ModelSpec:
    """The model, if all of its layers were of ``kind``."""
    return replace(model, attention=(kind,))


def of_kind(work: Workload, kind: str) -> Workload:
    """The same with layers of one kind only; good for what is said of a layer."""
    return work if work.model.attention == (kind,) else replace(work, model=model_of(work.model, kind))


def of_stages(
    work: Workload, figure: Callable[[Workload], float], counted: Sequence[float] | None = None
) -> list[float]:
    """``figure`` of a layer, summed over the layers of each stage; ``counted``: over so many of them."""
    model, number = work.model, work.layers
    if len(set(model.attention)) == 1:
        one = figure(work)
        return [layers * one for layers in (number if counted is None else counted)]
    each = {kind: figure(of_kind(work, kind)) for kind in set(model.attention)}
    found, at = [], 0
    for layers in number:
        found.append(sum(each[model.attention_of(layer)] for layer in range(at, at + layers)))
        at += layers
    return found if counted is None else [a * b / max(1, n) for a, b, n in zip(found, counted, number, strict=True)]


def mean(work: Workload, figure: Callable[[Workload], float]) -> float:
    """``figure`` of a layer, on average over the model's."""
    if len(set(work.model.attention)) == 1:
        return figure(work)
    return sum(of_stages(work, figure)) / sum(work.layers)


def least(work: Workload, figure: Callable[[Workload], float]) -> float:
    """``figure`` of the layer in which it is least."""
    return min(figure(of_kind(work, kind)) for kind in set(work.model.attention))


def most(work: Workload, figure: Callable[[Workload], float]) -> float:
    """``figure`` of the layer in which it is largest."""
    return max(figure(of_kind(work, kind)) for kind in set(work.model.attention))


def stretch(work: Workload) -> float:
    """Consecutive tokens that a rank holds: its part of a row, or with the zigzag layout one of two."""
    plan = work.plan
    return work.sequence_length / plan.cp / (2 if plan.cp > 1 and plan.context_layout == "zigzag" else 1)


def kept(work: Workload, *, recompute: str = "none") -> Kept:
    """What a layer of the model's one kind keeps of a token, over tp; ``recompute``: none or selective."""
    model, tp, length = work.model, work.plan.tp, stretch(work)
    heads, groups, size = model.num_heads / tp, model.kv_heads / tp, model.head_size
    queries, keys = heads * size, groups * size
    delta = kind_of(model) == "delta"
    if recompute == "selective":
        turned = queries + keys + 2 * heads + 2 * groups if delta else 0.0
        return Kept(own=2 * queries, sums=queries + 2 * keys + 3 * groups + heads + turned)
    chunk = min(CHUNK, length)
    chunks = ceil(length / chunk)
    states, chained = groups * size * size / chunk, (chunks - 1) / chunks
    if work.plan.cp > 1:  # what all chunks together make of a state
        chained *= 3 if delta else 2
    if delta:
        copied = 7 if heads > groups else 5  # for each query head, where several read one state
        sums = 9 * groups + 4 * groups * chunk + 9 * keys + copied * queries + 3 * heads + states
    else:
        sums = 4 * groups + groups * chunk + 3 * keys + 5 * queries + heads
    sums += 2 * heads * chunk + states * chained + heads * size * size / chunk
    return Kept(own=2 * queries, sums=sums * chunks * chunk / length)


def products(work: Workload) -> tuple[tuple[float, int, int], ...]:
    """Batched products of a layer forward as (rows over all tokens and heads, columns, summed over)."""
    model, tokens = work.model, work.tokens / work.plan.tp
    heads, groups, size = tokens * model.num_heads, tokens * model.kv_heads, model.head_size
    chunk = round(min(CHUNK, stretch(work)))
    found = [(heads, chunk, size), (heads, size, chunk), (heads, size, size), (groups, size, size)]
    if kind_of(model) == "delta":
        found += [(groups, chunk, size), (groups, size, chunk), (heads, size, chunk), (groups, size, size)]
        found += [(groups * size / chunk, size, size)]
    return tuple(found)


def kernel_operations(work: Workload) -> float:
    """Operations of the chunked kernel of a layer and micro-batch forward, on one rank."""
    return sum(2 * rows * columns * inner for rows, columns, inner in products(work))


def kernels(work: Workload, way: int) -> float:
    """Kernels of a layer forward (0) or backward (1)."""
    once, each = KERNELS[kind_of(work.model)][way]
    stretches = 2 if work.plan.cp > 1 and work.plan.context_layout == "zigzag" else 1
    return stretches * (once + each * ceil(stretch(work) / CHUNK))


def kernel_seconds(work: Workload, calibration: Calibration) -> tuple[float, float]:
    """The chunked kernel of one layer and micro-batch on an accelerator, forward and backward."""
    cluster = work.cluster
    matmul = (cluster.peak_flops_float32 or cluster.peak_flops_bfloat16 / SLOW_SUMS) * calibration.matmul
    memory = cluster.memory_bytes_per_second * calibration.memory
    numbers = 4 * work.tokens * kept(work).sums
    forward, backward = (
        (1 + way) * kernel_operations(work) / matmul
        + TOUCHED[way] * numbers / memory
        + kernels(work, way) * calibration.kernel_latency
        for way in (0, 1)
    )
    return forward, backward


def measured_seconds(work: Workload, machine: Machine) -> tuple[float, float]:
    """The same on a machine that was measured, from its products and copies."""
    size = max(4.0, work.stack.parameter_bytes)
    moved = machine.copy.at(size * work.tokens * kept(work).sums)
    once = sum(machine.product(max(1, round(rows)), columns, inner) for rows, columns, inner in products(work))
    return once + TOUCHED[0] / 2 * moved, 2 * once + TOUCHED[1] / 2 * moved
