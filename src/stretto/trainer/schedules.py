"""The schedules of a run: built from its plan, verified, and given their messages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from stretto.schedule.families import build
from stretto.schedule.op import Kind, Op
from stretto.schedule.passes.communication import lower
from stretto.schedule.schedule import Schedule
from stretto.schedule.validate import validate
from stretto.spec.errors import ConfigError, ScheduleError
from stretto.spec.run import RunSpec


def schedules_of(run: RunSpec) -> tuple[Schedule, Schedule]:
    """The training schedule of a run and the forward-only one of its evaluation.

    Raises ConfigError where the plan's family can't have its shape.
    """
    plan = run.plan
    options: dict[str, Any] = {}
    if plan.schedule == "hanayo":
        options["waves"] = plan.chunks // 2
    try:
        training = build(
            plan.schedule,
            ranks=plan.pp,
            microbatches=run.num_microbatches,
            chunks=None if options else plan.chunks,
            options=options,
        )
    except ScheduleError as error:
        raise ConfigError(f"plan.schedule = {plan.schedule!r}, plan.pp = {plan.pp}: {error}") from error
    return lowered_and_valid(training), lowered_and_valid(forward_of(training))


def lowered_and_valid(schedule: Schedule) -> Schedule:
    """With messages, and proved right.

    A pair that a family overlaps is taken apart: a rank that plays its forward before its backward can send the
    one's result before it waits for the other's operand.
    """
    lowered = lower(schedule.with_orders([_apart(schedule.ops(rank)) for rank in range(schedule.num_ranks)]))
    validate(lowered)
    return lowered


def _apart(order: Iterable[Op]) -> list[Op]:
    return [replace(op, joined=False) for op in order]


def forward_of(schedule: Schedule) -> Schedule:
    """The forwards of a schedule alone, in its order and on its ranks: what evaluates the model that it trains."""
    ranks = range(schedule.num_ranks)
    return Schedule.from_orders(
        [_apart(op for op in schedule.ops(rank) if op.kind is Kind.F) for rank in ranks],
        name=f"{schedule.name}, forward only",
        num_stages=schedule.num_stages,
        num_microbatches=schedule.num_microbatches,
        placement=schedule.placement,
        voice=schedule.voice,
        paths=schedule.paths,
        forward_only=True,
    )
