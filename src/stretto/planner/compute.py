"""Time of the arithmetic of one layer, and of the head, for one micro-batch on one rank.

Three kinds of work, each over its own rate, and a latency for each kernel however small it is:

    matrix products   2 operations per weight and token forward, 4 backward, in whole  matmul rate
                      waves of tiles (``matmul``)
    attention         flash: half of the T x T products, at the kernel's own rate;
                      otherwise all of them at the matmul rate                         flash or matmul rate
    moving data       norms, rotary, activation, residuals, scores, logits: bytes read
                      and written by each kernel, counted below                        memory rate

Bytes per element, forward + backward, each kernel reading its inputs and writing its outputs in 16 bit unless said
otherwise.  Written out for the unfused norm forward: to float32 2+4, square 4+4, mean 4, scale 4+4+4, to 16 bit 4+2,
times weight 2+2.
"""

from __future__ import annotations

from dataclasses import dataclass

from stretto.planner import video
from stretto.planner.blockwise import blockwise_seconds, cut_by_tiles, cut_by_us
from stretto.planner.calibration import Calibration
from stretto.planner.flops import BACKWARD, keys_per_query
from stretto.planner.linear_layers import gates, kernel_seconds, mean
from stretto.planner.matmul import processors_of, weight_operations
from stretto.planner.workload import Workload

FUSED_NORM = (4, 6)
"""Read and write; backward reads input and gradient, writes a gradient."""
UNFUSED_NORM = (40, 78)
"""As above; backward runs the chain in reverse with two operands per product."""
RESIDUAL = (6, 6)
"""Add, and the sum of two gradients where the stream forks."""
ROTARY = (20, 20)
"""Turn half 2+2, two products 4+4, one sum 6, of queries and keys; backward the same."""
GATED = (10, 18)
"""silu 4, product 6; backward two products 6 + 6, silu 6."""
GELU = (4, 6)
"""One kernel."""
SCORES = {"unfused": (32, 42), "fused": (12, 18)}
"""Unfused: written 2, scaled 4, masked 4, to float32 6, softmax 8, to 16 bit 6, read 2, and those in reverse; fused:
written 2, softmax 4, dropout 4, read 2."""
FUSED_NORM_KERNELS, UNFUSED_NORM_KERNELS = 1, 7
"""Of one norm: itself, or the chain above."""
ROTARY_KERNELS = 10
"""Of queries and keys: turn half (negate, concatenate), two products, one sum."""
GATED_KERNELS, GELU_KERNELS, RESIDUAL_KERNELS = 2, 1, 2
"""silu and product; gelu; two additions."""
ATTENTION_KERNELS = {"unfused": 10, "fused": 6, "flash-1": 3, "flash-2": 3, "flash-3": 3}
"""Two products, the steps over the scores as above, and two changes of layout."""
LOGITS = (22, 16)
"""Written 2, to float32 6, maximum 4, exponential 8, sum and pick 2; backward gradient 8, to 16 bit 6, read 2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """Seconds of a forward and of a backward pass."""

    forward: float
    backward: float
    weights: float = 0.0
    """Of ``backward``, what only the gradients of the weights need (W of a split backward)."""


def layer_seconds(work: Workload, calibration: Calibration) -> Passes:
    """One layer, without communication and recompute; on average, where they differ."""
    if len(set(work.model.attention)) > 1:
        return Passes(
            forward=mean(work, lambda one: layer_seconds(one, calibration).forward),
            backward=mean(work, lambda one: layer_seconds(one, calibration).backward),
            weights=mean(work, lambda one: layer_seconds(one, calibration).weights),
        )
    launched = kernels(work) * calibration.kernel_latency
    matmul, memory = rates(work, calibration)
    forward, backward = _products(work, weight_shapes(work))
    attention = attention_seconds(work, calibration)
    moved = moved_bytes(work)
    return Passes(
        forward=launched + forward / matmul + attention.forward + moved[0] / memory,
        backward=BACKWARD * (launched + backward / matmul) + attention.backward + moved[1] / memory,
        weights=launched + backward / matmul,
    )


def kernels(work: Workload) -> int:
    """Kernels of one layer's forward pass."""
    if work.model.video is not None:
        attention = video.ATTENTIONS * ATTENTION_KERNELS[work.stack.attention]
        return len(weight_shapes(work)) + video.KERNELS + attention
    stack, gpt2, softmax = work.stack, work.model.family == "gpt2", work.model.attention == ("softmax",)
    norms = 2 * (FUSED_NORM_KERNELS if stack.fused_norm else UNFUSED_NORM_KERNELS)
    others = GELU_KERNELS if gpt2 else GATED_KERNELS + (ROTARY_KERNELS if softmax else 0)
    # The chunked kernel of linear layers counts its own.
    attention = ATTENTION_KERNELS[stack.attention] if softmax else 0
    return len(weight_shapes(work)) + norms + others + RESIDUAL_KERNELS + attention


