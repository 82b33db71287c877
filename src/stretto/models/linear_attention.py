"""Layers that keep a state instead of keys and values, with an opening: ``states``.

    x ─► q k v, decay, (write) ─► summaries of chunks ─► states before them ─► out ─► norm of each head ─► o

``linear`` is linear attention with a decay of its own for each token and head (GLA's, one number a head); ``delta``
the gated delta rule, whose queries and keys have length 1 (Gated DeltaNet).  Positions are known by decay alone, so
there is no rotary, and there are no attention weights to drop.  Everything but the state before this rank's tokens is
local; where that comes from is the business of ``states``, which the rooms above replace (a ring or a gather under
context parallelism, the state so far when generating).

Shapes: B sequences, T tokens, D model width, H query heads, G key/value heads, K head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from stretto.models.attention import Attention
from stretto.models.chunked import Summary, Tokens, summarise
from stretto.models.norm import RMSNorm, at_least_float32

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from stretto.models.context import Context
    from stretto.spec.model import ModelSpec

SLOWNESS = 16.0
"""The logarithm of a decay is divided by this, so that states start out long-lived (GLA)."""


class States(Protocol):
    """The opening of a layer that keeps a state."""

    def lengths(self, context: Context, tokens: int, /) -> Sequence[int]:
        """Tokens of each stretch of consecutive ones among ``tokens``."""

    def begin(self, stretches: Sequence[Summary], context: Context, /) -> Callable[[], Sequence[Tensor]]:
        """Send for the state before each stretch, [B, G, K, K]; a call of what is returned waits for them."""


class NoState:
    """The opening where rows are whole: nothing was before them."""

    def lengths(self, context: Context, tokens: int) -> Sequence[int]:
        """All tokens follow each other."""
        return (tokens,)

    def begin(self, stretches: Sequence[Summary], context: Context) -> Callable[[], Sequence[Tensor]]:
        """Zeros."""
        return lambda: [torch.zeros_like(stretch.gain[:, :, 0]) for stretch in stretches]


class LinearAttention(nn.Module):
    """A layer in the place of attention whose cost grows with the tokens, not with their square."""

    def __init__(self, spec: ModelSpec, *, delta: bool, input_bias: bool, output_bias: bool) -> None:
        super().__init__()
        size, width = spec.head_size, spec.hidden_size
        self.head_size = size
        self.q = nn.Linear(width, spec.num_heads * size, bias=input_bias)
        self.k = nn.Linear(width, spec.kv_heads * size, bias=input_bias)
        self.v = nn.Linear(width, spec.kv_heads * size, bias=input_bias)
        self.decay = nn.Linear(width, spec.kv_heads)
        self.write = nn.Linear(width, spec.kv_heads) if delta else None
        self.o_norm = RMSNorm(size, spec.norm_eps)
        self.o = nn.Linear(spec.num_heads * size, width, bias=output_bias)
        self.states: States = NoState()
        self.recompute = False
        """Selective recompute: summarise again in backward instead of keeping what that saved."""

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """Run over the whole sequences ``x_BTD``."""
        heads = [self.split_heads(part(x_BTD)) for part in (self.q, self.k, self.v)]
        decay_BGT = F.logsigmoid(at_least_float32(self.decay(x_BTD))).transpose(1, 2) / SLOWNESS
        write_BGT = None
        if self.write is not None:
            heads[0], heads[1] = (F.normalize(at_least_float32(x), dim=-1) for x in heads[:2])
            write_BGT = at_least_float32(self.write(x_BTD)).sigmoid().transpose(1, 2)
        q_BHTK, k_BGTK, v_BGTK = (x.transpose(1, 2) for x in heads)
        tokens = Tokens(
            q=q_BHTK * self.head_size**-0.5,
            k=k_BGTK,
            v=v_BGTK,
            log_decay=decay_BGT,
            write=write_BGT,
            starts=context.starts,
        )
        if self.recompute and torch.is_grad_enabled():
            out_BHTK = checkpoint(self.scan, tokens, context, use_reentrant=False, preserve_rng_state=False)
        else:
            out_BHTK = self.scan(tokens, context)
        out_BTHK = self.o_norm(out_BHTK.transpose(1, 2).to(x_BTD.dtype))
        return self.o(out_BTHK.flatten(2))

    def scan(self, tokens: Tokens, context: Context) -> Tensor:
        """The recurrence, [B, H, T, K]."""
        stretches, at = [], 0
        for length in self.states.lengths(context, tokens.k.size(2)):
            stretches.append(summarise(tokens.narrow(at, length)))
            at += length
        before = self.states.begin(stretches, context)
        readings = [stretch.read() for stretch in stretches]  # while the states are under way
        return torch.cat([part.output(state) for part, state in zip(readings, before(), strict=True)], dim=2)

    def split_heads(self, x: Tensor) -> Tensor:
        """View [B, T, heads here * K] as [B, T, heads here, K]."""
        return x.view(x.size(0), x.size(1), -1, self.head_size)


def attention_of(spec: ModelSpec, layer: int, *, input_bias: bool, output_bias: bool) -> nn.Module:
    """What layer ``layer`` has in the place of attention, as ``spec.attention`` says."""
    kind = spec.attention_of(layer)
    if kind == "softmax":
        return Attention(spec, layer, input_bias=input_bias, output_bias=output_bias)
    return LinearAttention(spec, delta=kind == "delta", input_bias=input_bias, output_bias=output_bias)
