"""Time of a whole step and where it goes.

A stage's turn is the forward and backward of its layers (and head) for one micro-batch.  1F1B with M micro-batches:

    step = sum of all stages' turns + (M - 1) x the longest turn + messages + gradients + optimizer
           └ one micro-batch there and back ┘

which is the simulator's time for 1F1B where the last stage is the longest and no message takes time, and a little
more (1% in the tests) where an earlier one is: it fills gaps that this counts.  Messages of c between stages overlap
with work, but R - r micro-batches share the way from rank r to the last and back, so that every R - r turns take at
least as long as that way with its 2(R - 1 - r) messages (within 4% of the simulator's in the tests).

Every other schedule (split backwards, folded or doubled stages, passes, a file) is timed by the chains of operations
that ``profile`` remembers of its simulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stretto.planner.barrier import saved_seconds
from stretto.planner.calibration import Calibration, published
from stretto.planner.communication import (
    boundary_seconds,
    context_seconds,
    data_parts,
    logits_seconds,
    tensor_seconds,
)
from stretto.planner.compute import head_seconds, layer_seconds, optimizer_seconds, recompute_seconds
from stretto.planner.groups import apart, of_ranks
from stretto.planner.linear_layers import of_stages
from stretto.planner.measured_step import measured_step
from stretto.planner.memory import layer_activation_bytes
from stretto.planner.uncertainty import expected_error
from stretto.planner.workload import Workload
from stretto.schedule.op import Kind
from stretto.schedule.simulate.costs import EMPTY
from stretto.spec.errors import UnsupportedError
from stretto.spec.front import fills

FAMILIES = ("1f1b", "gpipe")
"""Schedules with a closed form here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of a step, by cause; communication over tp and cp is inside ``work`` and told apart."""

    work: float
    """The busiest rank's own micro-batches."""
    tensor_communication: float
    """Of ``work``, waiting for collectives over tp."""
    bubble: float
    """Filling and draining the pipeline."""
    data_communication: float
    """Gradients and parameters over the data ranks, what isn't hidden."""
    optimizer: float
    context_communication: float = 0.0
    """Of ``work``, waiting for keys and values of other cp ranks."""
    host_communication: float = 0.0
    """Waiting for activations on their way to the host and back."""
    expected_error: float = 0.0
    """Of ``total``, relative, one standard deviation (``uncertainty``)."""

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.work + self.bubble + self.data_communication + self.optimizer + self.host_communication


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTurns:
    """Seconds of each stage for one micro-batch."""

    forward: Sequence[float]
    backward: Sequence[float]
    weights: Sequence[float]
    """Of ``backward``, the gradients of the weights."""
    head: tuple[float, float]
    """Forward and backward of the head, which is in the last stage's where it isn't cut over the ranks."""


def step_time(work: Workload, calibration: Calibration | None = None) -> StepTime:
    """Estimate a step; UnsupportedError for machines of unknown rates, ScheduleError for a schedule that can't be."""
    given, plan = calibration, work.plan
    calibration = calibration or published(work.cluster.name)
    if calibration.machine is not None:
        return measured_step(work, calibration.machine)
    _check_rates(work)
    if plan.ep > 1:
        raise UnsupportedError("The time of plan.ep isn't estimated yet; estimate the plan without it.")
    if work.cluster.groups:
        return _mixed_step(work, given)
    between = tensor_seconds(work, calibration)
    context = context_seconds(work, calibration)
    turns = _turns(work, calibration, sum(between) + sum(context))
    closed = plan.schedule in FAMILIES and plan.schedule_file is None and not (plan.passes or plan.offload)
    longest, whole = (_closed if closed else _profiled)(work, turns, boundary_seconds(work, calibration))
    data = exposed_seconds(work, longest, calibration)
    layers = work.num_microbatches * max(share.layers for share in work.shares) / work.num_replicas
    time = StepTime(
        work=longest,
        tensor_communication=layers * sum(between),
        bubble=whole - longest,
        data_communication=data,
        optimizer=optimizer_seconds(work, calibration),
        context_communication=layers * sum(context),
        host_communication=_host_seconds(work, whole, calibration),
    )
    return replace(time, expected_error=expected_error(causes(time), work.cluster.name))


