"""The GPT-2 family: LayerNorm, learned positions, GELU, biases everywhere but in the head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from stretto.models.decoder import Block, Decoder
from stretto.models.dropout import EMBEDDING, Dropout
from stretto.models.feed_forward import FeedForward
from stretto.models.linear_attention import attention_of

if TYPE_CHECKING:
    from torch import Tensor

    from stretto.models.context import Context
    from stretto.spec.contract import Batch
    from stretto.spec.model import ModelSpec


class GPTInputs(nn.Module):
    """Token and position embedding."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.positions = nn.Embedding(spec.max_positions, spec.hidden_size)
        self.dropout = Dropout(spec.dropout, EMBEDDING)

    def forward(self, batch: Batch, context: Context) -> Tensor:
        """Return embeddings [B, T, D], or this rank's slice of the sequence.

        Under tensor parallelism the token embedding returns a slice that starts at
        ``place.token_start``; positions are looked up for that slice.
        """
        x_BTD = self.tokens(batch.tokens)
        start = context.place.token_start
        x_BTD = x_BTD + self.positions(batch.positions[:, start : start + x_BTD.size(1)])
        return self.dropout(x_BTD, context)


def gpt_block(spec: ModelSpec, layer: int) -> Block:
    """Build layer ``layer``, counted from 0."""
    parts = {
        "attention_norm": nn.LayerNorm(spec.hidden_size, spec.norm_eps),
        "attention": attention_of(spec, layer, input_bias=True, output_bias=True),
        "feed_forward_norm": nn.LayerNorm(spec.hidden_size, spec.norm_eps),
        "feed_forward": FeedForward(spec.hidden_size, spec.intermediate_size),
    }
    return Block(layer, spec.dropout, parts)


class GPT(Decoder):
    """GPT-2 as a Stack."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(
            spec,
            inputs=GPTInputs(spec),
            blocks=[gpt_block(spec, layer) for layer in range(spec.num_layers)],
            norm=nn.LayerNorm(spec.hidden_size, spec.norm_eps),
        )
