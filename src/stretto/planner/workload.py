"""What an estimate is asked about: model, plan, machines, kernels, and how much data a step holds.

Frozen and hashable, so that figures which many estimates share can be kept.  Ranks lie as in the mesh: tp
innermost, then cp, then data, pp outermost.  A group's neighbours are therefore ``stride`` ranks apart, and
``devices_per_node / stride`` of them (if that is more than one) share a node.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stretto.planner.flops import parameters
from stretto.planner.stack import KernelStack
from stretto.spec.cluster import ClusterSpec
from stretto.spec.errors import ConfigError
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.stages import balanced


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One step of training.  ConfigError where the plan doesn't divide the batch."""

    model: ModelSpec
    plan: PlanSpec
    cluster: ClusterSpec
    sequence_length: int
    """Tokens of a sequence."""
    global_batch_size: int
    """Sequences of a step, over all ranks."""
    stack: KernelStack = field(default_factory=KernelStack)

    def __post_init__(self) -> None:
        """Refuse a batch that the plan doesn't divide."""
        share = self.plan.dp * self.plan.micro_batch_size
        if self.global_batch_size % share:
            raise ConfigError(
                f"A global batch of {self.global_batch_size} sequences can't be divided over dp={self.plan.dp} x "
                f"micro-batches of {self.plan.micro_batch_size}; it must be a multiple of {share}."
            )

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of a step through one pipeline."""
        return self.global_batch_size // (self.plan.dp * self.plan.micro_batch_size)

    @property
    def tokens(self) -> float:
        """Tokens of a micro-batch on one rank, before tp divides what it can."""
        return self.plan.micro_batch_size * self.sequence_length / self.plan.cp

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of each stage, in order."""
        return self.plan.stages or balanced(self.model.num_layers, self.plan.num_stages)

    def layers_of_rank(self, rank: int) -> int:
        """Layers of all stages of a pipeline rank; stage s is on rank s mod pp."""
        return sum(self.layers[rank :: self.plan.pp])

    def parameters_of_rank(self, rank: int) -> float:
        """Parameters that a pipeline rank holds, divided over tp, before ZeRO divides them further.

        The first rank also has the embedding, the last the head.  A tied head is a second copy where the
        pipeline puts it on another rank.
        """
        counts, plan = parameters(self.model), self.plan
        layer = (counts.layer_matrices / plan.tp + counts.layer_vectors) / self.model.num_layers
        total = layer * self.layers_of_rank(rank)
        if rank == 0:
            total += counts.embedding / plan.tp
        if rank == plan.pp - 1:
            total += counts.final_norm
            if not (counts.tied and plan.pp == 1):
                total += counts.head / plan.tp
        return total
