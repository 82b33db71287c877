"""Micro-batches to the device that trains on them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from stretto.spec.contract import Batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same micro-batch on ``device``; the host doesn't wait for what runs there.

    Documents of whole rows stay where they are: who sees whom is worked out on the host.
    """

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else move(tensor)

    part, clips = batch.part, batch.clips
    if clips is not None:
        clips = replace(clips, noisy=move(clips.noisy), velocity=move(clips.velocity), time=move(clips.time))
    return Batch(
        tokens=move(batch.tokens),
        labels=move(batch.labels),
        positions=move(batch.positions),
        documents=moved(batch.documents),
        samples=move(batch.samples),
        part=None if part is None else replace(part, tokens=move(part.tokens), sources=moved(part.sources)),
        clips=clips,
    )
