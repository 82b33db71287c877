"""Why one plan and not another, in words and seconds.

Two plans are compared part by part, the parts of a step: arithmetic, waiting for each axis, filling the pipeline, the
optimizer.  A plan that doesn't fit is told apart by the kind of bytes that is too much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from itertools import islice
from typing import Any

from stretto.planner.candidates import cores, meshes, orders
from stretto.planner.estimate import Estimate
from stretto.planner.groups import divides, of_ranks
from stretto.planner.memory import RankMemory
from stretto.planner.pins import check_pins
from stretto.planner.profile import refused, schedule_key
from stretto.planner.request import OBJECTIVES, Objective, Request
from stretto.planner.search import search
from stretto.spec.check_values import one_of
from stretto.spec.errors import StrettoError
from stretto.spec.plan import PlanSpec
from stretto.spec.states import SHARD_KEYS
from stretto.spec.units import format_bytes, format_seconds

WORTH_SAYING = 0.003
"""Share of a step below which a difference isn't named."""
FEW = 32
"""Schedules that are asked why nothing can be had."""
MANY = 8
"""Pins of which only the unusual are named."""


def parts(estimate: Estimate) -> dict[str, float]:
    """Seconds of a step by what they are spent on; their sum is the step."""
    time = estimate.time
    return {
        "arithmetic": time.work - time.tensor_communication - time.context_communication,
        "tp communication": time.tensor_communication,
        "cp communication": time.context_communication,
        "bubble": time.bubble,
        "dp communication": time.data_communication,
        "offloading": time.host_communication,
        "optimizer": time.optimizer,
    }


def kinds(memory: RankMemory) -> dict[str, float]:
    """Bytes of a rank by kind."""
    return {field.name: getattr(memory, field.name) for field in fields(memory)}


def described(plan: PlanSpec) -> str:
    """A plan in a few words: its degrees above 1, its schedule, and what differs from the plainest choice.

    >>> described(PlanSpec(pp=4, dp_shard=8, zero=2, schedule="interleaved", chunks=2, micro_batch_size=4))
    'pp 4 x dp_shard 8, zero 2, interleaved with 2 chunks, micro-batch 4'
    >>> described(PlanSpec(cp=4, zero=3, context_groups="dynamic"))
    'cp 4, documents in groups, zero 3, micro-batch 1'
    """
    axes = ("pp", "tp", "cp", "dp_replicate", "dp_shard")
    words = [" x ".join(f"{axis} {getattr(plan, axis)}" for axis in axes if getattr(plan, axis) > 1) or "one rank"]
    if plan.cp > 1 and plan.context != "ring":
        words.append(f"{plan.context} {plan.ulysses}" if plan.context == "mesh" else plan.context)
    if plan.cp > 1:
        words += [plan.context_layout] if plan.context_layout != PlanSpec().context_layout else []
        words += ["keys kept"] if plan.context_keep else []
        words += [f"states by {plan.linear_context}"] if plan.linear_context != PlanSpec().linear_context else []
    words += ["documents in groups"] if plan.context_groups == "dynamic" else []
    if plan.dp_shard > 1 or (plan.cp > 1 and plan.zero > 1):  # those of cp share states too
        words.append(f"zero {plan.zero}")
    words += [f"{key.partition('_')[2]} over {getattr(plan, key)}" for key in SHARD_KEYS if getattr(plan, key)]
    if plan.pp > 1:
        name = "searched schedule" if plan.schedule_file is not None and plan.schedule == "auto" else plan.schedule
        words.append(name + (f" with {plan.chunks} chunks" if plan.chunks > 1 else ""))
    words.append(f"micro-batch {plan.micro_batch_size}")
    if plan.recompute != "none":
        words.append(f"{plan.recompute} recompute")
    words += ["offload"] if plan.offload else []
    words += [f"pass {text}" for text in plan.passes]
    if plan.stages is not None:
        words.append(f"stages of {_runs(plan.stages)} layers")
    return ", ".join(words)


def compared(better: Estimate, other: Estimate, objective: Objective = "time") -> str:
    """Why ``better`` beats ``other``: which parts of a step differ by how much.

    Where money or memory counts the winner may be slower, and what it is better in comes first.
    """
    lead = ""
    if objective == "memory" and other.peak_bytes > better.peak_bytes:
        lead = f"{format_bytes(other.peak_bytes - better.peak_bytes)} less memory; "
    if objective == "cost":
        lead = f"{1 - better.device_hours / other.device_hours:.1%} cheaper; "
    return lead + _compared_times(better, other)


def _compared_times(better: Estimate, other: Estimate) -> str:
    gap = other.seconds - better.seconds
    ours, theirs = parts(better), parts(other)
    differences = {name: theirs[name] - ours[name] for name in ours}
    named = sorted(differences.items(), key=lambda pair: -abs(pair[1]))
    least = WORTH_SAYING * better.seconds
    less = [f"{name} {format_seconds(value)} less" for name, value in named if value > least]
    more = [f"{name} {format_seconds(-value)} more" for name, value in named if -value > least]
    why = ", ".join(less or ["no part differs by much"]) + (f"; but {', '.join(more)}" if more else "")
    if abs(gap) <= 1e-9 * better.seconds:
        lighter = other.peak_bytes - better.peak_bytes
        if lighter > 0:
            return f"as fast, with {format_bytes(lighter)} less memory"
        more_bytes = f", though {format_bytes(-lighter)} larger" if lighter < 0 else ""
        return f"as fast{more_bytes}, and a simpler plan"
    return f"{format_seconds(abs(gap))} ({abs(gap) / better.seconds:.1%}) {'faster' if gap > 0 else 'slower'}: {why}"


