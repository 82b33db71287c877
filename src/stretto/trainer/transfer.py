"""Batches to the device that trains on them."""

from __future__ import annotations

import torch

from stretto.spec.contract import Batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch on ``device``; the copy overlaps with what runs there."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, non_blocking=True)

    return Batch(
        tokens=move(batch.tokens),
        labels=move(batch.labels),
        positions=move(batch.positions),
        documents=None if batch.documents is None else move(batch.documents),
        samples=move(batch.samples),
    )
