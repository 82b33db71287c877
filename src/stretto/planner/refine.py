"""A calibration corrected by what a run measured: ``stretto diagnose RUN --refine CALIBRATION``.

    trace of the run      seconds of each operation, message, reduction, update and of the whole step
    run.toml beside it    which work that was
    calibration           what the planner expects each of them to take, beside the others on the same cores
    ──────────────────►   a factor for each kind of work at this size (``refinement``)

Operations of ranks that share cores take longer the more ranks are at work, and who is at work depends on how long they
take.  So the schedule is played under the factors found so far, until each kind takes as long there as in the trace.
What a run can't tell apart is corrected together: the work of a layer and its exchanges over tp and cp, layers and head
where one stage holds all.  Each factor's error is what it differs by from step to step and from stage to stage, and
what the step of this very run still comes out wrong by.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import hypot
from pathlib import Path

from stretto.planner.machine import Machine
from stretto.planner.measured_step import (
    data_seconds,
    exchanged_bytes,
    head,
    head_size,
    layer,
    layer_size,
    measured_step,
    message_bytes,
    message_seconds,
    played,
    unit_bytes,
    update_seconds,
    updated_parameters,
)
from stretto.planner.observed import Observed, observe
from stretto.planner.refinement import Refinement, merged
from stretto.planner.request import Request
from stretto.planner.step import StepTime
from stretto.planner.workload import Workload
from stretto.schedule.measured.trace import Trace, load
from stretto.schedule.op import Kind
from stretto.spec.errors import ConfigError, UnsupportedError
from stretto.spec.plan import PlanSpec
from stretto.spec.resolve import load_run
from stretto.spec.run import RunSpec

ROUNDS = 12
"""Times that the schedule is played to find the factors; what is left after that is part of their error."""
LEAST = 0.02
"""The smallest factor; less would be a figure that isn't the run's."""
OPERATIONS: Mapping[str, tuple[Kind, ...]] = {
    "forward": (Kind.F,),
    "inputs": (Kind.B, Kind.I),
    "weights": (Kind.B, Kind.W),
}
"""Which operations tell a factor."""
ALL = (Kind.F, Kind.B, Kind.I, Kind.W)
"""They together."""
Seconds = Mapping[tuple[Kind, int], float]
"""Of an operation, by kind and stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refined:
    """A machine after a run, and what that changes for the run itself."""

    machine: Machine
    found: tuple[Refinement, ...]
    """What this run said; ``machine`` has the older ones too."""
    measured: float
    """Median step of the run in seconds."""
    before: StepTime
    """The run's step by the calibration as it was."""
    after: StepTime
    """And as it is now."""


def refine(machine: Machine, run: Path) -> Refined:
    """Correct ``machine`` by the trace in a run's directory.

    ConfigError where the trace isn't of this machine or of its own run file, UnsupportedError for runs that can't tell.
    """
    trace = load(run)
    spec = _spec(run)
    _check_machine(machine, trace, run)
    _check_told(machine, spec, trace, run)
    work = Request(run=spec).work(spec.plan)
    _check_shape(work, trace, run)
    seen = observe(trace)
    schedule = trace.schedule
    before = measured_step(work, machine)
    sizes = _sizes(work)
    factors = _operations(work, machine, seen, trace)
    factors |= _others(work, machine, seen)
    expected = played(work, _with(machine, factors, sizes), schedule=trace.schedule).makespan
    factors["waiting"] = max(LEAST, seen.makespan / expected)
    source = f"{run}: {schedule.name}, pp={spec.plan.pp} tp={spec.plan.tp} cp={spec.plan.cp} dp={spec.plan.dp}, "
    source += f"{len(trace.steps)} steps on {trace.ranks[0].source.host}"
    found = [
        Refinement(kind=kind, size=sizes[kind], factor=factor, error=0.0, source=source)
        for kind, factor in factors.items()
    ]
    after = measured_step(work, replace(machine, refinements=merged(machine.refinements, found)))
    wrong, now = after.total / seen.step - 1, _with(machine, factors, sizes)
    spreads = [seen.spread, _uneven(work, now, seen, trace)]
    found = [replace(one, error=hypot(wrong, *(spread.get(one.kind, 0.0) for spread in spreads))) for one in found]
    refined = replace(machine, refinements=merged(machine.refinements, found))
    return Refined(
        machine=refined, found=tuple(found), measured=seen.step, before=before, after=measured_step(work, refined)
    )