def recompute_seconds(work: Workload, calibration: Calibration) -> float:
    """What one layer computes twice: nothing, attention's scores and their use, or its whole forward pass."""
    if work.plan.recompute == "none":
        return 0.0
    if len(set(work.model.attention)) > 1:
        return mean(work, lambda one: recompute_seconds(one, calibration))
    if work.plan.recompute == "full":
        again = layer_seconds(work, calibration).forward
        # Attention that is cut over cp keeps its results (parallel/sequence/results).
        keeps = cut_by_us(work) and not work.model.keeps_states
        return again - (attention_seconds(work, calibration).forward if keeps else 0.0)
    if work.model.keeps_states:
        return attention_seconds(work, calibration).forward
    scores = SCORES.get(work.stack.attention, (0, 0))[0] * work.model.num_heads * work.sequence_length
    moved = work.tokens * scores / work.plan.tp
    return attention_seconds(work, calibration).forward + moved / rates(work, calibration)[1]


def head_seconds(work: Workload, calibration: Calibration) -> Passes:
    """Logits and loss; without sharding every tp rank works on all of the loss."""
    matmul, memory = rates(work, calibration)
    model, share = work.model, work.plan.tp
    forward, backward = _products(work, ((model.hidden_size, -(-model.num_outputs // share)),))
    logits = work.tokens * work.model.num_outputs / (work.plan.tp if work.stack.sharded_logits else 1) / memory
    return Passes(
        forward=forward / matmul + LOGITS[0] * logits,
        backward=BACKWARD * backward / matmul + LOGITS[1] * logits,
        weights=backward / matmul,
    )


def optimizer_seconds(work: Workload, calibration: Calibration, held: float | None = None) -> float:
    """The update of ``held`` parameters (None: the fullest rank's that train): states twice, gradient, weight."""
    stack = work.stack
    held = (work.largest_trained if held is None else held) / work.states.optimizer
    moved = 2 * stack.optimizer_bytes + stack.gradient_bytes + stack.parameter_bytes
    return held * moved / (work.cluster.memory_bytes_per_second * calibration.memory)


def weight_shapes(work: Workload) -> tuple[tuple[int, int], ...]:
    """Inputs and outputs of a layer's weights on one tp rank; queries, keys and values are one product."""
    if work.model.video is not None:
        return video.shapes(work.model)
    model, tp = work.model, work.plan.tp
    queries, keys = model.num_heads * model.head_size, model.kv_heads * model.head_size
    inner = -(-model.intermediate_size // tp)
    ups = 1 if model.family == "gpt2" else 2
    width, heads = model.hidden_size, -(-(queries + 2 * keys + gates(model)) // tp)
    return (width, heads), (-(-queries // tp), width), *(((width, inner),) * ups), (inner, width)


def _products(work: Workload, shapes: tuple[tuple[int, int], ...]) -> tuple[float, float]:
    """Operations of products forward, and half of those backward, unfilled waves counted."""
    tokens, processors = round(work.tokens), processors_of(work.cluster.name)
    passes = [weight_operations(tokens, inputs, outputs, processors) for inputs, outputs in shapes]
    return sum(one[0] for one in passes), sum(one[1] for one in passes)


def rates(work: Workload, calibration: Calibration) -> tuple[float, float]:
    """What matrix products reach in operations a second, and kernels that move data in bytes a second."""
    cluster = work.cluster
    return cluster.peak_flops_bfloat16 * calibration.matmul, cluster.memory_bytes_per_second * calibration.memory


def attention_seconds(work: Workload, calibration: Calibration) -> Passes:
    """The two products of attention; flash computes its scores once more in the backward pass.

    Of a layer that keeps a state: its chunked kernel.
    """
    if work.model.keeps_states:
        forward, backward = kernel_seconds(work, calibration)
        return Passes(forward=forward, backward=backward)
    if cut_by_tiles(work):
        forward, backward = blockwise_seconds(work, calibration)
        return Passes(forward=forward, backward=backward)
    model, length, attention = work.model, work.sequence_length, work.stack.attention
    flash = not work.stack.stores_scores
    keys = keys_per_query(model, length, causal=flash)
    operations = 4 * work.tokens * model.num_heads * model.head_size * keys / work.plan.tp
    shares = {"flash-1": calibration.flash_1, "flash-2": calibration.flash_2, "flash-3": calibration.flash_3}
    seconds = operations / (work.cluster.peak_flops_bfloat16 * shares.get(attention, calibration.matmul))
    # Papers count a flash backward as 2.5 forwards and give one rate for both.
    return Passes(forward=seconds, backward=seconds * (2.5 if flash else BACKWARD))


def moved_bytes(work: Workload) -> tuple[float, float]:
    """Bytes that one layer's kernels read and write besides matrix products, forward and backward."""
    if work.model.video is not None:
        return video.moved_bytes(work)
    model, stack, tp = work.model, work.stack, work.plan.tp
    gpt2 = model.family == "gpt2"
    norm = FUSED_NORM if stack.fused_norm else UNFUSED_NORM
    activation = GELU if gpt2 else GATED
    softmax = model.attention == ("softmax",)
    turned = 0 if gpt2 or not softmax else (model.num_heads + model.kv_heads) * model.head_size
    scores = SCORES.get(stack.attention, (0, 0)) if softmax else (0, 0)
    moved = []
    for way in (0, 1):
        whole = 2 * (norm[way] + RESIDUAL[way]) * model.hidden_size / (tp if stack.sequence_parallel else 1)
        split = ROTARY[way] * turned + activation[way] * model.intermediate_size
        split += scores[way] * model.num_heads * work.sequence_length
        moved.append(work.tokens * (whole + split / tp))
    return moved[0], moved[1]
