"""The test harness itself: results come back by rank, and a raising rank is named, not waited for."""

import pytest
import torch
import torch.distributed as dist

from ranks import RankFailure, Ranks


def total(rank: int, world: int, x: float) -> float:
    value = torch.tensor(x * rank)
    dist.all_reduce(value)
    return value.item()


def raise_on_one(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("boom on one")
    dist.barrier()


def test_results_come_back_in_rank_order(ranks: Ranks) -> None:
    assert ranks.run(total, 3, 2.0) == [6.0] * 3


def test_a_raising_rank_is_shown_and_the_pool_recovers() -> None:
    workers = Ranks()
    with pytest.raises(RankFailure, match="boom on one"):
        workers.run(raise_on_one, 2, timeout=60)
    assert workers.run(total, 2, 1.0) == [1.0] * 2
    workers.stop()
