"""The vocabulary split over tp against torch on one rank, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ranks import Ranks
from stretto.parallel.vocab import VocabParallelEmbedding, vocab_parallel_cross_entropy
from stretto.spec.contract import IGNORE
from stretto.spec.sharding import split_evenly

ROWS, LENGTH, WIDTH = 2, 8, 6
TP = 4
VOCABULARIES = [61, 64, 9, 5]
"""61 over 4 is 16, 16, 16, 13; 9 is 3, 3, 3, 0; 5 is 2, 2, 1, 0."""


def data_of(vocabulary: int, dtype: torch.dtype, scale: float, ignored: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    labels = torch.randint(0, vocabulary, (ROWS, LENGTH), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = IGNORE
    return {
        "ids": torch.randint(0, vocabulary, (ROWS, LENGTH), generator=generator),
        "labels": labels,
        "table": torch.randn(vocabulary, WIDTH, generator=generator, dtype=torch.float64).to(dtype),
        "logits": (scale * torch.randn(ROWS, LENGTH, vocabulary, generator=generator, dtype=torch.float64)).to(dtype),
        "weights": torch.randn(ROWS, LENGTH, WIDTH, generator=generator, dtype=torch.float64).to(dtype),
    }


def loss_on_rank(rank: int, world: int, cases: list[tuple[Any, ...]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = []
    for case in cases:
        data = data_of(*case)
        start, count = split_evenly(case[0], world, rank)
        mine = data["logits"][..., start : start + count].clone().requires_grad_()
        group = dist.group.WORLD
        assert group is not None
        loss = vocab_parallel_cross_entropy(mine, data["labels"], start, group)
        (gradient,) = torch.autograd.grad(3 * loss, [mine])
        found.append((loss.detach(), gradient))
    return found


CASES: list[tuple[Any, ...]] = [
    *[(v, torch.float64, 1.0, 0.3) for v in VOCABULARIES],
    (61, torch.float64, 1.0, 1.1),  # all labels ignored
    (61, torch.float64, 500.0, 0.3),  # exp would overflow without the maximum
    (61, torch.float32, 1e4, 0.0),
    (61, torch.float32, 1.0, 0.3),
    (61, torch.bfloat16, 1.0, 0.3),
]
BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""A few roundings of the type; bfloat16's loss is summed in float32, its gradient rounded once (2^-8)."""


def test_cross_entropy_equals_torch(ranks: Ranks) -> None:
    by_rank = ranks.run(loss_on_rank, TP, CASES)
    for number, case in enumerate(CASES):
        data = data_of(*case)
        logits = data["logits"].detach().to(torch.float64).requires_grad_()
        expected = F.cross_entropy(logits.flatten(0, 1), data["labels"].flatten(), ignore_index=IGNORE, reduction="sum")
        (gradient,) = torch.autograd.grad(3 * expected, [logits])
        losses = [r[number][0] for r in by_rank]
        together = torch.cat([r[number][1] for r in by_rank], -1)
        assert all(torch.equal(loss, losses[0]) for loss in losses), case
        assert losses[0].dtype == (torch.float64 if case[1] == torch.float64 else torch.float32)
        bound = BOUNDS[case[1]]
        assert losses[0].item() == pytest.approx(expected.item(), rel=bound, abs=0), case
        assert together.dtype == case[1]
        assert float((together.double() - gradient).abs().max()) <= 3 * bound, case
        assert bool((together[data["labels"] == IGNORE] == 0).all())


def test_all_ignored_is_zero_and_not_nan(ranks: Ranks) -> None:
    for loss, gradient in (r[0] for r in ranks.run(loss_on_rank, 2, [(61, torch.float64, 1.0, 1.1)])):
        assert float(loss) == 0.0 and bool((gradient == 0).all())


def embedding_on_rank(rank: int, world: int, vocabularies: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    group = dist.group.WORLD
    assert group is not None
    found = []
    for vocabulary in vocabularies:
        data = data_of(vocabulary, torch.float64, 1.0, 0.0)
        start, count = split_evenly(vocabulary, world, rank)
        weight = nn.Parameter(data["table"][start : start + count].clone())
        y = VocabParallelEmbedding(weight, start, group)(data["ids"])
        low = rank * LENGTH // world
        # A rank without rows must take part in the backward pass, or its peers wait for it for ever.
        (gradient,) = torch.autograd.grad(y, [weight], data["weights"][:, low : low + LENGTH // world])
        found.append((y.detach(), gradient))
    return found


def test_embedding_equals_torch_even_where_a_rank_has_no_rows(ranks: Ranks) -> None:
    by_rank = ranks.run(embedding_on_rank, TP, VOCABULARIES)
    for number, vocabulary in enumerate(VOCABULARIES):
        data = data_of(vocabulary, torch.float64, 1.0, 0.0)
        table = data["table"].requires_grad_()
        y = F.embedding(data["ids"], table)
        (gradient,) = torch.autograd.grad(y, [table], data["weights"])
        assert torch.equal(torch.cat([r[number][0] for r in by_rank], 1), y)
        torch.testing.assert_close(torch.cat([r[number][1] for r in by_rank], 0), gradient, rtol=0, atol=1e-14)
