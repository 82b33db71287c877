"""A whole run: everything that one TOML file says."""

from __future__ import annotations

from dataclasses import dataclass, field

from stretto.spec.checkpoint import CheckpointSpec
from stretto.spec.cluster import ClusterSpec
from stretto.spec.data import DataSpec
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.training import TrainingSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """Where the run lives and how its processes are watched."""

    dir: str = "runs/default"
    """Everything of the run goes here; relative to the working directory."""
    seed: int = 0
    """Decides initial weights, data order and dropout."""
    device: str = "auto"
    """``cpu``, ``cuda``, or auto: cuda where there is one."""
    silent_seconds: float = 45.0
    """A rank whose heartbeat stops for so long ends the run."""
    hang_seconds: float = 600.0
    """No operation finished anywhere for so long ends the run."""
    max_restarts: int = 0
    """How often local processes are started again from the last checkpoint after a rank died."""
    tensorboard: bool = False
    """Also write TensorBoard events to ``tensorboard`` in the run's directory."""
    trace: str = "last"
    """Steps of which every operation is recorded for ``stretto diagnose``: ``last`` (the last 8 that were made),
    ``off``, or steps such as ``5,10-12``."""
    refuse_unfit: bool = True
    """Refuse, before any process starts, a plan that the planner finds not to fit the devices' memory."""
    drill: str = ""
    """A fault to suffer, such as ``freeze rank 1 step 2 at B``, to see how the run ends; see docs/hangs.md#drills."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """One run: ``[run] [model] [cluster] [plan] [training] [data] [checkpoint]``."""

    run: RunSettings = field(default_factory=RunSettings)
    """Directory, seed, watching."""
    model: ModelSpec = field(default_factory=ModelSpec)
    """The model."""
    cluster: ClusterSpec = field(default_factory=ClusterSpec)
    """The machines."""
    plan: PlanSpec = field(default_factory=PlanSpec)
    """The layout."""
    training: TrainingSpec = field(default_factory=TrainingSpec)
    """The optimisation."""
    data: DataSpec = field(default_factory=DataSpec)
    """The corpus."""
    checkpoint: CheckpointSpec = field(default_factory=CheckpointSpec)
    """Saving and resuming."""

    @property
    def num_microbatches(self) -> int:
        """Micro-batches that each data-parallel rank runs per step."""
        return self.training.global_batch_size // (self.plan.dp * self.plan.micro_batch_size)
