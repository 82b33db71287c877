"""From logits to the next token.

Temperature divides the logits; top-k keeps the k likeliest tokens; top-p (nucleus sampling,
Holtzman et al. 2019) keeps the fewest tokens whose probabilities reach p.  Drawn on the CPU in
float64 with a generator of its own, so that a seed gives the same text on every machine.

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from stretto.spec.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


COLDEST = 1e-30
"""Temperature below which logits over it overflow, and only the likeliest token has any probability anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 1.0
    """Logits are divided by it; 0: always the likeliest token."""
    top_k: int | None = None
    """Choose among so many of the likeliest tokens; None: all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens whose probabilities reach this."""
    seed: int = 0
    """Decides the draws."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a value out of range."""
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature {self.temperature} can't be; it may be 0 (greedy) or any number above.")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k {self.top_k} leaves no token; it may be 1 or more.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p} is no probability to reach; it may be above 0 and at most 1.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed {self.seed} can't be; it may be at least 0 and below 2^63.")


class Sampler:
    """Chooses tokens one after the other."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.generator = torch.Generator().manual_seed(sampling.seed)

    def __call__(self, logits_V: Tensor) -> int:
        """Return the next token."""
        if self.sampling.temperature < COLDEST:
            return int(logits_V.argmax())
        probabilities = distribution(logits_V.detach().cpu().double(), self.sampling)
        return int(torch.multinomial(probabilities, 1, generator=self.generator))


def distribution(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities [V] that the next token is drawn from; ``temperature`` isn't 0."""
    ordered, index = (logits_V / sampling.temperature).sort(descending=True, stable=True)
    probabilities = ordered.softmax(0)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if sampling.top_k is not None:
        keep[sampling.top_k :] = False
    if sampling.top_p < 1:
        probabilities = probabilities * keep / (probabilities * keep).sum()
        # A token stays while those before it fall short of p, so the likeliest always does.
        keep &= probabilities.cumsum(0) - probabilities < sampling.top_p
    kept = probabilities * keep
    return torch.zeros_like(kept).scatter_(0, index, kept / kept.sum())
