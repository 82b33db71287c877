"""Sequence-parallel regions against one rank: values, and gradients of inputs and of every weight."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ranks import Ranks
from stretto.parallel.tensor import RowParallelLinear, gather_sequence, make_region, scatter_sequence

B, T, D, F = 2, 8, 6, 12


class FeedForward(nn.Module):
    """norm on a slice of the sequence, then a region with a column and a row layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(D, F)
        self.down: nn.Module = nn.Linear(F, D)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(hidden_states)))


def whole() -> tuple[FeedForward, Tensor, Tensor]:
    torch.manual_seed(5)
    module = FeedForward().double()
    return module, torch.randn(B, T, D, dtype=torch.float64), torch.randn(B, T, D, dtype=torch.float64)


def on_rank(rank: int, world: int, by_keyword: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    group = dist.group.WORLD
    assert group is not None
    module, x, dy = whole()
    part = slice(rank * F // world, (rank + 1) * F // world)
    rows = slice(rank * T // world, (rank + 1) * T // world)
    down = module.down
    assert isinstance(down, nn.Linear)
    module.up.weight = nn.Parameter(module.up.weight.detach()[part].clone())
    module.up.bias = nn.Parameter(module.up.bias.detach()[part].clone())
    module.down = RowParallelLinear(nn.Parameter(down.weight.detach()[:, part].clone()), nn.Parameter(down.bias), group)
    make_region(module, group)
    mine = x[:, rows].clone().requires_grad_()
    y = module(hidden_states=mine) if by_keyword else module(mine)
    named = dict(module.named_parameters())
    gradients = torch.autograd.grad(y, [mine, *named.values()], dy[:, rows])
    return y.detach(), gradients[0], dict(zip(named, gradients[1:], strict=True))


@pytest.mark.parametrize("tp,by_keyword", [(2, True), (4, False)])
def test_a_region_equals_one_rank(ranks: Ranks, tp: int, by_keyword: bool) -> None:
    module, x, dy = whole()
    x.requires_grad_()
    y = module(x)
    named = dict(module.named_parameters())
    gradients = torch.autograd.grad(y, [x, *named.values()], dy)
    expected = dict(zip(named, gradients[1:], strict=True))
    found = ranks.run(on_rank, tp, by_keyword)
    joined = {
        "y": (torch.cat([f[0] for f in found], 1), y),
        "dx": (torch.cat([f[1] for f in found], 1), gradients[0]),
        "up.weight": (torch.cat([f[2]["up.weight"] for f in found], 0), expected["up.weight"]),
        "up.bias": (torch.cat([f[2]["up.bias"] for f in found], 0), expected["up.bias"]),
        "down.weight": (torch.cat([f[2]["down.weight"] for f in found], 1), expected["down.weight"]),
        # Held whole: each rank saw its slice of the tokens, so the parts add up to the gradient.
        "down.bias": (torch.stack([f[2]["down.bias"] for f in found]).sum(0), expected["down.bias"]),
    }
    for name, (mine, reference) in joined.items():
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-13, msg=name)


def round_trip(rank: int, world: int) -> tuple[Tensor, Tensor]:
    group = dist.group.WORLD
    assert group is not None
    x = torch.full((1, 2, 3), float(rank + 1), requires_grad=True)
    y = scatter_sequence(gather_sequence(x, group), group)
    (gradient,) = torch.autograd.grad(y.sum(), [x])
    return y.detach(), gradient


def test_gather_and_scatter_are_each_others_transpose(ranks: Ranks) -> None:
    for rank, (y, gradient) in enumerate(ranks.run(round_trip, 2)):
        assert bool((y == 2 * (rank + 1)).all()) and bool((gradient == 2).all())
