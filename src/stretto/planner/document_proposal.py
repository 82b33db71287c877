"""Whether documents of some lengths are faster in groups of their own: asked of each plan on the planner's short list.

    estimate of a plan, rows of one document ──► its work x what documents in packed rows cost against that    static
    lengths ──► placed as the run itself does, at the rates of the machines (``document_step``)                dynamic

Everything else of the static step (filling, gradients, update) is taken as it was.  Where rates are only assumed,
groups too are told by a factor: that of what the fullest rank works on, messages staying what they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stretto.planner.calibration import published
from stretto.planner.document_costs import Costs, costs_of
from stretto.planner.document_groups import Placement
from stretto.planner.document_memory import document_memory, documents_fit
from stretto.planner.document_mix import Mix, static_time
from stretto.planner.document_portions import placed, plain_plan
from stretto.planner.document_seconds import Published
from stretto.planner.estimate import Estimate
from stretto.planner.plan import Answer
from stretto.planner.prediction import Prediction, of_documents
from stretto.planner.request import Request
from stretto.spec.check import check
from stretto.spec.errors import StrettoError, UnsupportedError
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.sequence import memory_tokens
from stretto.spec.units import format_bytes, format_seconds

STEPS = 3
"""Steps whose documents are drawn."""
FILLED = 0.97
"""Of the rows' tokens, what packing leaves no gaps in."""
WORTH = 1.03
"""Gain above which groups are proposed: of documents that fill their rows, static and dynamic groups do the same work,
and their estimates differ by 2% (messages are told by other formulas)."""
Steps = Sequence[Sequence[int]]
"""Lengths of the documents of each step."""
SHARING = ("ulysses", "mesh")
"""Ways to cut rows in which ranks share heads."""
REPLACED = ("context", "ulysses", "inner_ring", "context_inner", "context_keep", "context_groups", "offload")
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
    prediction: Prediction | None = None
    """Of a step with groups, as ``stretto train`` will say it; None where rates are assumed."""

    @property
    def seconds(self) -> float:
        """Of a step of ``plan``."""
        faster = self.plan.context_groups == "dynamic" and self.dynamic_seconds is not None
        return self.dynamic_seconds if faster and self.dynamic_seconds is not None else self.static_seconds

    @property
    def gain(self) -> float | None:
        """How many times faster dynamic groups are; None where there are none."""
        return None if self.dynamic_seconds is None else self.static_seconds / self.dynamic_seconds


def propose(answer: Answer, documents: Mix | Steps) -> tuple[Proposal, ...]:
    """What documents of a mix, or those of some steps, make of each plan of an answer, the fastest first."""
    training = answer.request.run.training
    row, tokens = training.sequence_length, FILLED * training.sequence_length * training.global_batch_size
    if isinstance(documents, Mix):
        documents = [documents.draw(int(tokens), seed=seed, longest=row) for seed in range(STEPS)]
    found = [_of_plan(answer, number, documents) for number in range(len(answer.plans))]
    return tuple(sorted(found, key=lambda proposal: proposal.seconds))


def _of_plan(answer: Answer, number: int, documents: Steps) -> Proposal:
    run, estimate, pins = answer.run(number), answer.plans[number], answer.request.pins
    static = _packed(answer.request, run, estimate, documents)
    best: tuple[Prediction, PlanSpec] | None = None
    for plan in grouped(run, pins):
        if not documents_fit(replace(answer.request, run=replace(run, plan=plan), pins={})):
            continue
        try:
            found = _placed(answer.request, replace(run, plan=plan), estimate, documents)
        except UnsupportedError:  # no figures for it
            continue
        if best is None or found.time.total < best[0].time.total:
            best = found, plan
    if best is None:
        return Proposal(number=number + 1, plan=run.plan, static_seconds=static, dynamic_seconds=None, sizes={})
    seconds, known = best[0].time.total, not answer.request.assumed
    wanted = pins.get("context_groups") == "dynamic" or static / seconds > WORTH
    sizes = [piece.ranks for piece in placed(replace(run, plan=best[1]), documents[0]).pieces]
    return Proposal(
        number=number + 1,
        plan=best[1] if wanted else run.plan,
        static_seconds=static,
        dynamic_seconds=seconds,
        sizes={size: sizes.count(size) for size in sorted(set(sizes))},
        prediction=best[0] if known else None,
    )


