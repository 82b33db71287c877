"""Verification of sequences that are cut over cp: where what a rank recorded lies in whole rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from stretto.parallel.collectives import all_reduce
from stretto.parallel.mesh import Mesh
from stretto.spec.contract import Batch, Clips
from stretto.spec.run import RunSpec
from stretto.spec.sequence import cut_sequence

if TYPE_CHECKING:
    from stretto.trainer.verify_rank import Patch


def runs_of(batch: Batch, start: int, length: int) -> Iterator[tuple[int, slice]]:
    """Stretches of the tokens ``start`` to ``start + length`` of a batch that follow each other in the whole row.

    Yields the position of each stretch in the row, and where it lies among the tokens.
    """
    if batch.part is None:
        yield start, slice(0, length)
        return
    tokens = batch.part.tokens[start : start + length].tolist()
    at = 0
    for i in range(1, length + 1):
        if i == length or tokens[i] != tokens[i - 1] + 1:
            yield tokens[at], slice(at, i)
            at = i


def place_in_clip(part: str, clips: Clips) -> tuple[int, int, int]:
    """Where what a part gives begins in a whole clip [F, P, D]: inputs give frames, blocks patches."""
    return (clips.frames[0], 0, 0) if part == "inputs" else (0, clips.patches[0], 0)


def with_whole_losses(patches: Sequence[Patch], mesh: Mesh) -> list[Patch]:
    """Losses of micro-batches summed over cp, whose ranks each have some of the tokens; collective along it."""
    group = mesh.group("cp")
    if group is None:
        return list(patches)
    found = []
    for patch in patches:
        if patch.name == "outputs":
            total = torch.from_numpy(np.array(patch.values))
            all_reduce(total, group).wait()
            patch = type(patch)(patch.name, patch.offset, total.numpy())
        found.append(patch)
    return found


def tokens_of_ranks(run: RunSpec) -> list[np.ndarray] | None:
    """Which tokens of a row each rank's cp share holds, by rank (tp fastest, then cp); None where rows are whole."""
    plan = run.plan
    if plan.cp == 1:
        return None
    shares = cut_sequence(run.training.sequence_length, plan.cp, plan.context_layout, unit=plan.tp)
    held = [np.concatenate([np.arange(*part) for part in parts]) for parts in shares]
    return [held[rank // plan.tp % plan.cp] for rank in range(plan.num_ranks)]
