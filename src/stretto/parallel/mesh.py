"""Which rank sits where: the mesh of ranks, its axes, and the process groups along them.

Ranks are numbered with tp fastest, then cp, and pp slowest, so that the ranks that talk most sit closest:

    rank = (((pp_i * dp_replicate + dp_replicate_i) * dp_shard + dp_shard_i) * cp + cp_i) * tp + tp_i

To parameters, context-parallel ranks are data-parallel ones that read other parts of the same sequences: what
``dp_shard`` ranks share (``SHARDS``), they share too, and gradients are summed over both at once.

The mesh is an argument, never a global.  Every group that the runtime needs is made once here;
a group of one rank is None, and whoever uses it then communicates nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from stretto.spec.plan import PlanSpec

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""The axes, slowest first."""
SHARDS = ("dp_shard", "cp")
"""Ranks that hold equal parameters and share their states between them."""
DATA = ("dp_replicate", *SHARDS)
"""Ranks that read different tokens."""
COPY = ("pp", *SHARDS, "tp")
"""Ranks that together hold one whole copy of the model's gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """The place of one rank and the groups it belongs to."""

    sizes: dict[str, int]
    """Degree of each axis."""
    coordinates: dict[str, int]
    """Index of this rank along each axis."""
    rank: int
    """Global rank."""
    groups: dict[tuple[str, ...], ProcessGroup | None] = field(repr=False)
    """Process group of the ranks that differ from this one only along the given axes."""

    def size(self, *axes: str) -> int:
        """Number of ranks along ``axes`` together."""
        return math.prod(self.sizes[a] for a in axes)

    def index(self, axis: str) -> int:
        """This rank's index along ``axis``."""
        return self.coordinates[axis]

    def group(self, *axes: str) -> ProcessGroup | None:
        """The process group along ``axes``; None where it would hold this rank alone."""
        return self.groups[axes]

    @property
    def dp_index(self) -> int:
        """Which share of the global batch's sequences this rank reads."""
        return self.index("dp_replicate") * self.sizes["dp_shard"] + self.index("dp_shard")

    @property
    def shard_index(self) -> int:
        """Which shard of the states is this rank's, among those of ``SHARDS``."""
        return self.index("dp_shard") * self.sizes["cp"] + self.index("cp")

    @property
    def columns(self) -> list[list[int]]:
        """Global ranks of every pipeline, each from first to last; this rank's is one of them."""
        stride = self.size(*DATA, "tp")
        return [list(range(first, stride * self.sizes["pp"], stride)) for first in range(stride)]

    def pipeline_rank(self, pp: int) -> int:
        """Global rank at pipeline position ``pp`` with this rank's other coordinates."""
        stride = self.size(*DATA, "tp")
        return self.rank + (pp - self.index("pp")) * stride


GROUPED: tuple[tuple[str, ...], ...] = (
    ("tp",),
    ("cp",),
    SHARDS,
    ("dp_replicate",),
    DATA,
    COPY,
)
"""Axis sets that need a group."""


def build_mesh(plan: PlanSpec, rank: int) -> Mesh:
    """Make the mesh of ``plan`` and all its groups; collective over the world if there is one."""
    sizes = {axis: int(getattr(plan, axis)) for axis in AXES}
    grid = np.arange(plan.num_ranks).reshape([sizes[a] for a in AXES])
    place = [int(i) for i in np.unravel_index(rank, grid.shape)]
    groups = {axes: _make_group(grid, axes, rank) for axes in GROUPED}
    return Mesh(
        sizes=sizes,
        coordinates=dict(zip(AXES, place, strict=True)),
        rank=rank,
        groups=groups,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Holders:
    """The pipeline ranks that hold the same parameters: through a tie, or as replicas of a stage."""

    ranks: tuple[int, ...]
    """Positions along pp, ascending."""
    group: ProcessGroup | None = field(repr=False)
    """Those ranks and their dp_replicate copies, over which gradients are summed, at this rank's other coordinates;
    None where this rank isn't among them."""


def make_holders(mesh: Mesh, ranks: tuple[int, ...]) -> Holders:
    """Make the groups of pipeline ranks that hold the same parameters; collective over the world."""
    grid = np.arange(mesh.size(*AXES)).reshape([mesh.sizes[a] for a in AXES])
    mine = None
    for members in grid[list(ranks)].reshape(len(ranks) * mesh.size("dp_replicate"), -1).T.tolist():
        group = dist.new_group(members)
        if mesh.rank in members:
            mine = group
    return Holders(ranks=ranks, group=mine)


def make_group(mesh: Mesh, *axes: str) -> ProcessGroup | None:
    """Make one more group along ``axes``, for an order of its own; collective over the world."""
    return _make_group(np.arange(mesh.size(*AXES)).reshape([mesh.sizes[a] for a in AXES]), axes, mesh.rank)


def _make_group(grid: np.ndarray, axes: tuple[str, ...], rank: int) -> ProcessGroup | None:
    """Make the groups along ``axes`` in the same order on every rank; return the one that holds ``rank``."""
    inner = [AXES.index(a) for a in axes]
    outer = [i for i in range(len(AXES)) if i not in inner]
    size = int(np.prod([grid.shape[i] for i in inner]))
    if size == 1:
        return None
    mine = None
    for members in grid.transpose(outer + inner).reshape(-1, size):
        group = dist.new_group([int(r) for r in members])
        if rank in members:
            mine = group
    return mine
