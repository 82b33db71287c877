"""Everything about a run that can be checked before a process starts.

``check(run)`` returns nothing or raises ConfigError (what is wrong, why, what would work) or
UnsupportedError (what this version can't do).  The order is from the plainest mistake to the one that
depends on several values, so that the first error shown is the one to repair first.
"""

from __future__ import annotations

import math
from pathlib import Path

from stretto.spec import capabilities
from stretto.spec.check_asynchronous import check_asynchronous
from stretto.spec.check_cluster import MOST, check_cluster
from stretto.spec.check_context import check_context
from stretto.spec.check_states import check_states
from stretto.spec.check_values import check_data, check_model, check_settings, check_training, one_of
from stretto.spec.check_video import check_clips, check_video
from stretto.spec.errors import ConfigError, UnsupportedError
from stretto.spec.front import check_front, front_layers
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.stages import check_stages, stages_of
from stretto.spec.written import read_named

__all__ = ["check", "check_world", "stages_of"]


def check(run: RunSpec, *, world_size: int | None = None, data: bool = True) -> None:
    """Refuse a run that can't work.

    ``world_size``: number of processes that there are, where that is already known.  ``data``: False
    where no corpus is read (verify draws its own tokens).
    """
    check_settings(run)
    check_model(run.model)
    check_training(run.training)
    _degrees(run.plan)
    _choices(run.plan)
    check_states(run.plan)
    _schedule(run.plan)
    check_asynchronous(run)
    check_front(run)
    if run.model.family == "video":
        check_video(run)
        check_stages(run.plan, run.model.num_layers)
    elif run.model.family != "foreign":  # a foreign model's sizes are known once its module is loaded
        _positions(run)
        _tensor_parallel(run)
        front = front_layers(run)
        check_stages(run.plan, run.model.num_layers - front, front=front)
    elif run.training.sequence_length % run.plan.tp:
        raise ConfigError(_sequence_error(run, _divisors(run.training.sequence_length)))
    if run.model.family != "video":
        check_context(run)
    _batch(run)
    if data:
        check_clips(run) if run.model.family == "video" else check_data(run)
    check_cluster(run)
    if world_size is not None:
        check_world(run, world_size)


