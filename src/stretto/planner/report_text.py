"""The short list as text: one line a plan, then the best one in detail."""

from __future__ import annotations

from stretto.planner.estimate import Estimate
from stretto.planner.explain import described, kinds
from stretto.planner.placement import placement_words
from stretto.planner.plan import Answer
from stretto.planner.request import ASSUMED
from stretto.spec.units import format_bytes, format_count, format_seconds

COLUMNS = ("step", "tokens/s", "MFU", "memory", "bubble", "exposed")
"""Headings of the list."""
WIDTH = 118
"""Characters of a line."""


def report(answer: Answer) -> str:
    """All that is said of an answer."""
    request = answer.request
    training = request.run.training
    head = (
        f"{request.model.name}, {training.sequence_length} tokens x {training.global_batch_size} sequences a step, "
        f"{training.dtype}, on {request.cluster.name} ({request.devices} device{'s' if request.devices > 1 else ''})"
    )
    lines = [head, ""]
    lines += _table(answer.plans)
    lines += ["", *_why(answer), "", *_detail(answer.best, request.price_source), "", *notes(answer)]
    return "\n".join(lines)


def _table(plans: tuple[Estimate, ...]) -> list[str]:
    rows = [("", *COLUMNS), *((str(number), *figures(plan)) for number, plan in enumerate(plans, start=1))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    aligned = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [
        f"{aligned[0]}  plan",
        *(f"{line}  {described(plan.plan)}" for line, plan in zip(aligned[1:], plans, strict=True)),
    ]


def figures(plan: Estimate) -> tuple[str, ...]:
    """A plan's figures under ``COLUMNS``; empty where one isn't known."""
    exposed = sum(plan.exposed.values()) / plan.seconds
    return (
        format_seconds(plan.seconds),
        format_count(plan.tokens_per_second),
        "" if plan.mfu is None else f"{plan.mfu:.1%}",
        format_bytes(plan.peak_bytes),
        f"{max(0.0, plan.bubble):.1%}",
        f"{exposed:.1%}",
    )


def _why(answer: Answer) -> list[str]:
    return [f"{number} before {number + 1}: {why}" for number, why in enumerate(answer.reasons, start=1)]


def _detail(best: Estimate, source: str) -> list[str]:
    """Memory by kind, exposed communication by axis, what a step costs, where the axes lie."""
    rank = best.memory[best.fullest]
    inside = ", ".join(f"{name} {format_bytes(value)}" for name, value in kinds(rank).items() if value)
    limit = format_bytes(best.limits[best.fullest])
    peaks = " ".join(format_bytes(memory.total).replace(" ", "") for memory in best.memory)
    lines = [f"memory of pipeline rank {best.fullest}, the fullest: {format_bytes(rank.total)} of {limit}: {inside}"]
    if len(best.memory) > 1:
        lines.append(f"memory of each pipeline rank: {peaks}")
    waits = ", ".join(f"{axis} {format_seconds(seconds)}" for axis, seconds in best.exposed.items())
    lines.append(f"communication that ranks wait for, per step: {waits or 'none'}")
    if best.cost is not None:
        tokens = best.work.global_batch_size * best.work.sequence_length
        of = f"{best.price:g} per device and hour" + (f", {source}" if source else "")
        lines.append(f"cost of a step: {best.cost:.4g}, of 10^9 tokens: {best.cost / tokens * 1e9:.4g} ({of})")
    lines.append(placement_words(best.plan, best.work.cluster))
    return lines


def notes(answer: Answer) -> list[str]:
    """How far off the estimates may be, and what the search looked at."""
    counts, request = answer.counts, answer.request
    lines = []
    if not request.assumed:
        step, peak = answer.best.time.expected_error, answer.best.memory[answer.best.fullest].expected_error
        lines.append(
            f"expected error, one standard deviation: step time {step:.0%}, memory {peak:.0%} (docs/planner.md)"
        )
    else:
        lines.append(
            f"not known of {request.cluster.name}, and assumed: "
            f"{', '.join(f'{name} {ASSUMED[name]:.0e}' for name in request.assumed)}; times only rank the plans"
        )
    lines.append(
        f"{counts.cores:,} ways to cut the model and the batch, {counts.opened:,} of them looked into, "
        f"{counts.estimated:,} plans estimated"
        + (f"; {counts.unpaid:,} shapes of schedules left out (--thorough)" if counts.unpaid else "")
    )
    return lines
