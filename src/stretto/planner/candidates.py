"""Which plans there are, from the widest choice to the narrowest.

    core        pp x tp x cp x data ranks = devices, micro-batch, recompute, offload    what a rank computes
    context     how attention is cut over cp: the fastest way for each core             what cp ranks exchange
    sharding    dp_replicate x dp_shard = data ranks, zero, factors of each state       who keeps which states
    order       schedule family and chunks, vocabulary over the pipeline or not         when it is computed
    stages      balanced by number, by cost, within each rank's memory                  (``search``)

A core already bounds the time from below, so that most of them are never opened.  ``dp_shard`` is every divisor of the
data ranks: shards inside a node and replicas across nodes are among them (MiCS).  With the optimizer's states over all
data ranks, parameters and gradients are also divided over the levels of the links, a module or a node, each for itself
(AMSP; Frontier's low-bandwidth partitioning).  Degrees that can't be (heads that tp doesn't divide, a batch that the
data ranks don't) aren't made; what is made passes ``spec.check``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import gcd
from typing import Any

from stretto.planner.groups import divides
from stretto.planner.request import DEGREES, Request
from stretto.spec import capabilities
from stretto.spec.check_states import check_states
from stretto.spec.errors import ConfigError
from stretto.spec.model import VideoSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.states import SHARD_KEYS, StateSharding, of_plan, written

FEW_CHUNKS = 8
"""Chunks that are always tried; above it only those that divide the layers evenly."""
FIRST = ("1f1b", "interleaved", "zb-h1", "dualpipe-v", "hanayo", "bitpipe", "zb-auto", "dualpipe", "chimera", "zb-h2")
"""Schedules in the order in which they are tried, the others after them; where time for trying ends, these were."""
CUT_VOCABULARY = ("1f1b", "interleaved")
"""Schedules that are also tried with the vocabulary cut over the pipeline."""
LARGEST_MICRO = 4096
"""Sequences of a micro-batch that are tried."""
UNPROPOSED = ("skip-pipe", "auto")
"""Schedules that aren't tried for every plan: one leaves out parts of the model, the other searches for long."""


def worlds(request: Request) -> list[int]:
    """Numbers of ranks that a plan may have, most first.

    All devices, but for ``cost`` also every divisor of the nodes or of one node: fewer devices may be cheaper.
    """
    devices = request.devices
    if request.objective != "cost" or request.cluster.groups:
        return [devices]
    per_node = request.cluster.devices_per_node
    nodes = devices // per_node
    parts = {per_node * count for count in divisors(nodes)} if nodes else set()
    return sorted(parts | set(divisors(min(per_node, devices))), reverse=True)


