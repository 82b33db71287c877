"""Layers over clips (family video): what they keep, move and send, counted by hand.

With D the model's width, I the feed-forward's, H heads, one layer keeps of a token, in elements of the run's type:

    three times          input, normed, scaled and shifted, what the gate multiplies            12 D + 6 numbers
    attention, twice     q, k, v and output, one number per head                                8 D + 2 H
    frames' output       once more, since frames don't lie beside each other                    D
    feed-forward         before and after GELU                                                  2 I
    after a switch       its input, which is also kept as the layer's                           D

and of a clip 14 D: shifts, scales and gates, the scales with 1 added, the time.  Bytes of elementwise kernels forward
and backward, in 16 bit: norm 4 + 8, scale 4 + 10, shift 4 + 2, gate 4 + 8, residual 6 + 6, three times; frames turned
8 + 8; GELU 4 + 6; and the weights of the modulation, which multiply clips and not tokens.

A cut moves from frames to patches inside each layer and back between layers (DSP), so that a rank that holds f of F
frames, and of P patches p, sends with e bytes a number and B clips

    forward   e B D (L f (P - p) + (L - 1) p (F - f))         backward   e B D (L p (F - f) + (L - 1) f (P - p))

and forward's once more where blocks are recomputed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stretto.planner.sequence_volume import Volume
from stretto.spec.model import ModelSpec, VideoSpec
from stretto.spec.sequence import cut_sequence

if TYPE_CHECKING:
    from stretto.planner.workload import Workload

ATTENTIONS = 2
"""Of a layer."""
ELEMENTWISE_BYTES = (3 * 22 + 8, 3 * 34 + 8)
"""Per token and channel, forward and backward."""
GELU_BYTES = (4, 6)
"""Per token and channel of the feed-forward."""
MODULATED = 9
"""Shifts, scales and gates of a layer, each as wide as the model."""
REST = 7
"""Widths of the model that stand for what is elementwise in a layer, where a machine was measured with one of text;
from 5 to 10 on a CPU, over widths of 64 to 256."""
KERNELS = 3 * 5 + 1 + 2 + 2
"""Of a layer besides products and attention: three times norm, scale, shift, gate, residual; GELU; frames turned twice;
the modulation and its SiLU."""


def clip_of(work: Workload) -> VideoSpec:
    """The clips of a workload that has some."""
    assert work.model.video is not None, "asked of clips only"
    return work.model.video


def shapes(model: ModelSpec) -> tuple[tuple[int, int], ...]:
    """Inputs and outputs of a layer's weights that multiply tokens: two attentions, feed-forward."""
    width, inner = model.hidden_size, model.intermediate_size
    return (*((width, 3 * width), (width, width)) * ATTENTIONS, (width, inner), (inner, width))


def layer_elements(work: Workload, *, recompute: str) -> float:
    """What one layer keeps of one micro-batch on one rank, on average over the layers."""
    model, clips = work.model, work.plan.micro_batch_size
    if recompute == "full":
        return work.tokens * model.hidden_size
    moved = (1 - 1 / model.num_layers) if work.plan.cp > 1 else 0.0
    token = (21 + moved) * model.hidden_size + 2 * model.intermediate_size + ATTENTIONS * model.num_heads + 6
    return work.tokens * token + clips * 14 * model.hidden_size


def moved_bytes(work: Workload) -> tuple[float, float]:
    """Bytes that one layer's kernels read and write besides products of tokens, forward and backward."""
    model = work.model
    width, modulation = model.hidden_size, 2 * MODULATED * model.hidden_size**2
    forward, backward = (
        work.tokens * (ELEMENTWISE_BYTES[way] * width + GELU_BYTES[way] * model.intermediate_size) for way in (0, 1)
    )
    return forward + modulation, backward + 2 * modulation


def switches(work: Workload) -> float:
    """All-to-alls of a layer each way, on average: two, but one in the first."""
    return 2 - 1 / work.model.num_layers


def switch_volume(work: Workload, rank: int, *, element_bytes: float) -> Volume:
    """Bytes that ``rank`` of cp sends for a micro-batch through all layers, exact for uneven parts too."""
    clip, model, plan = clip_of(work), work.model, work.plan
    of_frames, of_patches = (cut_sequence(size, plan.cp, "contiguous")[rank][0] for size in (clip.frames, clip.patches))
    frames, patches = of_frames[1] - of_frames[0], of_patches[1] - of_patches[0]
    there, back = frames * (clip.patches - patches), patches * (clip.frames - frames)
    each, layers = element_bytes * plan.micro_batch_size * model.hidden_size, model.num_layers
    forward = each * (layers * there + (layers - 1) * back)
    backward = each * (layers * back + (layers - 1) * there)
    again = forward if plan.recompute == "full" else 0
    return Volume(forward=round(forward), backward=round(backward + again))
