"""Where each of our parameters lies in a Hugging Face checkpoint.

    ours                              theirs (llama)                       theirs (gpt2)
    inputs.tokens.weight              model.embed_tokens.weight            transformer.wte.weight
    blocks.3.attention.q.weight       model.layers.3.self_attn.q_proj.…    transformer.h.3.attn.c_attn.…
    blocks.3.feed_forward.down.weight model.layers.3.mlp.down_proj.…       transformer.h.3.mlp.c_proj.…
    outputs.head.weight               lm_head.weight                       lm_head.weight

GPT-2 keeps its projections transposed, [in, out], with q, k and v side by side along the outputs:
q is the first third of the columns of c_attn.weight, turned around.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from stretto.models.build import build_decoder
from stretto.spec.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stretto.spec.model import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceTensor:
    """Which part of which Hugging Face tensor one of our parameters is."""

    name: str
    """Tensor name as transformers saves the whole language model."""
    transposed: bool = False
    """Whether theirs is [in, out] where ours is [out, in]."""
    part: int = 0
    """Ours is part ``part`` ..."""
    parts: int = 1
    """... of so many equal parts along the output features (dim 0 of ours)."""


LLAMA_BLOCK: Mapping[str, str] = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
"""Module in our block -> module in theirs."""

GPT2_BLOCK: Mapping[str, str] = {
    "attention_norm": "ln_1",
    "attention.q": "attn.c_attn",
    "attention.k": "attn.c_attn",
    "attention.v": "attn.c_attn",
    "attention.o": "attn.c_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward.up": "mlp.c_fc",
    "feed_forward.down": "mlp.c_proj",
}
"""The same for GPT-2."""

LLAMA_ENDS: Mapping[str, str] = {
    "inputs.tokens": "model.embed_tokens",
    "outputs.norm": "model.norm",
    "outputs.head": "lm_head",
}
"""Module outside our blocks -> theirs."""

GPT2_ENDS: Mapping[str, str] = {
    "inputs.tokens": "transformer.wte",
    "inputs.positions": "transformer.wpe",
    "outputs.norm": "transformer.ln_f",
    "outputs.head": "lm_head",
}
"""The same for GPT-2."""

BODY_PREFIXES = ("model.", "transformer.")
"""What a checkpoint of the body alone (without a head) leaves out of its names."""

HARMLESS_SUFFIXES = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")
"""Buffers of older checkpoints that hold no weights: causal masks and rotary frequencies."""


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return global name -> global shape of every parameter, tied copies included."""
    with torch.device("meta"):
        model = build_decoder(spec)
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def hugging_face_tensors(spec: ModelSpec) -> dict[str, HuggingFaceTensor]:
    """Return global name -> place in a Hugging Face checkpoint; a tied head lies in the embedding."""
    if spec.family == "foreign":
        raise UnsupportedError("Weights of a foreign model come from its own builder, not from a directory.")
    if spec.keeps_states:
        raise UnsupportedError(
            "Hugging Face has no model with these linear and delta layers (model.attention), so weights can't be read "
            'from or written to its format; keep to checkpoints of Stretto, with model.weights = "random".'
        )
    found = {name: locate(name, spec.family) for name in parameter_shapes(spec)}
    if spec.tied_embeddings:
        found["outputs.head.weight"] = found["inputs.tokens.weight"]
    return found


def locate(name: str, family: str) -> HuggingFaceTensor:
    """Return where parameter ``name`` of the family lies, untied."""
    module, kind = name.rsplit(".", 1)
    gpt2 = family == "gpt2"
    if not module.startswith("blocks."):
        return HuggingFaceTensor(name=f"{(GPT2_ENDS if gpt2 else LLAMA_ENDS)[module]}.{kind}")
    _, layer, inner = module.split(".", 2)
    if not gpt2:
        return HuggingFaceTensor(name=f"model.layers.{layer}.{LLAMA_BLOCK[inner]}.{kind}")
    fused = inner in ("attention.q", "attention.k", "attention.v")
    return HuggingFaceTensor(
        name=f"transformer.h.{layer}.{GPT2_BLOCK[inner]}.{kind}",
        transposed=kind == "weight" and not inner.endswith("_norm"),
        part="qkv".index(inner[-1]) if fused else 0,
        parts=3 if fused else 1,
    )