def why_not(request: Request, pins: Mapping[str, Any], best: Estimate | None = None) -> str:
    """Why the best plan isn't one with these pins: what they break, by how much, or why they are slower."""
    pinned = request.pinned(**pins)
    asked = ", ".join(f"{name}={value}" for name, value in pins.items())
    against = [name for name, value in pins.items() if request.pins.get(name, value) != value]
    if against:
        kept = ", ".join(f"{name}={request.pins[name]}" for name in against)
        return f"{asked} contradicts what is pinned: {kept}. Leave that pin out to compare."
    one_of("--objective", request.objective, OBJECTIVES)
    try:
        check_pins(pinned)
    except StrettoError as error:
        return f"{asked} can't be: {error}"
    found = search(pinned, top=1).plans
    if found:
        best = best or next(iter(search(request, top=1).plans), None)
        if best is None:  # the search without these pins left such plans out to save time
            return f"{asked} can be, as {described(found[0].plan)}; nothing that fits was found without them."
        if found[0].plan == best.plan:
            return f"{asked} is the best plan: {described(best.plan)}."
        why = compared(best, found[0], request.objective)
        return (
            f"{asked} can be, at best as {described(found[0].plan)} ({format_seconds(found[0].seconds)} a step, "
            f"{format_bytes(found[0].peak_bytes)}). {described(best.plan)} is {why}."
        )
    least = search(replace(pinned, objective="memory"), top=1, any_size=True).plans
    if not least or least[0].fits:
        return f"{asked} can't be: {undivided(pinned)}"
    return f"{asked} doesn't fit. {too_large(least[0])}"


def too_large(least: Estimate) -> str:
    """What the plan that needs least memory needs, against what there is."""
    limit, rank = least.limits[least.fullest], least.memory[least.fullest]
    inside = sorted(kinds(rank).items(), key=lambda pair: -pair[1])
    listed = ", ".join(f"{name} {format_bytes(value)}" for name, value in inside if value > 0.01 * rank.total)
    return (
        f"The least that any plan needs is {format_bytes(rank.total)} on pipeline rank {least.fullest}, "
        f"{format_bytes(rank.total - limit)} more than a device's {format_bytes(limit)} ({listed}), "
        f"by {described(least.plan)}."
    )


def undivided(request: Request) -> str:
    """Why there is no plan at all: no degrees divide the devices, the batch and the model together."""
    batch, devices, cluster = request.run.training.global_batch_size, request.devices, request.cluster
    if cluster.groups and "pp" in request.pins and not divides(cluster, request.pins["pp"]):
        may = [str(pp) for pp in range(1, devices + 1) if divides(cluster, pp)]
        return (
            f"pp={request.pins['pp']} puts a pipeline rank on two groups of {cluster.name!r}, "
            f"whose devices aren't equal; pp may be {', '.join(may)}."
        )
    usual, pins = PlanSpec(), request.pins
    if len(pins) > MANY:  # a plan that is written out: what is usual isn't the cause
        pins = {name: value for name, value in pins.items() if value != getattr(usual, name)} or pins
    pinned = ", ".join(f"{name}={list(one) if isinstance(one, tuple) else one}" for name, one in pins.items())
    if why := _disordered(request):
        return f"No schedule of {devices} devices can be had with {pinned}: {why}"
    near = _batches(request)
    if pinned and f" {batch} " in f" {near} ":  # the degrees divide it, so it isn't the batch
        left = "one of them" if len(pins) > 1 else "it"
        return f"No plan for {devices} devices and {batch} sequences can have {pinned}; leave {left} out."
    return (
        f"No plan divides a global batch of {batch} sequences over {devices} devices"
        f"{f' with {pinned}' if pinned else ''}: what pp, tp and cp leave of the devices must divide the batch; take "
        f"{near}."
    )


def _disordered(request: Request) -> str:
    """What a schedule has against what is pinned of its order, or machines against it; empty where nothing was met."""
    told = any(request.pins.get(key) for key in ("memory_limit", "options", "passes", "schedule_file"))
    found = (order for core in cores(request, request.devices) for order in orders(request, core))
    for one in islice(found, FEW):
        try:
            of_ranks(one, request.cluster)
        except StrettoError as error:
            return str(error)
        if told and (why := refused(schedule_key(one), request.microbatches(one))):
            return why
    return ""


def _batches(request: Request) -> str:
    devices, batch = request.devices, request.run.training.global_batch_size
    layers = request.model.num_layers
    data = {devices // (pp * tp * cp) for pp, tp, cp in meshes(request, devices) if pp <= layers}
    micro = request.pins.get("micro_batch_size", 1)
    units = sorted(count * micro for count in data)
    if not units:
        return "another number of devices"
    near = sorted({max(unit, round(batch / unit) * unit) for unit in units}, key=lambda size: (abs(size - batch), size))
    return f"a batch of {' or '.join(map(str, sorted(near[:2])))}"


def _runs(stages: tuple[int, ...]) -> str:
    """``8 + 3 x 9 + 8`` of (8, 9, 9, 9, 8)."""
    runs: list[list[int]] = []
    for layers in stages:
        if runs and runs[-1][1] == layers:
            runs[-1][0] += 1
        else:
            runs.append([1, layers])
    return " + ".join(f"{count} x {layers}" if count > 1 else str(layers) for count, layers in runs)
