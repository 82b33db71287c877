"""S and T by themselves: scores of a shard against the whole head, what they keep, and when rows travel."""

from __future__ import annotations

import gc
import threading
import time

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from parallel.test_master import mesh_at
from ranks import Ranks
from stretto.parallel.mesh import build_mesh
from stretto.parallel.pipeline.transport import transport_for
from stretto.parallel.pipeline.vocabulary.background import SideThread
from stretto.parallel.pipeline.vocabulary.groups import make_groups
from stretto.parallel.pipeline.vocabulary.rows import RowGradient
from stretto.parallel.pipeline.vocabulary.scores import Scores, Totals
from stretto.parallel.pipeline.vocabulary.sums import summed
from stretto.schedule.families import build
from stretto.schedule.itinerary import AHEAD, itinerary
from stretto.schedule.op import Kind
from stretto.schedule.passes.communication import lower
from stretto.schedule.passes.vocabulary import vocabulary
from stretto.schedule.progress import rounds
from stretto.spec.contract import IGNORE
from stretto.spec.plan import PlanSpec
from stretto.spec.sharding import split_evenly

N, D, V = 12, 8, 7
"""Seven rows over four ranks: 2, 2, 2 and 1; over five: 2, 2, 2, 1 and 0."""
SEED = 0.125
CPU = torch.device("cpu")


def case(scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::3] = IGNORE
    return x.to(dtype), labels, weight.to(dtype)


