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
for the gradient: 2 each.  With vocabulary passes every rank has what S and T keep instead (``profile.waiting``).
A rank's activations in flight come from the schedule (``in_flight``), rank by rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from stretto.planner import video
from stretto.planner.blockwise import brought_bytes, cut_by_us, kept_bytes, temporary_bytes
from stretto.planner.groups import limits
from stretto.planner.in_flight import CLOSED_FORMS, in_flight
from stretto.planner.linear_layers import kept as kept_of_token
from stretto.planner.linear_layers import mean, most, of_stages
from stretto.planner.stack import KernelStack
from stretto.planner.uncertainty import MEMORY
from stretto.planner.workload import Share, Workload
from stretto.spec.front import fills
from stretto.spec.model import ModelSpec

SCORE_BYTES = {"unfused": 9.0, "fused": 5.0, "flash-1": 0.0, "flash-2": 0.0, "flash-3": 0.0}
"""Bytes kept per head, query and key."""
TEMPORARY = 0.5
"""Of one layer's activations, their gradients that are alive at once: each is let go when its own input's is made."""
INPUT_BYTES = 4
"""Of the inputs of attention and feed-forward, 2 bytes each, which sequence parallelism divides or keeps whole."""
TABLE_BYTES = 2.0
"""Per token and vocabulary entry of a shard that S keeps until T, under vocabulary parallelism."""
SCORING_BYTES = 6.0
"""What S takes besides while it runs: a float32 copy, and the exponentials in 16 bits for a product."""
GATHERED_LAYERS = 2
"""Whole layers that ZeRO-3 holds: the one at work and the one that is being gathered."""
REDUCED_LAYERS = 3
"""Layers whose whole gradients are alive where each backward pass is reduced: one that is filled, two on their way."""
LOGIT_BYTES = 12.0
"""Bytes per token and vocabulary entry while the loss is computed and differentiated."""
GATHER_BYTES = 8.0
"""What gathering logits over tp adds to that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin:
    """What no tensor that is counted here accounts for."""

    context_bytes: float = 1e9
    """CUDA context, libraries' workspaces and the communicators' buffers; assumed, published runs don't tell it."""
    fragmentation: float = 0.3
    """Lost between the allocator's blocks, as a share of activations and logits, which come and go; what
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
    temporaries: float = 0.0
    """Gradients of activations inside the layer that is in its backward pass."""

    @property
    def total(self) -> float:
        """Peak bytes."""
        states = self.parameters + self.gradients + self.optimizer
        return states + self.activations + self.logits + self.temporaries + self.reserve

    @property
    def expected_error(self) -> float:
        """Of ``total``, relative."""
        return MEMORY


def memory(work: Workload, margin: Margin | None = None) -> tuple[RankMemory, ...]:
    """Peak memory of each pipeline rank, first to last; ScheduleError for an unknown schedule or one that can't be."""
    margin, plan = margin or Margin(), work.plan
    if work.cluster.name.partition(":")[0] == "local-cpu" and not work.vocabulary:
        from stretto.planner.tracked import tracked

        return tracked(work)
    closed = plan.schedule in CLOSED_FORMS and plan.schedule_file is None and not (plan.passes or plan.offload)
    kept: list[float] = []
    of = of_stages(work, layer_activation_bytes, work.backward_layers)
    if closed:
        flying = in_flight(plan.schedule, ranks=plan.pp, microbatches=work.num_microbatches, chunks=plan.chunks)
        held = [sum(of[stage] for stage in share.stages) for share in work.shares]
        kept += [number * num_bytes for number, num_bytes in zip(flying, held, strict=True)]
    else:
        kept += [max(sum(n * of[stage] for stage, n in moment) for moment in rank) for rank in work.profile.alive]
    whole, logits = most(work, lambda one: layer_activation_bytes(one, recompute="none")), logits_bytes(work)
    again = whole if plan.recompute != "none" else 0.0
    passing = TEMPORARY * whole + (temporary_bytes(work) if cut_by_us(work) else 0.0)
    last = len(work.layers) - 1
    found = []
    for rank, (alive, share) in enumerate(zip(kept, work.shares, strict=True)):
        of_head = scored_bytes(work, rank) if work.vocabulary else logits if last in share.stages else 0.0
        alive += again + waiting_bytes(work, rank)
        found.append(_rank(work, share, margin, alive=alive, logits=of_head, passing=passing))
    return tuple(found)


def waiting_bytes(work: Workload, rank: int) -> float:
    """First inputs that wait on a pipeline rank for the next step, where a frozen front is computed ahead.

    At the fullest moment of a rank's activations some are used already, and those of the next step are not there yet;
    so this is at most what waits then.
    """
    if not fills(work.plan):
        return 0.0
    counts = work.profile
    number = sum(counts.voices[voice] for voice, holders in enumerate(counts.placement) if holders[0] == rank)
    return number * work.tokens * work.model.hidden_size * work.stack.parameter_bytes / work.plan.tp


