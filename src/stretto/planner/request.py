"""What the planner is asked: a run without its plan, what of the plan is fixed, and what is best.

A *pin* is a value of the plan that the search keeps.  Whatever isn't pinned is chosen, among what this version can
run (``spec.capabilities``).  Keys that change the training itself or need a file (``UNCHOSEN``) are never chosen: they
keep their default where they aren't pinned.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

from stretto.planner.calibration import Calibration
from stretto.planner.calibration_file import calibration_of
from stretto.planner.memory import Margin
from stretto.planner.own_stack import own_stack
from stretto.planner.profile import refused, schedule_key
from stretto.planner.stack import KernelStack
from stretto.planner.workload import Workload
from stretto.spec.check import check
from stretto.spec.cluster import ClusterSpec
from stretto.spec.errors import ConfigError, StrettoError
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.states import SHARD_KEYS

Objective = Literal["time", "cost", "memory"]
OBJECTIVES = ("time", "cost", "memory")
"""Shortest step, fewest devices x seconds (any number of the devices may be used), least peak memory."""
DEGREES = ("pp", "tp", "cp", "dp_replicate", "dp_shard")
"""Their product is the number of ranks; ep divides the data ranks and adds none."""
CHOSEN = (
    *DEGREES,
    "context",
    "ulysses",
    "context_layout",
    "linear_context",
    "ep",
    "schedule",
    "chunks",
    "micro_batch_size",
    "stages",
    "zero",
    *SHARD_KEYS,
    "recompute",
    "offload",
)
"""Keys of the plan that the search chooses where they aren't pinned."""
ASSUMED = {
    "peak_flops_bfloat16": 5e10,
    "memory_bytes_per_second": 1e10,
    "link_bytes_per_second": 2e9,
    "network_bytes_per_second": 1e9,
}
"""What is taken for a rate of 0 (not known): about one core of a laptop, and messages through its memory.  Orders of
magnitude: enough to tell a good plan from a bad one, not to tell seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question to the planner."""

    run: RunSpec
    """Model, machines and data; its plan isn't looked at."""
    pins: Mapping[str, Any] = field(default_factory=dict)
    """Values of the plan that are fixed."""
    objective: Objective = "time"
    """What the best plan has least of."""
    price: float | None = None
    """Of one device for an hour, in any currency; None: not known."""
    price_source: str = ""
    """Where the price is from."""
    calibration: Calibration | None = None
    """What was measured of the machines; None: what ``cluster.calibration`` names, else the published figures."""

    def __post_init__(self) -> None:
        """Read the cluster's own calibration; ConfigError where its file can't be, or the price."""
        if self.price is not None and not 0 < self.price < float("inf"):
            raise ConfigError(f"A price of {self.price:g} for a device and hour must be a finite number above 0.")
        if self.calibration is None:
            object.__setattr__(self, "calibration", calibration_of(self.run.cluster))

    @property
    def model(self) -> ModelSpec:
        """The model."""
        return self.run.model

    @property
    def cluster(self) -> ClusterSpec:
        """The machines, with rates that they don't tell as measured, or assumed."""
        machine = None if self.calibration is None else self.calibration.machine
        known = ASSUMED if machine is None else machine.rates()
        rates: dict[str, Any] = {name: known[name] for name in self.untold}
        return replace(self.run.cluster, **rates)

    @property
    def assumed(self) -> tuple[str, ...]:
        """Rates of the cluster that aren't known."""
        measured = self.calibration is not None and self.calibration.machine is not None
        return () if measured else self.untold

    @property
    def untold(self) -> tuple[str, ...]:
        """Rates that ``[cluster]`` doesn't tell."""
        return tuple(name for name in ASSUMED if not getattr(self.run.cluster, name))

    @property
    def stack(self) -> KernelStack:
        """Kernels and precisions of the run."""
        return own_stack(self.run.training)

    @property
    def margin(self) -> Margin:
        """What no tensor accounts for: a CPU has no context, and its memory isn't in blocks."""
        cpu = self.cluster.name.partition(":")[0] == "local-cpu"
        return Margin(context_bytes=0.0, fragmentation=0.0) if cpu else Margin()

    @property
    def restricted(self) -> bool:
        """Whether what is pinned goes with some schedules and degrees only, so that each plan is checked for itself."""
        pins = self.pins
        grouped = pins.get("context_groups", "static") != "static"
        return grouped or pins.get("asynchronous", "none") != "none" or self.ordered

    @property
    def ordered(self) -> bool:
        """Whether what is pinned of the schedule is for the schedule itself to refuse: closed forms don't build it."""
        return any(self.pins.get(key) for key in ("memory_limit", "options"))

    def runs(self, plan: PlanSpec) -> bool:
        """Whether the checks that come before a launch pass; what they refuse isn't proposed."""
        try:
            check(replace(self.run, plan=plan), data=False)
        except StrettoError:
            return False
        return not self.ordered or not refused(schedule_key(plan), self.microbatches(plan))

    def microbatches(self, plan: PlanSpec) -> int:
        """Micro-batches of a step of a plan, per pipeline."""
        return self.run.training.global_batch_size // (plan.dp * plan.micro_batch_size)

    @property
    def devices(self) -> int:
        """Devices that a plan may use.

        A CPU without a number (``local-cpu``) is given the processes that the pinned degrees ask for, or as many as it
        has cores.
        """
        cluster = self.cluster
        if cluster.name != "local-cpu":
            return cluster.num_nodes * cluster.devices_per_node
        pinned = prod(self.pins.get(axis, 1) for axis in DEGREES)
        return pinned if any(axis in self.pins for axis in DEGREES) else os.cpu_count() or 1

    def values(self, key: str, choices: Iterable[Any]) -> list[Any]:
        """``choices`` of a key of the plan; of them only the pin where there is one."""
        if key not in self.pins:
            return list(choices)
        return [choice for choice in choices if choice == self.pins[key]]

    def plan(self, **chosen: Any) -> PlanSpec:
        """A plan of what is chosen and pinned, the rest by default."""
        return PlanSpec(**{**self.pins, **chosen})

    def work(self, plan: PlanSpec) -> Workload:
        """The plan on as many of the machines as it needs."""
        training = self.run.training
        return Workload(
            model=self.model,
            plan=plan,
            cluster=self.machines(plan.num_ranks),
            sequence_length=training.sequence_length,
            global_batch_size=training.global_batch_size,
            stack=self.stack,
            freeze=training.freeze,
        )

    def machines(self, ranks: int) -> ClusterSpec:
        """As much of the cluster as ``ranks`` ranks need, in whole nodes beyond the first."""
        return resized(self.cluster, ranks)

    def pinned(self, **pins: Any) -> Request:
        """The same question with further pins."""
        return replace(self, pins={**self.pins, **pins})


def resized(cluster: ClusterSpec, devices: int) -> ClusterSpec:
    """``cluster`` with another number of devices: a part of a node, or whole nodes (rounded up).

    A name that tells the number of devices is rewritten.

    >>> from stretto.spec.presets_cluster import cluster_preset
    >>> part = resized(cluster_preset("h100:512"), 16)
    >>> part.name, part.num_nodes, part.devices_per_node
    ('h100:16', 2, 8)
    """
    if devices == cluster.num_nodes * cluster.devices_per_node:
        return cluster
    preset, colon, _ = cluster.name.partition(":")
    per_node = cluster.devices_per_node
    if preset == "local-cpu" or devices <= per_node:
        nodes, per_node = 1, devices
    else:
        nodes = -(-devices // per_node)
    name = f"{preset}:{nodes * per_node}" if colon else cluster.name
    return replace(cluster, name=name, num_nodes=nodes, devices_per_node=per_node)
