"""A diffusion transformer over clips, whose layers look along one dim at a time: patches, then frames.

    noisy clip ─► embed ─► [ x + patches of a frame ─► x + frames of a patch ─► x + feed-forward ] x L ─► velocity
                             each scaled, shifted and gated by the diffusion time (adaLN, DiT; Latte, Open-Sora)

Neither attention needs the other's dim, so a rank may hold a part of either: of the frames while patches look at each
other, of the patches while frames do.  ``switch`` is the opening that moves the cut (DSP); alone it does nothing.

It tells the velocity noise - clip from (1 - t) clip + t noise (rectified flow).  The loss of a token (a patch of a
frame) is the mean square over its channels.

Shapes: B clips, F frames, P patches of a frame, C channels of a patch, D model width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn

from stretto.spec.contract import IGNORE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from stretto.spec.contract import Batch, Clips, Place
    from stretto.spec.model import ModelSpec, VideoSpec
    from stretto.spec.sharding import TensorRule

FRAMES, PATCHES = 1, 2
"""Dims of a clip [B, F, P, D]."""
PERIODS = 64
"""Sines, and cosines, that tell the diffusion time."""


class Switch(Protocol):
    """The opening: which dim of a clip is cut here."""

    def __call__(self, x: Tensor, cut: int, into: int, size: int, /) -> Tensor:
        """Move the cut: ``x`` has part of dim ``cut`` (of ``size``) and all of ``into``; after it is the reverse."""


class Whole:
    """The opening where all of a clip is here."""

    def __call__(self, x: Tensor, cut: int, into: int, size: int) -> Tensor:
        """Nothing to move."""
        return x


class AxialAttention(nn.Module):
    """Attention along one dim of a clip, without a mask."""

    def __init__(self, spec: ModelSpec, dim: int) -> None:
        super().__init__()
        self.dim, self.heads = dim, spec.num_heads
        self.qkv = nn.Linear(spec.hidden_size, 3 * spec.hidden_size)
        self.o = nn.Linear(spec.hidden_size, spec.hidden_size)

    def forward(self, x_BFPD: Tensor) -> Tensor:
        """Attend along ``dim``, the other being one more batch dim."""
        x = x_BFPD if self.dim == PATCHES else x_BFPD.transpose(FRAMES, PATCHES)
        # One batch dim, since fused kernels know no two.
        q, k, v = self.qkv(x).flatten(0, 1).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).view_as(x)
        return self.o(out if self.dim == PATCHES else out.transpose(FRAMES, PATCHES))


class VideoInputs(nn.Module):
    """Embeds noisy patches, their places, and the diffusion time."""

    def __init__(self, spec: ModelSpec, clip: VideoSpec) -> None:
        super().__init__()
        width = spec.hidden_size
        self.embed = nn.Linear(clip.channels, width)
        self.frames = nn.Embedding(clip.frames, width)
        self.patches = nn.Embedding(clip.patches, width)
        self.time = nn.Sequential(nn.Linear(2 * PERIODS, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, batch: Batch, context: None) -> tuple[Tensor, Tensor]:
        """The frames that are here [B, F here, P, D], and the time [B, D]."""
        clips, dtype = clips_of(batch), self.embed.weight.dtype
        places = self.frames.weight[slice(*clips.frames), None] + self.patches.weight
        x_BFPD = self.embed(clips.noisy.to(dtype)) + places
        return x_BFPD, self.time(waves(clips.time.to(torch.promote_types(dtype, torch.float32))).to(dtype))


class VideoBlock(nn.Module):
    """Patches, frames, feed-forward; each modulated by the diffusion time."""

    def __init__(self, spec: ModelSpec, clip: VideoSpec, layer: int) -> None:
        super().__init__()
        width, self.eps = spec.hidden_size, spec.norm_eps
        self.sizes, self.first = (clip.frames, clip.patches), layer == 0
        self.patches = AxialAttention(spec, PATCHES)
        self.frames = AxialAttention(spec, FRAMES)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, spec.intermediate_size), nn.GELU(), nn.Linear(spec.intermediate_size, width)
        )
        self.modulation = nn.Linear(width, 9 * width)
        self.switch: Switch = Whole()

    def forward(self, value: tuple[Tensor, Tensor], context: None) -> tuple[Tensor, Tensor]:
        """A part of the patches after this layer, from one of the patches (in the first layer of the frames)."""
        x_BFPD, time_BD = value
        shifts = self.modulation(F.silu(time_BD))[:, None, None].chunk(9, dim=-1)
        x = x_BFPD if self.first else self.switch(x_BFPD, PATCHES, FRAMES, self.sizes[1])
        x = x + self.modulated(self.patches, x, shifts[:3])
        x = self.switch(x, FRAMES, PATCHES, self.sizes[0])
        x = x + self.modulated(self.frames, x, shifts[3:6])
        return x + self.modulated(self.feed_forward, x, shifts[6:]), time_BD

    def modulated(self, part: nn.Module, x: Tensor, by: tuple[Tensor, ...]) -> Tensor:
        """``gate * part(norm(x) * (1 + scale) + shift)``."""
        shift, scale, gate = by
        return gate * part(F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift)


class VideoOutputs(nn.Module):
    """Final norm, and the velocity."""

    def __init__(self, spec: ModelSpec, clip: VideoSpec) -> None:
        super().__init__()
        self.eps = spec.norm_eps
        self.velocity = nn.Linear(spec.hidden_size, clip.channels)

    def forward(self, value: tuple[Tensor, Tensor], context: None) -> Tensor:
        """Velocity of the patches that are here [B, F, P here, C]."""
        x_BFPD = value[0]
        return self.velocity(F.layer_norm(x_BFPD, x_BFPD.shape[-1:], eps=self.eps))


class VideoTransformer(nn.Module):
    """The model as a Stack (spec.contract.Stack says what the attributes mean)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.video is not None, "checked with the run"
        self.spec = spec
        self.inputs: nn.Module = VideoInputs(spec, spec.video)
        self.blocks = nn.ModuleList(VideoBlock(spec, spec.video, layer) for layer in range(spec.num_layers))
        self.outputs: nn.Module = VideoOutputs(spec, spec.video)
        self.tied: Mapping[str, str] = {}
        self.tensor_rules: Mapping[str, TensorRule] = {}

    def context(self, batch: Batch, place: Place) -> None:
        """Blocks share nothing but the time, which has parameters and so travels with the clip."""

    def loss(self, predictions: Tensor, batch: Batch) -> Tensor:
        """Sum over the valid tokens that are here, float32 at least."""
        exact = torch.promote_types(predictions.dtype, torch.float32)
        wrong = (predictions.to(exact) - clips_of(batch).velocity.to(exact)).square().mean(-1)
        return wrong.masked_fill(batch.labels.view_as(wrong) == IGNORE, 0.0).sum()

    def initial_value(self, name: str) -> tuple[str, float] | None:
        """Biases start at 0, weights normal; what writes to the residual stream is scaled by 1 / sqrt(3 L)."""
        if name.endswith(".bias"):
            return "constant", 0.0
        into_residual = name.endswith((".o.weight", ".feed_forward.2.weight"))
        scale = 1.0 / math.sqrt(3 * self.spec.num_layers) if into_residual else 1.0
        return "normal", self.spec.initial_std * scale


def clips_of(batch: Batch) -> Clips:
    """The clips of a batch that has some."""
    return cast("Clips", batch.clips)


def waves(time_B: Tensor) -> Tensor:
    """Sines and cosines of a time in [0, 1], [B, 2 * PERIODS]."""
    speeds = torch.exp(-math.log(1e4) * torch.arange(PERIODS, device=time_B.device, dtype=time_B.dtype) / PERIODS)
    angles = 1e3 * time_B.unsqueeze(-1) * speeds
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
