"""The planner's answer to one question: the short list, or a clear error where there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stretto.planner.estimate import Estimate
from stretto.planner.explain import compared, too_large, undivided
from stretto.planner.kept_keys import with_kept_keys
from stretto.planner.pins import check_pins
from stretto.planner.request import OBJECTIVES, Request
from stretto.planner.search import Counts, key_of, search
from stretto.planner.synthesized import with_synthesized
from stretto.spec.check import check
from stretto.spec.check_values import one_of
from stretto.spec.errors import ConfigError
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.units import format_bytes

LARGER = (2, 4, 8, 16)
"""Times as many devices that are tried where a model fits on none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Plans of different layout, best first, and what was looked at."""

    request: Request
    """The question."""
    plans: tuple[Estimate, ...]
    """At least one; each fits, and ``stretto train`` runs it."""
    counts: Counts
    """What the search looked at."""
    seen: tuple[tuple[PlanSpec, float], ...] = ()
    """Plans whose step was estimated, and its seconds."""

    @property
    def best(self) -> Estimate:
        """The first."""
        return self.plans[0]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why each plan beats the one after it; one fewer than there are plans."""
        objective = self.request.objective
        return tuple(compared(one, other, objective) for one, other in zip(self.plans, self.plans[1:], strict=False))

    def run(self, number: int = 0) -> RunSpec:
        """The run with plan ``number`` of the list, on as many of the machines as it needs."""
        plan = self.plans[number].plan
        request = self.request
        machines = replace(request, pins={}).machines(plan.num_ranks)
        if machines.groups:
            machines = self.plans[number].work.cluster
        known: dict[str, Any] = dict.fromkeys(request.untold, 0.0)
        return replace(request.run, plan=plan, cluster=replace(machines, **known))


def answer(request: Request, *, top: int = 5, thorough: bool = False, folder: Path | None = None) -> Answer:
    """The ``top`` best plans.

    ``thorough``: of more schedules, and where there is a ``folder`` for their files, of some that are searched for.
    ConfigError where the pins contradict each other or the machines, where nothing divides the batch, and where the
    model fits on no plan (which says the least memory and the nearest plan).
    """
    one_of("--objective", request.objective, OBJECTIVES)
    if top < 1:
        raise ConfigError(f"--top {top} must be at least 1.")
    if request.objective == "cost" and request.price is None:
        raise ConfigError(
            "What a step costs needs the price of a device for an hour: write --price, for example --price 2.5, or "
            "price_per_device_hour in the cluster file."
        )
    check_pins(request)
    found = search(request, top=top, thorough=thorough)
    plans = with_kept_keys(request, found.plans)
    if thorough and folder is not None and request.objective != "memory":
        plans = with_synthesized(request, plans, folder)
    if plans != found.plans:
        plans = tuple(sorted(plans, key=lambda plan: key_of(request, plan.work, plan.seconds, plan.peak_bytes)))
    runnable = [plan for plan in plans if request.runs(plan.plan)]
    if not runnable:
        for plan in plans:  # say what the checks have against the best
            check(replace(request.run, plan=plan.plan), data=False)
        raise ConfigError(_nothing(request))
    return Answer(request=request, plans=tuple(runnable), counts=found.counts, seen=found.seen)


def fill_in(run: RunSpec, pins: Mapping[str, Any]) -> PlanSpec:
    """The plan of a run file in which something is ``auto``: the fastest around what is written."""
    return answer(Request(run=run, pins=pins), top=1).best.plan


def _nothing(request: Request) -> str:
    """Why there is no plan."""
    least = search(replace(request, objective="memory"), top=1, any_size=True).plans
    if not least or least[0].fits:
        return undivided(request)
    devices = request.devices
    return (
        f"{request.model.name!r} fits on no plan for {devices} device{'s' if devices > 1 else ''} of "
        f"{format_bytes(request.cluster.memory_bytes)}. {too_large(least[0])} {_larger(request)}"
    )


def _larger(request: Request) -> str:
    """The nearest number of devices on which it fits."""
    cluster = request.run.cluster
    for times in LARGER:
        more = replace(cluster, name=cluster.name.partition(":")[0], num_nodes=cluster.num_nodes * times)
        if cluster.name.partition(":")[0] == "local-cpu":
            break
        found = search(replace(request, run=replace(request.run, cluster=more)), top=1).plans
        if found:
            return f"It fits on {times * request.devices} devices."
    return "Take devices with more memory, a shorter sequence or a smaller model."
