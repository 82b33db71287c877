"""Turns a part of a model into a segment of the pipeline: how it is called, recomputed and compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from stretto.assemble.sequence import results_in
from stretto.assemble.split import rule_of
from stretto.parallel.collectives import size_of
from stretto.parallel.pipeline.backward import Deferral
from stretto.parallel.pipeline.segment import Segment, Value
from stretto.parallel.tensor import gather_sequence
from stretto.parallel.unit import Unit
from stretto.parallel.vocab import vocab_parallel_cross_entropy
from stretto.spec.contract import Batch, Stack
from stretto.spec.errors import UnsupportedError
from stretto.spec.plan import PlanSpec
from stretto.spec.sharding import Sharding, TensorRule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from stretto.parallel.mesh import Mesh


def make_segment(
    stack: Stack, part: str, units: Sequence[Unit], *, plan: PlanSpec, mesh: Mesh, shardings: Mapping[str, Sharding]
) -> Segment:
    """The segment of ``part``; its modules already have their local parameters, cut as ``shardings`` say."""
    module = cast(nn.Module, stack).get_submodule(part)
    group = mesh.group("tp")
    if part == "inputs":
        return Segment(name=part, run=_inputs(stack, module, group, mesh), units=units, deferral=Deferral(module))
    if part == "outputs":
        run = _outputs(stack, module, group, shardings)
        return Segment(name=part, run=run, units=units, deferral=Deferral(module))
    if plan.recompute == "selective":
        _recompute_attention(module, part)
    call: Any = torch.compile(module) if plan.compile else module
    # A block that is compiled as a whole runs its full backward in I: no layer in it can stash.
    deferral = Deferral() if plan.compile else Deferral(module)

    def block(x: Value, context: Any, batch: Batch) -> Value:
        return call(x, context)

    full, results = plan.recompute == "full", results_in(module)
    return Segment(name=part, run=block, units=units, recompute=full, deferral=deferral, results=results)


def _recompute_attention(block: nn.Module, part: str) -> None:
    found = [m for m in block.modules() if hasattr(m, "recompute")]
    if not found:
        raise UnsupportedError(
            f"{part} has no attention that can be recomputed by itself; plan.recompute may be none or full."
        )
    for module in found:
        cast(Any, module).recompute = True


def _inputs(stack: Stack, module: nn.Module, group: ProcessGroup | None, mesh: Mesh) -> Any:
    """Embeddings; where they aren't split over tp, each rank keeps its slice of the sequence."""
    split = TensorRule.VOCAB_EMBEDDING in _rules_below(stack, "inputs")
    tp, index = mesh.size("tp"), mesh.index("tp")

    def run(x: Value, context: Any, batch: Batch) -> Value:
        y = module(batch, context)
        if group is not None and not split:
            length = y.shape[1] // tp
            y = y.narrow(1, index * length, length).contiguous()
        return y

    return run


def _outputs(stack: Stack, module: nn.Module, group: ProcessGroup | None, shardings: Mapping[str, Sharding]) -> Any:
    """Final norm, head and loss.

    A head that is split over the vocabulary gets the loss that never sees full logits.  A head that
    is not runs on all tp ranks alike: each then owns 1/tp of the gradient, so that the sums over tp
    that every other part needs are right here too.
    """
    if group is None:
        return lambda x, context, batch: stack.loss(module(x, context), batch)
    ranks = size_of(group)
    head = next((n for n in _names_below(stack, "outputs") if rule_of(stack, n) is TensorRule.VOCAB_HEAD), None)
    if head is not None:
        start = shardings[f"{head}.weight"].slice.offset[0]
        return lambda x, context, batch: vocab_parallel_cross_entropy(module(x, context), batch.labels, start, group)

    def alike(x: Value, context: Any, batch: Batch) -> Tensor:
        loss = stack.loss(module(gather_sequence(cast(Tensor, x), group), context), batch)
        share = loss / ranks
        return share + (loss - share).detach()

    return alike


def _names_below(stack: Stack, part: str) -> list[str]:
    root = cast(nn.Module, stack).get_submodule(part)
    return [f"{part}.{name}" for name, _ in root.named_modules() if name]


def _rules_below(stack: Stack, part: str) -> set[TensorRule | None]:
    return {rule_of(stack, name) for name in _names_below(stack, part)}
