"""Which documents are held out for evaluation.

Document i is held out if a hash of i falls below the fraction: the same ones on every machine, and
those of a corpus that grew at its end stay where they were.
"""

from __future__ import annotations

import numpy as np

from stretto.data.order import keyed
from stretto.spec.errors import ConfigError

Spans = tuple[np.ndarray, np.ndarray]
"""int64 start and int64 length of documents in a shard."""


def split(offsets: np.ndarray, fraction: float) -> dict[str, Spans]:
    """Spans of the documents of ``train`` and, if ``fraction`` > 0, of ``validation``.

    ``offsets`` int64 [documents + 1].  Both sides get at least one document; a corpus that is a single
    document is cut in two, its end being held out.  Documents of a single token teach nothing and are left out.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"data.validation_fraction = {fraction} must be at least 0 and less than 1.")
    start, length = offsets[:-1], np.diff(offsets)
    start, length = start[length > 1], length[length > 1]
    if fraction == 0:
        return {"train": (start, length)}
    if len(start) == 1 and length[0] >= 4:
        held_tokens = min(max(2, round(length[0] * fraction)), length[0] - 2)
        start = np.array([start[0], start[0] + length[0] - held_tokens])
        length = np.array([length[0] - held_tokens, held_tokens])
        held = np.array([False, True])
    else:
        rank = keyed(np.arange(len(start))) / 2.0**64
        held = rank < fraction
        if len(start) and not held.any():
            held[np.argmin(rank)] = True
        if len(start) > 1 and held.all():
            held[np.argmax(rank)] = False
    return {"train": (start[~held], length[~held]), "validation": (start[held], length[held])}
