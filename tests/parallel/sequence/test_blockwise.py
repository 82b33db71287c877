"""Blockwise attention, and the merge of partial results, against the plain formula and torch's own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stretto.parallel.sequence.blockwise import Block, Blockwise, Rows
from stretto.parallel.sequence.merge import merge
from stretto.parallel.sequence.pieces import Task, attend_over
from stretto.parallel.sequence.ring import Ring
from stretto.parallel.sequence.sight import Relation, Sight
from stretto.parallel.wire import Wire
from stretto.spec.sequence import Range, cut_sequence

LENGTH = 23
DOCUMENTS = torch.tensor([[0] * 9 + [9] * 14, [0] * 23])
WINDOW = (torch.arange(LENGTH) - 4).clamp(min=0).unsqueeze(0)
SIGHTS = {"causal": None, "documents": DOCUMENTS, "window": WINDOW, "both": DOCUMENTS.maximum(WINDOW)}


def heads(count: int, length: int = LENGTH, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, length, 4, generator=generator, dtype=dtype)


def whole_mask(first: Tensor | None) -> Tensor:
    q, k = torch.arange(LENGTH).unsqueeze(1), torch.arange(LENGTH)
    seen = (k <= q).unsqueeze(0)
    return (seen if first is None else seen & (k >= first.unsqueeze(2))).unsqueeze(1)


def alone(first: Tensor | None, *, tile: int) -> tuple[Ring, Task]:
    """A ring of one seat that holds everything."""
    ring = Ring(wire=Wire(None), members=(0,), seat=0, inner=1)
    return ring, Task(kernel=Blockwise(tile), seats=(((0, LENGTH),),), sight=Sight(first))


@pytest.mark.parametrize("first", SIGHTS.values(), ids=SIGHTS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_output_and_gradients_are_those_of_torch(first: Tensor | None, kv_heads: int) -> None:
    mine = [heads(n, seed=i).requires_grad_() for i, n in enumerate((4, kv_heads, kv_heads))]
    theirs = [x.detach().clone().requires_grad_() for x in mine]
    dout = heads(4, seed=9)
    ring, task = alone(first, tile=5)
    out = attend_over(ring, task, *mine)
    expected = F.scaled_dot_product_attention(*theirs, attn_mask=whole_mask(first), enable_gqa=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    for a, b in zip(torch.autograd.grad(out, mine, dout), torch.autograd.grad(expected, theirs, dout), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_bfloat16_is_as_near_as_its_rounding() -> None:
    q, k, v = (heads(4, seed=i, dtype=torch.bfloat16) for i in range(3))
    ring, task = alone(None, tile=5)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    torch.testing.assert_close(attend_over(ring, task, q, k, v).double(), exact, rtol=0.02, atol=0.02)


def test_no_table_is_larger_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    product = Tensor.__matmul__

    def watched(a: Tensor, b: Tensor) -> Tensor:
        found = product(a, b)
        sizes.append(found.numel())
        return found

    q = heads(2, length=128)
    block = Block(queries=(0, 128), keys=(0, 128), sight=Sight(None))
    monkeypatch.setattr(Tensor, "__matmul__", watched)
    _, lse = Blockwise(8).forward(q, torch.stack((q, q)), block)
    Blockwise(8).backward(Rows(q=q, dout=q, lse=lse, delta=lse), torch.stack((q, q)), block)
    tiles = 16 * 17 // 2  # the upper triangle is left out
    assert max(sizes) <= 2 * 2 * 8 * 8 and len(sizes) == tiles * (2 + 5)


def test_merge_is_safe_and_has_a_neutral_element() -> None:
    nothing = (torch.zeros(1, 3), torch.tensor([-math.inf]))
    big = (torch.full((1, 3), 2.0), torch.tensor([1000.0]))
    small = (torch.full((1, 3), 5.0), torch.tensor([-1000.0]))
    out, lse = (t.clone() for t in nothing)
    merge(out, lse, *nothing)
    assert not out.any() and lse.item() == -math.inf
    for other, mean, top in ((big, 2.0, 1000.0), (small, 2.0, 1000.0), (big, 2.0, 1000.0 + math.log(2))):
        merge(out, lse, *other)
        assert out.tolist() == [[mean] * 3] and lse.item() == pytest.approx(top)
    merge(out, lse, *nothing)
    assert out.tolist() == [[2.0] * 3]


def test_scores_of_any_size_give_finite_weights() -> None:
    q, k, v = (heads(2, seed=i, dtype=torch.float32) for i in range(3))
    ring, task = alone(WINDOW, tile=5)
    for factor in (1e3, -1e3, 1e4):
        q2 = (q * factor).requires_grad_()
        out = attend_over(ring, task, q2, k, v)
        out.sum().backward()
        assert bool(out.isfinite().all()) and q2.grad is not None and bool(q2.grad.isfinite().all())


@pytest.mark.parametrize("first", SIGHTS.values(), ids=SIGHTS)
def test_a_block_is_what_its_corners_say(first: Tensor | None) -> None:
    sight, mask = Sight(first), whole_mask(first)
    cuts = [(a, b) for a in range(0, LENGTH, 4) for b in (a + 1, a + 3) if b <= LENGTH]
    kinds = set()
    for queries in cuts:
        for keys in cuts:
            part = mask[:, :, slice(*queries), slice(*keys)]
            kind = sight.relation(queries, keys)
            kinds.add(kind)
            assert (kind is Relation.EMPTY) == (not part.any())
            assert (kind is Relation.FULL) == bool(part.all())
            assert torch.equal(sight.mask(queries, keys, torch.device("cpu")).expand_as(part), part)
            assert sight.pairs(queries, keys) == int(part[0].sum())
    assert kinds == {Relation.EMPTY, Relation.FULL, Relation.PARTIAL}


def work_of(layout: str, ranks: int, length: int, first: Tensor | None = None) -> list[int]:
    """Pairs that see each other, per rank."""
    sight, whole = Sight(first), (0, length)
    return [sum(sight.pairs(part, whole) for part in parts) for parts in cut_sequence(length, ranks, layout)]


def test_zigzag_gives_each_rank_the_same_work() -> None:
    for ranks, length in ((2, 64), (4, 2999), (8, 32768), (8, 8191)):
        work = work_of("zigzag", ranks, length)
        assert sum(work) == length * (length + 1) // 2
        assert max(work) / (sum(work) / ranks) <= 1.03
    plain = work_of("contiguous", 8, 32768)
    assert max(plain) / (sum(plain) / 8) == pytest.approx(15 / 8, rel=1e-3)


def test_shares_hold_every_token_once_and_differ_by_one_unit() -> None:
    for layout in ("zigzag", "contiguous"):
        for ranks, length, unit in ((4, 2999, 1), (3, 30, 2), (8, 16, 1), (1, 5, 1)):
            shares = cut_sequence(length, ranks, layout, unit=unit)
            held = [token for parts in shares for a, b in parts for token in range(a, b)]
            assert sorted(held) == list(range(length))
            sizes = [sum(b - a for a, b in parts) for parts in shares]
            assert max(sizes) - min(sizes) <= unit and all(size % unit == 0 for size in sizes)


def test_dropout_reaches_every_tile_by_its_positions() -> None:
    """Factors that depend on head and positions alone: tiles give what the whole table gives."""

    def factor(part: Range) -> Tensor:
        return torch.arange(*part, dtype=torch.float64)

    def drop(h: Range, q: Range, k: Range) -> Tensor:
        return (factor(h)[:, None, None] + 2 * factor(q)[:, None] + 3 * factor(k)).remainder(3).unsqueeze(0)

    q, k, v = (heads(4, seed=i).requires_grad_() for i in range(3))
    weights = ((q @ k.transpose(2, 3)) / 2).masked_fill(~whole_mask(None), -math.inf).softmax(-1)
    expected = (weights * drop((3, 7), (0, LENGTH), (0, LENGTH))) @ v
    ring, task = alone(None, tile=5)
    task = Task(kernel=task.kernel, seats=task.seats, sight=task.sight, drop=drop, first_head=3)
    out = attend_over(ring, task, q, k, v)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    dout = heads(4, seed=9)
    for a, b in zip(
        torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(expected, (q, k, v), dout), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
