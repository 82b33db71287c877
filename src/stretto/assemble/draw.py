"""Initial values: drawn in fixed blocks of rows, each keyed by (seed, parameter name, block).

A rank draws only the blocks that its slice touches, always on the CPU and always in float32, so every
plan, device and dtype starts from the same model.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from stretto.spec.sharding import Slice

ROWS = 256
"""Rows (indices of dim 0) in a block."""


def draw(seed: int, name: str, shape: tuple[int, ...], part: Slice, how: tuple[str, float]) -> Tensor:
    """Values of the rectangle ``part`` of parameter ``name``, float32.

    Args:
        how: ``("normal", std)`` or ``("constant", value)``, as Stack.initial_value gives it.
    """
    kind, number = how
    if kind == "constant":
        return torch.full(part.length, number)
    assert kind == "normal", kind
    if not shape:
        return _block(seed, name, 0, (1,))[0] * number
    values = torch.empty(part.length)
    first, count = part.offset[0], part.length[0]
    rest = tuple(slice(o, o + n) for o, n in zip(part.offset[1:], part.length[1:], strict=True))
    at = first
    while at < first + count:
        index = at // ROWS
        rows = min(ROWS, shape[0] - index * ROWS)
        block = _block(seed, name, index, (rows, *shape[1:]))
        stop = min(first + count, index * ROWS + rows)
        values[at - first : stop - first] = block[at - index * ROWS : stop - index * ROWS][(slice(None), *rest)]
        at = stop
    return values.mul_(number)


def _block(seed: int, name: str, index: int, shape: tuple[int, ...]) -> Tensor:
    key = hashlib.blake2b(f"{seed}/{name}/{index}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    return torch.randn(shape, generator=generator)
