"""What a plan's ``fill-bubbles`` asks for: which frozen layers run a step ahead, in how many units, for how long.

A unit is a micro-batch of the next step, a frozen stage one of its layers; the times by which bubbles are filled are
those of a forward of the pipeline, per layer, unless the pass says others.
"""

from __future__ import annotations

from typing import Any

from stretto.schedule.passes import PASSES
from stretto.schedule.passes.hand_over import Front, ahead, times_of
from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate.costs import Costs
from stretto.spec.errors import ConfigError
from stretto.spec.front import FILL, fills, front_layers, front_stages
from stretto.spec.run import RunSpec
from stretto.spec.stages import stages_of


def front_of(run: RunSpec) -> Front | None:
    """Where the frozen front stands in the run's schedules; None where nothing is computed ahead."""
    if not fills(run.plan):
        return None
    return Front(stages=run.plan.num_stages, layers=front_stages(run), microbatches=run.num_microbatches)


def fill(run: RunSpec, schedule: Schedule, settings: dict[str, Any], costs: Costs) -> tuple[Schedule, Costs]:
    """``schedule`` with the front of the next step where its ranks idle, and the way of its results; costs that fit.

    Raises ConfigError for settings that training can't have, ScheduleError for others that can't be.
    """
    front = front_of(run)
    assert front is not None
    if settings.get("units", 0) not in (0, front.microbatches):
        raise ConfigError(
            f"plan.passes, {FILL}: units = {settings['units']}, but in training a unit is a micro-batch, of which a "
            f"step has {front.microbatches}; leave units out."
        )
    forward = costs.F if isinstance(costs.F, float) else sum(costs.F) / run.plan.pp
    share = sum(stages_of(run)) / run.plan.pp
    times = settings.get("frozen", times_of(front_layers(run), share=share, forward=forward))
    if len(str(times).split("+")) != front.layers or "/" in str(times):
        raise ConfigError(
            f"plan.passes, {FILL}: frozen = {times} are the times of {len(str(times).replace('/', '+').split('+'))} "
            f"layers, but training.freeze makes {front.layers} in front, one after the other; leave frozen out, or "
            "write a time for each, for example " + "+".join(["0.5"] * front.layers) + "."
        )
    for name in settings:
        if name not in PASSES[FILL].options:
            known = ", ".join(PASSES[FILL].options)
            raise ConfigError(f"Pass {FILL} has no option {name!r}; its options: {known}.")
    return ahead(schedule, frozen=str(times), where=settings.get("where", "bubbles"), costs=costs)
