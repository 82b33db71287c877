"""A plan that can't fit, and the changes that make it fit: one key or two at a time, the quickest step first.

What is tried keeps model, batch and number of ranks: recompute, smaller micro-batches, states divided further, a
schedule that keeps less, offload, and data ranks turned into tensor or pipeline ranks.  Pairs are tried where single
changes don't give enough.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from stretto.planner.document_memory import document_memory, documents_fit
from stretto.planner.document_portions import plain_plan
from stretto.planner.estimate import Estimate, estimate
from stretto.planner.request import Request
from stretto.spec.check import check
from stretto.spec.cluster import ClusterSpec
from stretto.spec.errors import ConfigError, ScheduleError, UnsupportedError
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.sequence import memory_tokens
from stretto.spec.states import of_plan
from stretto.spec.units import format_bytes, format_seconds

SHOWN = 3
"""Changes that are told."""
LEANER: Mapping[str, tuple[str, int]] = {"gpipe": ("1f1b", 1), "1f1b": ("v-half", 2), "interleaved": ("1f1b", 1)}
"""A schedule that keeps less activations than another, and its chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """Keys of the plan with other values, under which it fits."""

    changes: Mapping[str, Any]
    estimate: Estimate
    timed: bool = True
    """Whether its step is told: with dynamic groups that depends on documents that aren't known here."""

    def __str__(self) -> str:
        """As a run file would say it, with what it takes."""
        written = ", ".join(f"plan.{key} = {_written(value)}" for key, value in self.changes.items())
        step = f", {format_seconds(self.estimate.seconds)} a step" if self.timed else ""
        return f"{written} ({format_bytes(self.estimate.peak_bytes)}{step})"


def refuse_unfit(run: RunSpec) -> None:
    """ConfigError where a rank would need more memory than there is, with the three changes that cost least time.

    Silent where the memory can't be told, and where ``run.refuse_unfit`` is false.
    """
    if not run.run.refuse_unfit or run.model.family == "foreign":
        return
    try:
        request = Request(run=replace(run, cluster=_with_memory(run)))
    except UnsupportedError:
        return
    asked = _estimated(request, run.plan)
    if asked is None or asked.fits:
        return
    rank, limit = asked.memory[asked.fullest], request.cluster.memory_bytes
    found = remedies(request, run.plan)
    if found:
        way = "What makes it fit, quickest step first: " + "; ".join(map(str, found)) + "."
    else:
        way = "No change of one or two keys makes it fit; stretto plan looks at all plans."
    raise ConfigError(
        f"The plan can't fit: pipeline rank {asked.fullest} needs {format_bytes(rank.total)}, and there are "
        f"{format_bytes(limit)} for it. {way} Set run.refuse_unfit = false to start it all the same."
    )


def remedies(request: Request, plan: PlanSpec, *, most: int = SHOWN) -> tuple[Remedy, ...]:
    """The ``most`` quickest ways to make ``plan`` fit; single changes where there are enough of them."""
    single = list(_changes(request, plan))
    found = _fitting(request, plan, single)
    if len(found) < most:
        others = [change for change in single if "context_tokens" not in change]  # which fits by itself
        pairs = [{**one, **other} for one, other in combinations(others, 2) if not set(one) & set(other)]
        found += _fitting(request, plan, pairs)[: most - len(found)]
    return tuple(found[:most])


def _fitting(request: Request, plan: PlanSpec, changes: list[dict[str, Any]]) -> list[Remedy]:
    found = []
    for change in changes:
        other = _estimated(request, replace(plan, **change))
        if other is not None and other.fits:
            found.append(Remedy(changes=change, estimate=other, timed=plan.context_groups == "static"))
    return sorted(found, key=lambda remedy: remedy.estimate.seconds)


def _estimated(request: Request, plan: PlanSpec) -> Estimate | None:
    """None where the plan can't be run or told."""
    try:
        run = replace(request.run, plan=plan)
        check(run, data=False)
        found = estimate(request, plan if plan.context_groups == "static" else plain_plan(plan))
        if plan.context_groups == "static":
            return found
        own = replace(request, run=run)
        return replace(found, memory=document_memory(own), fits=documents_fit(own))
    except (ConfigError, UnsupportedError, ScheduleError):
        return None


def _room(request: Request, plan: PlanSpec) -> int | None:
    """Tokens at most of a micro-batch of documents, so that it fits; None where no number does."""
    length = request.run.training.sequence_length
    least, most = -(-length // (plan.cp * plan.dp)), memory_tokens(plan, length) - 1

    def fits(tokens: int) -> bool:
        found = _estimated(request, replace(plan, context_tokens=tokens))
        return found is not None and found.fits

    if most < least or not fits(least):
        return None
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def _changes(request: Request, plan: PlanSpec) -> Iterator[dict[str, Any]]:
    """One change at a time."""
    if plan.context_groups == "dynamic" and (tokens := _room(request, plan)) is not None:
        yield {"context_tokens": tokens}
    order = ("none", "selective", "full")
    yield from ({"recompute": choice} for choice in order[order.index(plan.recompute) + 1 :])
    sizes = (size for size in range(plan.micro_batch_size - 1, 0, -1) if plan.micro_batch_size % size == 0)
    yield from ({"micro_batch_size": size} for size in sizes)
    if plan.dp_shard * plan.cp > 1:
        yield from ({"zero": zero} for zero in range(plan.zero + 1, 4))
    states, ranks = of_plan(plan), plan.dp * plan.cp
    if states.optimizer < ranks and ranks % states.gradients == 0:
        yield {"shard_optimizer": ranks}
    if plan.dp_replicate > 1:
        yield from ({"dp_replicate": 1, "dp_shard": plan.dp, "zero": zero} for zero in (1, 2, 3))
    if plan.pp > 1 and plan.schedule in LEANER and plan.schedule_file is None:
        schedule, chunks = LEANER[plan.schedule]
        yield {"schedule": schedule, "chunks": chunks, "stages": None}
    if plan.pp > 1 and not plan.offload:
        yield {"offload": True}
    for axis in ("tp", "pp"):
        for data in ("dp_replicate", "dp_shard"):
            if getattr(plan, data) % 2 == 0:
                change = {axis: 2 * getattr(plan, axis), data: getattr(plan, data) // 2}
                yield change if axis == "tp" or plan.stages is None else {**change, "stages": None}


def _with_memory(run: RunSpec) -> ClusterSpec:
    """The cluster; of a CPU whose memory isn't written, each rank's share of this machine's."""
    cluster = run.cluster
    if cluster.name.partition(":")[0] != "local-cpu" or cluster.memory_bytes != ClusterSpec().memory_bytes:
        return cluster
    try:
        whole = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # not told here
        return cluster
    return replace(cluster, memory_bytes=whole / run.plan.num_ranks)


def _written(value: Any) -> str:
    if value is None:
        return "auto"
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