def cores(request: Request, ranks: int) -> Iterator[PlanSpec]:
    """Plans of ``ranks`` ranks that differ in what a rank computes; states are sharded over all data ranks."""
    model, batch = request.model, request.run.training.global_batch_size
    for pp, tp, cp in meshes(request, ranks):
        data = ranks // (pp * tp * cp)
        if batch % data or pp > model.num_layers:
            continue
        most = max(LARGEST_MICRO, request.pins.get("micro_batch_size", 1))
        for micro in request.values("micro_batch_size", (n for n in divisors(batch // data) if n <= most)):
            for recompute in request.values("recompute", _recomputes(request)):
                for offload in request.values("offload", (False, True) if capabilities.OFFLOAD else (False,)):
                    yield request.plan(
                        pp=pp, tp=tp, cp=cp, dp_replicate=1, dp_shard=data,
                        micro_batch_size=micro, recompute=recompute, offload=offload, **chunks_of(request, pp),
                    )  # fmt: skip


def _recomputes(request: Request) -> tuple[str, ...]:
    """What the backward pass can recompute; of clips no scores, since nothing keeps them; beside kept keys nothing."""
    if request.pins.get("context_keep"):
        return ("none",)
    return tuple(way for way in capabilities.RECOMPUTE if way != "selective" or request.model.video is None)


def chunks_of(request: Request, pp: int) -> dict[str, int]:
    """Chunks that pinned stages leave for ``pp`` ranks; empty where they aren't pinned, or are for a schedule file."""
    staged = _staged(request)
    return {"chunks": staged // pp} if staged else {}


def _staged(request: Request) -> int:
    """Number of stages that are pinned; 0 where none are, or a schedule file says how many a rank holds."""
    return 0 if "schedule_file" in request.pins else len(request.pins.get("stages") or ())


def meshes(request: Request, ranks: int) -> Iterator[tuple[int, int, int]]:
    """Degrees pp, tp and cp that divide ``ranks`` and what they cut."""
    model, length = request.model, request.run.training.sequence_length
    split = gcd(model.num_heads, model.kv_heads, model.intermediate_size, length) if model.video is None else 1
    staged = _staged(request)
    for pp in request.values("pp", divisors(ranks)):
        if staged and staged % pp:
            continue
        for tp in request.values("tp", divisors(gcd(split, ranks // pp))):
            if request.cluster.groups and not divides(request.cluster, pp):
                continue
            for cp in request.values("cp", _context_degrees(request, ranks // (pp * tp), tp)):
                yield pp, tp, cp


def contexts(request: Request, core: PlanSpec) -> Iterator[PlanSpec]:
    """The ways to cut the core's attention over cp, simplest first; with linear layers also of states and of rows."""
    if request.model.video is not None:
        yield from (replace(core, context=way) for way in request.values("context", [capabilities.SWITCH]))
        return
    if not request.model.keeps_states:
        yield from _attention_ways(request, core)
        return
    softmax = "softmax" in request.model.attention
    for layout in request.values("context_layout", reversed(capabilities.CONTEXT_LAYOUTS)):
        for way in request.values("linear_context", capabilities.LINEAR_CONTEXT):
            cut = replace(core, context_layout=layout, linear_context=way)
            yield from _attention_ways(request, cut) if softmax else (cut,)


def _attention_ways(request: Request, core: PlanSpec) -> Iterator[PlanSpec]:
    heads, given = request.model.num_heads // core.tp, request.pins.get("ulysses")
    grouped, inner = request.pins.get("context_groups", "static") != "static", request.pins.get("inner_ring", 1)
    for way in request.values("context", capabilities.GROUPED_CONTEXT if grouped else capabilities.CONTEXT):
        if way == capabilities.SWITCH:  # of clips alone
            continue
        if inner > 1 and way not in ("ring", "mesh"):
            continue
        if core.context_keep and way not in capabilities.KEEPING_CONTEXT:
            continue
        if way == "mesh":
            for sharers in request.values("ulysses", divisors(core.cp)):
                if 1 < sharers < core.cp and heads % sharers == 0 and core.cp // sharers % inner == 0:
                    yield replace(core, context=way, ulysses=sharers)
        elif given in (None, 1) and (way != "ulysses" or heads % core.cp == 0):
            yield replace(core, context=way, ulysses=1)


def shardings(request: Request, core: PlanSpec) -> Iterator[PlanSpec]:
    """The ways to keep the core's states, each once; one rank per shard has nothing to split, zero 1 stands for all."""
    data, seen, pins = core.dp, set(), {key: request.pins[key] for key in SHARD_KEYS if key in request.pins}
    told = "zero" in request.pins
    for shard in request.values("dp_shard", divisors(data)) if told or not pins else ():
        if request.pins.get("dp_replicate", data // shard) != data // shard:
            continue
        stages = capabilities.ZERO_STAGES if shard > 1 or "zero" in request.pins else (1,)
        for zero in request.values("zero", stages):
            degrees = {"dp_shard": shard, "dp_replicate": data // shard, "zero": zero}
            plan = request.plan(**{**_chosen(core), **degrees, **pins})
            if (states := divided(plan)) is not None and states not in seen:
                seen.add(states)
                yield plan
    for plan in () if told and pins else _independent(request, core):
        if pins:
            yield replace(plan, **pins)
        elif divided(plan) not in seen and request.values("zero", (plan.zero,)):
            yield plan


def divided(plan: PlanSpec) -> StateSharding | None:
    """How the plan's states are divided; None where they can't be so."""
    try:
        check_states(plan)
    except ConfigError:
        return None
    return of_plan(plan)


def _independent(request: Request, core: PlanSpec) -> Iterator[PlanSpec]:
    """Optimizer states over all data ranks, parameters and gradients inside a level of the links, nearest first."""
    pins, ranks, cluster = request.pins, core.dp * core.cp, request.cluster
    shard = pins.get("dp_shard", core.dp // pins.get("dp_replicate", 1))
    if not shard or shard * pins.get("dp_replicate", core.dp // shard) != core.dp:
        return
    base = request.plan(**{**_chosen(core), "dp_shard": shard, "dp_replicate": core.dp // shard})
    levels = {1, ranks, *(size // core.tp for size in (cluster.module_devices, cluster.devices_per_node))}
    near = sorted(size for size in levels if size and ranks % size == 0)
    for p in (pins["shard_parameters"],) if "shard_parameters" in pins else near:
        for g in (pins["shard_gradients"],) if "shard_gradients" in pins else (size for size in near if size >= p):
            o = pins.get("shard_optimizer", ranks)
            if not any((ranks % o, o % g, g % p)):
                yield written(base, StateSharding(parameters=p, gradients=g, optimizer=o))


def orders(request: Request, plan: PlanSpec) -> Iterator[PlanSpec]:
    """The schedules that ``plan`` can have; without a pipeline there is nothing to order."""
    layers = request.model.num_layers
    if "schedule_file" in request.pins:
        yield plan
        return
    families = sorted(
        (name for name in capabilities.SCHEDULES if name not in UNPROPOSED),
        key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST),
    )
    pinned = request.pins.get("schedule")
    if pinned in UNPROPOSED:
        families = [pinned]
    elif plan.pp == 1 and pinned is None and plan.chunks == 1:
        families = ["1f1b"]
    for family in request.values("schedule", families):
        most = layers // plan.pp
        few = [count for count in capabilities.SCHEDULES[family] if count <= most]
        kept = [count for count in few if count <= FEW_CHUNKS or layers % (plan.pp * count) == 0]
        pinned_chunks = chunks_of(request, plan.pp).get("chunks")
        for chunks in request.values("chunks", few if pinned_chunks or "chunks" in request.pins else kept):
            if pinned_chunks not in (None, chunks):
                continue
            order = request.plan(**{**_chosen(plan), "schedule": family, "chunks": chunks})
            yield order
            cuts = family in CUT_VOCABULARY and plan.pp > 1 and not plan.offload and request.model.video is None
            if cuts and "passes" not in request.pins:
                yield replace(order, passes=("vocabulary",))


def divisors(number: int) -> list[int]:
    """All divisors, least first.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


def _context_degrees(request: Request, ranks: int, tp: int) -> list[int]:
    """Context-parallel degrees: two equal pieces of the row a rank, each divided over tp; uneven where cp is pinned."""
    if "cp" not in capabilities.AXES:
        return [1]
    if request.model.video is not None:
        return _cuts_of_clips(request, request.model.video, ranks)
    length, pinned = request.run.training.sequence_length, request.pins.get("cp")
    uneven = [pinned] if pinned is not None and length // tp >= 2 * pinned else []
    seated = [cp for cp in divisors(ranks) if cp % fewest_seats(request.pins) == 0]
    return [cp for cp in seated if cp == 1 or cp in uneven or length % (2 * cp * tp) == 0]


def _cuts_of_clips(request: Request, clip: VideoSpec, ranks: int) -> list[int]:
    """Context-parallel degrees that cut frames and patches evenly, or unevenly where cp is pinned."""
    pins = request.pins
    if pins.get("context", capabilities.SWITCH) != capabilities.SWITCH:
        return [1]
    return [cp for cp in divisors(ranks) if gcd(clip.frames, clip.patches) % cp == 0 or cp == pins.get("cp")]


def fewest_seats(pins: Mapping[str, Any]) -> int:
    """What cp must be a multiple of where the ranks that share heads, or the inner level of a ring, are pinned."""
    return max(1, pins.get("ulysses", 1)) * max(1, pins.get("inner_ring", 1))


def _chosen(plan: PlanSpec) -> dict[str, object]:
    ways = ("context", "ulysses", "context_layout", "linear_context")
    keys = (*DEGREES, *ways, "chunks", "micro_batch_size", "recompute", "offload", "zero", *SHARD_KEYS)
    return {key: getattr(plan, key) for key in keys}
