"""Assembles what one rank runs: its stages, the units under them, and the masters above.

Stack (all parts, no storage) ─► parts of my stages ─► local values ─► tensor rules ─► units ─► stages
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from stretto.assemble.documents import DocumentCut, GroupFiller
from stretto.assemble.draw import draw
from stretto.assemble.segments import make_segment
from stretto.assemble.sequence import ContextFiller, SequenceCut, cuts_rows
from stretto.assemble.shard import apply_rules, shardings_of_part
from stretto.assemble.split import StageParts, holders_of_tied, owner_of, parts_of_stages, ranks_of_parts, rule_of
from stretto.assemble.transfer import to_device
from stretto.assemble.vocabulary import end_segment, split_vocabulary
from stretto.parallel.flat import FlatUnit, ReduceQueue
from stretto.parallel.master import Master
from stretto.parallel.mesh import DATA, Holders, Mesh, make_holders
from stretto.parallel.pipeline.segment import Segment
from stretto.parallel.pipeline.stage import Stage
from stretto.parallel.pipeline.vocabulary.passes import Shard
from stretto.parallel.unit import LocalUnit, Unit
from stretto.spec.contract import Batch, Place, Stack
from stretto.spec.errors import UnsupportedError
from stretto.spec.plan import PlanSpec
from stretto.spec.sharding import Sharding, TensorRule

Reader = Callable[[Sharding], Tensor]
"""Reads a slice of a parameter from a file."""
Held = list[tuple[nn.Parameter, Sharding]]
HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Types of a run."""

    compute: torch.dtype
    """Of parameters and activations."""
    main: torch.dtype
    """Of masters, moments and gradient sums; float32 where compute is bfloat16."""

    @classmethod
    def of(cls, name: str) -> Precision:
        """From training.dtype."""
        compute = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}[name]
        return cls(compute=compute, main=torch.promote_types(compute, torch.float32))


