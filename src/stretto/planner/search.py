"""The best plans: best-first over cores, which their bounds keep closed for the most part.

A core (see ``candidates``) can't be faster than its arithmetic and its collectives spread perfectly over the ranks.
Cores are opened in the order of that bound until it exceeds the worst plan of the short list: no plan that wasn't
looked at can be on it.  In an opened core every sharding whose states fit and both ways to divide the layers are
estimated; a plan that would be on the list but for its memory is tried again with fewer layers on the ranks that are
too full.

Three rounds, each with the limits that the one before has set:

    closed     schedules of closed form (1f1b, gpipe)                          all cores that their bound leaves
    profiled   the others, simulated once per shape (``planner.profile``)      as many shapes as ``effort`` pays for
    searched   families that search for their order themselves (zb-v, ...)     the best few, where ``effort`` pays

The list has one plan per layout, its best: five variants of the same degrees would be no choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from stretto.planner.balance import balanced_by_cost
from stretto.planner.candidates import contexts, cores, orders, shardings, worlds
from stretto.planner.effort import Effort, Round
from stretto.planner.estimate import (
    Estimate,
    Turns,
    estimate,
    least_peak_bytes,
    least_seconds,
    least_state_bytes,
    turns,
)
from stretto.planner.groups import arranged, limits, of_ranks
from stretto.planner.memory import Margin, fits, memory
from stretto.planner.request import DEGREES, Request
from stretto.planner.step import step_time
from stretto.planner.workload import Workload
from stretto.spec.errors import ScheduleError, UnsupportedError
from stretto.spec.plan import PlanSpec
from stretto.spec.stages import balanced
from stretto.spec.states import SHARD_KEYS

Key = tuple[Any, ...]
"""What plans are ordered by: the objective, then the simpler plan."""
LAYOUTS = (
    ("pp", "tp"),
    ("pp", "tp", "cp"),
    DEGREES,
    (*DEGREES, "micro_batch_size", "recompute", "zero", *SHARD_KEYS, "schedule", "chunks"),
)
"""What two plans of the list differ in: the first of these that leaves enough of them."""
OF_CORE = {"pp", "tp", "cp", "micro_batch_size", "recompute", "offload"}
"""What of a plan its core tells."""
PATIENCE = 3
"""Times that layers are taken from ranks that are still too full."""
RECOMPUTES = ("none", "selective", "full")
"""Simplest first."""


@dataclass(slots=True, kw_only=True)
class Counts:
    """What a search looked at."""

    estimated: int = 0
    """Plans whose step was estimated."""
    too_large: int = 0
    """Of the estimated and the opened, those that don't fit."""
    cores: int = 0
    """Ways to cut the model and the batch."""
    opened: int = 0
    """Of those, the ones that their bound didn't rule out."""
    refused: dict[str, int] = field(default_factory=dict)
    """Schedules whose time or memory can't be told yet, and how often they were met."""
    unpaid: int = 0
    """Shapes of schedules that were left out to save time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The short list, best first, and what was looked at; empty where nothing fits."""

    plans: tuple[Estimate, ...]
    counts: Counts
    seen: tuple[tuple[PlanSpec, float], ...] = ()
    """Plans whose step was estimated, and its seconds; most fit."""


def search(request: Request, *, top: int = 5, any_size: bool = False, thorough: bool = False) -> Found:
    """The ``top`` best plans of different layout.

    ``any_size``: also those that don't fit their devices.  ``thorough``: pay for more shapes of more schedules.
    """
    if len(request.run.cluster.groups) > 1:
        each = [
            _search(replace(request, run=replace(request.run, cluster=order)), top, any_size, thorough)
            for order in arranged(request.run.cluster)
        ]
        return _best_of(request, each, top)
    return _search(request, top, any_size, thorough)


def _best_of(request: Request, each: list[Found], top: int) -> Found:
    """The short list over several orders of unequal devices; of equal plans the first order's."""
    plans = [plan for found in each for plan in found.plans]
    plans.sort(key=lambda plan: key_of(request, plan.work, plan.seconds, plan.peak_bytes))
    kept: dict[tuple[int, int], Estimate] = {}
    for plan in plans:
        kept.setdefault((plan.plan.pp, plan.plan.tp), plan)
    seen = tuple(pair for found in each for pair in found.seen)
    return Found(plans=tuple(kept.values())[:top], counts=each[0].counts, seen=seen)


