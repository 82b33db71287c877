"""Verification of documents in groups of their own: where what a rank recorded lies in the rows of the step.

micro-batch of a rank   │ b b b │ d d │ e e e │ - │        each token knows its row and place there;
rows                    │ a a a a a │ b b b d d d │ ...    filler belongs to none
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stretto.parallel.collectives import all_reduce
from stretto.parallel.mesh import DATA, Mesh
from stretto.parallel.pipeline.segment import Segment, tensors_of
from stretto.spec.contract import Batch

if TYPE_CHECKING:
    from stretto.trainer.verify_rank import Patch

Make = Callable[[str, tuple[int, ...], np.ndarray], "Patch"]


class PlacedOutputs:
    """Records what each segment of a rank gives in the forward pass of one step, row by row.

    Args:
        segments: of all stages of the rank.
        mesh: where it sits.
        rows: of the global batch.
        make: makes a patch of a part's name, an offset and values.
    """

    def __init__(self, segments: Sequence[Segment], mesh: Mesh, *, rows: int, make: Make) -> None:
        self._mesh, self._rows, self._make = mesh, rows, make
        self._found: dict[tuple[str, int], list[Patch]] = {}
        self._batches: list[Batch] = []
        self._loss: Tensor | None = None
        self.first_sample = 0
        self.modules = None
        """Nobody looks inside the parts here."""
        for segment in segments:
            segment.run = self._watched(segment.name, segment.run)

    def _watched(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Any, context: Any, batch: Batch) -> Any:
            y = run(x, context, batch)
            key = (name, id(batch))  # what is recomputed runs again; the first time counts
            if key not in self._found:
                self._batches.append(batch)  # so that nobody else gets its number
                self._found[key] = self._patches(name, tensors_of(y)[0].detach(), batch)
            return y

        return call

    def _patches(self, name: str, y: Tensor, batch: Batch) -> list[Patch]:
        if y.ndim == 0:
            self._loss = y.double() + (0.0 if self._loss is None else self._loss)
            return []
        start = batch.tokens.shape[1] // self._mesh.size("tp") * self._mesh.index("tp")
        rest = (0,) * (y.ndim - 2)
        return [
            self._make(name, (sample - self.first_sample, at, *rest), y[:, part].numpy().copy())
            for sample, at, part in source_runs(batch, start, y.shape[1])
        ]

    def take(self) -> list[Patch]:
        """What was recorded since the last time; of the end of the model the loss of all rows together, summed over
        the ranks that have some of their tokens (collective along them)."""
        found = [patch for patches in self._found.values() for patch in patches]
        if self._loss is not None:
            all_reduce(self._loss, self._mesh.group(*DATA)).wait()
            found.append(self._make("outputs", (0, self._rows), self._loss.numpy()))
        self._found, self._batches, self._loss = {}, [], None
        return found


def source_runs(batch: Batch, start: int, length: int) -> Iterator[tuple[int, int, slice]]:
    """Stretches of the tokens ``start`` to ``start + length`` that follow each other in a row.

    Yields the sample, the place in its row, and where the stretch lies among the tokens; filler is left out.
    """
    assert batch.part is not None and batch.part.sources is not None, "the batch was not placed"
    sources = batch.part.sources[start : start + length]
    follows = torch.zeros(length, dtype=torch.bool)
    follows[1:] = (sources[1:, 0] == sources[:-1, 0]) & (sources[1:, 1] == sources[:-1, 1] + 1)
    begins = [*(~follows).nonzero().flatten().tolist(), length]
    for first, stop in pairwise(begins):
        sample, place = sources[first].tolist()
        if sample >= 0:
            yield sample, place, slice(first, stop)
