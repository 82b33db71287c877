"""Vocabulary parallelism: takes embedding and head out of their parts and gives every pipeline rank a shard of both.

    inputs   tokens ─ positions ─ dropout       what the first stage keeps: all but the lookup; rows arrive
    outputs  norm ─ head                        what the last stage keeps: all but the head; its output leaves

Shard pp · tp_size + tp holds ceil(V / shards) rows, the last ones fewer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from stretto.assemble.split import owner_of
from stretto.parallel.mesh import Mesh
from stretto.parallel.pipeline.backward import Deferral
from stretto.parallel.pipeline.segment import Segment, Value
from stretto.parallel.pipeline.vocabulary.passes import Shard
from stretto.parallel.pipeline.vocabulary.rows import Table
from stretto.parallel.unit import Unit
from stretto.spec.contract import Stack
from stretto.spec.errors import UnsupportedError
from stretto.spec.sharding import Sharding, TensorRule, cut

Make = Callable[[Sharding], nn.Parameter]
"""Gives a parameter its local values."""
Hold = Callable[[str, list[tuple[nn.Parameter, Sharding]]], Unit]
"""Makes a unit, given its name."""


class Arrived(nn.Module):
    """In the place of the token embedding: what other ranks looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.x: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """The embeddings, [B, t, D] of this rank's slice of the sequence."""
        assert self.x is not None
        return self.x


def split_vocabulary(stack: Stack, mesh: Mesh, make: Make, hold: Hold) -> Shard:
    """This rank's shard; the stack is left without embedding and head.

    Raises UnsupportedError for a model that doesn't say which layers they are.
    """
    embedding, head = _layer(stack, TensorRule.VOCAB_EMBEDDING), _layer(stack, TensorRule.VOCAB_HEAD)
    root = cast(nn.Module, stack)
    if getattr(root.get_submodule(head), "bias", None) is not None:
        raise UnsupportedError(
            f"{head} has a bias, which vocabulary parallelism doesn't split; leave out the pass vocabulary."
        )
    names = [f"{embedding}.weight", f"{head}.weight"]
    shardings = [_sharding(stack, name, mesh) for name in names]
    table, top = shardings
    first = make(table)
    if top.tied_to == table.name:
        second, unit = first, hold(table.name, [(first, table)])
        units = unit, unit
    else:
        second = make(top)
        units = hold(table.name, [(first, table)]), hold(top.name, [(second, top)])
    _replace(root, embedding, Arrived())
    _replace(root, head, nn.Identity())
    ranks, rows = mesh.size("pp", "tp"), table.shape[0]
    return Shard(
        head=second,
        unit=units[1],
        table=Table(weight=first, unit=units[0], height=-(-rows // ranks), start=table.slice.offset[0]),
    )


def _layer(stack: Stack, rule: TensorRule) -> str:
    found = [name for name, its in stack.tensor_rules.items() if its is rule]
    if len(found) != 1:
        raise UnsupportedError(
            "vocabulary parallelism needs a model that says which layers are its token embedding and its head "
            "(tensor_rules VOCAB_EMBEDDING and VOCAB_HEAD), as llama and gpt2 do; leave out the pass vocabulary, "
            "or give these rules."
        )
    return found[0]


def _sharding(stack: Stack, name: str, mesh: Mesh) -> Sharding:
    module, leaf = owner_of(cast(nn.Module, stack), name)
    index = mesh.index("pp") * mesh.size("tp") + mesh.index("tp")
    shape = tuple(getattr(module, leaf).shape)
    return cut(name, shape, dim=0, parts=mesh.size("pp", "tp"), index=index, tied_to=stack.tied.get(name))


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(path), leaf, module)


def end_segment(stack: Stack, part: str, units: list[Unit]) -> Segment:
    """The segment of ``inputs``, which begins with embeddings, or of ``outputs``, which ends before the head."""
    module = cast(nn.Module, stack).get_submodule(part)
    arrived = next((m for m in module.modules() if isinstance(m, Arrived)), None)

    def inputs(x: Value, context: Any, batch: Any) -> Value:
        assert arrived is not None
        arrived.x = cast(Tensor, x)
        y = module(batch, context)
        arrived.x = None
        return y

    def outputs(x: Value, context: Any, batch: Any) -> Value:
        return module(x, context)

    return Segment(name=part, run=inputs if part == "inputs" else outputs, units=units, deferral=Deferral(module))