def optimizer_bytes(work: Workload, share: Share) -> float:
    """Masters and moments of a pipeline rank, and their copies where an update may have to be taken back.

    A parameter that doesn't train has a master, but no moments and no copies (``trainer.rollback``).
    """
    stack = work.stack
    kept = stack.master_bytes * share.parameters + (stack.optimizer_bytes - stack.master_bytes) * share.trained
    if work.plan.pp > 1 and not work.plan.optimizer_barrier:
        updated = stack.master_bytes or stack.parameter_bytes
        kept += (stack.optimizer_bytes - stack.master_bytes + updated) * share.trained
    return kept / work.states.optimizer


def fits(work: Workload, margin: Margin | None = None) -> bool:
    """Whether every rank stays within its device."""
    return all(rank.total <= limit for rank, limit in zip(memory(work, margin), limits(work), strict=True))


def layer_activation_bytes(work: Workload, *, recompute: str | None = None) -> float:
    """What one layer keeps of one micro-batch on one rank; on average, where they differ.

    ``recompute`` None: the plan's.
    """
    if len(set(work.model.attention)) > 1:
        return mean(work, lambda one: layer_activation_bytes(one, recompute=recompute))
    recompute = recompute or work.plan.recompute
    if work.model.video is not None:
        return 2 * video.layer_elements(work, recompute=recompute)
    model, stack, tp = work.model, work.stack, work.plan.tp
    lengthwise = tp if stack.sequence_parallel else 1
    if recompute == "full":
        inputs = work.tokens * 2 * model.hidden_size / lengthwise
        return inputs + (kept_bytes(work) if cut_by_us(work) and not model.keeps_states else 0.0)
    kept = 0 if stack.gathers_again else INPUT_BYTES * model.hidden_size
    per_token = (_whole(model, stack) - kept) / lengthwise + kept + _split(model) / tp
    if model.keeps_states:
        found = kept_of_token(work, recompute=recompute)
        return work.tokens * (per_token + 2 * found.own + 4 * found.sums)
    if recompute == "none":
        per_token += SCORE_BYTES[stack.attention] * model.num_heads * work.sequence_length / tp
    return work.tokens * per_token + brought_bytes(work)


def logits_bytes(work: Workload) -> float:
    """Logits of one micro-batch and what the loss makes of them."""
    tp, logits = work.plan.tp, work.tokens * work.model.num_outputs
    if work.stack.sharded_logits:
        return LOGIT_BYTES * logits / tp
    return (LOGIT_BYTES + (GATHER_BYTES if tp > 1 else 0)) * logits


def scored_bytes(work: Workload, rank: int) -> float:
    """What vocabulary passes keep on a rank: tables, outputs and embeddings, and what S takes while it runs."""
    tables, outputs, embeddings = work.profile.waiting[rank]
    tp, width = work.plan.tp, 2 * work.tokens * work.model.hidden_size
    shard = work.tokens * work.model.vocab_size / (work.plan.pp * tp)
    return (TABLE_BYTES * tables + SCORING_BYTES) * shard + width * (outputs + embeddings / tp)


def _whole(model: ModelSpec, stack: KernelStack) -> float:
    """Bytes per token of a layer that only sequence parallelism splits."""
    norm = 4 if stack.fused_norm else 8
    return (2 * norm + (2 if model.dropout else 0)) * model.hidden_size


def _split(model: ModelSpec) -> float:
    """Bytes per token of a layer that tp splits, without scores."""
    queries, keys = model.num_heads * model.head_size, model.kv_heads * model.head_size
    feed_forward = (4 if model.family == "gpt2" else 8) * model.intermediate_size
    return (0 if model.keeps_states else 4 * queries + 4 * keys) + feed_forward


def _rank(work: Workload, share: Share, margin: Margin, *, alive: float, logits: float, passing: float) -> RankMemory:
    """One rank: bytes of activations, of logits, and of gradients that pass."""
    stack, states, held, trains = work.stack, work.states, share.parameters, share.trained
    whole = held
    if states.parameters > 1:
        whole = held / states.parameters + GATHERED_LAYERS * held / share.layers
    gradients = trains / states.gradients
    if stack.reduces_each and states.gradients > 1:
        gradients += min(REDUCED_LAYERS, share.layers) * trains / share.layers
    return RankMemory(
        parameters=min(whole, held) * stack.parameter_bytes,
        gradients=gradients * stack.gradient_bytes,
        optimizer=optimizer_bytes(work, share),
        activations=alive,
        logits=logits,
        reserve=margin.context_bytes + margin.fragmentation * (alive + logits),
        temporaries=passing,
    )
