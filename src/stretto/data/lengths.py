"""How long the documents of a step are, without making its batches: what dynamic groups place (numpy alone).

labels       a a a . │ b b │ c c c c .        . IGNORE: nothing follows
documents    0 0 0 0 │ 1 1 │ 2 2 2 2 2        ──► 3, 2, 4 tokens; one without any label is left out
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stretto.data.loader import Loader
from stretto.data.packing import Rows
from stretto.spec.contract import IGNORE


def document_lengths(rows: Rows, *, isolate: bool) -> list[int]:
    """Tokens of each document of some rows up to its last label, in their order; without ``isolate`` a row is one."""
    counted = rows.labels != IGNORE
    begins = np.zeros(counted.shape, dtype=bool)
    begins[:, 0] = True
    if isolate:
        begins[:, 1:] = rows.documents[:, 1:] != rows.documents[:, :-1]
    first = np.flatnonzero(begins)
    within = np.arange(counted.size) - np.repeat(first, np.diff(np.append(first, counted.size)))
    lengths = np.maximum.reduceat(np.where(counted.ravel(), within + 1, 0), first)
    found: list[int] = lengths[lengths > 0].tolist()
    return found


def lengths_of_steps(loader: Loader, steps: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Lengths of the documents that ``loader`` reads in each of some steps (from 1)."""
    isolate = loader.split.isolate
    return tuple(tuple(document_lengths(loader.rows(step), isolate=isolate)) for step in steps)
