"""A video transformer whose cut moves between frames and patches gives the loss and gradients of one rank (DSP)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from equivalence.reference import error
from ranks import Ranks
from stretto.models.video import FRAMES, PATCHES, VideoSpec, VideoTransformer
from stretto.parallel.sequence.switch import CutSwitch, switch_bytes
from stretto.parallel.wire import Wire

# 7 frames and 9 patches over 2 and 4 ranks: all parts are uneven.
SPEC = VideoSpec(frames=7, patches=9, hidden_size=16, num_layers=3)
VIDEOS = 2


def train(rank: int, world: int, replicas: int = 1) -> dict[str, Any]:
    """One step on this rank's part of its replica's videos; loss and gradients are shares of the sum over ranks."""
    torch.manual_seed(0)
    model = VideoTransformer(SPEC).double()
    video = torch.randn(VIDEOS, SPEC.frames, SPEC.patches, SPEC.channels, dtype=torch.float64)
    target, time = torch.randn_like(video), torch.rand(VIDEOS, dtype=torch.float64)
    cut = world // replicas
    own = slice(rank // cut * VIDEOS // replicas, (rank // cut + 1) * VIDEOS // replicas)
    video, target, time = video[own], target[own], time[own]
    each = [range(replica * cut, (replica + 1) * cut) for replica in range(replicas)]
    wire = Wire([torch.distributed.new_group(members) for members in each][rank // cut] if world > 1 else None)
    switch = CutSwitch(wire=wire, ranks=cut)
    if cut > 1:
        model.switch = switch
    frames, patches = switch.own(FRAMES, SPEC.frames), switch.own(PATCHES, SPEC.patches)
    out = model(video[:, slice(*frames)], time)
    assert out.shape == (len(video), SPEC.frames, patches[1] - patches[0], SPEC.channels)
    loss = (out - target[:, :, slice(*patches)]).square().sum()
    forward = wire.sent
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    if replicas > 1:  # as data parallelism does: all ranks, those of a replica too, have shares of one sum
        for gradient in gradients.values():
            torch.distributed.all_reduce(gradient)
    return {"loss": loss.item(), "gradients": gradients, "sent": (forward, wire.sent - forward)}


@pytest.mark.parametrize("world", [2, 4])
def test_switched_dims_equal_one_rank(ranks: Ranks, world: int) -> None:
    (whole,) = ranks.run(train, 1)
    found = ranks.run(train, world)
    assert abs(sum(f["loss"] for f in found) - whole["loss"]) <= 1e-12 * whole["loss"]
    for name, expected in whole["gradients"].items():
        assert error(sum(f["gradients"][name] for f in found), expected) <= 1e-11, name
    switch = CutSwitch(wire=Wire(None), ranks=world)
    frames, patches = switch.parts(SPEC.frames), switch.parts(SPEC.patches)
    token = VIDEOS * SPEC.hidden_size * 8
    for rank, result in enumerate(found):
        there = switch_bytes((frames, patches), rank, token_bytes=token)
        back = switch_bytes((patches, frames), rank, token_bytes=token)
        # Each layer moves the cut to the patches, each but the first begins by moving it back.
        assert result["sent"] == (3 * there + 2 * back, 3 * back + 2 * there)


def test_replicas_share_the_sum_with_the_ranks_of_a_cut(ranks: Ranks) -> None:
    (whole,) = ranks.run(train, 1)
    found = ranks.run(train, 4, 2)
    assert abs(sum(f["loss"] for f in found) - whole["loss"]) <= 1e-12 * whole["loss"]
    for result in found:
        for name, expected in whole["gradients"].items():
            assert error(result["gradients"][name], expected) <= 1e-11, name
    half = ranks.run(train, 2)
    assert [2 * sent for sent in found[0]["sent"]] == list(half[0]["sent"]), "a cut of two, half of the videos"
