"""What the model is: the numbers that decide its parameters and its arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal["llama", "gpt2", "video", "foreign"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama-3's stretch of rotary frequencies (Llama 3 report, and ``rope_type = "llama3"`` of Hugging Face)."""

    factor: float = 8.0
    """How much the lowest frequencies are slowed."""
    low_frequency_factor: float = 1.0
    """Wavelengths longer than original_positions / this are slowed by the full factor."""
    high_frequency_factor: float = 4.0
    """Wavelengths shorter than original_positions / this are left alone."""
    original_positions: int = 8192
    """Positions the model was first trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSpec:
    """What a clip is, for family = video: latents [frames, patches, channels]."""

    frames: int = 8
    """Frames of a clip."""
    patches: int = 16
    """Patches of a frame, in the order of the file."""
    channels: int = 4
    """Numbers of a patch."""

    @property
    def tokens(self) -> int:
        """Of a clip: one for each patch of each frame."""
        return self.frames * self.patches


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer; or with ``family = "video"`` a diffusion transformer over clips.

    Name a preset (``name``), a Hugging Face directory (``path``), or give the fields; fields given
    beside a preset or directory override it.
    """

    name: str = "custom"
    """Preset this started from (``llama-3-8b``, ``gpt2``, ``tiny``), or a label of your own."""
    path: str | None = None
    """Hugging Face directory (config.json) that the fields are read from."""
    weights: str = "random"
    """``random``, or a Hugging Face directory with safetensors to start from."""
    family: Family = "llama"
    """``llama`` (also Mistral, Qwen2, Qwen3 by configuration), ``gpt2``, ``video`` (a diffusion transformer that looks
    along patches, then along frames), or ``foreign``."""
    module: str | None = None
    """For family = foreign: ``package.module:function`` or ``file.py:function`` that returns a Stack."""
    vocab_size: int = 260
    """Number of token ids the embedding holds (the bytes tokenizer needs 257)."""
    hidden_size: int = 64
    """Width of the residual stream."""
    intermediate_size: int = 176
    """Width inside the feed-forward."""
    num_layers: int = 2
    """Number of blocks."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int | None = None
    """Key/value heads (GQA); None: as many as query heads."""
    head_dim: int | None = None
    """Size of a head; None: hidden_size / num_heads."""
    max_positions: int = 2048
    """Longest sequence the model accepts."""
    norm_eps: float = 1e-5
    """Epsilon of RMSNorm or LayerNorm."""
    rope_theta: float = 10000.0
    """Rotary base (llama family)."""
    rope_scaling: RopeScaling | None = None
    """Llama-3 rotary scaling; None: plain rotary."""
    tied_embeddings: bool = False
    """Whether the head shares the embedding's weight."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen2; always in gpt2)."""
    qk_norm: bool = False
    """RMSNorm over each query and key head (Qwen3)."""
    sliding_window: int | None = None
    """Attend to at most this many last tokens (Mistral); None: all."""
    dropout: float = 0.0
    """Probability for embedding, residual and attention dropout."""
    initial_std: float = 0.02
    """Standard deviation of random initial weights."""
    attention: tuple[str, ...] = ("softmax",)
    """What the layers have in the place of attention, one name a layer and then again from the first: ``softmax``,
    ``linear`` (linear attention with decay) or ``delta`` (gated delta rule)."""
    video: VideoSpec | None = None
    """Clips, for family = video; there ``training.sequence_length`` is frames x patches."""

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads, resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """Size of a head, resolved."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    def attention_of(self, layer: int) -> str:
        """The kind of attention of layer ``layer``, counted from 0."""
        return self.attention[layer % len(self.attention)]

    @property
    def num_outputs(self) -> int:
        """Numbers that the head gives for a token: a logit for each id, or the channels of a patch."""
        return self.vocab_size if self.video is None else self.video.channels

    @property
    def keeps_states(self) -> bool:
        """Whether some layer keeps a state instead of keys and values."""
        return any(kind != "softmax" for kind in self.attention[: self.num_layers])
