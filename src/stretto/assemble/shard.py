"""Applies a model's tensor rules to the modules of a part, and says how each parameter is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import nn

from stretto.assemble.split import rule_of
from stretto.parallel.tensor import RowParallelLinear, make_region
from stretto.parallel.vocab import VocabParallelEmbedding
from stretto.spec.contract import Stack
from stretto.spec.sharding import Sharding, TensorRule, cut

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from stretto.parallel.mesh import Mesh

CUT_DIM = {
    (TensorRule.COLUMN, "weight"): 0,
    (TensorRule.COLUMN, "bias"): 0,
    (TensorRule.ROW, "weight"): 1,
    (TensorRule.VOCAB_EMBEDDING, "weight"): 0,
    (TensorRule.VOCAB_HEAD, "weight"): 0,
    (TensorRule.VOCAB_HEAD, "bias"): 0,
}
"""The dim of a parameter that its module's rule cuts; all others are held whole."""


def shardings_of_part(stack: Stack, part: str, mesh: Mesh) -> dict[str, Sharding]:
    """Sharding of every parameter of a part on this tp rank, by global name."""
    module = cast(nn.Module, stack).get_submodule(part)
    found = {}
    for local, parameter in module.named_parameters(remove_duplicate=False):
        name = f"{part}.{local}"
        path, _, leaf = name.rpartition(".")
        rule = rule_of(stack, path)
        found[name] = cut(
            name,
            tuple(parameter.shape),
            dim=None if rule is None else CUT_DIM.get((rule, leaf)),
            parts=mesh.size("tp"),
            index=mesh.index("tp"),
            tied_to=stack.tied.get(name),
        )
    return found


def apply_rules(stack: Stack, part: str, shardings: dict[str, Sharding], group: ProcessGroup) -> None:
    """Swap the split layers of a part and hook its regions; parameters already have their local values."""
    root = cast(nn.Module, stack)
    names = [f"{part}.{n}" if n else part for n, _ in root.get_submodule(part).named_modules()]
    for name in names:
        rule = rule_of(stack, name)
        module = root.get_submodule(name)
        if rule in (TensorRule.REGION, TensorRule.VOCAB_HEAD):
            make_region(module, group)
        elif rule is TensorRule.ROW:
            linear = cast(nn.Linear, module)
            _replace(root, name, RowParallelLinear(cast(Any, linear.weight), cast(Any, linear.bias), group))
        elif rule is TensorRule.VOCAB_EMBEDDING and f"{name}.weight" in shardings:  # else split over pp too
            start = shardings[f"{name}.weight"].slice.offset[0]
            _replace(root, name, VocabParallelEmbedding(cast(Any, module.weight), start, group))


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(path), leaf, module)
