"""Peak memory of every pipeline rank, by kind.

What autograd keeps of one llama layer per token, in bytes with 16-bit activations (h width, q and k/v widths,
f feed-forward width; Korthikanti et al. 2022, arXiv 2205.05198, section 4, does this count for GPT):

    norm, twice      fused: input 2h and output 2h; unfused: float32 input 4h, normalised 2h, output 2h
    attention        q 2q, k and v 4kv, output 2q, all over tp
    scores           over tp, per head and key: softmax 2, dropout mask 1 and output 2, as in that paper; unfused
                     also the float32 softmax 4
    feed-forward     gate, up, silu(gate) and their product 8f (gpt2: before and after GELU 4f), over tp
    dropout          1h per mask, two masks, where there is dropout

Norms and residuals are split over tp only under sequence parallelism.  Full recompute keeps the layer's input
(2h) and one whole layer that is being recomputed; selective recompute drops the scores.

The last stage adds the logits of one micro-batch: product 2, float32 copy 4, softmax or gradient 4, 16-bit
gradient 2.  Where they aren't sharded over tp, gathering adds the pieces and their concatenation, and the same
for the gradient: 2 each.  A rank's activations in flight come from the schedule (``in_flight``), rank by rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from stretto.planner.in_flight import in_flight
from stretto.planner.stack import KernelStack
from stretto.planner.workload import Workload
from stretto.schedule.families import FAMILIES
from stretto.spec.errors import UnsupportedError
from stretto.spec.model import ModelSpec

SCORE_BYTES = {"unfused": 9.0, "fused": 5.0, "flash-1": 0.0, "flash-2": 0.0}
"""Bytes kept per head, query and key."""
LOOPED = ("gpipe", "breadth-first", "1f1b", "interleaved", "group-interleaved", "zb-h1", "zb-h2", "zb-auto")
"""Families that put stage s on rank s mod R, once: embedding on the first rank, head on the last."""
GATHERED_LAYERS = 2
"""Whole layers that ZeRO-3 holds: the one at work and the one that is being gathered."""
LOGIT_BYTES = 12.0
"""Bytes per token and vocabulary entry while the loss is computed and differentiated."""
GATHER_BYTES = 8.0
"""What gathering logits over tp adds to that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin:
    """What no tensor that is counted here accounts for."""

    context_bytes: float = 2e9
    """CUDA context, libraries' workspaces and the communicators' buffers; assumed, published runs don't tell it."""
    fragmentation: float = 0.34
    """Lost between the allocator's blocks or held by passing tensors, as a share of activations and logits; what
    ``benchmarks/planner_truth.py`` finds on 201 published runs of a 13B model that did or didn't fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Peak bytes of one pipeline rank, by kind."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    reserve: float
    """Context, communicators and fragmentation."""

    @property
    def total(self) -> float:
        """Peak bytes."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.logits + self.reserve


def memory(work: Workload, margin: Margin | None = None) -> tuple[RankMemory, ...]:
    """Peak memory of each pipeline rank, first to last.

    UnsupportedError for offload and for a schedule that folds the stages or holds them twice, ScheduleError for an
    unknown one or a shape that it can't have.
    """
    plan = work.plan
    if plan.offload:
        raise UnsupportedError("Memory under plan.offload isn't estimated yet; estimate the plan without it.")
    if plan.schedule in FAMILIES and plan.schedule not in LOOPED:
        raise UnsupportedError(
            f"Memory under schedule {plan.schedule!r} isn't estimated yet, because its stages don't lie in a loop over "
            f"the ranks; it is for {', '.join(LOOPED)}."
        )
    flying = in_flight(plan.schedule, ranks=plan.pp, microbatches=work.num_microbatches, chunks=plan.chunks)
    return tuple(_rank(work, rank, flying[rank], margin or Margin()) for rank in range(plan.pp))


def fits(work: Workload, margin: Margin | None = None) -> bool:
    """Whether every rank stays within its device."""
    return max(rank.total for rank in memory(work, margin)) <= work.cluster.memory_bytes


def layer_activation_bytes(work: Workload, *, recompute: str | None = None) -> float:
    """What one layer keeps of one micro-batch on one rank; ``recompute`` None: the plan's."""
    recompute = recompute or work.plan.recompute
    model, stack, tp = work.model, work.stack, work.plan.tp
    lengthwise = tp if stack.sequence_parallel else 1
    if recompute == "full":
        return work.tokens * 2 * model.hidden_size / lengthwise
    per_token = _whole(model, stack) / lengthwise + _split(model) / tp
    if recompute == "none":
        per_token += SCORE_BYTES[stack.attention] * model.num_heads * work.sequence_length / tp
    return work.tokens * per_token


def logits_bytes(work: Workload) -> float:
    """Logits of one micro-batch and what the loss makes of them."""
    tp, logits = work.plan.tp, work.tokens * work.model.vocab_size
    if work.stack.sharded_logits:
        return LOGIT_BYTES * logits / tp
    return (LOGIT_BYTES + (GATHER_BYTES if tp > 1 else 0)) * logits


def _whole(model: ModelSpec, stack: KernelStack) -> float:
    """Bytes per token of a layer that only sequence parallelism splits."""
    norm = 4 if stack.fused_norm else 8
    return (2 * norm + (2 if model.dropout else 0)) * model.hidden_size


def _split(model: ModelSpec) -> float:
    """Bytes per token of a layer that tp splits, without scores."""
    queries, keys = model.num_heads * model.head_size, model.kv_heads * model.head_size
    feed_forward = (4 if model.family == "gpt2" else 8) * model.intermediate_size
    return 4 * queries + 4 * keys + feed_forward


def _rank(work: Workload, rank: int, flying: float, margin: Margin) -> RankMemory:
    plan, stack = work.plan, work.stack
    held = work.parameters_of_rank(rank)
    activations = flying * work.layers_of_rank(rank) * layer_activation_bytes(work)
    if plan.recompute != "none":
        activations += layer_activation_bytes(work, recompute="none")
    logits = logits_bytes(work) if rank == plan.pp - 1 else 0.0
    whole = held
    if plan.zero >= 3:
        whole = held / plan.dp_shard + GATHERED_LAYERS * held / work.layers_of_rank(rank)
    return RankMemory(
        parameters=min(whole, held) * stack.parameter_bytes,
        gradients=held * stack.gradient_bytes / (plan.dp_shard if plan.zero >= 2 else 1),
        optimizer=held * stack.optimizer_bytes / plan.dp_shard,
        activations=activations,
        logits=logits,
        reserve=margin.context_bytes + margin.fragmentation * (activations + logits),
    )
