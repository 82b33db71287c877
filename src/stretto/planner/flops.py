"""Parameters and floating-point operations of a model: the one place where they are counted.

A matrix product of [m, k] and [k, n] is 2mkn operations, so a weight that multiplies every token costs 2
operations per token forward, and 4 backward (one product for the gradient of its input, one for its own):
the 6N of Kaplan et al. 2020 (arXiv 2001.08361, section 2.1).  N here are the weights that multiply, which
leaves out embeddings (a lookup), norms and biases, and keeps a tied head.

Attention adds two products per layer that grow with the sequence, scores q k^T and their use on v.  A query
at position i needs the keys 0..i, and a sliding window w at most the last w of them:

    keys per query on average = sum over i < T of min(i + 1, w) / T          ((T + 1) / 2 without window)
    forward operations per token and layer = 2 products x 2 x heads x head size x that

A layer that keeps a state [K, K] per key/value head (``linear``, ``delta``) is counted as its recurrence, whatever
the chunked kernel does besides: a product of K K for what a token writes, another for what a delta layer reads before
that, and one per query head; none grows with the sequence.

``causal=False`` counts all T keys for every query, the convention of the PaLM paper (appendix B: 6N + 12LHQT);
figures compared with others' must use the same.  Softmax, norms and activations are not counted, nor is what
recompute does twice: MFU is about the model's own work.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from stretto.spec.errors import UnsupportedError
from stretto.spec.model import ModelSpec, VideoSpec

TIME_WAVES = 128
"""Numbers that tell a model of clips the diffusion time."""
BACKWARD = 2
"""Backward operations per forward operation of a matrix product."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Number of parameters, by what they do.  A head tied to the embedding counts once in total."""

    embedding: int
    """Token embedding and learned positions."""
    layer_matrices: int
    """Weights of all layers that multiply."""
    layer_vectors: int
    """Norm weights and biases of all layers; of clips also the modulation, which multiplies no token."""
    final_norm: int
    """The norm before the head."""
    head: int
    """Weight that makes logits, tied or not."""
    tied: bool
    """Whether the head is the embedding's weight."""

    @property
    def total(self) -> int:
        """Distinct parameters of the model."""
        return (
            self.embedding
            + self.layer_matrices
            + self.layer_vectors
            + self.final_norm
            + (0 if self.tied else self.head)
        )

    @property
    def multiplying(self) -> int:
        """Weights that multiply every token: the N of 6N."""
        return self.layer_matrices + self.head


def parameters(model: ModelSpec) -> Parameters:
    """Count the parameters of a model; UnsupportedError for a foreign one.

    >>> from stretto.spec.presets_model import model_preset
    >>> parameters(model_preset("llama-3-8b")).total
    8030261248
    """
    if model.family == "foreign":
        raise UnsupportedError("The sizes of a foreign model are not known before its module is loaded.")
    return _counted(model)


@lru_cache(maxsize=256)
def _counted(model: ModelSpec) -> Parameters:
    """The counts, remembered: a search asks for the same ones at every estimate."""
    if model.video is not None:
        return _of_clips(model, model.video)
    gpt2 = model.family == "gpt2"
    width, inner = model.hidden_size, model.intermediate_size
    queries, keys = model.num_heads * model.head_size, model.kv_heads * model.head_size
    attention = width * (queries + 2 * keys) + queries * width
    feed_forward = (2 if gpt2 else 3) * width * inner
    norm = 2 * width if gpt2 else width
    vectors = 2 * norm
    if gpt2 or model.qkv_bias:
        vectors += queries + 2 * keys
    if gpt2:
        vectors += width + inner + width  # output projection, feed-forward up, feed-forward down
    per_kind = Counter(map(model.attention_of, range(model.num_layers)))
    # A decay per key/value head, and what a delta layer writes; both have biases.
    gates = model.kv_heads * (per_kind["linear"] + 2 * per_kind["delta"])
    head_norms = model.head_size * (model.num_layers - per_kind["softmax"])
    if model.qk_norm:
        head_norms += 2 * model.head_size * per_kind["softmax"]
    return Parameters(
        embedding=model.vocab_size * width + (model.max_positions * width if gpt2 else 0),
        layer_matrices=model.num_layers * (attention + feed_forward) + width * gates,
        layer_vectors=model.num_layers * vectors + gates + head_norms,
        final_norm=norm,
        head=model.vocab_size * width,
        tied=model.tied_embeddings,
    )


def _of_clips(model: ModelSpec, clip: VideoSpec) -> Parameters:
    """Of family video: embeddings are those of patches, places and time; two attentions a layer, all with biases."""
    width, inner, layers = model.hidden_size, model.intermediate_size, model.num_layers
    places, time = clip.frames + clip.patches, TIME_WAVES + 1 + width + 1
    return Parameters(
        embedding=width * (clip.channels + 1 + places + time),
        layer_matrices=layers * (8 * width**2 + 2 * width * inner),
        layer_vectors=layers * (9 * width**2 + 9 * width + 8 * width + inner + width),
        final_norm=0,
        head=clip.channels * (width + 1),
        tied=False,
    )


def keys_per_query(model: ModelSpec, sequence_length: int, *, causal: bool = True) -> float:
    """Keys that a query attends to, averaged over a sequence of one document; of clips in both attentions."""
    if model.video is not None:
        return float(model.video.frames + model.video.patches)
    if not causal:
        return float(sequence_length)
    window = min(model.sliding_window or sequence_length, sequence_length)
    growing = window * (window + 1) / 2
    return (growing + (sequence_length - window) * window) / sequence_length


def forward_flops_per_token(model: ModelSpec, sequence_length: int, *, causal: bool = True) -> float:
    """Operations of one forward pass per token, in FLOP."""
    keys = keys_per_query(model, sequence_length, causal=causal)
    kinds = Counter(map(model.attention_of, range(model.num_layers)))
    attention = 2 * 2 * kinds["softmax"] * model.num_heads * model.head_size * keys
    return 2 * parameters(model).multiplying + attention + state_flops(model)


def state_flops(model: ModelSpec) -> int:
    """Operations of one forward pass per token in layers that keep a state: writing and reading it, in FLOP."""
    kinds = Counter(map(model.attention_of, range(model.num_layers)))
    products = {"linear": model.num_heads + model.kv_heads, "delta": model.num_heads + 2 * model.kv_heads}
    return sum(2 * kinds[kind] * heads * model.head_size**2 for kind, heads in products.items())


def flops_per_token(model: ModelSpec, sequence_length: int, *, causal: bool = True) -> float:
    """Operations of one training step (forward and backward) per token, in FLOP."""
    return (1 + BACKWARD) * forward_flops_per_token(model, sequence_length, causal=causal)


def mfu(
    model: ModelSpec,
    *,
    sequence_length: int,
    tokens_per_second: float,
    num_devices: int,
    peak_flops: float,
) -> float | None:
    """Model FLOP utilisation, 0 to 1: operations done per second over what all devices could do.

    ``tokens_per_second`` is the whole mesh's, ``peak_flops`` one device's in FLOP/s.  None where the
    peak is not known (0) or the model is foreign.
    """
    if peak_flops <= 0 or model.family == "foreign":
        return None
    return flops_per_token(model, sequence_length) * tokens_per_second / (num_devices * peak_flops)
