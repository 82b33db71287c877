"""Turns a part of a model into a segment of the pipeline: how it is called, recomputed and compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from stretto.assemble.compiling import Call, between_linears, compiled, whole
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
from stretto.spec.plan import Compile, PlanSpec
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
        return _outputs_segment(stack, module, units, plan=plan, group=group, shardings=shardings)
    if plan.recompute == "selective":
        _recompute_attention(module, part)
    call, deferral = (whole if plan.compile == "blocks" else between_linears)(module, plan)

    def block(x: Value, context: Any, batch: Batch) -> Value:
        return call(x, context)

    full, results = plan.recompute == "full", results_in(module)
    return Segment(
        name=part, run=block, units=units, recompute=full, deferral=deferral, compiled=plan.compile, results=results
    )


def _outputs_segment(
    stack: Stack,
    module: nn.Module,
    units: Sequence[Unit],
    *,
    plan: PlanSpec,
    group: ProcessGroup | None,
    shardings: Mapping[str, Sharding],
) -> Segment:
    """Norm, head and loss; the head is a linear layer, so at most what is around it is compiled."""
    call, deferral = between_linears(module, plan)
    run = _outputs(stack, call, compiled(stack.loss, plan), group=group, shardings=shardings)
    compiles: Compile = "none" if plan.compile == "none" else "regions"
    return Segment(name="outputs", run=run, units=units, deferral=deferral, compiled=compiles)


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


def _outputs(
    stack: Stack, call: Call, loss: Call, *, group: ProcessGroup | None, shardings: Mapping[str, Sharding]
) -> Any:
    """Final norm, head (``call``) and loss.

    A head that is split over the vocabulary gets the loss that never sees full logits.  A head that
    is not runs on all tp ranks alike: each then owns 1/tp of the gradient, so that the sums over tp
    that every other part needs are right here too.
    """
    if group is None:
        return lambda x, context, batch: loss(call(x, context), batch)
    ranks = size_of(group)
    head = next((n for n in _names_below(stack, "outputs") if rule_of(stack, n) is TensorRule.VOCAB_HEAD), None)
    if head is not None:
        start = shardings[f"{head}.weight"].slice.offset[0]
        return lambda x, context, batch: vocab_parallel_cross_entropy(call(x, context), batch.labels, start, group)

    def alike(x: Value, context: Any, batch: Batch) -> Tensor:
        found: Tensor = loss(call(gather_sequence(cast(Tensor, x), group), context), batch)
        share = found / ranks
        return share + (found - share).detach()

    return alike


def _names_below(stack: Stack, part: str) -> list[str]:
    root = cast(nn.Module, stack).get_submodule(part)
    return [f"{part}.{name}" for name, _ in root.named_modules() if name]


def _rules_below(stack: Stack, part: str) -> set[TensorRule | None]:
    return {rule_of(stack, name) for name in _names_below(stack, part)}
