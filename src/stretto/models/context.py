"""What all blocks of a micro-batch share: rotary tables, the attention mask, and what keys dropout.

It is made once per micro-batch and stage and holds no parameters, so blocks stay functions of
``(x, context)`` and never ask which axis of the mesh they lie on.

Shapes: B sequences, T tokens, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from stretto.spec.contract import Batch, Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What the blocks of one micro-batch share."""

    place: Place
    """Which part of the micro-batch this rank sees, and the seed and step of dropout."""
    samples: Tensor
    """int64 [B], global sample index of each row."""
    mask: Tensor | None
    """bool [B or 1, 1, T, T], True where a query (dim 2) sees a key (dim 3); None: plain causal."""
    rotary: tuple[Tensor, Tensor] | None
    """Cosine and sine [B, T, 1, K] at each token's position; None: the model isn't rotary."""


def attention_mask(batch: Batch, window: int | None) -> Tensor | None:
    """Return who sees whom, bool [B or 1, 1, T, T], or None where plain causal attention is right.

    A query sees the keys of its own document that aren't later than itself and, with ``window``,
    are among the last ``window`` tokens up to itself.
    """
    length = batch.tokens.size(1)
    if window is not None and window >= length:
        window = None
    if batch.documents is None and window is None:
        return None
    index = torch.arange(length, device=batch.tokens.device)
    distance = index.unsqueeze(1) - index
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    mask = mask.view(1, 1, length, length)
    if batch.documents is not None:
        same = batch.documents.unsqueeze(2) == batch.documents.unsqueeze(1)
        mask = mask & same.unsqueeze(1)
    return mask