@dataclass(slots=True, kw_only=True)
class RankModel:
    """What one rank holds of the model."""

    stack: Stack
    """The whole model's structure; only this rank's parts have storage."""
    stages: dict[int, Stage]
    """This rank's stages by number."""
    units: list[Unit]
    """Each unit once, in model order."""
    mesh: Mesh
    num_heads: int
    """Query heads of the whole model."""
    cut: SequenceCut | None = None
    """How rows are cut over cp; None: every rank sees whole ones."""
    documents: DocumentCut | None = None
    """How documents are placed on all ranks that read data; None: rows are cut over cp, or whole."""
    shard: Shard | None = None
    """Its part of embedding and head, where those are split over all pipeline ranks."""
    device: torch.device = HOST
    """Where parameters lie."""

    @property
    def masters(self) -> list[Master]:
        """All tensors that the optimizer updates."""
        return [master for unit in self.units for master in unit.masters]

    def publish(self) -> None:
        """Masters have new values: bring them into the parameters."""
        for unit in self.units:
            unit.publish()

    def share(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """This cp rank's tokens of whole rows, or its parts of the documents in all rows of the global batch.

        Batches come from the host, are cut there and then go to the device, which is never asked what is in them.
        """
        if self.documents is not None:
            batches = self.documents(batches)
        elif self.cut is not None:
            batches = [self.cut(batch) for batch in batches]
        return batches if self.device.type == "cpu" else [to_device(batch, self.device) for batch in batches]

    def context(self, batch: Batch, *, seed: int, step: int, training: bool) -> Any:
        """What the blocks share of a micro-batch, as this tp rank sees it."""
        tp, index = self.mesh.size("tp"), self.mesh.index("tp")
        place = Place(
            seed=seed,
            step=step,
            token_start=batch.tokens.shape[1] // tp * index,
            head_start=self.num_heads // tp * index,
            training=training,
        )
        return self.stack.context(batch, place)


class Assembler:
    """Builds a RankModel; one use.

    ``front``: layers that are computed ahead, in stages of their own (spec/front.py); None: the embedding is in the
    first stage.
    """

    def __init__(
        self, stack: Stack, plan: PlanSpec, mesh: Mesh, *, precision: Precision, seed: int, front: int | None = None
    ) -> None:
        self._stack, self._plan, self._mesh, self._front = stack, plan, mesh, front
        self._precision, self._seed = precision, seed
        self._queue = ReduceQueue()
        self._shared: dict[str, nn.Parameter] = {}
        self._units: dict[str, Unit] = {}
        self._fill: Callable[[nn.Module, torch.device], None] | None = None
        if plan.context_groups == "dynamic":
            self._fill = GroupFiller(plan, mesh)
        elif cuts_rows(plan):
            self._fill = ContextFiller(plan, mesh)

    def build(
        self,
        layers: Sequence[int],
        placement: Sequence[Sequence[int]],
        *,
        num_heads: int,
        device: torch.device,
        reader: Reader | None = None,
        vocabulary: bool = False,
    ) -> RankModel:
        """Make this rank's stages.

        Args:
            layers: layers of each stage.
            placement: pipeline rank of each stage, for each replica of the model that flows through the pipeline.
            num_heads: query heads of the whole model.
            device: where parameters live.
            reader: where initial values come from; None: drawn (or what a foreign module holds).
            vocabulary: whether embedding and head are split over all pipeline ranks.
        """
        if self._mesh.size("tp") > 1 and not self._stack.tensor_rules:
            raise UnsupportedError(
                "this model can't be split over tp: no rule says how its attention is cut (its linear layers' names "
                "and shapes fit none); use pp, dp_replicate or dp_shard, or give tensor_rules."
            )
        _move_buffers(cast(nn.Module, self._stack), device)
        plans = parts_of_stages(layers, front=self._front)
        shard = None
        if vocabulary:
            make = partial(self._parameter, device=device, reader=reader)
            shard = split_vocabulary(self._stack, self._mesh, make, partial(self._unit, holders=None))
        self._find_holders(placement, plans, tied={} if vocabulary else self._stack.tied)
        stages: dict[int, Stage] = {}
        for plan in plans:
            if self._mesh.index("pp") not in self._ranks_of_part[plan.parts[0]]:
                continue
            segments = [self._segment(part, device, reader, vocabulary=vocabulary) for part in plan.parts]
            stages[plan.index] = Stage(plan.index, segments)
        _drop_parts(self._stack, keep={s.name for stage in stages.values() for s in stage.segments})
        units = list({id(u): u for s in sorted(stages) for u in stages[s].units}.values())
        cut = SequenceCut.of(self._plan, self._mesh) if cuts_rows(self._plan) else None
        model = RankModel(
            stack=self._stack,
            stages=stages,
            units=units,
            mesh=self._mesh,
            num_heads=num_heads,
            cut=cut,
            device=device,
        )
        if shard is not None:
            model.shard = shard
            model.units += shard.units
        return model

    def _segment(self, part: str, device: torch.device, reader: Reader | None, *, vocabulary: bool) -> Segment:
        shardings = shardings_of_part(self._stack, part, self._mesh)
        units = self._units_of_part(part, shardings, device, reader)
        if self._fill is not None:
            self._fill(cast(nn.Module, self._stack).get_submodule(part), device)
        if vocabulary and part in ("inputs", "outputs"):
            return end_segment(self._stack, part, units)
        return make_segment(self._stack, part, units, plan=self._plan, mesh=self._mesh, shardings=shardings)

    def _find_holders(
        self, placement: Sequence[Sequence[int]], plans: Sequence[StageParts], *, tied: Mapping[str, str]
    ) -> None:
        """Who holds what; collective where several ranks hold the same."""
        self._ranks_of_part = ranks_of_parts(placement, plans)
        self._tied = holders_of_tied(tied, self._ranks_of_part)
        # Each stage and each tie has groups of its own, so that ranks may reduce stages in different orders.
        stages = [[(part, self._ranks_of_part[part]) for part in plan.parts] for plan in plans]
        self._holders: dict[str, Holders] = {}
        for names in [*stages, *([item] for item in self._tied.items())]:
            if len(ranks := names[0][1]) > 1:
                holders = make_holders(self._mesh, ranks)
                self._holders.update((name, holders) for name, _ in names)

    def _units_of_part(
        self, part: str, shardings: dict[str, Sharding], device: torch.device, reader: Reader | None
    ) -> list[Unit]:
        groups: dict[str, Held] = {}
        for name, sharding in shardings.items():
            original = sharding.tied_to or name
            if original not in self._shared:
                self._shared[original] = self._parameter(sharding, device, reader)
                groups.setdefault(self._unit_name(part, name, original), []).append((self._shared[original], sharding))
            module, leaf = owner_of(cast(nn.Module, self._stack), name)
            setattr(module, leaf, self._shared[original])
        for name, held in groups.items():
            self._units[name] = self._unit(name, held, self._holders.get(name if name in self._tied else part))
        group = self._mesh.group("tp")
        if group is not None:
            apply_rules(self._stack, part, shardings, group)
        names = {self._unit_name(part, name, s.tied_to or name) for name, s in shardings.items()}
        return [unit for name, unit in self._units.items() if name in names]

    def _unit_name(self, part: str, name: str, original: str) -> str:
        """A block is one unit; tied and vocabulary weights of the ends are units of their own."""
        rule = rule_of(self._stack, name.rpartition(".")[0])
        if original in self._tied:
            return original
        return name if rule in (TensorRule.VOCAB_EMBEDDING, TensorRule.VOCAB_HEAD) else part

    def _unit(self, name: str, held: Held, holders: Holders | None) -> Unit:
        if holders is None and self._mesh.size(*DATA, "tp") == 1:
            return LocalUnit(name, held, mesh=self._mesh, compute=self._precision.compute)
        return FlatUnit(
            name,
            held,
            mesh=self._mesh,
            compute=self._precision.compute,
            queue=self._queue,
            holders=holders,
        )

    def _parameter(self, sharding: Sharding, device: torch.device, reader: Reader | None) -> nn.Parameter:
        """This rank's slice of a parameter with its initial values, in the masters' type."""
        module, leaf = owner_of(cast(nn.Module, self._stack), sharding.name)
        there = getattr(module, leaf)
        original = sharding.tied_to or sharding.name
        how = self._stack.initial_value(original)
        if reader is not None:
            values = reader(sharding)
        elif how is not None:
            values = draw(self._seed, original, sharding.shape, sharding.slice, how)
        else:
            assert not there.is_meta, f"{original} has neither an initial value nor data"
            window = tuple(slice(o, o + n) for o, n in zip(sharding.slice.offset, sharding.slice.length, strict=True))
            values = there.detach()[window].clone(memory_format=torch.contiguous_format)
        values = values.to(device=device, dtype=self._precision.main)
        return nn.Parameter(values, requires_grad=there.requires_grad)


def _drop_parts(stack: Stack, keep: set[str]) -> None:
    """Replace the parts that other ranks hold, so that only what is here counts as the model's parameters."""
    root = cast(Any, stack)
    for name in ("inputs", "outputs"):
        if name not in keep:
            setattr(root, name, nn.Module())
    for index in range(len(stack.blocks)):
        if f"blocks.{index}" not in keep:
            root.blocks[index] = nn.Module()


def _move_buffers(root: nn.Module, device: torch.device) -> None:
    """Tables that a foreign model registers beside its parameters go where the parameters go."""
    for name, buffer in list(root.named_buffers()):
        if not buffer.is_meta and buffer.device != device:
            module, leaf = owner_of(root, name)
            setattr(module, leaf, buffer.to(device))
