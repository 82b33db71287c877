"""What a plan takes: its step, its memory, and what both mean for tokens, money and links."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from stretto.planner.calibration import Calibration, published
from stretto.planner.communication import context_seconds, logits_seconds, tensor_seconds
from stretto.planner.compute import head_seconds, layer_seconds, recompute_seconds
from stretto.planner.flops import mfu, parameters
from stretto.planner.frozen import trained
from stretto.planner.groups import limits, plain
from stretto.planner.linear_layers import least
from stretto.planner.measured_step import turn
from stretto.planner.memory import RankMemory, fits, layer_activation_bytes, memory
from stretto.planner.request import Request
from stretto.planner.step import StepTime, step_time
from stretto.planner.workload import Workload
from stretto.spec.plan import PlanSpec

INSTANT = 1e9
"""Share of the network's rate at which messages between stages take no time."""
HOUR = 3600.0
"""Seconds."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One plan, and what it takes."""

    work: Workload
    """The plan on its machines."""
    time: StepTime
    """Seconds of a step, by cause."""
    memory: tuple[RankMemory, ...]
    """Peak bytes of each pipeline rank, by kind."""
    fits: bool
    """Whether every rank stays within its device."""
    price: float | None = None
    """Of a device for an hour."""
    calibration: Calibration | None = None
    """What the machines reach, as asked."""
    assumed: tuple[str, ...] = ()
    """Rates of the machines that aren't known and were assumed."""

    @property
    def plan(self) -> PlanSpec:
        """The plan."""
        return self.work.plan

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.time.total

    @property
    def tokens_per_second(self) -> float:
        """Over the whole mesh."""
        return self.work.global_batch_size * self.work.sequence_length / self.seconds

    @property
    def mfu(self) -> float | None:
        """Model FLOP utilisation, 0 to 1; None where the peak isn't known."""
        return mfu(
            self.work.model,
            sequence_length=self.work.sequence_length,
            tokens_per_second=self.tokens_per_second,
            num_devices=self.plan.num_ranks,
            peak_flops=0.0 if self.assumed else self.work.cluster.peak_flops_bfloat16,
        )

    @cached_property
    def fullest(self) -> int:
        """The pipeline rank with the most bytes; on unequal devices, with the most of its device's."""
        return max(range(len(self.memory)), key=lambda rank: self.memory[rank].total / self.limits[rank])

    @cached_property
    def limits(self) -> tuple[float, ...]:
        """Memory of the devices of each pipeline rank, in bytes."""
        return limits(self.work)

    @property
    def peak_bytes(self) -> float:
        """Of the fullest rank."""
        return self.memory[self.fullest].total

    @property
    def bubble(self) -> float:
        """Share of the step in which the pipeline fills and drains."""
        return self.time.bubble / self.seconds

    @property
    def device_hours(self) -> float:
        """Of a step."""
        return self.plan.num_ranks * self.seconds / HOUR

    @property
    def cost(self) -> float | None:
        """Price of a step."""
        return None if self.price is None else self.price * self.device_hours

    @cached_property
    def exposed(self) -> dict[str, float]:
        """Seconds of a step in which ranks wait for each other's data, by axis."""
        time, calibration = self.time, self.calibration or published(self.work.cluster.name)
        waits = {"pp": 0.0, "tp": time.tensor_communication, "cp": time.context_communication}
        if self.plan.pp > 1:
            silent = step_time(self.work, replace(calibration, message=INSTANT))
            waits["pp"] = max(0.0, time.total - silent.total)
        waits |= {"dp": time.data_communication, "host": time.host_communication}
        return {axis: seconds for axis, seconds in waits.items() if seconds > 0}


