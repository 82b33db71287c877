"""Rotary position embedding (RoFormer), with Llama-3's stretch of the low frequencies.

Each head is turned, pair by pair, by an angle that grows with the position.  A pair is channel i
and channel i + K/2 (the layout of Hugging Face checkpoints):

    channel   0 … K/2-1 │ K/2 … K-1
                a       │    b          ->   a·cos - b·sin │ b·cos + a·sin

Tables are computed in float32 for float32 and bfloat16 models, as Hugging Face does, and in
float64 for float64 models.

Shapes: B sequences, T tokens, H heads, K head size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch import Tensor

    from stretto.spec.model import RopeScaling


def inverse_frequencies(
    head_size: int, theta: float, scaling: RopeScaling | None, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the angle per position of each channel pair, [K / 2].

    With ``scaling``, wavelengths beyond original_positions / low_frequency_factor are slowed by
    ``factor``, those below original_positions / high_frequency_factor are left, and those between
    are blended linearly in 1 / wavelength (Llama 3.1).
    """
    exponent = torch.arange(0, head_size, 2, dtype=dtype, device=device) / head_size
    frequency = 1.0 / (theta**exponent)
    if scaling is None:
        return frequency
    turns = scaling.original_positions * frequency / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequency * (kept + (1.0 - kept) / scaling.factor)


class RotaryTables:
    """Cosine and sine of every position, kept per dtype and device and grown on demand."""

    def __init__(self, head_size: int, theta: float, scaling: RopeScaling | None = None) -> None:
        self.head_size = head_size
        self.theta = theta
        self.scaling = scaling
        self.tables: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def at(self, positions_BT: Tensor, *, dtype: torch.dtype, reach: int | None = None) -> tuple[Tensor, Tensor]:
        """Return cosine and sine [B, T, 1, K] of ``positions_BT`` (int64) in ``dtype``.

        ``reach``: one more than the largest position that may occur; by default T, which holds
        wherever positions count inside a row.
        """
        cos, sin = self.up_to(reach or positions_BT.size(1), dtype=dtype, device=positions_BT.device)
        return cos[positions_BT].unsqueeze(2), sin[positions_BT].unsqueeze(2)

    def up_to(self, length: int, *, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return tables [at least ``length``, K]."""
        key = (dtype, device)
        if key not in self.tables or self.tables[key][0].size(0) < length:
            self.tables[key] = self.compute(length, dtype=dtype, device=device)
        return self.tables[key]

    @torch.no_grad()
    def compute(self, length: int, *, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Compute cosine and sine [``length``, K] of positions 0, 1, ..."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        frequency = inverse_frequencies(self.head_size, self.theta, self.scaling, dtype=exact, device=device)
        angle = torch.outer(torch.arange(length, dtype=exact, device=device), frequency)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(dtype), angle.sin().to(dtype)


def turn(x_BTHK: Tensor, cos: Tensor, sin: Tensor, *, direction: int) -> Tensor:
    """Rotate every pair of channels forwards (``direction`` = 1) or back (-1)."""
    half = x_BTHK.size(-1) // 2
    out = x_BTHK * cos
    out[..., :half].addcmul_(x_BTHK[..., half:], sin[..., :half], value=-direction)
    out[..., half:].addcmul_(x_BTHK[..., :half], sin[..., half:], value=direction)
    return out


class Rotate(torch.autograd.Function):
    """``turn`` with its gradient, which is the turn back: no concatenation, nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn forwards."""
        ctx.save_for_backward(cos, sin)
        return turn(x_BTHK, cos, sin, direction=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Turn the gradient back."""
        cos, sin = ctx.saved_tensors
        return turn(gradients[0], cos, sin, direction=-1), None, None


def apply_rotary(x_BTHK: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate queries or keys by their positions; ``rotary`` is cosine and sine [B, T, 1, K]."""
    cos, sin = rotary
    assert cos.dtype == x_BTHK.dtype, f"rotary tables are {cos.dtype}, heads are {x_BTHK.dtype}"
    return Rotate.apply(x_BTHK, cos, sin)
