"""What a run of Stretto keeps on a CPU, tensor by tensor: what ``memory_bytes`` of its metrics will say.

There nothing counts allocations, so ``trainer.memory`` counts tensors: states as they lie, and what autograd saves.
No margin, no temporaries.  Of a layer and a token of one micro-batch, in elements (h width, q and kv widths of
queries and of keys, f of the feed-forward, H heads, T tokens of a sequence):

    norms          input and one number per token, twice          2 (h + 1), over tp
    products       their inputs: normed, gathered over tp         2 h
    attention      q, k, v, output, one number per head           (2 q + 2 kv + H) over tp
    mask           of packed documents, one for all heads         T
    feed-forward   gate, silu(gate), up, their product            4 f over tp (gpt2: 2 f)

A stage's micro-batch keeps rotary tables besides, 2 per channel of a head; the last one the norm's input and output and
the log-probabilities.  With split backwards the inputs of products and their gradients stay from I to W; that is within
what the activations were.
"""

from __future__ import annotations

from stretto.planner import video
from stretto.planner.blockwise import brought_bytes
from stretto.planner.communication import ACTIVATION_BYTES
from stretto.planner.linear_layers import kept, mean, most, of_stages
from stretto.planner.measured_step import schedule_of
from stretto.planner.memory import RankMemory, optimizer_bytes, waiting_bytes
from stretto.planner.workload import Workload
from stretto.schedule.op import Kind

SUM_BYTES = 4
"""Of a number of a state, and of what makes one: float32 at least."""
SCORE_BYTES = 4
"""Of a log-probability: float32 at least."""


def tracked(work: Workload, *, packed: bool = True) -> tuple[RankMemory, ...]:
    """Peak of the tracked tensors of each pipeline rank, by kind; ScheduleError for a schedule that can't be.

    ``packed``: sequences hold several documents, so that attention has a mask.
    """
    return tuple(_rank(work, rank, packed) for rank in range(work.plan.pp))


def layer_elements(work: Workload, *, packed: bool, recompute: str | None = None) -> float:
    """What one layer keeps of one micro-batch; on average, where they differ."""
    if len(set(work.model.attention)) > 1:
        return mean(work, lambda one: layer_elements(one, packed=packed, recompute=recompute))
    model, tp = work.model, work.plan.tp
    recompute = recompute or work.plan.recompute
    if model.video is not None:
        return video.layer_elements(work, recompute=recompute)
    if recompute == "full":
        return work.tokens * model.hidden_size / tp
    queries, keys = model.num_heads * model.head_size, model.kv_heads * model.head_size
    ups = 2 if model.family == "gpt2" else 4
    inside = (2 * queries + 2 * keys + model.num_heads) / tp + (work.sequence_length if packed else 0)
    if recompute == "selective":
        inside = (2 * queries + 2 * keys) / tp
    if model.keeps_states:
        found = kept(work, recompute=recompute)
        inside = found.own + found.sums * max(SUM_BYTES / work.stack.parameter_bytes, 1.0)
    outside = 2 * (model.hidden_size + 1) / tp + 2 * model.hidden_size
    brought = 0.0 if model.keeps_states else brought_bytes(work) / ACTIVATION_BYTES
    return work.tokens * (outside + inside + ups * model.intermediate_size / tp) + brought


def _rank(work: Workload, rank: int, packed: bool) -> RankMemory:
    stack, states, share = work.stack, work.states, work.shares[rank]
    gradients = share.trained * stack.gradient_bytes / states.gradients
    if states.optimizer > states.gradients:  # let go when they are reduced, beside the shard they go to
        gradients += share.trained * stack.gradient_bytes / states.optimizer
    moments = work.profile.alive[rank]
    kept = max(_moment(work, moment, packed) for moment in moments)
    last = len(work.layers) - 1 in work.stages_of_rank(rank)
    loss = _loss_bytes(work) * _waiting_losses(work, rank) if last else 0.0
    if work.plan.recompute != "none":  # one whole layer, when the loss is let go already
        whole = most(work, lambda one: layer_elements(one, packed=packed, recompute="none"))
        whole -= layer_elements(work, packed=packed)
        kept += max(0.0, whole * stack.parameter_bytes - loss)
    return RankMemory(
        parameters=share.parameters * stack.parameter_bytes / states.parameters,
        gradients=gradients,
        optimizer=optimizer_bytes(work, share),
        activations=kept + waiting_bytes(work, rank),
        logits=loss,
        reserve=0.0,
    )


def share_bytes(work: Workload, rank: int, *, packed: bool = True) -> float:
    """What a micro-batch keeps alive over all stages of a pipeline rank."""
    return _moment(work, tuple((stage, 1) for stage in work.stages_of_rank(rank)), packed)


def _moment(work: Workload, moment: tuple[tuple[int, int], ...], packed: bool) -> float:
    """Bytes of what is alive at once: so many micro-batches of each stage."""
    of, spared = of_stages(work, lambda one: layer_elements(one, packed=packed), work.backward_layers), _spared(work)
    turned = work.model.family == "llama" and "softmax" in work.model.attention
    tables = 2 * work.model.head_size * work.tokens if turned else 0
    kept = 0.0
    for stage, count in moment:
        layers = work.backward_layers[stage]
        elements = of[stage] - max(0.0, layers - work.weight_layers[stage]) * spared
        kept += count * work.stack.parameter_bytes * (elements + (tables if layers else 0))
    return kept


def _spared(work: Workload) -> float:
    """What a layer behind trained ones doesn't keep where its weights don't train: the inputs of their products.

    Those that the norms and the feed-forward make for products alone; full recompute keeps none of them anyway.
    """
    if work.plan.recompute == "full":
        return 0.0
    return work.tokens * (2 * work.model.hidden_size + work.model.intermediate_size / work.plan.tp)


def _waiting_losses(work: Workload, rank: int) -> int:
    """Micro-batches at most whose loss waits for its backward; what W waits for keeps no loss."""
    schedule, last = schedule_of(work), len(work.layers) - 1
    now = most = 0
    for op in schedule.ops(rank):
        if op.stage == last:
            now += (op.kind is Kind.F) - (op.kind in (Kind.B, Kind.I))
            most = max(most, now)
    return most


def _loss_bytes(work: Workload) -> float:
    model, tokens = work.model, work.tokens
    width = max(SCORE_BYTES, work.stack.parameter_bytes)
    return tokens * (model.num_outputs / work.plan.tp * width + 2 * model.hidden_size * work.stack.parameter_bytes)
