"""Tries tensor rules out on a real block: halves that don't add up to the whole are no halves.

Names and shapes can't tell how a fused projection lays out its heads, or whether a module counts
heads from its configuration.  So each region is cut in p parts here, run on the same input, and
the sum of the parts is compared with the whole; rules that fail are dropped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stretto.spec.sharding import TensorRule


@torch.no_grad()
def rules_hold(block: nn.Module, rules: Mapping[str, TensorRule], run: Callable[[], Any], *, parts: int) -> bool:
    """Return whether every region of ``block`` is the sum of its ``parts`` parts.

    ``run`` runs the block once on some input.
    """
    for name in (name for name, rule in rules.items() if rule is TensorRule.REGION):
        seen: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
        region = block.get_submodule(name)
        hook = region.register_forward_hook(
            lambda _, args, kwargs, out, seen=seen: seen.append((args, kwargs, out)), with_kwargs=True
        )
        try:
            run()
        finally:
            hook.remove()
        if len(seen) != 1:
            return False
        args, kwargs, out = seen[0]
        inner = {key.removeprefix(f"{name}."): rule for key, rule in rules.items() if key.startswith(f"{name}.")}
        try:
            pieces = [first(part_of(region, inner, parts, index)(*args, **kwargs)) for index in range(parts)]
        except (RuntimeError, ValueError, TypeError):
            return False
        whole, total = first(out), torch.stack(pieces).sum(0)
        if total.shape != whole.shape or bool((total - whole).abs().max() > 1e-3 * whole.abs().max()):
            return False
    return True


def part_of(region: nn.Module, rules: Mapping[str, TensorRule], parts: int, index: int) -> nn.Module:
    """Return a copy of ``region`` with part ``index`` of its split layers, a row's bias only in the first."""
    region = copy.deepcopy(region)
    for name, rule in rules.items():
        linear = region.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if rule is TensorRule.COLUMN:
            linear.weight = nn.Parameter(chunk(linear.weight, parts, index, dim=0))
            if linear.bias is not None:
                linear.bias = nn.Parameter(chunk(linear.bias, parts, index, dim=0))
        else:
            linear.weight = nn.Parameter(chunk(linear.weight, parts, index, dim=1))
            if linear.bias is not None and index:
                linear.register_parameter("bias", None)
    return region


def chunk(tensor: Tensor, parts: int, index: int, *, dim: int) -> Tensor:
    """Return part ``index`` of ``parts`` equal parts; ValueError where they aren't equal."""
    if tensor.size(dim) % parts:
        raise ValueError(f"{tensor.size(dim)} rows can't be cut in {parts}")
    return tensor.chunk(parts, dim)[index].clone()


def first(output: Any) -> Tensor:
    """Return the tensor of an output that may be a tuple."""
    return output[0] if isinstance(output, tuple) else output
