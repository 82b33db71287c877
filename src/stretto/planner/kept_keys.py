"""Keys and values that came from other ranks kept for backward (``plan.context_keep``), where that is faster and fits.

It takes memory from the rest of the plan and leaves everything else as it is, so that it is tried on the plans that
came out best and not on all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stretto.planner.estimate import Estimate, estimate
from stretto.spec import capabilities

if TYPE_CHECKING:
    from stretto.planner.request import Request

WORTH = 0.002
"""Share of a step that it must win."""


def with_kept_keys(request: Request, plans: tuple[Estimate, ...]) -> tuple[Estimate, ...]:
    """``plans``, in which those are kept for which it pays.  Order is the caller's to restore."""
    if "context_keep" in request.pins or request.objective == "memory":
        return plans
    return tuple(_better(request, plan) for plan in plans)


def _better(request: Request, found: Estimate) -> Estimate:
    plan = found.plan
    grouped = plan.context_groups != "static"
    if plan.cp == 1 or plan.recompute != "none" or grouped or plan.context not in capabilities.KEEPING_CONTEXT:
        return found
    kept = estimate(request, replace(plan, context_keep=True))
    return kept if kept.fits and kept.seconds < (1 - WORTH) * found.seconds else found
