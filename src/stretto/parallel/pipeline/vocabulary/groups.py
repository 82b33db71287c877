"""The process groups of vocabulary parallelism, one for each order in which ranks meet.

S, T and the outputs of the last stage are in an order of their own each, which all ranks share; between them a rank's
order is free.  On one group such collectives would have to meet in one common order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING

import torch

from stretto.parallel.collectives import all_reduce, index_in, size_of
from stretto.parallel.mesh import Mesh, make_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from stretto.parallel.pipeline.transport import Transport


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """All None where the ranks are one.  Ranks are numbered by pp, then tp."""

    outputs: ProcessGroup | None = field(repr=False)
    """Pipeline: the last stage's outputs."""
    scores: ProcessGroup | None = field(repr=False)
    """Pipeline and tp: the sums of S."""
    inputs_of_s: ProcessGroup | None = field(repr=False)
    """Pipeline: the gradients of S's input, behind its sums."""
    inputs_of_t: ProcessGroup | None = field(repr=False)
    """Pipeline: those that T gives."""
    rows: ProcessGroup | None = field(repr=False)
    """Pipeline and tp: embeddings."""
    row_gradients: ProcessGroup | None = field(repr=False)
    """Pipeline and tp: their gradients."""


def make_groups(mesh: Mesh, device: torch.device, transport: Transport) -> Groups:
    """Make them, and let their ranks meet before any waits for another; collective over the world."""
    scores = make_group(mesh, "pp", "tp")
    groups = Groups(
        outputs=make_group(mesh, "pp"),
        scores=scores,
        inputs_of_s=scores if mesh.size("tp") == 1 else make_group(mesh, "pp"),
        inputs_of_t=make_group(mesh, "pp"),
        rows=make_group(mesh, "pp", "tp"),
        row_gradients=make_group(mesh, "pp", "tp"),
    )
    for group in (groups.scores, groups.inputs_of_s, groups.inputs_of_t):
        all_reduce(torch.zeros(1, device=device), group).wait()
    for group in (groups.outputs, groups.rows, groups.row_gradients):
        here, size = index_in(group), size_of(group)
        for ends in combinations(range(size), 2):
            for source, target in (ends, ends[::-1]):  # each way is one of its own, which its first message would make
                if group is not None and here in ends:
                    transport.connect(group, target if here == source else source, sending=here == source)
    return groups
