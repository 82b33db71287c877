"""Causal self-attention with an opening: ``attend``.

    x ─► q k v ─► (norm) ─► rotary ─► attend ─► o

The projections and rotary are the model's; who attends to whom, and where the keys lie, is the
business of ``attend``, a callable that the rooms above replace (ring or Ulysses under context
parallelism, a cache when generating).  The number of heads is never read from the configuration:
under tensor parallelism a projection returns only this rank's heads.

Shapes: B sequences, T tokens, D model width, H query heads, G key/value heads, K head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from stretto.models.dropout import PER_LAYER, AttentionDropout, drop_attention
from stretto.models.norm import RMSNorm, at_least_float32
from stretto.models.rotary import apply_rotary

if TYPE_CHECKING:
    from torch import Tensor

    from stretto.models.context import Context
    from stretto.spec.model import ModelSpec


class Attend(Protocol):
    """The opening of attention."""

    def __call__(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, context: Context, /) -> Tensor:
        """Return each query's weighted mean of the values it sees, [B, H, T, K]."""


class LocalAttend:
    """Attention over keys and values that are all here."""

    def __init__(self, dropout: float, site: int) -> None:
        self.dropout = dropout
        self.site = site

    def __call__(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, context: Context) -> Tensor:
        """Attend under ``context.mask``, or causally where it is None."""
        if self.dropout > 0.0 and context.place.training:
            return self.explicit(q_BHTK, k_BGTK, v_BGTK, context)
        return scaled_dot_product(q_BHTK, k_BGTK, v_BGTK, context.mask, causal=context.mask is None)

    def weight_dropout(self, context: Context) -> AttentionDropout | None:
        """What drops attention weights, for those who attend in our place; None where nothing is dropped."""
        dropped = self.dropout > 0.0 and context.place.training
        return AttentionDropout(self.dropout, self.site, context) if dropped else None

    @torch.compiler.disable
    def explicit(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, context: Context) -> Tensor:
        """Attend with the weights written out, since the fused kernels draw their own dropout."""
        length = q_BHTK.size(2)
        k_BHTK, v_BHTK = repeat_heads(k_BGTK, q_BHTK.size(1)), repeat_heads(v_BGTK, q_BHTK.size(1))
        mask = context.mask
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=q_BHTK.device).tril()
        scores = (q_BHTK * q_BHTK.size(-1) ** -0.5) @ k_BHTK.transpose(2, 3)
        weights = at_least_float32(scores).masked_fill(~mask, float("-inf")).softmax(-1)
        weights = drop_attention(weights, self.dropout, self.site, context)
        return weights.to(v_BHTK.dtype) @ v_BHTK


def repeat_heads(x_BGTK: Tensor, heads: int) -> Tensor:
    """Repeat each key/value head for the query heads that share it, [B, heads, T, K]."""
    groups = x_BGTK.size(1)
    return x_BGTK if groups == heads else x_BGTK.repeat_interleave(heads // groups, dim=1)


def scaled_dot_product(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    """Run torch's fused attention; ``mask`` is bool, True where a query sees a key."""
    grouped = q_BHTK.size(1) != k_BGTK.size(1)
    if grouped and mask is not None and q_BHTK.is_cuda:
        # No fused CUDA kernel takes both grouped heads and a mask; repeating is cheaper than falling back.
        k_BGTK, v_BGTK = repeat_heads(k_BGTK, q_BHTK.size(1)), repeat_heads(v_BGTK, q_BHTK.size(1))
        grouped = False
    return F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values (GQA), optional head norms and rotary."""

    def __init__(self, spec: ModelSpec, layer: int, *, input_bias: bool, output_bias: bool) -> None:
        super().__init__()
        size, width = spec.head_size, spec.hidden_size
        self.head_size = size
        self.q = nn.Linear(width, spec.num_heads * size, bias=input_bias)
        self.k = nn.Linear(width, spec.kv_heads * size, bias=input_bias)
        self.v = nn.Linear(width, spec.kv_heads * size, bias=input_bias)
        self.o = nn.Linear(spec.num_heads * size, width, bias=output_bias)
        self.q_norm = RMSNorm(size, spec.norm_eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(size, spec.norm_eps) if spec.qk_norm else None
        self.attend: Attend = LocalAttend(spec.dropout, 1 + PER_LAYER * layer)
        self.recompute = False
        """Selective recompute: run ``attend`` again in backward instead of keeping what it saved."""

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """Attend within the whole sequences ``x_BTD``."""
        # The three products side by side: where what is between linear layers is compiled, that is one piece.
        q, k, v = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        q_BTHK, k_BTGK, v_BTGK = self.split_heads(q), self.split_heads(k), self.split_heads(v)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        if context.rotary is not None:
            q_BTHK, k_BTGK = apply_rotary(q_BTHK, context.rotary), apply_rotary(k_BTGK, context.rotary)
        heads = (q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), v_BTGK.transpose(1, 2))
        if self.recompute and torch.is_grad_enabled():
            # The mask of dropout is a pure function of context, so no generator state is kept.
            out_BHTK = checkpoint(self.attend, *heads, context, use_reentrant=False, preserve_rng_state=False)
        else:
            out_BHTK = self.attend(*heads, context)
        return self.o(out_BHTK.transpose(1, 2).flatten(2))

    def split_heads(self, x: Tensor) -> Tensor:
        """View [B, T, heads here * K] as [B, T, heads here, K]."""
        return x.view(x.size(0), x.size(1), -1, self.head_size)
