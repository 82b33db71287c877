"""What an estimate is asked about: model, plan, machines, kernels, and how much data a step holds.

Frozen and hashable, so that figures which many estimates share can be kept.  Ranks lie as in the mesh: tp
innermost, then cp, then data, pp outermost.  A group's neighbours are therefore ``stride`` ranks apart, and
``devices_per_node / stride`` of them (if that is more than one) share a node.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate

from stretto.planner.flops import parameters
from stretto.planner.frozen import trained
from stretto.planner.profile import Profile, profile
from stretto.planner.stack import KernelStack
from stretto.schedule.passes.hand_over import times_of
from stretto.spec.cluster import ClusterSpec
from stretto.spec.errors import ConfigError
from stretto.spec.front import FILL, fills, layers_ahead, timed
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.stages import balanced
from stretto.spec.states import StateSharding, of_plan

LOOPED = (
    "gpipe", "breadth-first", "modular", "1f1b", "interleaved", "group-interleaved", "zb-h1", "zb-h2", "zb-auto",
    "zeropp",
)  # fmt: skip
"""Families that put stage s on rank s mod R, once: embedding on the first rank, head on the last."""


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
    sharding: StateSharding | None = None
    """Over how many data ranks each kind of state is divided; None: as the plan says."""
    freeze: tuple[str, ...] = ()
    """Parameters that don't train, by patterns of their names (``training.freeze``)."""

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
        return self.plan.stages or balanced(self.model.num_layers - self.ahead, self.plan.num_stages)

    @property
    def ahead(self) -> int:
        """Layers in front of the pipeline, that its ranks compute a step ahead (spec/front.py)."""
        return layers_ahead(self.plan, self.freeze, self.model.num_layers)

    @property
    def passes(self) -> tuple[str, ...]:
        """The plan's passes; where layers are computed ahead, with what each of them is taken to cost."""
        if not fills(self.plan):
            return self.plan.passes
        times = times_of(self.ahead, share=sum(self.layers) / self.plan.pp)
        return tuple(timed(text, times) if text.partition(":")[0] == FILL else text for text in self.plan.passes)

    @property
    def profile(self) -> Profile:
        """Counts of the plan's pipeline schedule, remembered; ScheduleError for one that can't be."""
        return profile(self.plan, self.num_microbatches)

    @property
    def vocabulary(self) -> bool:
        """Whether the pipeline ranks share the vocabulary among them."""
        return vocabulary(self.plan)

    @property
    def num_replicas(self) -> int:
        """Copies of the model that flow through one pipeline; two in a bidirectional one."""
        return 1 if self._looped else len(self.profile.placement)

    @property
    def states(self) -> StateSharding:
        """Over how many data ranks each kind of state is divided."""
        return self.sharding or of_plan(self.plan)

    def stages_of_rank(self, rank: int) -> tuple[int, ...]:
        """Stages that a pipeline rank holds; of a bidirectional pipeline those of both replicas."""
        return self.shares[rank].stages

    def layers_of_rank(self, rank: int) -> int:
        """Layers of all stages of a pipeline rank."""
        return self.shares[rank].layers

    def parameters_of_rank(self, rank: int) -> float:
        """Parameters that a pipeline rank holds, divided over tp, before ZeRO divides them further."""
        return self.shares[rank].parameters

    @property
    def shares(self) -> tuple[Share, ...]:
        """What each pipeline rank holds of the model, remembered."""
        return _shares(self.model, self.plan, self.num_microbatches, self.freeze)

    @property
    def largest_share(self) -> float:
        """Parameters of the rank that holds most."""
        return max(share.parameters for share in self.shares)

    @property
    def largest_trained(self) -> float:
        """Parameters that train, of the rank that has most of them."""
        return max(share.trained for share in self.shares)

    @property
    def backward_layers(self) -> tuple[int, ...]:
        """Layers of each stage that have a backward pass; those before anything trains have none."""
        return _backward(self.model, (self.ahead, *self.layers), self.freeze)[0][1:]

    @property
    def weight_layers(self) -> tuple[float, ...]:
        """Layers of each stage by the share of their weights that trains."""
        return _backward(self.model, (self.ahead, *self.layers), self.freeze)[1][1:]

    @property
    def _looped(self) -> bool:
        return looped(self.plan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a pipeline rank holds of the model; of a bidirectional pipeline in both replicas."""

    stages: tuple[int, ...]
    layers: int
    parameters: float
    trained: float
    """Of the parameters, those that have gradients."""


def looped(plan: PlanSpec) -> bool:
    """Whether stage s lies on rank s mod pp."""
    return plan.schedule_file is None and plan.schedule in LOOPED


def vocabulary(plan: PlanSpec) -> bool:
    """Whether the pipeline ranks share the vocabulary among them (``plan.passes`` with ``vocabulary``)."""
    return any(text.partition(":")[0] == "vocabulary" for text in plan.passes)


@lru_cache(maxsize=4096)
def _shares(model: ModelSpec, plan: PlanSpec, microbatches: int, freeze: tuple[str, ...]) -> tuple[Share, ...]:
    """The first stage also has the embedding, the last the head, unless all ranks share the vocabulary.

    Layers that are computed ahead lie on every rank, with the embedding.

    A tied head is a second copy where the pipeline puts it on another rank.
    """
    front = layers_ahead(plan, freeze, model.num_layers)
    counts, layers = parameters(model), plan.stages or balanced(model.num_layers - front, plan.num_stages)
    ranks, last, replicas = range(plan.pp), len(layers) - 1, 1
    if looped(plan):
        held = [tuple(range(rank, len(layers), plan.pp)) for rank in ranks]
    else:
        counted = profile(plan, microbatches)
        held = [tuple(stage for _, stage in counted.held[rank]) for rank in ranks]
        replicas = len(counted.placement)
    layer = (counts.layer_matrices / plan.tp + counts.layer_vectors) / model.num_layers
    found = []
    for stages in held:
        number, firsts, lasts = sum(layers[stage] for stage in stages), stages.count(0), stages.count(last)
        total = layer * number + counts.final_norm * lasts
        if vocabulary(plan):
            total += replicas * (counts.embedding + counts.head) / plan.tp / plan.pp
        else:
            embeddings = 1 if fills(plan) else firsts
            heads = max(0, lasts - embeddings) if counts.tied else lasts
            total += (counts.embedding * embeddings + counts.head * heads) / plan.tp + layer * front
        share = Share(stages=stages, layers=number, parameters=total, trained=total)
        if freeze:
            share = replace(share, trained=_trained_of(model, plan, share, layers, freeze, replicas))
        found.append(share)
    return tuple(found)


def _trained_of(
    model: ModelSpec, plan: PlanSpec, share: Share, layers: tuple[int, ...], freeze: tuple[str, ...], replicas: int
) -> float:
    """Parameters of a rank that train."""
    front = layers_ahead(plan, freeze, model.num_layers)
    left, before = trained(model, freeze), [*accumulate(layers, initial=front)]
    held = [layer for stage in share.stages for layer in range(before[stage], before[stage + 1])]
    firsts, lasts = share.stages.count(0), share.stages.count(len(layers) - 1)
    total = sum(left.matrices[layer] / plan.tp + left.vectors[layer] for layer in held) + left.final_norm * lasts
    if vocabulary(plan):
        return total + replicas * (left.embedding + left.head) / plan.tp / plan.pp
    heads = max(0, lasts - firsts) if model.tied_embeddings else lasts
    return total + (left.embedding * firsts + left.head * heads) / plan.tp


@lru_cache(maxsize=4096)
def _backward(
    model: ModelSpec, layers: tuple[int, ...], freeze: tuple[str, ...]
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Layers of each stage with a backward pass, and by how much of their weights train."""
    if not freeze:
        return layers, tuple(map(float, layers))
    left, alive, shares = trained(model, freeze), [], []
    one = parameters(model).layer_matrices / model.num_layers
    at = 0
    for number in layers:
        of = range(at, at + number)
        alive.append(sum(layer >= left.first for layer in of))
        shares.append(sum(left.matrices[layer] for layer in of) / one)
        at += number
    return tuple(alive), tuple(shares)
