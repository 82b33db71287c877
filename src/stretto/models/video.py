"""A small diffusion transformer over video, whose blocks look along one dim at a time: patches, then frames.

    noisy video ─► embed ─► [ x + patches of a frame ─► x + frames of a patch ─► x + feed-forward ] x L ─► velocity
                              each scaled, shifted and gated by the diffusion time (adaLN, DiT; Latte, Open-Sora)

Neither attention needs the other's dim, so a rank may hold a part of either: of the frames while patches look at each
other, of the patches while frames do.  ``switch`` is the opening that moves the cut (DSP); alone it does nothing.

Shapes: B videos, F frames, P patches of a frame, C channels of a patch, D model width, K head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from stretto.spec.sequence import Range

FRAMES, PATCHES = 1, 2
"""Dims of a video [B, F, P, D]."""
PERIODS = 64
"""Sines, and cosines, that tell the diffusion time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSpec:
    """Sizes of the model."""

    frames: int = 8
    patches: int = 16
    channels: int = 4
    hidden_size: int = 32
    num_heads: int = 4
    num_layers: int = 2


class Switch(Protocol):
    """The opening: which part of a video is here."""

    def own(self, dim: int, size: int, /) -> Range:
        """What of ``size`` frames or patches is here while ``dim`` is cut."""

    def __call__(self, x: Tensor, cut: int, into: int, size: int, /) -> Tensor:
        """Move the cut: ``x`` has part of dim ``cut`` (of ``size``) and all of ``into``; after it is the reverse."""


class Whole:
    """The opening where all of a video is here."""

    def own(self, dim: int, size: int) -> Range:
        """All."""
        return 0, size

    def __call__(self, x: Tensor, cut: int, into: int, size: int) -> Tensor:
        """Nothing to move."""
        return x


class AxialAttention(nn.Module):
    """Attention along one dim of a video, without a mask."""

    def __init__(self, spec: VideoSpec, dim: int) -> None:
        super().__init__()
        self.dim, self.heads = dim, spec.num_heads
        self.qkv = nn.Linear(spec.hidden_size, 3 * spec.hidden_size)
        self.o = nn.Linear(spec.hidden_size, spec.hidden_size)

    def forward(self, x_BFPD: Tensor) -> Tensor:
        """Attend along ``dim``, the other being one more batch dim."""
        x = x_BFPD if self.dim == PATCHES else x_BFPD.transpose(FRAMES, PATCHES)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(3)
        return self.o(out if self.dim == PATCHES else out.transpose(FRAMES, PATCHES))


class VideoBlock(nn.Module):
    """Patches, frames, feed-forward; each modulated by the diffusion time."""

    def __init__(self, spec: VideoSpec) -> None:
        super().__init__()
        width = spec.hidden_size
        self.patches = AxialAttention(spec, PATCHES)
        self.frames = AxialAttention(spec, FRAMES)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 9 * width)

    def forward(self, x_BFPD: Tensor, time_BD: Tensor, switch: Switch, frames: int) -> Tensor:
        """From a part of the ``frames`` to a part of the patches."""
        shifts = self.modulation(F.silu(time_BD))[:, None, None].chunk(9, dim=-1)
        x = x_BFPD + modulated(self.patches, x_BFPD, shifts[:3])
        x = switch(x, FRAMES, PATCHES, frames)
        x = x + modulated(self.frames, x, shifts[3:6])
        return x + modulated(self.feed_forward, x, shifts[6:])


def modulated(part: nn.Module, x: Tensor, by: tuple[Tensor, ...]) -> Tensor:
    """``gate * part(norm(x) * (1 + scale) + shift)``."""
    shift, scale, gate = by
    return gate * part(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)


class VideoTransformer(nn.Module):
    """Tells a noisy video's velocity at a diffusion time (rectified flow)."""

    def __init__(self, spec: VideoSpec) -> None:
        super().__init__()
        width = spec.hidden_size
        self.spec = spec
        self.embed = nn.Linear(spec.channels, width)
        self.frame_places = nn.Parameter(torch.randn(spec.frames, 1, width) * 0.02)
        self.patch_places = nn.Parameter(torch.randn(spec.patches, width) * 0.02)
        self.time = nn.Sequential(nn.Linear(2 * PERIODS, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(VideoBlock(spec) for _ in range(spec.num_layers))
        self.velocity = nn.Linear(width, spec.channels)
        self.switch: Switch = Whole()

    def forward(self, x_BFPC: Tensor, time_B: Tensor) -> Tensor:
        """From own frames [B, F here, P, C] to the velocity of own patches [B, F, P here, C]."""
        spec = self.spec
        places = self.frame_places[slice(*self.switch.own(FRAMES, spec.frames))] + self.patch_places
        x = self.embed(x_BFPC) + places
        time_BD = self.time(waves(time_B).to(x.dtype))
        for index, block in enumerate(self.blocks):
            if index:
                x = self.switch(x, PATCHES, FRAMES, spec.patches)
            x = cast("Tensor", block(x, time_BD, self.switch, spec.frames))
        return self.velocity(F.layer_norm(x, x.shape[-1:]))


def waves(time_B: Tensor) -> Tensor:
    """Sines and cosines of a time in [0, 1], [B, 2 * PERIODS]."""
    speeds = torch.exp(-math.log(1e4) * torch.arange(PERIODS, device=time_B.device, dtype=time_B.dtype) / PERIODS)
    angles = 1e3 * time_B.unsqueeze(-1) * speeds
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
