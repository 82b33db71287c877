"""The header that goes before the first message of a kind: how many tensors follow, of which types and shapes.

row 0     count, 1 where the value is a single tensor and not a tuple
row 1..   type, number of dims, dims ...          one row for each tensor
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stretto.parallel.pipeline.segment import Value, tensors_of
from stretto.spec.errors import UnsupportedError

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
MAX_TENSORS, MAX_DIMS = 6, 6
HEADER = (((MAX_TENSORS + 1, MAX_DIMS + 2), torch.int64),)
"""Shape and type of a header."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """What a value is made of."""

    tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    single: bool
    """Whether the value is a tensor, not a tuple."""

    def value_of(self, tensors: list[Tensor]) -> Value:
        """The value that ``tensors`` are the parts of."""
        return tensors[0] if self.single else tuple(tensors)


def header_of(value: Value, stage: int) -> Tensor:
    """The header of ``value``, the output of ``stage``, on the host.  Raises UnsupportedError for what can't travel."""
    tensors = tensors_of(value)
    if len(tensors) > MAX_TENSORS or any(t.ndim > MAX_DIMS or t.dtype not in DTYPES for t in tensors):
        found = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in tensors)
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise UnsupportedError(
            f"stage {stage} passes on {len(tensors)} tensors ({found}); what crosses between pipeline "
            f"ranks may be at most {MAX_TENSORS} tensors of at most {MAX_DIMS} dims, in {names}."
        )
    header = torch.zeros(HEADER[0][0], dtype=HEADER[0][1])
    header[0, 0], header[0, 1] = len(tensors), int(isinstance(value, Tensor))
    for row, t in zip(header[1:], tensors, strict=False):
        row[0], row[1] = DTYPES.index(t.dtype), t.ndim
        row[2 : 2 + t.ndim] = torch.tensor(t.shape)
    return header


def shapes_in(header: Tensor) -> Shapes:
    """What a header says."""
    rows = header.tolist()
    count, single = rows[0][0], rows[0][1]
    tensors = tuple((tuple(r[2 : 2 + r[1]]), DTYPES[r[0]]) for r in rows[1 : 1 + count])
    return Shapes(tensors=tensors, single=bool(single))
