"""``stretto diagnose``: from a run's directory to figures and sentences.

Medians are over all recorded steps; what is laid over the simulation is the step of median length, in the
pipeline that takes longest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stretto.schedule.measured.findings import WORTH, differences, outside, slow_ranks, slow_stages, stragglers
from stretto.schedule.measured.medians import costs_of, durations
from stretto.schedule.measured.overlay import Overlay, overlay
from stretto.schedule.measured.trace import Played, Trace, load
from stretto.spec.errors import ConfigError
from stretto.spec.units import format_seconds

if TYPE_CHECKING:
    from stretto.schedule.simulate import Attribution, Costs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Diagnosis:
    """Measured over simulated."""

    trace: Trace
    """What was recorded."""
    pipeline: int
    """Which of the pipelines was looked at: the one that takes longest."""
    played: Played
    """The step that was looked at."""
    steps: tuple[int, ...]
    """Steps that the medians are over."""
    costs: Costs
    """Measured medians, in seconds."""
    seconds: dict[str, float]
    """They, as measured, by operation and stage: ``F 2``."""
    over: Overlay
    """Both timelines, and why they differ."""
    findings: tuple[str, ...]
    """Sentences, the most important first."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of the world, by the schedule's ranks."""
        return self.trace.pipelines[self.pipeline]

    @property
    def ratio(self) -> float:
        """Measured over simulated step."""
        return self.over.measured.makespan / self.over.simulated.makespan

    def as_data(self) -> dict[str, Any]:
        """What ``--json`` prints; times in seconds."""
        schedule, difference = self.trace.schedule, self.over.difference
        return {
            "schedule": schedule.name,
            "ranks": list(self.ranks),
            "stages": schedule.num_stages,
            "microbatches": schedule.num_microbatches,
            "steps": list(self.steps),
            "step": self.played.step,
            "measured": self.over.measured.makespan,
            "simulated": self.over.simulated.makespan,
            "ratio": self.ratio,
            "difference": {
                "operations": difference.operations.seconds,
                "messages": difference.messages.seconds,
                "gaps": difference.gaps.seconds,
                "start": difference.start,
                "slack": difference.slack,
            },
            "measured_ranks": _columns(self.over.spent),
            "simulated_ranks": _columns(self.over.predicted),
            "whole_step": self.played.whole,
            "settling": self.played.settling.tolist(),
            "optimizer": self.played.optimizer.tolist(),
            "message_bytes": int(self.played.num_bytes.sum()) // 2,  # each is noted where it leaves and arrives
            "medians": self.seconds,
            "findings": list(self.findings),
        }


def diagnose(run: Path | str, *, step: int | None = None) -> Diagnosis:
    """Diagnose the run in a directory; ``step`` is looked at instead of the one of median length.

    Raises ConfigError where there is nothing to diagnose, or the step wasn't recorded.
    """
    trace = load(Path(run))
    steps = trace.steps
    if step is not None and step not in trace.ranks[0].steps:
        recorded = ", ".join(map(str, steps))
        raise ConfigError(f"Step {step} of the run in {run} was not recorded; recorded steps: {recorded}.")
    pipeline, played = _longest(trace, steps)
    chosen = _median_step(played) if step is None else trace.played(pipeline, step)
    costs = costs_of(played, whole=trace.ranks[0].source.compiled == "blocks")
    over = overlay(chosen, costs)
    medians = {f"{kind.name} {stage}": seconds for (kind, stage), seconds in durations(played).items()}
    return Diagnosis(
        trace=trace,
        pipeline=pipeline,
        played=chosen,
        steps=steps,
        costs=costs,
        seconds=medians,
        over=over,
        findings=tuple(_findings(trace, pipeline, chosen, costs=costs, over=over)),
    )


def _longest(trace: Trace, steps: tuple[int, ...]) -> tuple[int, list[Played]]:
    """The pipeline whose median step is longest, and its steps."""
    found = [[trace.played(pipeline, step) for step in steps] for pipeline in range(len(trace.pipelines))]
    pipeline = max(range(len(found)), key=lambda number: _median_step(found[number]).makespan)
    return pipeline, found[pipeline]


def _median_step(steps: list[Played]) -> Played:
    return sorted(steps, key=lambda played: played.makespan)[(len(steps) - 1) // 2]


def _findings(trace: Trace, pipeline: int, played: Played, *, costs: Costs, over: Overlay) -> Iterator[str]:
    ranks = trace.pipelines[pipeline]
    measured, simulated = over.measured.makespan, over.simulated.makespan
    if abs(measured - simulated) <= WORTH * measured:
        yield f"The step takes as long as simulated: {format_seconds(measured)}, {measured / simulated - 1:+.1%}."
    else:
        yield (
            f"The step takes {format_seconds(measured)}; simulated under the measured medians it takes "
            f"{format_seconds(simulated)} ({measured / simulated:.2f} x)."
        )
    yield from slow_ranks(trace, trace.steps)
    yield from stragglers(trace, pipeline)
    yield from slow_stages(trace.schedule, costs, ranks)
    yield from differences(over, ranks)
    yield from outside(played)
    if any(rank.source.device != "cpu" for rank in trace.ranks):
        yield "The run was on GPUs: times are those at which the host launched operations, not those of the kernels."
    if trace.num_hosts > 1:
        yield f"The run was on {trace.num_hosts} machines, whose clocks may differ; so may messages between them."


def _columns(spent: Attribution) -> dict[str, list[float]]:
    names = ("busy", "communication", "bubble")
    return {name: list(getattr(spent, name)) for name in names}
