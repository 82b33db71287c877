"""Which rank sits where: the mesh of ranks, its axes, and the process groups along them.

Ranks are numbered with tp fastest, then cp, and pp slowest, so that the ranks that talk most sit closest:

    rank = (((pp_i * dp_replicate + dp_replicate_i) * dp_shard + dp_shard_i) * cp + cp_i) * tp + tp_i

To parameters, context-parallel ranks are data-parallel ones that read other parts of the same sequences.  Parameters,
gradients and optimizer states are divided over P, G and O consecutive ones of the data ranks (spec/states.py), so that
seen from the states the same data ranks have four other axes:

    data ranks     ((copies_i * O/G + optimizer_i) * G/P + gradients_i) * P + parameters_i

The mesh is an argument, never a global.  Every group that the runtime needs is made once here;
a group of one rank is None, and whoever uses it then communicates nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np

from stretto.parallel.process_groups import new_group
from stretto.spec.states import of_plan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from stretto.spec.plan import PlanSpec

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""The axes, slowest first."""
STATE_AXES = ("pp", "copies", "optimizer", "gradients", "parameters", "tp")
"""The axes as states see them: who divides parameters, who divides each such shard of the gradients further, who each
of those of the optimizer states, and who has copies of these, slowest first."""
SHARDS = ("optimizer", "gradients", "parameters")
"""Ranks that share one copy of the optimizer states between them."""
DATA = ("dp_replicate", "dp_shard", "cp")
"""Ranks that read different tokens."""
COPY = ("pp", *SHARDS, "tp")
"""Ranks that together hold one whole copy of the model's gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """The place of one rank and the groups it belongs to."""

    sizes: dict[str, int]
    """Degree of each axis, those of states among them."""
    coordinates: dict[str, int]
    """Index of this rank along each axis."""
    rank: int
    """Global rank."""
    groups: dict[tuple[str, ...], ProcessGroup | None] = field(repr=False)
    """Process group of the ranks that differ from this one only along the given axes."""
    limit: timedelta | None = None
    """How long ranks of a group may wait for each other; None: as long as torch lets them."""

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
        """Which shard of the optimizer states is this rank's: those of one shard of the parameters are neighbours."""
        within = self.index("gradients") * self.sizes["optimizer"] + self.index("optimizer")
        return self.index("parameters") * self.size("gradients", "optimizer") + within

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
    ("parameters",),
    ("gradients",),
    ("optimizer",),
    SHARDS,
    ("copies",),
    DATA,
    COPY,
)
"""Axis sets that need a group."""
SHARING = (("parameters",), ("gradients",), ("optimizer",), SHARDS)
"""Of these, the ones that have one group where they are the same ranks: all that uses them has one order."""


def build_mesh(plan: PlanSpec, rank: int, *, limit: timedelta | None = None) -> Mesh:
    """Make the mesh of ``plan`` and all its groups; collective over the world if there is one.

    ``limit``: see Mesh.
    """
    sizes = {axis: int(getattr(plan, axis)) for axis in AXES} | _state_sizes(plan)
    coordinates: dict[str, int] = {}
    for order in (AXES, STATE_AXES):
        place = np.unravel_index(rank, [sizes[a] for a in order])
        coordinates |= {axis: int(index) for axis, index in zip(order, place, strict=True)}
    made: dict[tuple[tuple[int, ...], ...], ProcessGroup | None] = {}
    groups: dict[tuple[str, ...], ProcessGroup | None] = {}
    for axes in GROUPED:
        members = _members(sizes, axes)
        if axes not in SHARING:
            groups[axes] = _make_groups(members, rank, limit)
            continue
        if members not in made:
            made[members] = _make_groups(members, rank, limit)
        groups[axes] = made[members]
    return Mesh(sizes=sizes, coordinates=coordinates, rank=rank, groups=groups, limit=limit)


def _state_sizes(plan: PlanSpec) -> dict[str, int]:
    """Degrees of the axes that only states see."""
    states = of_plan(plan)
    return {
        "parameters": states.parameters,
        "gradients": states.gradients // states.parameters,
        "optimizer": states.optimizer // states.gradients,
        "copies": plan.dp * plan.cp // states.optimizer,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Holders:
    """The pipeline ranks that hold the same parameters: through a tie, or as replicas of a stage."""

    ranks: tuple[int, ...]
    """Positions along pp, ascending."""
    group: ProcessGroup | None = field(repr=False)
    """Those ranks and their copies, over which gradients are summed, at this rank's other coordinates; None where this
    rank isn't among them."""


def make_holders(mesh: Mesh, ranks: tuple[int, ...]) -> Holders:
    """Make the groups of pipeline ranks that hold the same parameters; collective over the world."""
    grid = np.arange(mesh.size(*AXES)).reshape(mesh.size("pp"), mesh.size("copies"), -1)
    members = grid[list(ranks)].reshape(len(ranks) * mesh.size("copies"), -1).T
    return Holders(ranks=ranks, group=_make_groups(members.tolist(), mesh.rank, mesh.limit))


def make_group(mesh: Mesh, *axes: str) -> ProcessGroup | None:
    """Make one more group along ``axes``, for an order of its own; collective over the world."""
    return _make_groups(_members(mesh.sizes, axes), mesh.rank, mesh.limit)


def _members(sizes: Mapping[str, int], axes: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """The ranks of every group along ``axes``, which are all of ``AXES`` or all of ``STATE_AXES``."""
    order = AXES if set(axes) <= set(AXES) else STATE_AXES
    grid = np.arange(math.prod(sizes[a] for a in AXES)).reshape([sizes[a] for a in order])
    inner = [order.index(a) for a in axes]
    outer = [i for i in range(len(order)) if i not in inner]
    found = grid.transpose(outer + inner).reshape(-1, math.prod(sizes[a] for a in axes))
    return tuple(tuple(ranks) for ranks in found.tolist())


def _make_groups(members: Sequence[Sequence[int]], rank: int, limit: timedelta | None) -> ProcessGroup | None:
    """Make the groups in the same order on every rank; return the one that holds ``rank``; None where it's alone."""
    if len(members[0]) == 1:
        return None
    mine = None
    for ranks in members:
        group = new_group(ranks, limit=limit)
        if rank in ranks:
            mine = group
    return mine
