"""What decoder families share: the pre-norm block, the head, and the Stack they make.

    inputs ─► [ x + attention(norm(x)) ─► x + feed_forward(norm(x)) ] × L ─► norm ─► head

Shapes: B sequences, T tokens (of this rank's slice between regions), D model width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from stretto.models.context import Context, attention_mask, first_seen
from stretto.models.dropout import PER_LAYER, Dropout
from stretto.models.loss import cross_entropy_sum
from stretto.models.rotary import RotaryTables
from stretto.spec.sharding import TensorRule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from stretto.spec.contract import Batch, Place
    from stretto.spec.model import ModelSpec

TENSOR_RULES: Mapping[str, TensorRule] = {
    "blocks.*.attention": TensorRule.REGION,
    "blocks.*.attention.q": TensorRule.COLUMN,
    "blocks.*.attention.k": TensorRule.COLUMN,
    "blocks.*.attention.v": TensorRule.COLUMN,
    "blocks.*.attention.o": TensorRule.ROW,
    "blocks.*.feed_forward": TensorRule.REGION,
    "blocks.*.feed_forward.up": TensorRule.COLUMN,
    "blocks.*.feed_forward.down": TensorRule.ROW,
    "inputs.tokens": TensorRule.VOCAB_EMBEDDING,
    "outputs.head": TensorRule.VOCAB_HEAD,
}
"""Tensor rules that hold in every family; a gated feed-forward adds its gate, layers that keep a state theirs."""


def state_rules(spec: ModelSpec) -> Mapping[str, TensorRule]:
    """The rules of what only layers that keep a state have."""
    kinds = set(map(spec.attention_of, range(spec.num_layers)))
    names = [name for name, of in (("decay", {"linear", "delta"}), ("write", {"delta"})) if kinds & of]
    return {f"blocks.*.attention.{name}": TensorRule.COLUMN for name in names}


class Block(nn.Module):
    """One layer: attention and feed-forward, each after its norm and added to the residual stream."""

    def __init__(self, layer: int, dropout: float, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.attention_norm = parts["attention_norm"]
        self.attention = parts["attention"]
        self.feed_forward_norm = parts["feed_forward_norm"]
        self.feed_forward = parts["feed_forward"]
        self.attention_dropout = Dropout(dropout, 2 + PER_LAYER * layer)
        self.feed_forward_dropout = Dropout(dropout, 3 + PER_LAYER * layer)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """Return the residual stream after this layer."""
        attended = self.attention(self.attention_norm(x_BTD), context)
        x_BTD = x_BTD + self.attention_dropout(attended, context)
        transformed = self.feed_forward(self.feed_forward_norm(x_BTD), context)
        return x_BTD + self.feed_forward_dropout(transformed, context)


class Outputs(nn.Module):
    """Final norm and head."""

    def __init__(self, norm: nn.Module, width: int, vocabulary: int) -> None:
        super().__init__()
        self.norm = norm
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """Return logits [B, T, V]."""
        return self.head(self.norm(x_BTD))


class Decoder(nn.Module):
    """A decoder-only transformer as a Stack (spec.contract.Stack says what the attributes mean)."""

    def __init__(self, spec: ModelSpec, *, inputs: nn.Module, blocks: list[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        outputs = Outputs(norm, spec.hidden_size, spec.vocab_size)
        self.spec = spec
        self.inputs = inputs
        self.blocks = nn.ModuleList(blocks)
        self.outputs: nn.Module = outputs
        self.tied: Mapping[str, str] = {}
        if spec.tied_embeddings:
            self.tied = {"outputs.head.weight": "inputs.tokens.weight"}
            outputs.head.weight = cast("nn.Embedding", inputs.tokens).weight
        self.tensor_rules: Mapping[str, TensorRule] = {**TENSOR_RULES, **state_rules(spec)}
        self.rotary: RotaryTables | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters that are here; torch's default where there are none."""
        return next((p.dtype for p in self.parameters()), torch.get_default_dtype())

    def context(self, batch: Batch, place: Place) -> Context:
        """Return what the blocks of ``batch`` share; cheap where plain causal attention suffices."""
        part, window = batch.part, self.spec.sliding_window
        reach = batch.tokens.size(1) if part is None else part.length
        return Context(
            place=place,
            samples=batch.samples,
            mask=attention_mask(batch, window) if part is None else None,
            rotary=self.rotary.at(batch.positions, dtype=self.dtype, reach=reach) if self.rotary else None,
            part=part,
            first=None if part is None else first_seen(part, window),
            starts=batch.positions == 0 if batch.documents is not None and self.spec.keeps_states else None,
        )

    def forward(self, batch: Batch, place: Place) -> Tensor:
        """Run the whole stack on one process and return logits [B, T, V]."""
        context = self.context(batch, place)
        x_BTD = self.inputs(batch, context)
        for block in self.blocks:
            x_BTD = block(x_BTD, context)
        return self.outputs(x_BTD, context)

    def loss(self, predictions: Tensor, batch: Batch) -> Tensor:
        """Return the sum of cross-entropy over the valid tokens."""
        return cross_entropy_sum(predictions, batch.labels)

    def initial_value(self, name: str) -> tuple[str, float] | None:
        """Norms start at 1, biases at 0, weights normal; what writes to the residual stream is scaled
        by 1 / sqrt(2 L), so that the stream's variance doesn't grow with depth (GPT-2)."""
        if name.endswith(".bias"):
            return "constant", 0.0
        if name.rsplit(".", 2)[-2].endswith("norm"):
            return "constant", 1.0
        into_residual = name.endswith((".attention.o.weight", ".feed_forward.down.weight"))
        scale = 1.0 / math.sqrt(2 * self.spec.num_layers) if into_residual else 1.0
        return "normal", self.spec.initial_std * scale