def _mixed_step(work: Workload, given: Calibration | None) -> StepTime:
    """A step on unequal devices: each pipeline rank at its own rates, messages over the slowest links.

    A rank's data ranks are on its own machines; the slowest of them and of the optimizers is waited for.
    """
    turns, plan = stage_turns(work, given), work.plan
    closed = plan.schedule in FAMILIES and plan.schedule_file is None and not (plan.passes or plan.offload)
    rates = given or published(work.cluster.name)
    longest, whole = (_closed if closed else _profiled)(work, turns, boundary_seconds(work, rates))
    layers, tensor, context, data, optimizer = 0, 0.0, 0.0, 0.0, 0.0
    for machines, ranks in apart(work).items():
        one, own = replace(work, cluster=machines), given or published(machines.name)
        layers = work.num_microbatches * max(work.shares[rank].layers for rank in ranks)
        held = max(work.shares[rank].parameters for rank in ranks)
        tensor = max(tensor, layers * sum(tensor_seconds(one, own)))
        context = max(context, layers * sum(context_seconds(one, own)))
        data = max(data, exposed_seconds(one, longest, own, held))
        optimizer = max(optimizer, optimizer_seconds(one, own, held))
    time = StepTime(
        work=longest,
        tensor_communication=min(tensor, longest),
        bubble=whole - longest,
        data_communication=data,
        optimizer=optimizer,
        context_communication=min(context, longest),
        host_communication=_host_seconds(work, whole, rates),
    )
    return replace(time, expected_error=expected_error(causes(time), work.cluster.name))


def exposed_seconds(work: Workload, longest: float, calibration: Calibration, held: float | None = None) -> float:
    """What a step waits for its data ranks, where the busiest rank works for ``longest``.

    What is done for each micro-batch lies beside all of the work, what is done once beside the last backward and the
    first forward pass.  What is hidden takes processors from the work.
    """
    each, once = data_parts(work, calibration, held)
    if not work.stack.overlapped_reduction:
        return each + once
    waits = max(0.0, each + once - longest, once - longest / work.num_microbatches)
    return waits + calibration.overlap * (each + once - waits)


def causes(time: StepTime) -> dict[str, float]:
    """Seconds of a step by the causes whose uncertainty is known."""
    return {
        "work": time.work - time.tensor_communication - time.context_communication,
        "tensor": time.tensor_communication,
        "context": time.context_communication,
        "bubble": time.bubble,
        "data": time.data_communication,
        "host": time.host_communication,
        "optimizer": time.optimizer,
    }


def stage_turns(work: Workload, calibration: Calibration | None = None) -> StageTurns:
    """What each stage does with one micro-batch, its collectives over tp and cp included."""
    if work.cluster.groups:
        return _mixed_turns(work, calibration)
    calibration = calibration or published(work.cluster.name)
    return _turns(work, calibration, sum(tensor_seconds(work, calibration)) + sum(context_seconds(work, calibration)))


def _mixed_turns(work: Workload, given: Calibration | None) -> StageTurns:
    """Each stage on the machines of its rank."""
    each = {machines: stage_turns(replace(work, cluster=machines), given) for machines in apart(work)}
    on = of_ranks(work.plan, work.cluster)
    rank_of = {stage: rank for rank, share in enumerate(work.shares) for stage in share.stages}
    of = [each[on[rank_of[stage]]] for stage in range(len(work.layers))]
    return StageTurns(
        forward=[turns.forward[stage] for stage, turns in enumerate(of)],
        backward=[turns.backward[stage] for stage, turns in enumerate(of)],
        weights=[turns.weights[stage] for stage, turns in enumerate(of)],
        head=of[-1].head,
    )


def _turns(work: Workload, calibration: Calibration, collectives: float) -> StageTurns:
    """Each stage's own; ``collectives`` are seconds of a layer forward and backward, a third of them forward."""
    head, gathered = head_seconds(work, calibration), logits_seconds(work, calibration)

    def again(one: Workload) -> float:
        layer = layer_seconds(one, calibration)
        return layer.backward - layer.weights + recompute_seconds(one, calibration) + collectives * 2 / 3

    forward = of_stages(work, lambda one: layer_seconds(one, calibration).forward + collectives / 3)
    weights = of_stages(work, lambda one: layer_seconds(one, calibration).weights, work.weight_layers)
    inputs = of_stages(work, again, work.backward_layers)
    backward = [one + own for one, own in zip(inputs, weights, strict=True)]
    if work.plan.compile == "blocks":  # layers that are compiled as a whole do all of it in I
        weights = [EMPTY * seconds for seconds in backward]
    if not work.vocabulary:
        forward[-1] += head.forward + gathered
        backward[-1] += head.backward
        weights[-1] += head.weights
    return StageTurns(forward=forward, backward=backward, weights=weights, head=(head.forward, head.backward))


