"""Tensor parallelism with sequence-parallel regions (Megatron-LM; Korthikanti et al. 2022, figure 5).

Between attention and feed-forward every rank holds a slice of the sequence.  A *region* gathers it,
works on its share of heads or features, and scatters the sum back:

      [B, T/tp, D] ── gather over T ──► column linears ──► ... ──► row linear ── reduce-scatter over T ──► [B, T/tp, D]
        backward:     reduce-scatter                                             all-gather

Column-split layers are plain ``nn.Linear`` with fewer rows, so a model never knows.  Parameters that
every tp rank holds whole (norms, biases after a row linear) saw only a slice of the tokens or heads:
their gradients are partial and are summed over tp when the shard unit reduces them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, autograd, nn
from torch.nn import functional

from stretto.parallel.collectives import gather_dim, reduce_scatter_dim

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SEQUENCE_DIM = 1


class _Gather(autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return gather_dim(x, SEQUENCE_DIM, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_dim(grads[0], SEQUENCE_DIM, ctx.group), None


class _Scatter(autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter_dim(x, SEQUENCE_DIM, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gather_dim(grads[0], SEQUENCE_DIM, ctx.group), None


@torch.compiler.disable
def gather_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """[B, T/tp, D] -> [B, T, D]; the gradient is summed and scattered."""
    return _Gather.apply(x, group)


@torch.compiler.disable
def scatter_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """Partial sums [B, T, D] -> sums [B, T/tp, D]; the gradient is gathered."""
    return _Scatter.apply(x, group)


class RowParallelLinear(nn.Module):
    """A linear layer that holds a slice of the input features.

    Args:
        weight: [out, in/tp].
        bias: [out] or None, added after the sum so that it counts once.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, group: ProcessGroup) -> None:
        super().__init__()
        self.weight = weight
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)
        self._group = group
        self.linear: Callable[[Tensor, Tensor], Tensor] = functional.linear
        """How ``x`` [..., in] and the weight are multiplied; a split backward puts its own function here."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, in/tp] -> [B, T/tp, out]."""
        y = scatter_sequence(self.linear(x, self.weight), self._group)
        return y if self.bias is None else y + self.bias


def make_region(module: nn.Module, group: ProcessGroup) -> None:
    """Gather the first input of ``module`` (positional, or the keyword ``hidden_states``) over the sequence."""

    def gather(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (gather_sequence(args[0], group), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": gather_sequence(kwargs["hidden_states"], group)}

    module.register_forward_pre_hook(gather, with_kwargs=True)
