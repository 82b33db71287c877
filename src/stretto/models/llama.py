"""The Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Mistral (sliding window), Qwen2 (biases on q, k, v) and Qwen3 (norms on query and key heads) are
settings of the same model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from stretto.models.decoder import Block, Decoder
from stretto.models.dropout import EMBEDDING, Dropout
from stretto.models.feed_forward import GatedFeedForward
from stretto.models.linear_attention import attention_of
from stretto.models.norm import RMSNorm
from stretto.models.rotary import RotaryTables
from stretto.spec.sharding import TensorRule

if TYPE_CHECKING:
    from torch import Tensor

    from stretto.models.context import Context
    from stretto.spec.contract import Batch
    from stretto.spec.model import ModelSpec


class LlamaInputs(nn.Module):
    """Token embedding."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.dropout = Dropout(spec.dropout, EMBEDDING)

    def forward(self, batch: Batch, context: Context) -> Tensor:
        """Return embeddings [B, T, D], or this rank's slice of the sequence."""
        return self.dropout(self.tokens(batch.tokens), context)


def llama_block(spec: ModelSpec, layer: int) -> Block:
    """Build layer ``layer``, counted from 0."""
    parts = {
        "attention_norm": RMSNorm(spec.hidden_size, spec.norm_eps),
        "attention": attention_of(spec, layer, input_bias=spec.qkv_bias, output_bias=False),
        "feed_forward_norm": RMSNorm(spec.hidden_size, spec.norm_eps),
        "feed_forward": GatedFeedForward(spec.hidden_size, spec.intermediate_size),
    }
    return Block(layer, spec.dropout, parts)


class Llama(Decoder):
    """Llama 2 and 3, Mistral, Qwen2 and Qwen3 as a Stack."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(
            spec,
            inputs=LlamaInputs(spec),
            blocks=[llama_block(spec, layer) for layer in range(spec.num_layers)],
            norm=RMSNorm(spec.hidden_size, spec.norm_eps),
        )
        self.tensor_rules = {**self.tensor_rules, "blocks.*.feed_forward.gate": TensorRule.COLUMN}
        self.rotary = RotaryTables(spec.head_size, spec.rope_theta, spec.rope_scaling)
