"""Models that Stretto doesn't ship, as a user would write them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from stretto.models.foreign import ForeignStack, from_hugging_face
from stretto.spec.contract import IGNORE, Batch
from stretto.spec.model import ModelSpec


def neox(spec: ModelSpec) -> ForeignStack:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        max_position_embeddings=spec.max_positions,
        initializer_range=0.2,
    )
    return from_hugging_face(GPTNeoXForCausalLM(config))


def llama(spec: ModelSpec) -> ForeignStack:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.kv_heads,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return from_hugging_face(LlamaForCausalLM(config), loss=smoothed)


def smoothed(predictions: Tensor, batch: Batch) -> Tensor:
    """A user's own loss: label smoothing."""
    logits, labels = predictions.flatten(0, 1), batch.labels.flatten()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum", label_smoothing=0.1)


class TwoStreams(nn.Module):
    """A block whose activations are a tuple: a stream and a running gate (a reversible-style network)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        left, right = x
        return right + torch.tanh(self.mix(self.norm(left))), left


class Pair(nn.Module):
    """Embeds into two streams."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.left, self.right = nn.Embedding(vocabulary, width), nn.Embedding(vocabulary, width)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(tokens), self.right(tokens)


class Sum(nn.Module):
    """Reads both streams."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, vocabulary)

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return self.out(x[0] + x[1])


def streams(spec: ModelSpec) -> Any:
    torch.manual_seed(0)
    return ForeignStack(
        embed=Pair(spec.vocab_size, spec.hidden_size),
        blocks=[TwoStreams(spec.hidden_size) for _ in range(spec.num_layers)],
        head=Sum(spec.vocab_size, spec.hidden_size),
    )