def _closed(work: Workload, turns: StageTurns, message: float) -> tuple[float, float]:
    """Seconds of the busiest rank's work, and of all until the last backward.

    A rank that blocks in its messages adds them to its turn: two at an end of the pipeline, four in between.
    """
    ranks, number = work.plan.pp, work.num_microbatches
    own = [there + back for there, back in zip(turns.forward, turns.backward, strict=True)]
    if work.stack.blocking_messages and ranks > 1:
        own = [turn + (2 if rank in (0, ranks - 1) else 4) * message for rank, turn in enumerate(own)]
        return number * max(own), (number - 1) * max(own) + sum(own)
    longest = turn = max(own)
    if work.plan.schedule == "1f1b":
        turn = max((sum(own[r:]) + 2 * (ranks - 1 - r) * message) / (ranks - r) for r in range(ranks))
    way = sum(own) + 2 * (ranks - 1) * message
    return number * longest, way + (number - 1) * max(longest, turn)


def _profiled(work: Workload, turns: StageTurns, message: float) -> tuple[float, float]:
    """The same from the chains of the schedule's simulation."""
    counts = work.profile
    stages, ranks = len(work.layers), work.plan.pp
    inputs = [whole - part for whole, part in zip(turns.backward, turns.weights, strict=True)]
    shard = sum(turns.head) / ranks / 2
    whole = counts.makespan(
        {
            Kind.F: turns.forward,
            Kind.I: inputs,
            Kind.W: turns.weights,
            Kind.R: turns.forward,
            Kind.S: [shard] * stages,
            Kind.T: [shard] * stages,
        },
        message,
    )
    own, both = [], [there + back for there, back in zip(turns.forward, turns.backward, strict=True)]
    for rank in range(ranks):
        held = counts.held[rank]
        own.append(sum(counts.voices[voice] * both[stage] for voice, stage in held))
    busiest = max(own) + (work.num_microbatches * 2 * shard if counts.vocabulary else 0.0)
    whole -= saved_seconds(work, turns.forward, inputs, turns.weights, message)
    if fills(work.plan):
        return _filled(work, turns, min(busiest, whole), max(whole, 0.0), sum(own))
    return min(busiest, whole), whole


def _filled(work: Workload, turns: StageTurns, busiest: float, whole: float, together: float) -> tuple[float, float]:
    """The same with a frozen front in the bubbles, which is spread so that all ranks end as early as can be.

    ``together``: what all ranks work, in seconds, without the front.
    """
    frozen = work.num_microbatches * work.ahead * turns.forward[0] / work.layers[0]
    even = (together + frozen) / work.plan.pp
    return max(busiest, even), max(whole, even)


def _host_seconds(work: Workload, whole: float, calibration: Calibration) -> float:
    """What moving activations to the host (and back, at the same time) takes beyond the step itself."""
    if not work.plan.offload and not any(text.partition(":")[0] == "offload" for text in work.plan.passes):
        return 0.0
    one = layer_activation_bytes(work)
    moved = max(share * work.layers_of_rank(rank) for rank, share in enumerate(work.profile.offloaded))
    seconds = moved * one * work.num_microbatches / work.num_replicas / calibration.host_bytes_per_second
    return max(0.0, seconds - whole)


def _check_rates(work: Workload) -> None:
    """UnsupportedError where a rate that the plan needs isn't known."""
    plan, cluster = work.plan, work.cluster
    needed = ["peak_flops_bfloat16", "memory_bytes_per_second"]
    if plan.num_ranks > 1:
        needed.append("link_bytes_per_second")
    if plan.num_ranks > cluster.devices_per_node:
        needed.append("network_bytes_per_second")
    unknown = [name for name in needed if not getattr(cluster, name)]
    if unknown:
        raise UnsupportedError(
            f"The time of a step on {cluster.name!r} can't be estimated, because {' and '.join(unknown)} of [cluster] "
            f"isn't known; measure it or take a preset that has it, for example a100."
        )
