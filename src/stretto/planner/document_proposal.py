"""Whether documents of some lengths are faster in groups of their own: asked of each plan on the planner's short list.

    estimate of a plan, rows of one document ──► its work x what documents in packed rows cost against that    static
                                             └─► its work x what they cost in groups of their own             dynamic

Both factors are of the costs that the run itself places documents by (``document_costs.costs_of``), so what is proposed
here is what the run will do.  Everything else of the step (filling, gradients, update) is taken as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stretto.planner.document_costs import costs_of
from stretto.planner.document_mix import Compared, Mix, compared, static_time
from stretto.planner.estimate import Estimate
from stretto.planner.plan import Answer
from stretto.spec.check import check
from stretto.spec.errors import StrettoError
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.units import format_seconds

STEPS = 3
"""Steps whose documents are drawn."""
FILLED = 0.97
"""Of the rows' tokens, what packing leaves no gaps in."""
WORTH = 1.02
"""Gain above which groups are proposed."""
REPLACED = ("context", "ulysses", "inner_ring", "context_inner", "context_groups", "offload")
"""Keys of a plan that groups need otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A plan of the list with documents of a mix."""

    number: int
    """Its place on the list, from 1."""
    plan: PlanSpec
    """What to run: the plan itself, or with dynamic groups where they are faster."""
    static_seconds: float
    """Of a step with packed rows."""
    dynamic_seconds: float | None
    """With groups; None where the plan can't have them."""
    sizes: dict[int, int]
    """Documents by the number of their ranks, of one step."""

    @property
    def seconds(self) -> float:
        """Of a step of ``plan``."""
        faster = self.plan.context_groups == "dynamic" and self.dynamic_seconds is not None
        return self.dynamic_seconds if faster and self.dynamic_seconds is not None else self.static_seconds

    @property
    def gain(self) -> float | None:
        """How many times faster dynamic groups are; None where there are none."""
        return None if self.dynamic_seconds is None else self.static_seconds / self.dynamic_seconds


def propose(answer: Answer, mix: Mix) -> tuple[Proposal, ...]:
    """What documents of ``mix`` make of each plan of an answer, the fastest first."""
    pins = answer.request.pins
    found = [_of_plan(answer.run(i), one, mix, i + 1, pins) for i, one in enumerate(answer.plans)]
    return tuple(sorted(found, key=lambda proposal: proposal.seconds))


def _of_plan(run: RunSpec, estimate: Estimate, mix: Mix, number: int, pins: Mapping[str, Any]) -> Proposal:
    row, rows = run.training.sequence_length, run.training.global_batch_size
    drawn = [mix.draw(int(FILLED * row * rows), seed=seed, longest=row) for seed in range(STEPS)]
    work = estimate.time.work

    def of_step(times: Sequence[float], costs: Any) -> float:
        plain = static_time([row] * rows, costs, cp=run.plan.cp, replicas=run.plan.dp, row=row)
        return estimate.seconds + work * (sum(times) / len(times) / plain - 1)

    best: tuple[float, PlanSpec, Compared] | None = None
    static = None
    for plan in (run.plan, *grouped(run, pins)):
        one = replace(run, plan=plan)
        costs = costs_of(one)
        if static is None:
            times = [
                static_time(lengths, costs, cp=plan.cp, replicas=plan.dp, row=row, way=_way(plan)) for lengths in drawn
            ]
            static = of_step(times, costs)
            continue
        tokens = plan.context_tokens or row
        each = [
            compared(lengths, costs, cp=plan.cp, replicas=plan.dp, row=row, memory_tokens=tokens) for lengths in drawn
        ]
        seconds = of_step([step.dynamic for step in each], costs)
        if best is None or seconds < best[0]:
            best = seconds, plan, each[0]
    assert static is not None
    better = best is not None and static / best[0] > WORTH
    return Proposal(
        number=number,
        plan=best[1] if best is not None and better else run.plan,
        static_seconds=static,
        dynamic_seconds=None if best is None else best[0],
        sizes={} if best is None else best[2].sizes,
    )


def _way(plan: PlanSpec) -> str:
    """What circulates between the seats, as far as a row's time is told by it."""
    return plan.context if plan.context in ("token-ring", "all-gather") else "ring"


def grouped(run: RunSpec, pins: Mapping[str, Any] | None = None) -> list[PlanSpec]:
    """The plan with dynamic groups, and with documents' activations on the host, where checks and pins let it.

    In a group its own way to cut attention, or the plain one.
    """
    plan, pins = run.plan, pins or {}
    tokens = pins.get("context_tokens", plan.micro_batch_size * -(-run.training.sequence_length // plan.cp))
    own = replace(plan, context_groups="dynamic", context_tokens=tokens)
    plain = replace(own, context=_way(plan), ulysses=1, inner_ring=1, context_inner=PlanSpec().context_inner)
    found = []
    for candidate in dict.fromkeys(replace(way, offload=away) for way in (plain, own) for away in (plan.offload, True)):
        if any(getattr(candidate, key) != pins[key] for key in REPLACED if key in pins):
            continue
        try:
            check(replace(run, plan=candidate), data=False)
        except StrettoError:
            continue
        found.append(candidate)
    return found


def described(proposals: Sequence[Proposal]) -> list[str]:
    """What to say of them, one line each."""
    lines = ["documents of these lengths, packed into rows or in groups of their own:"]
    for one in proposals:
        told = f"plan {one.number}: {format_seconds(one.static_seconds)} packed"
        if one.dynamic_seconds is None:
            lines.append(f"{told}; it can't have dynamic groups")
            continue
        sizes = ", ".join(f"{count} over {size}" for size, count in one.sizes.items())
        host = ", the longest on the host" if one.plan.offload and one.plan.context_groups == "dynamic" else ""
        told += f", {format_seconds(one.dynamic_seconds)} in groups ({one.gain:.2f} times as fast{host}; {sizes})"
        lines.append(told)
    first = proposals[0]
    if first.plan.context_groups == "dynamic":
        tokens = "" if first.plan.context_tokens is None else f", context_tokens = {first.plan.context_tokens}"
        way = f'context = "{first.plan.context}", ' if first.plan.cp > 1 else ""
        way += f"ulysses = {first.plan.ulysses}, " if first.plan.context == "mesh" else ""
        lines.append(f'proposed: plan {first.number}, {way}context_groups = "dynamic"{tokens}')
    else:
        lines.append(f"proposed: plan {first.number} as it is")
    return lines


def as_data(proposals: Sequence[Proposal]) -> list[dict[str, Any]]:
    """Plain figures, the fastest first."""
    return [
        {
            "plan": one.number,
            "static_step_s": one.static_seconds,
            **({} if one.dynamic_seconds is None else {"dynamic_step_s": one.dynamic_seconds}),
            "context": one.plan.context,
            "context_groups": one.plan.context_groups,
            **({} if one.plan.context_tokens is None else {"context_tokens": one.plan.context_tokens}),
            "offload": one.plan.offload,
            "documents_over_ranks": {str(size): count for size, count in one.sizes.items()},
        }
        for one in proposals
    ]
