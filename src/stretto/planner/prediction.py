"""What the planner expects of a run's own plan, to be laid beside what its first steps measure.

There is a prediction where the machines' rates are known, from a preset, ``[cluster]`` or a calibration; elsewhere
there is none, rather than one of assumed rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from stretto.planner.document_memory import document_memory
from stretto.planner.document_step import document_step
from stretto.planner.memory import RankMemory, memory
from stretto.planner.request import Request
from stretto.planner.step import StepTime, step_time
from stretto.planner.tracked import tracked
from stretto.spec.errors import StrettoError
from stretto.spec.presets_cluster import CLUSTERS
from stretto.spec.run import RunSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Of one step and of the fullest rank."""

    time: StepTime
    memory: RankMemory

    def as_data(self) -> dict[str, Any]:
        """Plain values."""
        parts = {field.name: getattr(self.time, field.name) for field in fields(StepTime)}
        error = parts.pop("expected_error")
        kinds = {field.name: getattr(self.memory, field.name) for field in fields(RankMemory)}
        return {
            "seconds": {"predicted": self.time.total, "expected_error": error, "parts": parts},
            "bytes": {"predicted": self.memory.total, "expected_error": self.memory.expected_error, "kinds": kinds},
        }


def predict(
    run: RunSpec, *, cuda: bool = False, documents: Sequence[Sequence[int]] = (), uncounted: int = 0
) -> Prediction | None:
    """What ``run`` is expected to take; None where that can't be told.

    Args:
        cuda: the run is measured by the device's count of allocations; otherwise tensors are tracked.
        documents: lengths of the documents of some steps, where documents have groups of their own: memory is that of
            the first, which is the one whose memory is measured, time the median one.
        uncounted: first of these steps that don't count in the median.
    """
    if run.model.family == "foreign" or run.plan.asynchronous != "none" or not _of_this(run, cuda):
        return None
    grouped = run.plan.context_groups == "dynamic"
    if grouped and not documents:
        return None
    try:
        request = Request(run=run)
        if request.assumed:
            return None
        if grouped:
            return of_documents(request, documents, uncounted)
        work = request.work(run.plan)
        ranks = memory(work, request.margin) if cuda or work.vocabulary else tracked(work)
        return Prediction(time=step_time(work, request.calibration), memory=max(ranks, key=lambda rank: rank.total))
    except StrettoError:
        return None


def of_documents(request: Request, documents: Sequence[Sequence[int]], uncounted: int = 0) -> Prediction:
    """Of steps with these documents, placed in groups as the request's run does; see ``predict``.

    Raises what ``document_step`` raises.
    """
    counted = documents[uncounted:] or documents
    times = sorted((document_step(request, lengths) for lengths in counted), key=lambda time: time.total)
    ranks = document_memory(request, documents[0])
    return Prediction(time=times[(len(times) - 1) // 2], memory=max(ranks, key=lambda rank: rank.total))


def _of_this(run: RunSpec, cuda: bool) -> bool:
    """Whether ``[cluster]`` can mean what the run computes on: no preset of devices does on a CPU, nor the reverse."""
    preset = run.cluster.name.partition(":")[0]
    return preset != "local-cpu" if cuda else preset == "local-cpu" or preset not in CLUSTERS