def _search(request: Request, top: int, any_size: bool, thorough: bool) -> Found:
    """The short list for machines in one order."""
    found = Found(plans=(), counts=Counts())
    for layout in LAYOUTS:
        found = _Search(request, top=top, layout=layout, any_size=any_size).run(Effort(thorough=thorough))
        if len(found.plans) >= top or not found.plans:
            break
    return found


def key_of(request: Request, work: Workload, seconds: float, peak: float) -> Key:
    """What ``work`` is ordered by; least is best."""
    plan = work.plan
    figures = {"time": seconds, "cost": plan.num_ranks * seconds, "memory": peak}
    ranked = float(f"{figures[request.objective]:.9g}")  # equal sums come out a little different in another order
    simpler = (
        plan.offload, plan.cp > 1, RECOMPUTES.index(plan.recompute), plan.zero, _said(plan), plan.chunks,
        plan.schedule != "1f1b", plan.pp * plan.tp * plan.cp,
    )  # fmt: skip
    figure = seconds if request.objective == "memory" else peak
    rest = (plan.pp, plan.tp, plan.cp, plan.dp_shard, plan.micro_batch_size, plan.schedule, plan.stages or ())
    return (ranked, *simpler, figure, *rest)


class _Search:
    """One pass over the cores; ``layout``: the keys that plans of the list differ in."""

    def __init__(self, request: Request, *, top: int, layout: tuple[str, ...], any_size: bool) -> None:
        self.request, self.top, self.layout, self.any_size = request, top, layout, any_size
        self.counts = Counts()
        self.best: dict[tuple[Any, ...], tuple[Key, Workload]] = {}
        self.threshold: float = float("inf")
        self.turns: dict[tuple[Any, ...], Turns] = {}
        self.ways: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.floors: dict[PlanSpec, tuple[float, bool]] = {}
        self.refused: set[tuple[Any, ...]] = set()
        self.seen: list[tuple[PlanSpec, float]] = []

    def run(self, effort: Effort) -> Found:
        """All cores in the order of their bounds, once per round."""
        request = self.request
        bounded = sorted(self._bounded(), key=lambda pair: pair[0])
        self.counts.cores = len(bounded)
        for stage in effort.rounds(request):
            for bound, core in self._promising(bounded, stage):
                if bound <= self._limit(core):
                    self.counts.opened += stage.whole
                    self._open(core, stage)
        self.counts.unpaid = effort.unpaid
        chosen = sorted(self.best.values(), key=lambda pair: pair[0])[: self.top]
        plans = tuple(estimate(request, _plain(work)) for _, work in chosen)
        return Found(plans=plans, counts=self.counts, seen=tuple(self.seen))

    def _promising(self, bounded: list[tuple[float, PlanSpec]], stage: Round) -> list[tuple[float, PlanSpec]]:
        """The cores of a round, best first.

        Schedules without closed form are tried where 1f1b was best and fits, then where it was best and didn't (some
        need less memory), and with offload where it was but didn't.
        """
        if stage.whole:
            return [pair for pair in bounded if stage.opens(pair[1])]
        known: tuple[list[tuple[bool, float, float, PlanSpec]], ...] = ([], [])
        for bound, core in bounded:
            unknown = (bound, core.offload is not self.request.pins.get("offload"))
            floor, fitted = self.floors.get(replace(core, offload=False), unknown)
            if stage.opens(core) and not (core.offload and fitted):
                known[core.offload].append((not fitted, floor, bound, core))
        best = [one for some in known for one in sorted(some, key=lambda one: one[:3])[: stage.cores]]
        return [(bound, core) for *_, bound, core in best]

    def _bounded(self) -> Iterator[tuple[float, PlanSpec]]:
        request = self.request
        for ranks in worlds(request):
            for core in map(self._cut, cores(request, ranks)):
                if request.objective == "memory":
                    yield 0.0, core
                else:
                    work = request.work(core)
                    yield self._figure(core, least_seconds(work, self._turns(work))), core

    def _cut(self, core: PlanSpec) -> PlanSpec:
        """The core with its fastest way to cut attention over cp; nothing else of a plan depends on that way."""
        if core.cp == 1:
            return core
        key = (core.tp, core.cp, core.micro_batch_size, core.recompute)
        if key not in self.ways:
            each = list(contexts(self.request, core)) or [core]
            layer = {plan: turns(self.request.work(plan), self.request.calibration).layer for plan in each}
            best = min(each, key=lambda plan: float(f"{layer[plan]:.6g}"))
            names = ("context", "ulysses", "context_layout", "linear_context")
            self.ways[key] = {name: getattr(best, name) for name in names}
        return replace(core, **self.ways[key])

    def _open(self, core: PlanSpec, stage: Round) -> None:
        """Every order of the core, and under each that can be on the list every sharding."""
        kept = [plan for plan in shardings(self.request, core) if self._may_fit(plan, stage)]
        if not kept:
            return
        slimmest = min(kept, key=lambda plan: least_state_bytes(self.request.work(plan)))
        for order in orders(self.request, slimmest):
            if (order.schedule, order.offload) in self.refused or not stage.pays(order, self.request):
                continue
            try:
                for plan in self._divided(order):
                    self._note(core, *self._shard(plan, kept))
            except UnsupportedError:
                self.refused.add((order.schedule, order.offload))
                self.counts.refused[order.schedule] = self.counts.refused.get(order.schedule, 0) + 1
            except ScheduleError:  # micro-batches or chunks that the family can't order
                continue

    def _may_fit(self, plan: PlanSpec, stage: Round) -> bool:
        """Whether the states of a sharding leave any room, and could be on the list."""
        work = self.request.work(plan)
        states = max(least_state_bytes(work), least_peak_bytes(work, share=stage.kept))
        if states > work.cluster.memory_bytes and not self.any_size:
            self.counts.too_large += 1
            return False
        return self.request.objective != "memory" or states <= self._limit(plan)

    def _divided(self, plan: PlanSpec) -> Iterator[PlanSpec]:
        """The plan with its layers divided by number, and by cost where that is another division."""
        if plan.pp == 1 or "stages" in self.request.pins:
            yield plan
            return
        even = balanced(self.request.model.num_layers, plan.num_stages)
        yield replace(plan, stages=even)
        stages = self._stages(plan)
        if stages is not None and stages != even:
            yield replace(plan, stages=stages)

    def _turns(self, work: Workload) -> Turns:
        """What a rank does with a micro-batch, which how many ranks and micro-batches there are doesn't change."""
        plan = work.plan
        key = (plan.tp, plan.cp, plan.micro_batch_size, plan.recompute, work.cluster)
        if key not in self.turns:
            self.turns[key] = turns(work, self.request.calibration)
        return self.turns[key]

    def _stages(self, plan: PlanSpec, most: list[int] | None = None) -> tuple[int, ...] | None:
        work = self.request.work(plan)
        turn, layers = self._turns(work), self.request.model.num_layers
        if not work.cluster.groups:
            last = turn.head / turn.layer
            return balanced_by_cost(layers, ranks=plan.pp, chunks=plan.chunks, last=last, most=most)
        own = [self._turns(replace(work, cluster=machines)) for machines in of_ranks(plan, work.cluster)]
        return balanced_by_cost(
            layers, ranks=plan.pp, chunks=plan.chunks, last=own[-1].head / own[-1].layer, most=most,
            costs=[one.layer for one in own],
        )  # fmt: skip

    def _note(self, core: PlanSpec, floor: float, fitted: bool) -> None:
        """Remember the best of a core without the communication of its data ranks, and whether anything fitted."""
        before = self.floors.get(core, (float("inf"), False))
        self.floors[core] = (min(floor, before[0]), fitted or before[1])

    def _shard(self, slimmest: PlanSpec, kept: list[PlanSpec]) -> tuple[float, bool]:
        """An order under all shardings, unless even the slimmest doesn't fit, or it is too slow.

        Gives what the objective can't be below, and whether it fits as far as that was looked at.
        """
        work, floor = self.request.work(slimmest), 0.0
        if self.request.objective != "memory":
            time = step_time(work, self.request.calibration)
            floor = self._figure(slimmest, time.work + time.bubble)
            if floor > self._limit(slimmest):
                self.counts.estimated += 1
                return floor, True
        if not self.any_size and self._fitting(work) is None:
            self.counts.too_large += len(kept)
            return floor, False
        for sharding in kept:
            self._look(
                replace(sharding, **{key: getattr(slimmest, key) for key in ("schedule", "chunks", "passes", "stages")})
            )
        return floor, True

    def _look(self, plan: PlanSpec) -> None:
        """Estimate a plan, and keep it where it is the best of its layout so far."""
        if self.request.restricted and not self.request.runs(plan):
            return
        self.counts.estimated += 1
        work = self.request.work(plan)
        seconds = step_time(work, self.request.calibration).total
        self.seen.append((plan, seconds))
        if self.request.objective != "memory" and self._figure(plan, seconds) > self._limit(plan):
            return
        if not self.any_size:
            fitting = self._fitting(work)
            if fitting is None:
                self.counts.too_large += 1
                return
            if fitting is not work:
                work, seconds = fitting, step_time(fitting, self.request.calibration).total
                self.seen.append((work.plan, seconds))
        key = key_of(self.request, work, seconds, max(rank.total for rank in memory(work, self.request.margin)))
        group = self._group(plan)
        if group not in self.best or key < self.best[group][0]:
            self.best[group] = (key, work)
            if len(self.best) >= self.top:
                self.threshold = sorted(key[0] for key, _ in self.best.values())[self.top - 1]

    def _figure(self, plan: PlanSpec, seconds: float) -> float:
        return seconds * plan.num_ranks if self.request.objective == "cost" else seconds

    def _group(self, plan: PlanSpec) -> tuple[Any, ...]:
        return tuple(getattr(plan, name) for name in self.layout)

    def _limit(self, plan: PlanSpec) -> float:
        """What the objective of a plan like this one may be at most: the list's last, and what its layout has already.

        A layout that isn't told by the core yet is compared with the list alone.
        """
        found = self.best.get(self._group(plan)) if set(self.layout) <= OF_CORE else None
        return self.threshold if found is None else min(self.threshold, found[0][0])

    def _fitting(self, work: Workload) -> Workload | None:
        """``work``, or the same plan with fewer layers on the ranks that are too full; None where that doesn't help."""
        if fits(work, self.request.margin):
            return work
        plan = work.plan
        if plan.pp == 1 or "stages" in self.request.pins:
            return None
        most = self._most_layers(work)
        for _ in range(PATIENCE):
            stages = self._stages(plan, most)
            if stages is None:
                return None
            work = self.request.work(replace(plan, stages=stages))
            if fits(work, self.request.margin):
                return work
            full = _full(work, self.request.margin)
            most = [min(limit, work.layers_of_rank(rank) - full[rank]) for rank, limit in enumerate(most)]
        return None

    def _most_layers(self, work: Workload) -> list[int]:
        """Layers that each rank can hold: memory grows by the same for each."""
        plan = work.plan
        one, two = (
            [
                rank.total
                for rank in memory(
                    self.request.work(replace(plan, stages=(count,) * plan.num_stages)), self.request.margin
                )
            ]
            for count in (1, 2)
        )
        room = (
            (limit - low) * plan.chunks / max(high - low, 1.0)
            for limit, low, high in zip(limits(work), one, two, strict=True)
        )
        return [plan.chunks + max(-plan.chunks, int(layers)) for layers in room]


def _said(plan: PlanSpec) -> int:
    """Keys beside ``zero`` that say how states are divided."""
    return sum(getattr(plan, key) is not None for key in SHARD_KEYS)


def _plain(work: Workload) -> PlanSpec:
    """The plan; stages that are what they would be anyway are left out."""
    plan = work.plan
    if plan.stages == balanced(work.model.num_layers, plan.num_stages):
        return replace(plan, stages=None)
    return plan


def _full(work: Workload, margin: Margin) -> list[bool]:
    """The pipeline ranks that exceed their device."""
    return [rank.total > limit for rank, limit in zip(memory(work, margin), limits(work), strict=True)]
