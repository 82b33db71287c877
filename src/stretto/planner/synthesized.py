"""Schedules that are searched for, on the layouts that came out best (``--thorough``).

    layout of the list ──► seconds of F, I, W and a message per stage        (``step.stage_turns``)
                           memory that its states leave each rank            (``memory``)
                       ──► ``schedule.synthesize``: loops and zigzags, each number of CHUNKS
                       ──► a schedule file, estimated like any other plan and kept where it beats the layout's own

A family is drawn for even stages and a memory of its own; what is searched for knows the head's weight, the latency of
messages and the very bytes that are left.  The file is played as it is: nothing is searched for again at the launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from stretto.planner.calibration import published
from stretto.planner.communication import boundary_seconds
from stretto.planner.estimate import Estimate, estimate
from stretto.planner.groups import limits
from stretto.planner.memory import layer_activation_bytes, memory
from stretto.planner.request import Request
from stretto.planner.step import stage_turns
from stretto.planner.tracked import share_bytes
from stretto.spec.errors import ScheduleError, UnsupportedError
from stretto.spec.plan import PlanSpec

if TYPE_CHECKING:
    from stretto.schedule.simulate import Costs

BUDGET_SECONDS = 60.0
"""For all layouts together."""
CHUNKS = (1, 2)
"""Stages per rank that are tried."""
OPERATIONS = 12_000
"""Of a schedule at most; longer ones are hardly searched in the time."""
TRIES = 2
"""Times that a layout is searched: once more where the ends of the model made a rank too full."""
WORTH = 0.002
"""Share of a step that a schedule file must win."""
PINNED = ("schedule", "chunks", "schedule_file", "passes", "options", "memory_limit", "stages")
"""Keys that leave nothing to search for where they are pinned."""


def with_synthesized(request: Request, plans: tuple[Estimate, ...], folder: Path) -> tuple[Estimate, ...]:
    """``plans`` in which a layout has the schedule that was found for it where that is faster; files go to ``folder``.

    Order is the caller's to restore.
    """
    asked = [plan for plan in plans if _is_asked(request, plan)]
    better: dict[PlanSpec, Estimate] = {}
    for number, plan in enumerate(asked):
        tried = [chunks for chunks in CHUNKS if _is_small(request, plan, chunks)]
        for chunks in tried:
            seconds = BUDGET_SECONDS / len(asked) / len(tried) / TRIES
            path = folder / f"schedule-{number}-{chunks}.json"
            found = _found(request, plan, chunks=chunks, path=path, seconds=seconds)
            limit = better.get(plan.plan, plan).seconds
            if found is not None and found.seconds < (1 - WORTH) * limit:
                better[plan.plan] = found
    return tuple(better.get(plan.plan, plan) for plan in plans)


def _is_asked(request: Request, plan: Estimate) -> bool:
    """Whether a layout has something to search for, in terms that the search knows."""
    own = plan.plan
    measured = request.calibration is not None and request.calibration.machine is not None
    plain = not (own.passes or own.offload or plan.work.cluster.groups or plan.work.freeze or measured)
    return own.pp > 1 and plain and not request.restricted and not any(key in request.pins for key in PINNED)


def _is_small(request: Request, plan: Estimate, chunks: int) -> bool:
    own = plan.plan
    enough = own.pp * chunks <= request.model.num_layers
    return enough and 3 * own.pp * chunks * plan.work.num_microbatches <= OPERATIONS


def _found(request: Request, plan: Estimate, *, chunks: int, path: Path, seconds: float) -> Estimate | None:
    """The layout with a schedule searched for; None where there is none that fits."""
    from stretto.schedule.document import save
    from stretto.schedule.synthesize.auto import synthesize
    from stretto.schedule.synthesize.space import layouts

    own = plan.plan
    stages = own.stages if chunks == own.chunks else None
    drawn = replace(own, schedule="interleaved" if chunks > 1 else "1f1b", chunks=chunks, stages=stages)
    shape = replace(own, schedule="auto", chunks=chunks, stages=stages, schedule_file=str(path))
    try:
        room = list(_room(request, drawn))
        for _ in range(TRIES):
            found = synthesize(
                microbatches=plan.work.num_microbatches,
                space=layouts(own.pp, chunks=(chunks,), shapes=["loop", "zigzag"] if chunks > 1 else ["loop"]),
                costs=_costs(request, drawn),
                memory_limit=room,
                time_budget=seconds,
            )
            save(found.schedule, path)
            tried = estimate(request, shape)
            if tried.fits:
                return tried
            room = [min(pair) for pair in zip(room, _kept(request, tried), strict=True)]
            path = path.with_stem(f"{path.stem}-less")  # what a file holds is remembered by its name
            shape = replace(shape, schedule_file=str(path))
    except (ScheduleError, UnsupportedError):
        return None
    return None


def _costs(request: Request, drawn: PlanSpec) -> Costs:
    """Seconds per stage, as fractions of the longest forward: searches like figures near one."""
    from stretto.schedule.simulate import Costs

    work = request.work(drawn)
    turns = stage_turns(work, request.calibration)
    message = boundary_seconds(work, request.calibration or published(work.cluster.name))
    unit = max(turns.forward)
    inputs = tuple((back - own) / unit for back, own in zip(turns.backward, turns.weights, strict=True))
    return Costs(
        F=tuple(seconds / unit for seconds in turns.forward),
        I=inputs,
        W=tuple(seconds / unit for seconds in turns.weights),
        comm=message / unit,
    )


def _room(request: Request, drawn: PlanSpec) -> Iterator[float]:
    """Micro-batches over its whole share that each rank can keep beside all else."""
    work = request.work(drawn)
    lost = 1 + request.margin.fragmentation
    whole = layer_activation_bytes(work, recompute="none") if drawn.recompute != "none" else 0.0
    for rank, (held, limit) in enumerate(zip(memory(work, request.margin), limits(work), strict=True)):
        left = limit - held.total + lost * (held.activations - whole)
        yield max(0.0, left / lost / _unit(request, drawn, rank))


def _kept(request: Request, tried: Estimate) -> Iterator[float]:
    """What each rank kept, less what was too much, in the same unit; no limit where it wasn't too much."""
    lost = 1 + request.margin.fragmentation
    whole = layer_activation_bytes(tried.work, recompute="none") if tried.plan.recompute != "none" else 0.0
    for rank, (held, limit) in enumerate(zip(tried.memory, tried.limits, strict=True)):
        kept = held.activations - whole - (held.total - limit) / lost
        yield kept / _unit(request, tried.plan, rank) if held.total > limit else float("inf")


def _unit(request: Request, plan: PlanSpec, rank: int) -> float:
    """Bytes of one micro-batch over a rank's whole share."""
    work = request.work(plan)
    if request.cluster.name.partition(":")[0] == "local-cpu":
        return share_bytes(work, rank)
    return layer_activation_bytes(work) * max(1, work.layers_of_rank(rank))
