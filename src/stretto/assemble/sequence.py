"""Context parallelism at the model's edges: which tokens of a batch are this rank's, and what fills ``attend``.

    whole rows ─► SequenceCut ─► own tokens, labels, positions ─► blocks, whose attend knows where the others are

Between the two nothing knows: embeddings, norms, feed-forward, head and loss work token by token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from stretto.parallel.mesh import Mesh
from stretto.parallel.sequence.backends import kernel_for
from stretto.parallel.sequence.groups import GroupedAttend, GroupedStates
from stretto.parallel.sequence.opening import ContextAttend
from stretto.parallel.sequence.pieces import Kernel
from stretto.parallel.sequence.results import Results
from stretto.parallel.sequence.states import WAYS, CutStates
from stretto.parallel.sequence.switch import CutSwitch
from stretto.parallel.wire import Wire
from stretto.spec.contract import Batch, Clips, SequencePart
from stretto.spec.plan import PlanSpec
from stretto.spec.sequence import Arrangement, cut_sequence


def cuts_rows(plan: PlanSpec) -> bool:
    """Whether attention goes block by block through the opening: rows are cut over cp, or a backend was named."""
    return plan.cp > 1 or plan.attention_backend != "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceCut:
    """Gives one rank its tokens of every row."""

    ranks: int
    """Context-parallel degree."""
    index: int
    """This rank's index along cp."""
    layout: str
    """``plan.context_layout``."""
    unit: int
    """Tokens are cut in multiples of this: each share is cut once more, over tp."""

    @classmethod
    def of(cls, plan: PlanSpec, mesh: Mesh) -> SequenceCut:
        """The cut of a plan, for one rank of its mesh."""
        return cls(ranks=plan.cp, index=mesh.index("cp"), layout=plan.context_layout, unit=plan.tp)

    def __call__(self, batch: Batch) -> Batch:
        """This rank's tokens, labels and positions; documents too, and those of the whole rows beside them.

        Of clips its frames of what is noisy and its patches of what is to be told.
        """
        if batch.clips is not None:
            return self._clips(batch, batch.clips)
        shares = cut_sequence(batch.tokens.shape[1], self.ranks, self.layout, unit=self.unit)
        tokens = torch.cat([torch.arange(*part, device=batch.tokens.device) for part in shares[self.index]])

        def own(x: Tensor) -> Tensor:
            return torch.cat([x[:, start:stop] for start, stop in shares[self.index]], dim=1)

        return Batch(
            tokens=own(batch.tokens),
            labels=own(batch.labels),
            positions=own(batch.positions),
            documents=None if batch.documents is None else own(batch.documents),
            samples=batch.samples,
            part=SequencePart(shares=shares, tokens=tokens, documents=batch.documents),
        )

    def _clips(self, batch: Batch, clips: Clips) -> Batch:
        frames, patches = (
            cut_sequence(size, self.ranks, "contiguous")[self.index][0]
            for size in (clips.noisy.shape[1], clips.velocity.shape[2])
        )
        whole = clips.velocity.shape[:3]

        def own(x: Tensor) -> Tensor:
            return x.view(whole)[:, :, slice(*patches)].flatten(1)

        noisy, velocity = clips.noisy[:, slice(*frames)], clips.velocity[:, :, slice(*patches)]
        return replace(
            batch,
            tokens=own(batch.tokens),
            labels=own(batch.labels),
            positions=own(batch.positions),
            clips=replace(clips, noisy=noisy, velocity=velocity, frames=frames, patches=patches),
        )


class ContextFiller:
    """Puts attention over cut rows into the ``attend`` of a model's blocks, and states over them into ``states``.

    Into ``switch`` of blocks over clips, what moves the cut.
    """

    def __init__(self, plan: PlanSpec, mesh: Mesh) -> None:
        self._arrangement = Arrangement.of(plan)
        self._backend, self._kernel = plan.attention_backend, cast(Kernel | None, None)
        self._way = WAYS[plan.linear_context] if plan.cp > 1 else None
        self.wire = Wire(mesh.group("cp"))
        self._results = Results() if plan.recompute == "full" else None

    def __call__(self, part: nn.Module, device: torch.device) -> None:
        """Fill what of ``part`` has the opening."""
        if self._kernel is None:
            self._kernel = kernel_for(device, self._backend)
        for module in part.modules():
            if hasattr(module, "attend"):
                opening = cast(Any, module)
                opening.attend = ContextAttend(
                    wire=self.wire,
                    arrangement=self._arrangement,
                    local=opening.attend,
                    kernel=self._kernel,
                    results=self._results,
                )
            if self._way is not None and hasattr(module, "states"):
                cast(Any, module).states = CutStates(wire=self.wire, way=self._way, results=self._results)
            if hasattr(module, "switch"):
                cast(Any, module).switch = CutSwitch(wire=self.wire, ranks=self._arrangement.ranks)


def results_in(block: nn.Module) -> Results | None:
    """What keeps the results of a block's attention, if anything does."""
    openings = (getattr(module, name, None) for module in block.modules() for name in ("attend", "states"))
    kinds = ContextAttend | CutStates | GroupedAttend | GroupedStates
    return next((opening.results for opening in openings if isinstance(opening, kinds)), None)
