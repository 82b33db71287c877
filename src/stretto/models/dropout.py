"""Dropout whose mask is a pure function of what is dropped, not of a random stream.

Whether an element is kept follows from (seed, step, sample, site, token, channel) through an
integer hash.  Every plan therefore drops the same elements, whichever rank computes them, and a
recomputed forward drops them again without saving a generator's state (counter-based generators:
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the mixing function is the
finaliser of SplitMix64).  Nothing is computed at p = 0.

Sites, per model: 0 the embedding, then three per layer.

Shapes: B sequences, T tokens, D channels, H heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from stretto.models.context import Context

EMBEDDING = 0
"""Site of the dropout after the embedding."""
PER_LAYER = 3
"""Sites of a layer: attention weights, attention output, feed-forward output."""

WORD = 1 << 64
STRIDE = 0x9E3779B97F4A7C15
FIRST = 0xBF58476D1CE4E5B9
SECOND = 0x94D049BB133111EB


def signed(word: int) -> int:
    """Return the int64 that has the bits of the unsigned 64-bit ``word``."""
    word %= WORD
    return word - WORD if word >= WORD >> 1 else word


def mix_integer(word: int) -> int:
    """Mix a 64-bit integer: each bit of the input flips each bit of the output half of the time."""
    word %= WORD
    word = (word ^ word >> 30) * FIRST % WORD
    word = (word ^ word >> 27) * SECOND % WORD
    return word ^ word >> 31


def mix(words: Tensor) -> Tensor:
    """Mix an int64 tensor in place, element by element, like ``mix_integer``."""
    # >> keeps the sign in torch, so the bits it shifts in are masked away.
    words ^= (words >> 30).bitwise_and_((1 << 34) - 1)
    words *= signed(FIRST)
    words ^= (words >> 27).bitwise_and_((1 << 37) - 1)
    words *= signed(SECOND)
    words ^= (words >> 31).bitwise_and_((1 << 33) - 1)
    return words


def extend(keys: Tensor, index: Tensor) -> Tensor:
    """Return keys [..., n]: every key of ``keys`` [...] continued by every number of ``index`` [n]."""
    return mix(keys.unsqueeze(-1) + index * signed(STRIDE))


def sample_keys(context: Context, site: int) -> Tensor:
    """Return one key per sequence, int64 [B], for this seed, step and site."""
    return keys_of(context.samples, context, site)


def keys_of(samples: Tensor, context: Context, site: int) -> Tensor:
    """Return one key per sample for this seed, step and site, int64 like ``samples``."""
    key = 0
    for number in (context.place.seed, context.place.step, site):
        key = mix_integer(key + (number + 1) * STRIDE)
    return mix(samples * signed(STRIDE) + signed(key))


def token_keys(context: Context, site: int, length: int, device: torch.device) -> Tensor:
    """Return one key per token between attention and feed-forward, int64 [B, ``length``], by its place in its row."""
    sources = None if context.part is None else context.part.sources
    if sources is None:
        return extend(sample_keys(context, site), context.tokens(length, device))
    start = context.place.token_start
    samples, places = sources[start : start + length].unbind(1)
    return mix(keys_of(samples, context, site) + places * signed(STRIDE)).unsqueeze(0)


def kept(keys: Tensor, p: float) -> Tensor:
    """Return True with probability 1 - p, decided by each key."""
    return keys >= signed(round(p * WORD) - (WORD >> 1)) if p < 1.0 else torch.zeros_like(keys, dtype=torch.bool)


def scale_kept(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """Return x / (1 - p) where kept and 0 elsewhere; only the bool mask is saved for backward."""
    return torch.where(keep, x, 0.0) * (1.0 / (1.0 - p) if p < 1.0 else 0.0)


class Dropout:
    """Dropout of activations at one site.

    torch.compile leaves it out of its graphs: step and site are numbers that would each ask for a
    compilation of their own.
    """

    def __init__(self, p: float, site: int) -> None:
        self.p = p
        self.site = site

    def __call__(self, x_BTD: Tensor, context: Context) -> Tensor:
        """Drop activations, each by where its token sits in the whole row."""
        return x_BTD if self.p == 0.0 else self.drop(x_BTD, context)

    @torch.compiler.disable
    def drop(self, x_BTD: Tensor, context: Context) -> Tensor:
        """Drop where something is dropped."""
        if not context.place.training:
            return x_BTD
        channels = torch.arange(x_BTD.size(2), device=x_BTD.device)
        keys = extend(token_keys(context, self.site, x_BTD.size(1), x_BTD.device), channels)
        return scale_kept(x_BTD, kept(keys, self.p), self.p)


Span = tuple[int, int]
"""Numbers from the first up to, without, the second."""


class AttentionDropout:
    """Dropout of attention weights, keyed by query head and by the positions of query and key."""

    def __init__(self, p: float, site: int, context: Context) -> None:
        self.p = p
        self.head_start = context.place.head_start
        self.keys = sample_keys(context, site)
        self.start = 0
        self._context, self._site = context, site

    def of_document(self, sample: int, start: int) -> AttentionDropout:
        """Return the same for a document at token ``start`` of a sample's row, in which tokens are then counted."""
        found = AttentionDropout(self.p, self._site, self._context)
        found.keys = keys_of(torch.full_like(self.keys[:1], sample), self._context, self._site)
        found.start = start
        return found

    def kept(self, heads: Span, queries: Span, keys: Span) -> Tensor:
        """Return which weights stay, bool [B, heads, queries, keys].

        Heads count among those of this rank (``place.head_start`` onwards), queries and keys in the whole row, or in
        the document.
        """
        h, q, k = (torch.arange(*span, device=self.keys.device) for span in (heads, queries, keys))
        return kept(extend(extend(extend(self.keys, h + self.head_start), q + self.start), k + self.start), self.p)

    def __call__(self, heads: Span, queries: Span, keys: Span) -> Tensor:
        """Return the factor of each weight, 0 or 1 / (1 - p)."""
        return scale_kept(
            torch.ones((), dtype=torch.float64, device=self.keys.device), self.kept(heads, queries, keys), self.p
        )


def drop_attention(weights_BHTT: Tensor, p: float, site: int, context: Context) -> Tensor:
    """Drop attention weights of whole rows, of heads ``place.head_start`` onwards."""
    _, heads, queries, keys = weights_BHTT.shape
    keep = AttentionDropout(p, site, context).kept((0, heads), (0, queries), (0, keys))
    return scale_kept(weights_BHTT, keep, p)
