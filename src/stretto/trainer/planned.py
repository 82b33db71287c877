"""The order that a plan asks for, before it gets its messages: a family's or a file's, changed by passes.

plan.schedule, options ─┐
                        ├─► schedule ──► plan.passes, in order ──► within plan.memory_limit? ──► can it be trained?
plan.schedule_file ─────┘

What is wrong is one ConfigError, before any process starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stretto.schedule.document import load
from stretto.schedule.families import FAMILIES, TOLERANCE, build
from stretto.schedule.op import Kind
from stretto.schedule.passes import change
from stretto.schedule.passes.freeze import freeze
from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate.costs import Costs
from stretto.schedule.simulate.memory import peak_activation
from stretto.schedule.validate import validate
from stretto.spec.errors import ConfigError, ScheduleError
from stretto.spec.front import FILL
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.written import read_named
from stretto.trainer.ahead import fill, front_of

MESSAGES = frozenset({Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B})
"""What a schedule file may hold and is added again anyway."""


def planned(run: RunSpec) -> Schedule:
    """The training schedule of a run, without messages; a search (``plan.schedule = "auto"``) takes its time.

    Raises ConfigError for a schedule that can't be, doesn't fit the plan, exceeds the memory limit or can't be played.
    """
    plan = run.plan
    schedule = _of_file(run, plan.schedule_file) if plan.schedule_file is not None else _of_family(run)
    _check_whole(schedule, plan)
    frozen = _frozen_stages(run)
    schedule = _frozen(schedule, frozen, plan)
    schedule, costs = _changed(schedule, run)
    if (front := front_of(run)) is not None:
        frozen |= {*front.first_layers(), front.landing}
    if passes_of(plan) or plan.schedule_file is not None:
        _check_limit(schedule, costs, plan)
        _check_played(schedule, plan)
        _check_trained(schedule, frozen, plan)
    return schedule


def skips(schedule: Schedule) -> bool:
    """Whether micro-batches leave out stages or visit them in another order, which changes the mathematics."""
    return any(tuple(path) != tuple(range(schedule.num_stages)) for path in schedule.paths or ())


def passes_of(plan: PlanSpec) -> tuple[str, ...]:
    """What changes the schedule, in order; ``plan.offload`` is the pass with its defaults, before sharding.

    With dynamic groups it is the solver's, document by document, and no pass.
    """
    names = [read_named(text, "plan.passes")[0] for text in plan.passes]
    if not plan.offload or "offload" in names or plan.context_groups == "dynamic":
        return plan.passes
    at = names.index("sharding") if "sharding" in names else len(names)
    return (*plan.passes[:at], "offload", *plan.passes[at:])


def costs_of_plan(plan: PlanSpec) -> Costs:
    """What an order is made for before anything was measured: a unit for each pass, of a plan that splits backwards."""
    return Costs().whole() if plan.compile == "blocks" else Costs()


def _of_family(run: RunSpec) -> Schedule:
    plan = run.plan
    options: dict[str, Any] = dict(plan.options)
    family = FAMILIES[plan.schedule]
    if plan.schedule == "hanayo":
        options.setdefault("waves", plan.chunks // 2)
    if plan.schedule == "skip-pipe" and "keep" not in options:
        options["keep"] = [0, plan.num_stages - 1]  # embedding and loss
    later = bool(passes_of(plan)) and not family.costed  # passes may bring its memory down
    try:
        schedule = build(
            plan.schedule,
            ranks=plan.pp,
            microbatches=run.num_microbatches,
            chunks=None if family.chunk_counts == () else plan.chunks,
            options=options,
            memory_limit=None if later else plan.memory_limit,
            costs=costs_of_plan(plan),
        )
    except ScheduleError as error:
        raise ConfigError(f"plan.schedule = {plan.schedule!r}, plan.pp = {plan.pp}: {error}") from error
    if schedule.num_stages != plan.num_stages:
        raise ConfigError(
            f"{_written(plan.options)} makes {schedule.num_stages // plan.pp} stages per rank of plan.schedule = "
            f"{plan.schedule!r}, but plan.chunks = {plan.chunks}; set plan.chunks = {schedule.num_stages // plan.pp}."
        )
    return schedule


def _of_file(run: RunSpec, path: str) -> Schedule:
    plan, place = run.plan, f"plan.schedule_file = {path!r}"
    try:
        schedule = load(Path(path).expanduser())
        validate(schedule)
    except ScheduleError as error:
        raise ConfigError(f"{place}: {str(error).removeprefix(f'{Path(path).expanduser()}: ')}") from error
    made = run.num_microbatches
    batch = f"training.global_batch_size = {run.training.global_batch_size} makes {made} of them per pipeline"
    stages = f"plan.pp = {plan.pp} x plan.chunks = {plan.chunks} makes {plan.num_stages}"
    if plan.stages is not None:
        stages = f"plan.stages names {plan.num_stages}"
    for there, here, what, why, repair in (
        (schedule.num_ranks, plan.pp, "ranks", f"plan.pp = {plan.pp}", f"set plan.pp = {schedule.num_ranks}"),
        (schedule.num_stages, plan.num_stages, "stages", stages, _repaired_stages(schedule, plan)),
        (
            schedule.num_microbatches,
            made,
            "micro-batches",
            batch,
            f"set training.global_batch_size = {schedule.num_microbatches * plan.dp * plan.micro_batch_size}",
        ),
    ):
        if there != here:
            raise ConfigError(f"{place} is for {there} {what}, but {why}; {repair}, or take another file.")
    if schedule.forward_only:
        raise ConfigError(f"{place} is forward only, so nothing would be trained; take one with backwards.")
    orders = [[op for op in schedule.ops(rank) if op.kind not in MESSAGES] for rank in range(schedule.num_ranks)]
    return schedule.with_orders(orders)


def _repaired_stages(schedule: Schedule, plan: PlanSpec) -> str:
    if plan.stages is None and schedule.num_stages % plan.pp == 0:
        return f"set plan.chunks = {schedule.num_stages // plan.pp}"
    return f"write plan.stages, the layers of each of {schedule.num_stages} stages"


def _check_whole(schedule: Schedule, plan: PlanSpec) -> None:
    """ConfigError where a micro-batch misses the embedding or the loss."""
    last = schedule.num_stages - 1
    for microbatch, path in enumerate(schedule.paths or ()):
        if path[0] != 0 or path[-1] != last:
            raise ConfigError(
                f"{_origin(plan)} sends micro-batch {microbatch} through the stages {list(path)}, but only what goes "
                f"from stage 0 (embedding) to stage {last} (loss) can be trained; let all visit both, "
                f"for example by plan.options.keep = [0, {last}] of skip-pipe."
            )


def _frozen_stages(run: RunSpec) -> frozenset[int]:
    """The first stages, as far as nothing of them trains."""
    if not run.training.freeze:
        return frozenset()
    from stretto.trainer.freezing import frozen_stages
    from stretto.trainer.structure import make_stack

    return frozenset(frozen_stages(run, make_stack(run)))


def _frozen(schedule: Schedule, frozen: frozenset[int], plan: PlanSpec) -> Schedule:
    """Without backward in the stages where nothing trains."""
    added = sorted(frozen - schedule.frozen)
    try:
        return freeze(schedule, stages=added) if added else schedule
    except ScheduleError as error:
        raise ConfigError(f"{_origin(plan)} can't have training.freeze: {error}") from error


def _check_trained(schedule: Schedule, frozen: frozenset[int], plan: PlanSpec) -> None:
    """ConfigError where a stage that has something to train has no backward."""
    if wrong := sorted(schedule.frozen - frozen):
        raise ConfigError(
            f"{_origin(plan)} has no backward in the stages {wrong}, but they have parameters that train; "
            "name them in training.freeze, or take another schedule."
        )


def _changed(schedule: Schedule, run: RunSpec) -> tuple[Schedule, Costs]:
    costs = costs_of_plan(run.plan)
    for text in passes_of(run.plan):
        name, options = read_named(text, "plan.passes")
        try:
            if name == FILL:
                schedule, costs = fill(run, schedule, options, costs)
            else:
                schedule, costs = change(schedule, name, options=options, costs=costs)
        except ScheduleError as error:
            raise ConfigError(f"plan.passes, {text!r}: {error}") from error
    return schedule, costs


def _check_limit(schedule: Schedule, costs: Costs, plan: PlanSpec) -> None:
    if plan.memory_limit is None:
        return
    peaks = peak_activation(schedule, costs)
    peak = max(peaks)
    if peak > plan.memory_limit + TOLERANCE:
        raise ConfigError(
            f"{_origin(plan)} keeps {peak:.9g} micro-batches of activations on rank {peaks.index(peak)}, above "
            f"plan.memory_limit = {plan.memory_limit:.9g}; raise it, or take passes or a schedule that keep less."
        )


def _check_played(schedule: Schedule, plan: PlanSpec) -> None:
    """ConfigError where an operation can't be played."""
    from stretto.parallel.pipeline.operation import PLAYED  # what is played is known there, and torch comes with it

    alien = sorted({Kind(kind) for kind in schedule.kind.tolist()} - set(PLAYED))
    if alien:
        raise ConfigError(
            f"{_origin(plan)} has {', '.join(kind.name for kind in alien)}, which training can't play; "
            f"it plays {', '.join(kind.name for kind in PLAYED if kind not in MESSAGES)}."
        )


def _origin(plan: PlanSpec) -> str:
    """What the schedule came from, for errors."""
    source = f"plan.schedule = {plan.schedule!r}"
    if plan.schedule_file is not None:
        source = f"plan.schedule_file = {plan.schedule_file!r}"
    passes = list(passes_of(plan))
    return f"{source} with plan.passes = {passes}" if passes else source


def _written(options: Mapping[str, Any]) -> str:
    return ", ".join(f"plan.options.{name} = {value}" for name, value in options.items()) or "The family"