def _sizes(work: Workload) -> dict[str, float]:
    """Where a run of ``work`` measures each kind."""
    layers, ranks = layer_size(work), float(work.plan.num_ranks)
    return {
        "forward": layers,
        "inputs": layers,
        "weights": layers,
        "head": head_size(work),
        "exchange": exchanged_bytes(work),
        "message": message_bytes(work),
        "collectives": unit_bytes(work),
        "optimizer": updated_parameters(work),
        "step": ranks,
        "gaps": ranks,
        "waiting": float(work.plan.pp),
    }


def _operations(work: Workload, machine: Machine, seen: Observed, trace: Trace) -> dict[str, float]:
    """Factors under which the schedule, played on the machine's cores, has operations as long as those observed."""
    sizes, last, bare = _sizes(work), work.plan.num_stages - 1, _bare(work)
    told = [name for name, kinds in OPERATIONS.items() if any((kind, bare[0]) in seen.operations for kind in kinds)]
    names = [*told, "head", "gaps", *(["exchange"] if work.plan.tp * work.plan.cp > 1 else [])]
    factors = {name: machine.factor(name, sizes[name]) for name in names}
    for _ in range(ROUNDS):
        now = _with(machine, factors, sizes)
        expected, crowding = _played(work, now, trace)
        whole = _ratio(seen.operations, expected, ALL, bare)
        ratios = {name: _ratio(seen.operations, expected, OPERATIONS[name], bare) for name in told}
        factors["gaps"] = seen.gap / (machine.operation_seconds * crowding)
        if last:
            factors["head"] *= _of_head(work, now, _ratio(seen.operations, expected, ALL, [last]), ratios)
        else:
            factors["head"] *= whole
        factors |= {name: max(LEAST, factors[name] * ratio) for name, ratio in ratios.items()}
        if "exchange" in factors:
            factors["exchange"] *= whole
    return factors


def _bare(work: Workload) -> list[int]:
    """The stages without the head, or the only one."""
    return list(range(max(1, work.plan.num_stages - 1)))


def _uneven(work: Workload, machine: Machine, seen: Observed, trace: Trace) -> dict[str, float]:
    """By how much stages differ in what the factors still leave, for each of them."""
    expected, _ = _played(work, machine, trace)
    found = {}
    for name, kinds in OPERATIONS.items():
        keys = [key for key in expected if key[0] in kinds and key in seen.operations and key[1] in _bare(work)]
        ratios = [seen.operations[key] / expected[key] for key in keys]
        found[name] = statistics.pstdev(ratios) if ratios else 0.0
    return found


def _played(work: Workload, machine: Machine, trace: Trace) -> tuple[Seconds, float]:
    """Mean seconds of the operations on shared cores, and how many times longer than alone they take together."""
    taken: dict[tuple[Kind, int], list[float]] = {}
    alone: dict[tuple[Kind, int], list[float]] = {}
    played(work, machine, schedule=trace.schedule, taken=taken)
    played(work, replace(machine, contention=(), cores=work.plan.num_ranks), schedule=trace.schedule, taken=alone)
    crowding = sum(map(sum, taken.values())) / sum(map(sum, alone.values()))
    return {key: statistics.fmean(some) for key, some in taken.items()}, max(1.0, crowding)


def _ratio(seen: Seconds, expected: Seconds, kinds: Sequence[Kind], stages: Sequence[int]) -> float:
    """Measured over expected seconds of some operations, all together; 1 where there are none."""
    keys = [(kind, stage) for kind in kinds for stage in stages]
    both = [key for key in keys if key in seen and key in expected]
    return sum(seen[key] for key in both) / sum(expected[key] for key in both) if both else 1.0


def _of_head(work: Workload, machine: Machine, ratio: float, longer: Mapping[str, float]) -> float:
    """Times that logits and loss take longer, where the last stage takes ``ratio`` times what is expected of it."""
    one, layers = layer(work, machine), work.layers[-1]
    parts = {"forward": one.forward, "inputs": one.inputs, "weights": one.weights}
    before = layers * sum(parts.values())
    after = layers * sum(seconds * longer.get(name, 1.0) for name, seconds in parts.items())
    own = sum(head(work, machine))
    return max(LEAST, (ratio * (before + own) - after) / own)


