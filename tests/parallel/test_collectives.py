"""Collectives: shapes, order of the parts, and that a group of one sends nothing."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ranks import Ranks
from stretto.parallel import collectives as c

WORLD = 3


def on_rank(rank: int, world: int) -> dict[str, torch.Tensor]:
    group = dist.group.WORLD
    assert (c.size_of(group), c.index_in(group)) == (world, rank)
    total = torch.full((2,), float(rank + 1))
    c.all_reduce(total, group).wait()
    largest = torch.tensor([rank, -rank])
    c.all_reduce(largest, group, maximum=True).wait()
    flat = torch.arange(2 * world, dtype=torch.float64) * (rank + 1)
    shard = torch.empty(2, dtype=torch.float64)
    c.reduce_scatter(flat, shard, group).wait()
    gathered = torch.empty(2 * world, dtype=torch.float64)
    c.all_gather(shard, gathered, group).wait()
    x = torch.arange(2 * 2 * 3.0).view(2, 2, 3) + 100 * rank
    empty = torch.empty(0)
    c.all_reduce(empty, group).wait()
    return {
        "total": total,
        "largest": largest,
        "shard": shard,
        "gathered": gathered,
        "x": x,
        **{f"gather{dim}": c.gather_dim(x.transpose(0, 1), dim, group) for dim in range(3)},
        "scattered": c.reduce_scatter_dim(x, 2, group),
        "back": c.reduce_scatter_dim(c.gather_dim(x, 1, group), 1, group),
    }


def test_shapes_and_order(ranks: Ranks) -> None:
    found = ranks.run(on_rank, WORLD)
    flat = 6 * torch.arange(2.0 * WORLD, dtype=torch.float64)
    xs = [f["x"].transpose(0, 1) for f in found]
    for rank, mine in enumerate(found):
        assert mine["total"].tolist() == [6.0, 6.0]
        assert mine["largest"].tolist() == [2, 0]
        assert torch.equal(mine["shard"], flat[2 * rank : 2 * rank + 2])
        assert torch.equal(mine["gathered"], flat)
        for dim in range(3):
            assert torch.equal(mine[f"gather{dim}"], torch.cat(xs, dim))
        assert torch.equal(mine["scattered"], sum(f["x"] for f in found)[..., rank : rank + 1])
        # Every rank gathers all parts, so summing them again gives each part as often as there are ranks.
        assert torch.equal(mine["back"], WORLD * mine["x"])


def test_a_group_of_one() -> None:
    x = torch.arange(6.0).view(1, 2, 3)
    assert c.gather_dim(x, 1, None) is x and c.reduce_scatter_dim(x, 1, None) is x
    shard = torch.zeros(6)
    assert c.reduce_scatter(x.flatten(), shard, None) is c.DONE and torch.equal(shard, x.flatten())
    flat = torch.zeros(6)
    c.all_gather(shard, flat, None).wait()
    assert torch.equal(flat, shard)
    assert c.all_reduce(x, None) is c.DONE and (c.size_of(None), c.index_in(None)) == (1, 0)