def estimate(request: Request, plan: PlanSpec) -> Estimate:
    """What ``plan`` takes; UnsupportedError or ScheduleError where that can't be told, or the schedule can't be."""
    work = request.work(plan)
    return Estimate(
        work=work,
        time=step_time(work, request.calibration),
        memory=memory(work, request.margin),
        fits=fits(work, request.margin),
        price=request.price,
        calibration=request.calibration,
        assumed=request.assumed,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """What a rank does with one micro-batch, forward and backward, in seconds."""

    layer: float
    """One layer, with its recompute and its collectives over tp."""
    head: float
    """Logits and loss."""


def turns(work: Workload, calibration: Calibration | None) -> Turns:
    """The parts that stages are balanced by and that no schedule can avoid; on unequal devices the least of them."""
    if work.cluster.groups:
        each = {group: turns(replace(work, cluster=plain(group)), calibration) for group in work.cluster.groups}
        devices = sum(group.devices for group in each)
        together = sum(group.devices / one.layer for group, one in each.items())
        return Turns(layer=devices / together, head=min(one.head for one in each.values()))
    calibration = calibration or published(work.cluster.name)
    if calibration.machine is not None:
        one, last = turn(work, calibration.machine)
        return Turns(layer=one, head=last)
    layer, head = layer_seconds(work, calibration), head_seconds(work, calibration)
    repeated = recompute_seconds(work, calibration)
    between = sum(tensor_seconds(work, calibration)) + sum(context_seconds(work, calibration))
    alive, weights = (sum(layers) / work.model.num_layers for layers in (work.backward_layers, work.weight_layers))
    back = alive * (layer.backward - layer.weights + repeated + between * 2 / 3) + weights * layer.weights
    return Turns(
        layer=layer.forward + between / 3 + back,
        head=head.forward + head.backward + logits_seconds(work, calibration),
    )


def least_seconds(work: Workload, turn: Turns) -> float:
    """Below the time of a step of every plan with this core: all turns, spread perfectly over the ranks."""
    return work.num_microbatches * (work.model.num_layers * turn.layer + turn.head) / work.plan.pp


def least_state_bytes(work: Workload) -> float:
    """Below the peak of every plan with this sharding: the average rank's states, whatever the order and the stages.

    The whole layers that zero 3 gathers are left out.
    """
    plan, stack, states, counts = work.plan, work.stack, work.states, parameters(work.model)
    held = (counts.layer_matrices + counts.embedding) / plan.tp + counts.layer_vectors
    if not counts.tied:
        held += counts.head / plan.tp
    trains = _trained_share(work)
    per_parameter = (
        stack.parameter_bytes / states.parameters
        + trains * stack.gradient_bytes / states.gradients
        + (stack.master_bytes + trains * (stack.optimizer_bytes - stack.master_bytes)) / states.optimizer
    )
    return held / plan.pp * per_parameter


def _trained_share(work: Workload) -> float:
    """Of the parameters, those that train."""
    if not work.freeze:
        return 1.0
    left, counts = trained(work.model, work.freeze), parameters(work.model)
    return (sum(left.matrices) + left.embedding) / (counts.layer_matrices + counts.embedding + counts.head)


def least_peak_bytes(work: Workload, *, share: float = 1.0) -> float:
    """Below the peak of every plan with this core and sharding under 1f1b or gpipe, however its layers lie.

    Rank r keeps at least k = min(M, R - r) micro-batches of its n layers, so its bytes are at least n (state + k kept).
    The largest of them is least where all are equal: layers / sum over ranks of 1 / (state + k kept).  ``share``: of
    these micro-batches, for other schedules.
    """
    plan, model = work.plan, work.model
    state = least_state_bytes(work) * plan.pp / model.num_layers
    counts = parameters(model)
    state *= counts.layer_matrices / (counts.layer_matrices + counts.embedding + counts.head)
    # Layers before the first that trains keep nothing, and which rank has them isn't known here.
    kept = 0.0 if work.freeze else share * least(work, layer_activation_bytes)
    number = work.num_microbatches
    return model.num_layers / sum(1 / (state + min(number, plan.pp - rank) * kept) for rank in range(plan.pp))
