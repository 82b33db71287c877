"""Masters: the tensors that the optimizer updates, and where each sits in its global parameter.

A master is either a rank's whole slice of a parameter, or (under dp_shard) a flat range of it, in
float32 or wider.  Checkpoints, the gradient norm and weight decay all go through masters, so none of
them knows how a unit is sharded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from stretto.spec.contract import Piece
from stretto.spec.sharding import Sharding, rectangles

if TYPE_CHECKING:
    from stretto.parallel.mesh import Holders, Mesh


@dataclass(slots=True, kw_only=True, eq=False)
class Master:
    """One tensor of the optimizer; its gradient is ``tensor.grad``."""

    tensor: Tensor
    """The values, shaped like the slice, or flat where only a range is held."""
    sharding: Sharding
    """Name, global shape and slice of the parameter."""
    start: int
    """First element held, counted in the flat slice."""
    stop: int
    """One past the last element held."""
    counted: bool
    """Whether this rank's copy counts in the gradient norm (replicated and tied copies count once)."""
    owned: bool
    """Whether this rank writes it to checkpoints."""
    trained: bool = True
    """Whether it gets gradients; a frozen one has no moments."""

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: weights of two or more dims, not norms and biases."""
        return len(self.sharding.shape) >= 2

    def pieces(self, kind: str, values: Tensor) -> Iterator[Piece]:
        """``values`` (the tensor, or a moment of it) as rectangles of ``<kind>.<parameter name>``.

        A tied copy goes by the name of its original: there is one such tensor in the model.
        """
        flat = values.detach().view(-1)
        origin = self.sharding.slice.offset
        for at, part in rectangles(self.sharding.slice.length, self.start, self.stop):
            yield Piece(
                name=f"{kind}.{self.sharding.tied_to or self.sharding.name}",
                shape=self.sharding.shape,
                offset=tuple(o + p for o, p in zip(origin, part.offset, strict=True)),
                tensor=flat[at : at + part.numel].view(part.length),
                owned=self.owned,
            )


def counts_here(sharding: Sharding, mesh: Mesh, holders: Holders | None = None) -> bool:
    """Whether this rank's copy is the one that counts: the first holder's, its own tp slice or the first of equal ones.

    ``holders``: the pipeline ranks that hold the parameter; None: this one alone.
    """
    first = holders is None or holders.ranks[0] == mesh.index("pp")
    return first and (sharding.tp_dim is not None or mesh.index("tp") == 0)
