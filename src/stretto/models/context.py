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

    from stretto.spec.contract import Batch, Place, SequencePart


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
    part: SequencePart | None = None
    """Where this rank's tokens sit in rows that are cut over ranks; None: rows are whole, and ``mask`` holds."""
    first: Tensor | None = None
    """Of rows that are cut, int64 [B or 1, S] on the CPU: the first token of the row that each token sees; None: all
    that precede it."""
    starts: Tensor | None = None
    """bool [B, T], where this rank's tokens begin a document, for layers that keep a state; None: only rows begin."""

    def tokens(self, length: int, device: torch.device) -> Tensor:
        """Where in their rows the tokens sit that lie between attention and feed-forward, int64 [``length``]."""
        start = self.place.token_start
        if self.part is not None:
            return self.part.tokens[start : start + length]
        return torch.arange(start, start + length, device=device)


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


def first_seen(part: SequencePart, window: int | None) -> Tensor | None:
    """The first token of the row that each token sees, int64 [B or 1, S] on the CPU; None: all that precede it.

    The same rule as ``attention_mask``: what a query sees are the tokens from this one up to itself.
    """
    length = part.length
    if window is not None and window >= length:
        window = None
    if part.documents is None and window is None:
        return None
    index = torch.arange(length)
    first = torch.zeros(1, length, dtype=torch.int64)
    if part.documents is not None:
        documents = part.documents.cpu()
        starts = torch.cat([torch.ones_like(documents[:, :1], dtype=torch.bool), documents.diff(dim=1) != 0], dim=1)
        first = torch.where(starts, index, 0).cummax(1).values
    if window is not None:
        first = first.maximum(index - (window - 1))
    return first
