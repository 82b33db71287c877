"""The schedules of a run: built from its plan, verified, and given their messages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from stretto.schedule.document import from_json, save, to_json
from stretto.schedule.op import Kind, Op
from stretto.schedule.passes.asynchronous import asynchronous
from stretto.schedule.passes.communication import lower
from stretto.schedule.passes.hand_over import evaluated
from stretto.schedule.schedule import Schedule
from stretto.schedule.validate import validate
from stretto.spec.errors import ConfigError, ScheduleError, UnsupportedError
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.trainer.ahead import front_of
from stretto.trainer.planned import planned


def schedules_of(run: RunSpec) -> tuple[Schedule, Schedule]:
    """The training schedule of a run and the forward-only one of its evaluation.

    Collective over the world where ``plan.schedule = "auto"`` and processes are joined: rank 0 searches, and all get
    what it found.  Raises ConfigError for a schedule that can't be, or that the plan can't have,
    UnsupportedError for one that can't be played as the plan says.
    """
    found = _found_together(run) if run.plan.schedule == "auto" and run.plan.schedule_file is None else planned(run)
    if (found.kind == Kind.S).any():
        _check_vocabulary(run.plan)
    try:
        training = found if run.plan.asynchronous == "none" else asynchronous(found)
        return lowered_and_valid(training), lowered_and_valid(evaluation_of(run, found))
    except ScheduleError as error:
        raise ConfigError(f"The schedule of the plan can't be played: {error}") from error


def _check_vocabulary(plan: PlanSpec) -> None:
    """UnsupportedError for what a schedule with S and T can't be combined with."""
    if plan.asynchronous != "none":
        raise UnsupportedError(
            f"plan.asynchronous = {plan.asynchronous!r} gives each stage weights of its own age, and a vocabulary "
            'that lies on all ranks has no stage; set plan.asynchronous = "none", or leave the vocabulary pass out.'
        )


def searched(run: RunSpec) -> RunSpec:
    """The run, with the schedule that was searched for as a file in its directory (``plan.schedule_file``).

    Elsewhere than with ``plan.schedule = "auto"`` it is the same run.  Raises what ``schedules_of`` raises.
    """
    if run.plan.schedule != "auto" or run.plan.schedule_file is not None:
        return run
    path = Path(run.run.dir) / "schedule.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # What the passes make of it is not written, so that the file and plan.passes together are the schedule.
    save(planned(replace(run, plan=replace(run.plan, passes=(), offload=False))), path)
    return replace(run, plan=replace(run.plan, schedule_file=str(path)))


def _found_together(run: RunSpec) -> Schedule:
    from stretto.checkpoint.agree import from_first, rank_and_size

    text: str | None = None
    failure: Exception | None = None
    if rank_and_size(None)[0] == 0:
        try:
            text = to_json(planned(run))
        except Exception as error:  # the others wait for an answer
            failure = error
    text, failure = from_first((text, failure), None)
    if failure is not None:
        raise failure
    assert text is not None
    return from_json(text)


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


def evaluation_of(run: RunSpec, schedule: Schedule) -> Schedule:
    """The forwards that evaluate what the run's schedule trains."""
    front = front_of(run)
    return forward_of(schedule) if front is None else evaluated(schedule, front)


def forward_of(schedule: Schedule) -> Schedule:
    """The forwards of a schedule alone, in its order and on its ranks: what evaluates the model that it trains."""
    ranks = range(schedule.num_ranks)
    return Schedule.from_orders(
        [_apart(op for op in schedule.ops(rank) if op.kind in (Kind.F, Kind.S)) for rank in ranks],
        name=f"{schedule.name}, forward only",
        num_stages=schedule.num_stages,
        num_microbatches=schedule.num_microbatches,
        placement=schedule.placement,
        voice=schedule.voice,
        paths=schedule.paths,
        forward_only=True,
    )