def check_world(run: RunSpec, world_size: int) -> None:
    """ConfigError where ``world_size`` processes are not the ``plan.num_ranks`` that the plan needs."""
    plan = run.plan
    if world_size == plan.num_ranks:
        return
    degrees = {axis: getattr(plan, axis) for axis in capabilities.AXES}
    product = " x ".join(f"{axis} {degree}" for axis, degree in degrees.items() if degree > 1) or "every degree 1"
    rest = plan.num_ranks // plan.dp_replicate
    choices = [f"start {_count(plan.num_ranks, 'process', 'processes')}"]
    if world_size % rest == 0 and _batch_fits(run, world_size // rest):
        choices.append(f"set plan.dp_replicate = {world_size // rest}")
    else:
        fitting = [n for n in range(1, 2 * world_size + 1) if n % rest == 0 and _batch_fits(run, n // rest)]
        near = sorted(fitting, key=lambda n: abs(n - world_size))[:2]
        if near:
            sizes = " or ".join(f"{n} processes (plan.dp_replicate = {n // rest})" for n in sorted(near))
            choices.append(f"keep pp, tp and dp_shard and take {sizes}")
    raise ConfigError(
        f"The plan needs {_count(plan.num_ranks, 'rank', 'ranks')} ({product}), but the number of processes is "
        f"{world_size}; "
        f"{', or '.join(choices)}."
    )


def _degrees(plan: PlanSpec) -> None:
    for axis in (*capabilities.AXES, *capabilities.LATER_AXES, "chunks", "micro_batch_size"):
        value = getattr(plan, axis)
        if value < 1:
            raise ConfigError(f"plan.{axis} = {value} must be at least 1.")
        if value > MOST and axis != "micro_batch_size":
            raise ConfigError(f"plan.{axis} = {value} is more than can be; it may be up to {MOST:,}.")
    for axis in capabilities.LATER_AXES:
        if getattr(plan, axis) > 1:
            what = {"ep": "expert"}[axis]
            raise UnsupportedError(
                f"plan.{axis} = {getattr(plan, axis)}: {what} parallelism is not in this version; set plan.{axis} = 1 "
                f"and use {', '.join(capabilities.AXES)}."
            )


def _choices(plan: PlanSpec) -> None:
    one_of("plan.schedule", plan.schedule, capabilities.SCHEDULES)
    one_of("plan.zero", plan.zero, capabilities.ZERO_STAGES)
    one_of("plan.recompute", plan.recompute, capabilities.RECOMPUTE)
    one_of("plan.compile", plan.compile, capabilities.COMPILE)
    one_of("plan.compile_backend", plan.compile_backend, capabilities.COMPILE_BACKENDS)


def _schedule(plan: PlanSpec) -> None:
    for text in plan.passes:
        read_named(text, "plan.passes")
    if plan.memory_limit is not None and not plan.memory_limit > 0:
        raise ConfigError(
            f"plan.memory_limit = {plan.memory_limit:g} leaves no room for a micro-batch; write a number above 0."
        )
    if plan.schedule_file is not None:
        _schedule_file(plan, plan.schedule_file)
        return
    counts = capabilities.SCHEDULES[plan.schedule]
    if plan.chunks in counts:
        return
    others = [name for name, known in capabilities.SCHEDULES.items() if plan.chunks in known]
    choice = f", or plan.schedule = {_either_of(others)}" if others else ""
    may = _either(list(counts)) if len(counts) <= 4 else f"{counts[0]}, {counts[1]} and so on up to {counts[-1]}"
    raise ConfigError(
        f"plan.schedule = {plan.schedule!r} can't order plan.chunks = {plan.chunks} "
        f"stage{'s' if plan.chunks > 1 else ''} per rank; set plan.chunks = {may}{choice}."
    )


def _schedule_file(plan: PlanSpec, path: str) -> None:
    """ConfigError where the file isn't there, or another schedule is asked for besides."""
    if not Path(path).expanduser().is_file():
        fact = "is a folder" if Path(path).expanduser().is_dir() else "doesn't exist"
        raise ConfigError(
            f"The schedule file {path!r} {fact} (paths are relative to the working directory, {Path.cwd()}); "
            "write one by stretto simulate --export, or leave out plan.schedule_file."
        )
    # "auto" is what was searched for, and the file is what was found: a finished run's run.toml says both.
    searched = plan.schedule == "auto"
    if plan.options and not searched:
        raise ConfigError(
            f"plan.schedule_file = {path!r} says the whole order, so plan.options has nothing to choose; "
            "leave one of them out."
        )
    if plan.schedule != PlanSpec().schedule and not searched:
        raise ConfigError(
            f"plan.schedule = {plan.schedule!r} and plan.schedule_file = {path!r} both say the order; "
            "leave one of them out."
        )


def _positions(run: RunSpec) -> None:
    length, most = run.training.sequence_length, run.model.max_positions
    if length > most:
        raise ConfigError(
            f"training.sequence_length = {length} is longer than the model's {most} positions; "
            f"take at most {most}, or raise model.max_positions."
        )


def _tensor_parallel(run: RunSpec) -> None:
    model, tp = run.model, run.plan.tp
    length = run.training.sequence_length
    # What is offered must pass every later check too, so it divides all four.
    fitting = _divisors(math.gcd(model.num_heads, model.kv_heads, model.intermediate_size, length))
    may = f"tp may be {_either(fitting)}."
    for count, what in ((model.num_heads, "heads"), (model.kv_heads, "key/value heads")):
        if count % tp:
            raise ConfigError(f"{count} {what} can't be split over tp={tp}; {may}")
    if model.intermediate_size % tp:
        raise ConfigError(f"model.intermediate_size = {model.intermediate_size} can't be split over tp={tp}; {may}")
    if length % tp:
        raise ConfigError(_sequence_error(run, fitting))


def _sequence_error(run: RunSpec, fitting: list[int]) -> str:
    length, tp = run.training.sequence_length, run.plan.tp
    return (
        f"training.sequence_length = {length} can't be split over tp={tp} (between attention and feed-forward each "
        f"rank holds a part of the sequence); tp may be {_either(fitting)}, or take a multiple of {tp} tokens."
    )


def _batch(run: RunSpec) -> None:
    plan, batch = run.plan, run.training.global_batch_size
    unit = plan.dp * plan.micro_batch_size
    if batch % unit:
        below = batch - batch % unit
        near = _either([size for size in (below, below + unit) if size])
        raise ConfigError(
            f"training.global_batch_size = {batch} can't be divided into micro-batches of {plan.micro_batch_size} over "
            f"dp={plan.dp} (dp_replicate {plan.dp_replicate} x dp_shard {plan.dp_shard}); take a multiple of {unit}, "
            f"for example {near}."
        )


def _batch_fits(run: RunSpec, dp_replicate: int) -> bool:
    unit = dp_replicate * run.plan.dp_shard * run.plan.micro_batch_size
    return dp_replicate > 0 and run.training.global_batch_size % unit == 0


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _either(numbers: list[int]) -> str:
    return _either_of([str(number) for number in numbers])


def _either_of(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"