def score_on_rank(
    rank: int, world: int, scale: float, dtype: torch.dtype, early: bool
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    mesh = build_mesh(PlanSpec(pp=world), rank)
    groups = make_groups(mesh, CPU, transport_for(CPU))
    x, labels, weight = case(scale, dtype)
    start, count = split_evenly(V, world, rank)
    shard = weight[start : start + count]
    scores = Scores(x, labels, shard, start=start, early=early)
    kept = [tensor.numel() * tensor.element_size() for tensor in scores.tensors()]
    top, mass, loss, *gradient = summed(scores, groups, 1 if early else None, here=rank)
    assert bool(gradient) == (early and rank == 1)
    dlogits = scores.take_logit_gradient(Totals(top=top, mass=mass, loss=loss), torch.tensor(SEED, dtype=top.dtype))
    dx = gradient[0] * SEED if gradient else dlogits @ shard
    return loss, dlogits.t() @ x, dx, kept


def reference(scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, labels, weight = (t.double() if t.is_floating_point() else t for t in case(scale, dtype))
    x.requires_grad_(), weight.requires_grad_()
    loss = functional.cross_entropy(x @ weight.t(), labels, ignore_index=IGNORE, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss * SEED, [weight, x])


@pytest.mark.parametrize("early", [False, True], ids=["algorithm 1", "algorithm 2"])
def test_shards_together_are_the_whole_head(ranks: Ranks, early: bool) -> None:
    """Also where logits are in the thousands, so that a shard's exponentials vanish beside another's."""
    for scale, dtype, world, bound in (
        (1.0, torch.float64, 4, 1e-14),
        (3000.0, torch.float64, 5, 1e-14),
        (1.0, torch.bfloat16, 4, 0.02),
    ):
        found = ranks.run(score_on_rank, world, scale, dtype, early)
        loss, dweight, dx = reference(scale, dtype)
        for mine, _, _, _ in found:
            assert mine.dtype == torch.promote_types(dtype, torch.float32)
            assert float((mine - loss).abs()) <= bound * float(loss.abs())
        whole = torch.cat([mine for _, mine, _, _ in found]).double()
        assert float((whole - dweight).abs().max()) <= bound * float(dweight.abs().max())
        summed_up = found[1][2] if early else torch.stack([mine for _, _, mine, _ in found]).sum(0)
        assert float((summed_up.double() - dx).abs().max()) <= bound * float(dx.abs().max())


def test_between_s_and_t_a_rank_keeps_the_input_and_one_table() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        x, labels, weight = case(1.0, dtype)
        size = dtype.itemsize
        assert [t.nbytes for t in Scores(x, labels, weight, start=0, early=False).tensors()] == [
            N * D * size,
            N * V * size,
        ]
        early = Scores(x, labels, weight, start=0, early=True)
        assert sum(t.nbytes for t in early.tensors()) == (3 * N * D + N * V) * size  # until the sums are there
        early.take_input_gradient(early.top, early.mass)
        assert sum(t.nbytes for t in early.tensors()) == (N * D + N * V) * size
        early.forget()
        assert not sum(t.nbytes for t in early.tensors())


def test_gradients_of_equal_rows_add_up() -> None:
    total = torch.full((4, 2), 5.0)
    gradient = RowGradient([(torch.tensor([1, 3, 1]), torch.ones(3, 2)), (torch.tensor([3]), torch.ones(1, 2))])
    gradient.into(total, fresh=True)
    assert total.tolist() == [[0, 0], [2, 2], [0, 0], [2, 2]]
    gradient.into(total, fresh=False)
    assert total.tolist() == [[0, 0], [4, 4], [0, 0], [4, 4]]


@pytest.mark.parametrize(("name", "chunks"), [("1f1b", 1), ("zb-v", 2), ("dualpipe", 1), ("interleaved", 2)])
def test_rows_travel_some_micro_batches_ahead(name: str, chunks: int) -> None:
    schedule = lower(vocabulary(build(name, ranks=4, microbatches=12, chunks=chunks), algorithm=2))
    turns = rounds(schedule)
    when = {
        (op.kind is Kind.F, op.microbatch): int(turns[row])
        for rank in range(4)
        for row, op in enumerate(schedule.ops(rank), start=int(schedule.offsets[rank]))
        if op.stage == 0 and op.kind in (Kind.F, Kind.B, Kind.I)
    }
    for rank in range(4):
        own = [0, *turns[schedule.offsets[rank] : schedule.offsets[rank + 1]].tolist(), len(turns)]
        seen: dict[str, list[int]] = {"look up": [], "exchange": [], "take": []}
        for at, what, m in itinerary(schedule, rank):
            seen[what].append(m)
            before, behind = own[at], own[at + 1]  # rounds of the operations around it
            if what == "look up":
                assert before < when[True, m]
                assert sum(when[True, other] >= behind for other in seen[what]) <= AHEAD + len(schedule.placement)
            else:
                assert behind > when[False, m]
                assert what == "exchange" or m in seen["exchange"]
        assert all(sorted(found) == list(range(12)) for found in seen.values())


def test_the_thread_beside_ends_with_its_owner_and_passes_errors_on() -> None:
    beside = SideThread()
    (thread,) = (t for t in threading.enumerate() if t.name == "vocabulary")
    order: list[int] = []
    promises = [beside.submit(lambda n=n: (order.append(n), (torch.tensor(n),))[1]) for n in range(3)]
    assert [int(promise.result()[0]) for promise in promises] == order == [0, 1, 2]

    def fail() -> tuple[Tensor, ...]:
        raise ValueError("the peer has left")

    with pytest.raises(ValueError, match="the peer has left"):
        beside.submit(fail).result()
    assert int(beside.submit(lambda: (torch.tensor(4),)).result()[0]) == 4
    del beside, promises
    gc.collect()
    end = time.monotonic() + 10
    while thread.is_alive() and time.monotonic() < end:
        time.sleep(0.01)
    assert not thread.is_alive()


def test_one_rank_needs_no_groups() -> None:
    x, labels, weight = case(1.0, torch.float64)
    scores = Scores(x, labels, weight, start=0, early=True)
    *_, loss, dx = summed(scores, make_groups(mesh_at(), CPU, transport_for(CPU)), 0, here=0)
    expected, _, gradient = reference(1.0, torch.float64)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(dx * SEED, gradient)
