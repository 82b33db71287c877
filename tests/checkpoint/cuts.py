"""Random cuttings of tensors into owned rectangles, for the checkpoint tests."""

from __future__ import annotations

import math
import random

import torch

from stretto.spec.contract import Piece
from stretto.spec.sharding import rectangles

SHAPES: dict[str, tuple[int, ...]] = {
    "model.inputs.weight": (13, 6),
    "model.blocks.0.norm.weight": (7,),
    "model.blocks.0.experts": (3, 4, 5),
    "optimizer.exp_avg.blocks.0": (5, 8),
    "optimizer.step": (),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def values(seed: int) -> dict[str, torch.Tensor]:
    """The global tensors of ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(DTYPES[i % 3])
        for i, (name, shape) in enumerate(SHAPES.items())
    }


def cutting(
    name: str, shape: tuple[int, ...], parts: int, seed: int
) -> list[list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """``parts`` lists of (offset, length): along a dim, or as flat ranges, or all to one part."""
    rng = random.Random(f"{name} {parts} {seed}")
    result: list[list[tuple[tuple[int, ...], tuple[int, ...]]]] = [[] for _ in range(parts)]
    total = math.prod(shape)
    if not shape or rng.random() < 0.2:
        result[rng.randrange(parts)].append(((0,) * len(shape), shape))
        return result
    if rng.random() < 0.5:
        dim = rng.randrange(len(shape))
        bounds = [0, *sorted(rng.randint(0, shape[dim]) for _ in range(parts - 1)), shape[dim]]
        for part in range(parts):
            offset = tuple(bounds[part] if d == dim else 0 for d in range(len(shape)))
            length = tuple(bounds[part + 1] - bounds[part] if d == dim else n for d, n in enumerate(shape))
            result[part].append((offset, length))
        return result
    bounds = [0, *sorted(rng.randint(0, total) for _ in range(parts - 1)), total]
    for part in range(parts):
        for _, slice_ in rectangles(shape, bounds[part], bounds[part + 1]):
            result[part].append((slice_.offset, slice_.length))
    return result


def part_of(tensor: torch.Tensor, offset: tuple[int, ...], length: tuple[int, ...]) -> torch.Tensor:
    """The rectangle of ``tensor``."""
    return tensor[tuple(slice(o, o + n) for o, n in zip(offset, length, strict=True))]


def pieces_of(rank: int, world: int, *, seed: int, cut_seed: int, filled: bool) -> list[Piece]:
    """This rank's pieces; ``filled`` with the values of ``seed``, else empty.  Rank 1 has an unowned copy more."""
    found = []
    for name, whole in values(seed).items():
        shape = tuple(whole.shape)
        for offset, length in cutting(name, shape, world, cut_seed)[rank]:
            local = part_of(whole, offset, length)
            tensor = local.clone() if filled else torch.full_like(local, -7.0)
            found.append(Piece(name=name, shape=shape, offset=offset, tensor=tensor))
        if rank == 1:
            copy = whole.clone() if filled else torch.full_like(whole, -7.0)
            found.append(Piece(name=name, shape=shape, offset=(0,) * len(shape), tensor=copy, owned=False))
    return found


def differing(pieces: list[Piece], seed: int) -> list[str]:
    """Names of the pieces that aren't bitwise the values of ``seed``."""
    whole = values(seed)
    return [
        p.name for p in pieces if not torch.equal(p.tensor, part_of(whole[p.name], p.offset, tuple(p.tensor.shape)))
    ]
