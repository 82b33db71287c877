"""Documents that have groups of ranks of their own: from the rows of a step to this rank's micro-batches.

    rows of the whole global batch ─► documents ─► placement, equal on every rank ─► own parts, side by side in one row

What no label follows is left out: padding, and the end of a document that nothing is predicted from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from stretto.parallel.mesh import DATA, Mesh
from stretto.parallel.sequence.backends import kernel_for
from stretto.parallel.sequence.groups import GroupedAttend, GroupedStates
from stretto.parallel.sequence.pieces import Kernel
from stretto.parallel.sequence.results import Results
from stretto.parallel.sequence.states import WAYS
from stretto.parallel.wire import Wire
from stretto.planner.document_costs import Costs, costs_of
from stretto.planner.document_groups import Placement, assign
from stretto.spec.contract import IGNORE, Batch, SequencePart
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.sequence import Arrangement, Section, count, cut_sequence, memory_tokens

Document = tuple[Tensor, Tensor, Tensor, Tensor]
"""Tokens, labels and positions, int64 [length] each; sample and place in its row, [length, 2]."""


def documents_of(batches: Sequence[Batch]) -> Iterator[Document]:
    """The documents of whole rows, each up to its last label; those without a label are left out."""
    for batch in batches:
        for row in range(batch.tokens.shape[0]):
            tokens, labels, positions = batch.tokens[row], batch.labels[row], batch.positions[row]
            borders = [0, len(tokens)]
            if batch.documents is not None:
                borders[1:1] = (batch.documents[row].diff().nonzero().flatten() + 1).tolist()
            for start, stop in pairwise(borders):
                counted = (labels[start:stop] != IGNORE).nonzero()
                if len(counted):
                    part = slice(start, start + int(counted[-1]) + 1)
                    at = torch.arange(part.start, part.stop, device=tokens.device)
                    sources = torch.stack((batch.samples[row].expand_as(at), at), dim=1)
                    yield tokens[part], labels[part], positions[part], sources


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentCut:
    """Gives one rank its parts of a step's documents."""

    ranks: int
    """Ranks that read different tokens, all of them."""
    index: int
    """This rank's among them."""
    costs: Costs
    memory_tokens: int
    """Tokens of a micro-batch on a rank, at most."""
    layout: str
    """``plan.context_layout``."""
    unit: int
    """Tokens of a micro-batch are a multiple of this: they are cut once more, over tp."""

    @classmethod
    def of(cls, run: RunSpec, mesh: Mesh) -> DocumentCut:
        """The cut of a run, for one rank of its mesh."""
        return cls(
            ranks=mesh.size(*DATA),
            index=mesh.dp_index * mesh.size("cp") + mesh.index("cp"),
            costs=costs_of(run),
            memory_tokens=memory_tokens(run.plan, run.training.sequence_length),
            layout=run.plan.context_layout,
            unit=run.plan.tp,
        )

    def __call__(self, batches: Sequence[Batch]) -> list[Batch]:
        """This rank's micro-batches of the whole global batch; equally many on every rank."""
        documents = list(documents_of(batches))
        lengths = [len(tokens) for tokens, *_ in documents]
        placement = assign(lengths, self.ranks, self.costs, memory_tokens=self.memory_tokens)
        device = batches[0].tokens.device
        return [self._micro_batch(m, documents, placement, device) for m in range(max(1, placement.micro_batches))]

    def _micro_batch(
        self, number: int, documents: Sequence[Document], placement: Placement, device: torch.device
    ) -> Batch:
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        found: list[Document] = []
        places: list[Tensor] = []
        sections, at, longest, away = [], 0, 1, 0
        for piece in placement.pieces:
            seat = self.index - piece.first
            if piece.micro_batch != number or not 0 <= seat < piece.ranks:
                continue
            document = documents[piece.document]
            shares = cut_sequence(len(document[0]), piece.ranks, self.layout)
            sample, place = document[3][0].tolist()
            sections.append(Section(first=piece.first, shares=shares, start=at, sample=sample, place=place))
            places.append(torch.cat([torch.arange(*part, device=device) for part in shares[seat]] or [nothing]))
            tokens, labels, positions, sources = (x[places[-1]] for x in document)
            found.append((tokens, labels, positions, sources))
            at, longest, away = at + count(shares[seat]), max(longest, len(document[0])), piece.away
        missing = -at % self.unit if at else self.unit
        if missing:  # tokens that nothing is asked of, also where the others have one micro-batch more
            filler = torch.arange(missing, device=device)
            nowhere = filler.new_full((missing, 2), -1)
            found, places = [*found, (0 * filler, 0 * filler + IGNORE, filler, nowhere)], [*places, filler]
            sections.append(Section(first=self.index, shares=(((0, missing),),), start=at))
        tokens, labels, positions, sources = (torch.cat(same) for same in zip(*found, strict=True))
        part = SequencePart(
            shares=(((0, longest),),),
            tokens=torch.cat(places),
            documents=None,
            sections=tuple(sections),
            sources=sources,
            away=away,
        )
        return Batch(
            tokens=tokens.unsqueeze(0),
            labels=labels.unsqueeze(0),
            positions=positions.unsqueeze(0),
            documents=None,
            samples=torch.zeros(1, dtype=torch.int64, device=device),
            part=part,
        )


class GroupFiller:
    """Puts attention of placed documents into the ``attend`` of a model's blocks, and states into ``states``."""

    def __init__(self, plan: PlanSpec, mesh: Mesh) -> None:
        self._arrange, self._backend = cache(partial(Arrangement.of_group, plan)), plan.attention_backend
        self._kernel: Kernel | None = None
        self._way = WAYS[plan.linear_context]
        self._results = Results() if plan.recompute == "full" else None
        self.wire = Wire(mesh.group(*DATA))

    def __call__(self, part: nn.Module, device: torch.device) -> None:
        """Fill what of ``part`` has the opening."""
        if self._kernel is None:
            self._kernel = kernel_for(device, self._backend)
        for module in part.modules():
            if hasattr(module, "attend"):
                opening = cast(Any, module)
                opening.attend = GroupedAttend(
                    wire=self.wire,
                    arrange=self._arrange,
                    kernel=self._kernel,
                    local=opening.attend,
                    whole=opening.attend if self._backend == "auto" else None,
                    results=self._results,
                )
            if hasattr(module, "states"):
                opening = cast(Any, module)
                opening.states = GroupedStates(
                    wire=self.wire, way=self._way, local=opening.states, results=self._results
                )
