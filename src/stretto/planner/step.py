"""Time of a whole step and where it goes.

A stage's turn is the forward and backward of its layers (and head) for one micro-batch.  1F1B with M micro-batches:

    step = sum of all stages' turns + (M - 1) x the longest turn + messages + gradients + optimizer
           └ one micro-batch there and back ┘

which is the simulator's time for 1F1B where the last stage is the longest and no message takes time, and a little
more (1% in the tests) where an earlier one is: it fills gaps that this counts.  With messages of c between stages one
micro-batch's way there and back is R turns and 2(R - 1) messages, and R micro-batches share it: each turn costs
2(R - 1)/R c more.  With V chunks per rank other chunks fill the way of the first micro-batch, and the bubble is divided
by V (Narayanan et al. 2021, section 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass

from stretto.planner.calibration import Calibration
from stretto.planner.communication import boundary_seconds, data_seconds, tensor_seconds
from stretto.planner.compute import head_seconds, layer_seconds, optimizer_seconds, recompute_seconds
from stretto.planner.workload import Workload
from stretto.spec.errors import UnsupportedError

FAMILIES = ("1f1b", "gpipe", "interleaved", "breadth-first")
"""Schedules with a closed form here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of a step, by cause; tensor-parallel communication is inside ``work`` and told apart."""

    work: float
    """The busiest rank's own micro-batches."""
    tensor_communication: float
    """Of ``work``, waiting for collectives over tp."""
    bubble: float
    """Filling and draining the pipeline."""
    data_communication: float
    """Gradients and parameters over the data ranks, what isn't hidden."""
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.work + self.bubble + self.data_communication + self.optimizer


def step_time(work: Workload, calibration: Calibration | None = None) -> StepTime:
    """Estimate a step; UnsupportedError for what has no closed form here, or machines of unknown rates."""
    calibration, plan = calibration or Calibration(), work.plan
    _check_rates(work)
    for name, used in (("cp", plan.cp > 1), ("ep", plan.ep > 1), ("offload", plan.offload)):
        if used:
            raise UnsupportedError(f"The time of plan.{name} isn't estimated yet; estimate the plan without it.")
    if plan.schedule not in FAMILIES:
        raise UnsupportedError(
            f"There is no closed form for the time of schedule {plan.schedule!r} yet; there is one for "
            f"{', '.join(FAMILIES)}."
        )
    layer, head = layer_seconds(work, calibration), head_seconds(work, calibration)
    there, back, again = tensor_seconds(work, calibration)
    repeated = recompute_seconds(work, calibration)
    turn = layer.forward + layer.backward + repeated + there + back + again
    exposed = plan.chunks * 2 * (plan.pp - 1) / plan.pp * boundary_seconds(work, calibration)
    turns = [turn * work.layers_of_rank(rank) + exposed for rank in range(plan.pp)]
    turns[-1] += head.forward + head.backward
    longest = max(turns)
    data = data_seconds(work, calibration)
    if work.stack.overlapped_reduction:  # only the last backward and the first forward have it beside them
        data = max(0.0, data - longest)
    return StepTime(
        work=work.num_microbatches * longest,
        tensor_communication=work.num_microbatches * max(work.layers) * plan.chunks * (there + back + again),
        bubble=(sum(turns) - longest) / plan.chunks,
        data_communication=data,
        optimizer=optimizer_seconds(work, calibration),
    )


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
