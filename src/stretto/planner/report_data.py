"""The short list as plain data, for ``--json`` and for other programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from stretto.planner.estimate import Estimate
from stretto.planner.explain import described, kinds, parts
from stretto.planner.placement import placed
from stretto.planner.plan import Answer


def as_data(answer: Answer) -> dict[str, Any]:
    """JSON-ready; times in seconds, sizes in bytes, shares 0 to 1.  What isn't known is absent."""
    request = answer.request
    reasons = [*answer.reasons, None]
    plans = [
        _plan(plan) | ({"beats_next": why} if why else {}) for plan, why in zip(answer.plans, reasons, strict=True)
    ]
    known = {"assumed": list(request.assumed)} if request.assumed else {}
    return {
        "model": request.model.name,
        "cluster": request.cluster.name,
        "devices": request.devices,
        "objective": request.objective,
        "sequence_length": request.run.training.sequence_length,
        "global_batch_size": request.run.training.global_batch_size,
        **known,
        "plans": plans,
        "searched": asdict(answer.counts),
    }


def _plan(estimate: Estimate) -> dict[str, Any]:
    plan = {key: value for key, value in asdict(estimate.plan).items() if value is not None}
    if plan["schedule"] == "auto":
        plan.pop("schedule_file", None)  # where it was while the search went on; --out says where it is
    error = None if estimate.assumed else estimate.time.expected_error
    figures = {"mfu": estimate.mfu, "cost": estimate.cost, "expected_error": error}
    return {
        "plan": plan,
        "words": described(estimate.plan),
        "step_s": estimate.seconds,
        "tokens_per_s": estimate.tokens_per_second,
        "bubble": estimate.bubble,
        "device_hours": estimate.device_hours,
        "peak_bytes": estimate.peak_bytes,
        "memory": [kinds(rank) | {"total": rank.total} for rank in estimate.memory],
        "parts": parts(estimate),
        "exposed": estimate.exposed,
        "placement": placed(estimate.plan, estimate.work.cluster),
        **{name: value for name, value in figures.items() if value is not None},
    }