def _packed(request: Request, run: RunSpec, estimate: Estimate, documents: Steps) -> float:
    """A step of the plan itself; on a measured CPU packed rows take as long as full ones, masked pairs included."""
    plan, row, rows = run.plan, run.training.sequence_length, run.training.global_batch_size
    if request.calibration is not None and request.calibration.machine is not None:
        return estimate.seconds
    costs, launched = work_of(run), 0.0
    if not request.assumed:
        work = request.work(plain_plan(plan))
        rates = Published(work, request.calibration or published(work.cluster.name), costs_of(run))
        costs = rates.of_row(row // plan.cp, plan.cp)
        launched = 2 * run.model.num_layers * rates.launches / plan.dp  # of each document, forward and backward

    def time(lengths: Sequence[int], way: str) -> float:
        return static_time(lengths, costs, cp=plan.cp, replicas=plan.dp, row=row, way=way)

    plain, number = time([row] * rows, _plainly(plan)), len(documents)
    more = sum(max(0, len(lengths) - rows) for lengths in documents) / number
    mean = sum(time(lengths, plan.context) for lengths in documents) / number
    return estimate.seconds + estimate.time.work * (mean / plain - 1) + launched * more


def _placed(request: Request, run: RunSpec, estimate: Estimate, documents: Steps) -> Prediction:
    """A step in groups; where rates are only assumed, by what the fullest rank works on, messages as they were."""
    own = replace(request, run=run, pins={})
    if not request.assumed:
        return of_documents(own, documents)
    costs, plan = work_of(run), run.plan
    row, rows = run.training.sequence_length, run.training.global_batch_size
    plain = static_time([row] * rows, costs, cp=plan.cp, replicas=plan.dp, row=row, way=_plainly(plan))
    mean = sum(_fullest(lengths, placed(run, lengths), costs) for lengths in documents) / len(documents)
    time = replace(estimate.time, work=estimate.time.work * mean / plain)
    ranks = document_memory(own, documents[0])
    return Prediction(time=time, memory=max(ranks, key=lambda rank: rank.total))


def work_of(run: RunSpec) -> Costs:
    """The run's costs but for messages, whose price beside arithmetic nobody knows where rates are only assumed."""
    return replace(costs_of(run), exchange=0.0, near_exchange=0.0, messages=None, state=0.0, near_state=0.0)


def _fullest(lengths: Sequence[int], placement: Placement, costs: Costs) -> float:
    """Work of the fullest rank of documents that are placed so, by these costs."""
    work = [0.0] * len(placement.times)
    for piece in placement.pieces:
        for rank in range(piece.first, piece.first + piece.ranks):
            work[rank] += costs.time(lengths[piece.document], piece.ranks)
    return max(work)


def _plainly(plan: PlanSpec) -> str:
    """How full rows are cut, as far as their time is told by it."""
    return plan.context if plan.context in SHARING else "ring"


def _way(plan: PlanSpec) -> str:
    """What circulates between the seats, as far as a row's time is told by it."""
    return plan.context if plan.context in ("token-ring", "all-gather") else "ring"


def grouped(run: RunSpec, pins: Mapping[str, Any] | None = None) -> list[PlanSpec]:
    """The plan with dynamic groups, and with documents' activations on the host, where checks and pins let it.

    In a group its own way to cut attention, or the plain one.
    """
    plan, pins = run.plan, pins or {}
    tokens = pins.get("context_tokens", memory_tokens(plan, run.training.sequence_length))
    own = replace(plan, context_groups="dynamic", context_tokens=tokens, context_keep=False)
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
            lines.append(
                f"{told}; it can't have dynamic groups, or they are pinned away, or no memory is left for them"
            )
            continue
        sizes = ", ".join(f"{count} over {size}" for size, count in one.sizes.items())
        host = ", the longest on the host" if one.plan.offload and one.plan.context_groups == "dynamic" else ""
        held = "" if one.prediction is None else f", {format_bytes(one.prediction.memory.total)}"
        told += f", {format_seconds(one.dynamic_seconds)} in groups ({one.gain:.2f} times as fast{host}; {sizes})"
        lines.append(told + held)
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
            **({} if one.prediction is None else {"dynamic_memory_bytes": one.prediction.memory.total}),
            "context": one.plan.context,
            "context_groups": one.plan.context_groups,
            **({} if one.plan.context_tokens is None else {"context_tokens": one.plan.context_tokens}),
            "offload": one.plan.offload,
            "documents_over_ranks": {str(size): count for size, count in one.sizes.items()},
        }
        for one in proposals
    ]