def _others(work: Workload, machine: Machine, seen: Observed) -> dict[str, float]:
    """Factors of what lies outside the operations."""
    sizes, found = _sizes(work), {}

    def against(kind: str, seconds: float, expected: float) -> None:
        if seconds > 0 and expected > 0:
            found[kind] = max(LEAST, seconds / expected * machine.factor(kind, sizes[kind]))

    rest, reduced = seen.rest, data_seconds(work, machine)
    if not reduced:
        rest += seen.settling
    update, besides = update_seconds(work, machine)
    against("collectives", seen.settling, reduced)
    against("optimizer", seen.optimizer, update)
    against("step", rest, besides)
    against("message", seen.message, message_seconds(work, machine))
    return found


def _with(machine: Machine, factors: Mapping[str, float], sizes: Mapping[str, float]) -> Machine:
    found = [Refinement(kind=k, size=sizes[k], factor=factor, error=0.0, source="") for k, factor in factors.items()]
    return replace(machine, refinements=merged(machine.refinements, found))


def _spec(run: Path) -> RunSpec:
    """The run that the trace is of; ConfigError where its file is missing."""
    path = run / "run.toml"
    if not path.is_file() or not path.stat().st_size:
        raise ConfigError(
            f"The run in {run} has no run.toml, so that nothing says which model and plan its trace is of; "
            "record the run again."
        )
    return load_run(path)


def _check_machine(machine: Machine, trace: Trace, run: Path) -> None:
    """ConfigError for a trace of other machines than the calibrated one."""
    first = trace.ranks[0].source
    if trace.num_hosts > 1:
        raise ConfigError(
            f"The run in {run} was on {trace.num_hosts} machines, but the calibration is of one; refine it by a run on "
            "that one."
        )
    there = (first.processor, first.cores)
    if not first.processor:
        raise ConfigError(
            f"The trace in {run} doesn't say which processor it was recorded on, so that it may be another than the "
            f"calibrated one ({machine.processor}); record the run again with this version."
        )
    if there != (machine.processor, machine.cores):
        raise ConfigError(
            f"The run in {run} was on {first.cores} cores of {first.processor!r}, but the calibration is of "
            f"{machine.cores} cores of {machine.processor!r}; calibrate that machine (stretto diagnose --calibrate "
            "there), or refine by a run on this one."
        )


def _check_told(machine: Machine, spec: RunSpec, trace: Trace, run: Path) -> None:
    """Errors for runs that don't tell what the machine's figures are."""
    plan, place = spec.plan, f"The run in {run}"
    if any(rank.source.device != "cpu" for rank in trace.ranks):
        raise UnsupportedError(
            f"{place} was on GPUs: its trace says when operations were launched, not how long they took, so that it "
            "can't refine a calibration; write what you know of them under [shares] of the file."
        )
    if spec.training.dtype != machine.dtype:
        raise ConfigError(
            f"{place} computes in {spec.training.dtype}, but the calibration is of {machine.dtype}; refine it by a run "
            f"with training.dtype = {machine.dtype!r}."
        )
    usual = PlanSpec()
    kept = (plan.compile, plan.asynchronous) == (usual.compile, usual.asynchronous) and not spec.training.freeze
    changed = not kept or (plan.pp > 1 and not plan.optimizer_barrier)
    if spec.model.family == "foreign" or changed:
        raise UnsupportedError(
            f"{place} can't refine a calibration, because the planner doesn't know what foreign models, plan.compile, "
            "plan.asynchronous, training.freeze and plan.optimizer_barrier = false make of each operation; take a run "
            "without them."
        )
    states = Request(run=spec).work(plan).states
    if states.parameters > 1 or states.gradients > 1:
        raise UnsupportedError(
            f"{place} gathers parameters or reduces gradients inside its operations (plan.zero = {plan.zero}), which "
            "its trace doesn't tell apart from their work; refine by a run with plan.zero = 1."
        )


def _check_shape(work: Workload, trace: Trace, run: Path) -> None:
    """ConfigError where the trace is of another plan than the run file beside it."""
    schedule, plan = trace.schedule, work.plan
    for what, there, here in (
        ("ranks in all", trace.ranks[0].source.world_size, plan.num_ranks),
        ("pipeline ranks", schedule.num_ranks, plan.pp),
        ("stages", schedule.num_stages, plan.num_stages),
        ("micro-batches", schedule.num_microbatches, work.num_microbatches),
    ):
        if there != here:
            raise ConfigError(
                f"The trace in {run} is of a run with {there} {what}, but the run.toml beside it says {here}: it is of "
                "another model or plan; record the run again."
            )
