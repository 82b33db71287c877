"""The two feed-forwards: gated (SwiGLU, Shazeer 2020) and plain (GPT-2's tanh GELU)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from stretto.models.context import Context


class GatedFeedForward(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, width: int, inner: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=bias)
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """Transform each token by itself; ``context`` is not needed."""
        gate, up = self.gate(x_BTD), self.up(x_BTD)
        return self.down(F.silu(gate) * up)


class FeedForward(nn.Module):
    """``down(gelu(up(x)))`` with the tanh approximation of GELU."""

    def __init__(self, width: int, inner: int, *, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """Transform each token by itself; ``context`` is not needed."""
        return self.down(F.gelu(self.up(x_BTD), approximate="tanh"))
