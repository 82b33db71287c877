"""Trains an architecture that Stretto doesn't ship: GPT-NeoX of Hugging Face, with a loss of our own.

    stretto train examples/foreign_gpt_neox.toml

Each rank calls ``build``, keeps its own layers and drops the rest, so ``build`` must return the same
model everywhere: hence the seed.  A model of your own that isn't Hugging Face's is wrapped with
``stretto.models.foreign.ForeignStack`` instead: give it the embedding, the list of blocks and the
head, and say how a block is called.
"""

import torch
import torch.nn.functional as F
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from stretto.models.foreign import ForeignStack, from_hugging_face
from stretto.spec.contract import Batch
from stretto.spec.model import ModelSpec

Z_WEIGHT = 1e-4


def loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross-entropy plus PaLM's z-loss, which keeps logits small; both summed over valid tokens."""
    labels, logits = batch.labels.flatten(), logits.flatten(0, 1)
    log_z = torch.logsumexp(logits, dim=-1)
    z_loss = Z_WEIGHT * (log_z.square() * (labels != -100)).sum()
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") + z_loss


def build(spec: ModelSpec) -> ForeignStack:
    """Return a small random GPT-NeoX of the sizes in the run file."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        max_position_embeddings=spec.max_positions,
    )
    return from_hugging_face(GPTNeoXForCausalLM(config), loss=loss)


if __name__ == "__main__":
    stack = build(ModelSpec(num_layers=4))
    for name, rule in stack.tensor_rules.items():
        print(f"{name:48} {rule.value}")
