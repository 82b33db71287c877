"""Every way to cut attention: output, gradients, and bytes on the wire, against the whole and the closed forms."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ranks import Ranks
from stretto.parallel.sequence.blockwise import Blockwise
from stretto.parallel.sequence.opening import ContextAttend
from stretto.parallel.sequence.sight import Sight
from stretto.parallel.wire import Wire
from stretto.planner.sequence_volume import Heads, sequence_volume
from stretto.spec.contract import SequencePart
from stretto.spec.plan import PlanSpec
from stretto.spec.reach import Reach
from stretto.spec.sequence import Arrangement, cut_sequence

HEAD_SIZE, ROWS = 4, 2

Mask = int | tuple[int, ...]
"""First token of the first row's second document (0: there is none), or of all rows' documents, or minus a window."""
Case = tuple[dict[str, Any], int, int, int, Mask]
"""Plan, query heads, key/value heads, tokens, mask."""

CASES: list[Case] = [
    ({}, 4, 2, 37, 11),
    ({"context_layout": "contiguous"}, 4, 1, 37, 0),
    ({"inner_ring": 2}, 4, 2, 37, 11),
    ({"inner_ring": 4}, 2, 2, 36, 0),
    ({"context": "ulysses"}, 8, 8, 37, 0),
    ({"context": "ulysses"}, 8, 2, 37, 11),
    ({"context": "ulysses", "context_layout": "contiguous"}, 4, 1, 36, 0),
    ({"context": "ulysses"}, 12, 3, 37, 0),
    ({"context": "ulysses"}, 12, 2, 37, 0),
    ({"context": "mesh", "ulysses": 2}, 6, 2, 37, 11),
    ({"context": "mesh", "ulysses": 2}, 6, 3, 37, 0),
    ({"context": "mesh", "ulysses": 2, "context_inner": "ring", "context_layout": "contiguous"}, 4, 1, 37, 11),
    ({"context": "token-ring"}, 4, 2, 37, 11),
    ({"context": "token-ring", "context_layout": "contiguous"}, 4, 4, 36, 0),
    ({"context": "all-gather"}, 4, 2, 37, 11),
    ({"context": "all-gather"}, 4, 1, 36, 0),
    ({"context_layout": "contiguous"}, 4, 2, 37, -6),
    ({}, 4, 2, 37, -4),
    ({"inner_ring": 2}, 4, 2, 37, -5),
    ({"inner_ring": 2, "context_layout": "contiguous"}, 4, 2, 37, (3, 9, 12, 30)),
    ({}, 4, 2, 37, (3, 9, 12, 30)),
    ({"context": "mesh", "ulysses": 2}, 4, 2, 37, -5),
    ({"context": "token-ring"}, 4, 2, 37, -4),
    ({"context": "token-ring", "context_layout": "contiguous"}, 4, 2, 37, (3, 9, 12, 30)),
    ({"context": "all-gather"}, 4, 2, 37, -4),
    ({"context": "all-gather", "context_keep": True}, 4, 2, 37, -4),
    ({"inner_ring": 2, "context_keep": True}, 4, 2, 37, -5),
    ({"context": "mesh", "ulysses": 2, "context_keep": True}, 4, 2, 37, (3, 9, 12, 30)),
    ({"context": "mesh", "ulysses": 2, "context_inner": "ring", "context_keep": True}, 4, 2, 37, -5),
    ({"context": "all-gather", "context_layout": "contiguous"}, 4, 2, 37, (3, 9, 12, 30)),
]

CONTIGUOUS = {"context_layout": "contiguous"}
INNER_RING = {"context": "mesh", "context_inner": "ring"}
EVERY: dict[str, dict[str, Any]] = {
    "ring": {},
    "ring, contiguous": CONTIGUOUS,
    "ulysses": {"context": "ulysses"},
    "ulysses, contiguous": {"context": "ulysses", **CONTIGUOUS},
    "token-ring": {"context": "token-ring"},
    "token-ring, contiguous": {"context": "token-ring", **CONTIGUOUS},
    "all-gather": {"context": "all-gather"},
    "all-gather, contiguous": {"context": "all-gather", **CONTIGUOUS},
    "mesh of 2": {"context": "mesh", "ulysses": 2},
    "mesh of 2, keys kept": {"context": "mesh", "ulysses": 2, "context_keep": True},
    "mesh of 2, ring inside": {**INNER_RING, "ulysses": 2, **CONTIGUOUS},
}
FROM_FOUR: dict[str, dict[str, Any]] = {
    "double ring": {"inner_ring": 2},
    "double ring, contiguous": {"inner_ring": 2, **CONTIGUOUS},
    "mesh of 4": {"context": "mesh", "ulysses": 4, **CONTIGUOUS},
    "mesh of 4, ring inside": {**INNER_RING, "ulysses": 4},
}
FROM_EIGHT: dict[str, dict[str, Any]] = {
    "double ring of 4": {"inner_ring": 4},
    "ring, keys kept": {"context_keep": True},
    "all-gather, keys kept": {"context": "all-gather", "context_keep": True},
    "mesh of 2, double ring": {"context": "mesh", "ulysses": 2, "inner_ring": 2},
}


@dataclass(frozen=True)
class Cut:
    """What the opening reads of a context."""

    part: SequencePart
    first: Tensor | None


class NoDropout:
    def weight_dropout(self, context: Any) -> None:
        return None


def tensors(heads: int, kv_heads: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output, whole."""
    generator = torch.Generator().manual_seed(heads * length + kv_heads)
    return [
        torch.randn(ROWS, n, length, HEAD_SIZE, generator=generator, dtype=torch.float64).to(dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    ]


def first_of(length: int, mask: Mask) -> Tensor | None:
    if not mask:
        return None
    if isinstance(mask, int) and mask < 0:
        return (torch.arange(length) + mask + 1).clamp(min=0).unsqueeze(0)
    first = torch.zeros(ROWS, length, dtype=torch.int64)
    if isinstance(mask, int):
        first[0, mask:] = mask
        return first
    for start in mask:
        first[:, start:] = start
    return first


def own(x: Tensor, index: Tensor) -> Tensor:
    return x[:, :, index].contiguous()


def attend_cut(
    rank: int, world: int, cases: list[Any], dtype: torch.dtype
) -> list[tuple[list[Tensor], tuple[int, int]]]:
    """Output, gradients and sent bytes of each case."""
    wire, found = Wire(dist.group.WORLD), []
    for plan, heads, kv_heads, length, mask in cases:
        spec = PlanSpec(cp=world, **plan)
        shares = cut_sequence(length, world, spec.context_layout)
        index = torch.cat([torch.arange(*part) for part in shares[rank]])
        *qkv, dout = (own(x, index) for x in tensors(heads, kv_heads, length, dtype))
        qkv = [x.requires_grad_() for x in qkv]
        context = Cut(SequencePart(shares=shares, tokens=index, documents=None), first_of(length, mask))
        attend = ContextAttend(wire=wire, arrangement=Arrangement.of(spec), local=NoDropout(), kernel=Blockwise())
        before = wire.sent
        out = attend(*qkv, context)
        middle = wire.sent
        gradients = torch.autograd.grad(out, qkv, dout)
        found.append(([out.detach(), *gradients], (middle - before, wire.sent - middle)))
    return found


def whole_of(case: Any, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of one rank."""
    _, heads, kv_heads, length, mask = case
    *qkv, dout = tensors(heads, kv_heads, length, dtype)
    qkv = [x.double().requires_grad_() for x in qkv]
    q, k = torch.arange(length).unsqueeze(1), torch.arange(length)
    seen = (k <= q).expand(ROWS, length, length)
    first = first_of(length, mask)
    if first is not None:
        seen = seen & (k >= first.unsqueeze(2))
    out = F.scaled_dot_product_attention(*qkv, attn_mask=seen.unsqueeze(1), enable_gqa=True)
    return [out.detach(), *torch.autograd.grad(out, qkv, dout.double())]


def hold(cases: list[Any], found: list[Any], world: int, *, dtype: torch.dtype, error: float) -> None:
    """Compare what all ranks found with one rank, and their bytes with the closed forms."""
    for number, case in enumerate(cases):
        plan, heads, kv_heads, length, mask = case
        spec = PlanSpec(cp=world, **plan)
        shares = cut_sequence(length, world, spec.context_layout)
        whole = whole_of(case, dtype)
        shape = Heads(rows=ROWS, heads=heads, kv_heads=kv_heads, head_size=HEAD_SIZE, element_bytes=dtype.itemsize)
        for rank in range(world):
            index = torch.cat([torch.arange(*part) for part in shares[rank]])
            parts, sent = found[rank][number]
            for mine, expected in zip(parts, whole, strict=True):
                worst = (mine.double() - own(expected, index)).abs().max() / expected.abs().max()
                assert worst <= error, (case, rank)
            volume = sequence_volume(
                Arrangement.of(spec), shares, rank, shape, sees=Sight(first_of(length, mask)).reach
            )
            assert sent == (volume.forward, volume.backward), (case, rank)


def test_every_way_equals_the_whole_and_sends_what_its_formula_says(ranks: Ranks) -> None:
    """Float64 on four ranks: rounding only."""
    hold(CASES, ranks.run(attend_cut, 4, CASES, torch.float64), 4, dtype=torch.float64, error=1e-13)


def test_bfloat16_sums_in_float32_and_pays_for_it(ranks: Ranks) -> None:
    cases = [case for case in CASES if case[3] == 36]
    hold(cases, ranks.run(attend_cut, 4, cases, torch.bfloat16), 4, dtype=torch.bfloat16, error=0.02)


def test_gradients_of_key_heads_that_ranks_share_are_added_in_float32(ranks: Ranks) -> None:
    """In bfloat16 those of Ulysses, which replicates the one head, are as close as those of a ring, which doesn't."""
    cases: list[Case] = [({}, 8, 1, 64, 0), ({"context": "ulysses"}, 8, 1, 64, 0)]
    found = ranks.run(attend_cut, 4, cases, torch.bfloat16)
    errors = []
    for number, case in enumerate(cases):
        expected, error = whole_of(case, torch.bfloat16)[-1], 0.0
        for rank, share in enumerate(cut_sequence(64, 4, "zigzag")):
            index = torch.cat([torch.arange(*part) for part in share])
            error += float((found[rank][number][0][-1].double() - own(expected, index)).square().sum())
        errors.append(error**0.5)
    assert errors[1] <= 1.1 * errors[0]


def test_keys_are_kept_without_what_only_others_see(ranks: Ranks) -> None:
    """Documents that end inside of shares: messages go on to seats that see more of them."""
    for excess, kept in ranks.run(bytes_kept, 4):
        assert excess == 0 and kept > 0


def bytes_kept(rank: int, world: int) -> tuple[int, int]:
    """Bytes that are held beside those of the tensors kept for backward, and those of the tensors."""
    spec = PlanSpec(cp=world, context_keep=True)
    shares = cut_sequence(37, world, "zigzag")
    index = torch.cat([torch.arange(*part) for part in shares[rank]])
    *qkv, _ = (own(x, index).requires_grad_() for x in tensors(4, 2, 37, torch.float64))
    context = Cut(SequencePart(shares=shares, tokens=index, documents=None), first_of(37, (3, 9, 12, 30)))
    kept: list[Tensor] = []
    attend = ContextAttend(
        wire=Wire(dist.group.WORLD), arrangement=Arrangement.of(spec), local=NoDropout(), kernel=Blockwise()
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        attend(*qkv, context)
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    size = sum(x.numel() * x.element_size() for x in kept)
    return sum(held.values()) - size, size


def test_an_odd_length(ranks: Ranks) -> None:
    long: list[Case] = [
        ({}, 1, 1, 2999, 700),
        ({"context": "mesh", "ulysses": 2}, 2, 1, 2999, 0),
        ({"context": "token-ring"}, 1, 1, 2999, -900),
    ]
    hold(long, ranks.run(attend_cut, 4, long, torch.float64), 4, dtype=torch.float64, error=1e-12)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_every_way_at_every_degree(ranks: Ranks, world: int) -> None:
    """Eight query heads with as many key/value heads, two, and one (of eight ranks two of these); masks take turns."""
    plans = [*EVERY.values(), *(FROM_FOUR.values() if world > 2 else ()), *(FROM_EIGHT.values() if world > 4 else ())]
    masks: list[Mask] = [0, (3, 9, 12, 30), -6]
    cases = [
        (plan, 8, kv_heads, 37, masks[(number + turn) % 3])
        for number, plan in enumerate(plans)
        for turn, kv_heads in enumerate((8, 2, 1))
        if world < 8 or turn != number % 3
    ]
    found = ranks.run(attend_cut, world, cases, torch.float64, timeout=300)
    hold(cases, found, world, dtype=torch.float64, error=1e-13)


def test_seats_that_three_ranks_share(ranks: Ranks) -> None:
    cases: list[Case] = [
        ({"context": "mesh", "ulysses": 3}, 6, 2, 37, 11),
        ({"context": "mesh", "ulysses": 3, "context_inner": "ring"}, 3, 3, 37, -9),
        ({"context": "ulysses"}, 6, 2, 37, 0),
    ]
    hold(cases, ranks.run(attend_cut, 6, cases, torch.float64), 6, dtype=torch.float64, error=1e-13)


def test_even_shares_are_the_formulas_of_the_papers() -> None:
    """N tokens, n ranks: the closed forms of the module's table."""
    n, length, h, g, k = 4, 64, 8, 2, 16
    shares = cut_sequence(length, n, "zigzag")
    heads = Heads(rows=1, heads=h, kv_heads=g, head_size=k, element_bytes=2)
    others = length * (n - 1) // n

    def of(**plan: Any) -> tuple[int, int]:
        volumes = {sequence_volume(Arrangement.of(PlanSpec(cp=n, **plan)), shares, r, heads) for r in range(n)}
        assert len(volumes) == 1
        volume = volumes.pop()
        return volume.forward, volume.backward

    keys = 2 * g * k * others
    assert of() == of(inner_ring=2) == of(context="all-gather") == (2 * keys, (2 + 4) * keys)
    replicated = 2 * (2 * h + 2 * g * n // g) * k * others // n
    assert of(context="ulysses") == (replicated, replicated)
    assert of(context="token-ring") == (
        h * (2 * k + 4 * (k + 1)) * others,
        h * (2 * 2 * k + 2 * 4 + 4 * k) * others,
    )


def test_a_window_and_documents_cost_the_tokens_that_are_seen() -> None:
    """64 tokens over four ranks, contiguous: a window of 5 reaches 4 tokens back, over one border."""
    shares = cut_sequence(64, 4, "contiguous")
    heads = Heads(rows=1, heads=8, kv_heads=2, head_size=16, element_bytes=2)
    token = 2 * 2 * 16

    def of(sees: Any, **plan: Any) -> list[tuple[int, int]]:
        who = Arrangement.of(PlanSpec(cp=4, context_layout="contiguous", **plan))
        found = [sequence_volume(who, shares, rank, heads, sees=sees) for rank in range(4)]
        return [(volume.forward // token, volume.backward // token) for volume in found]

    window = partial(Reach.window, size=5)
    first, middle, last = (4 * 2, 4 * 2), (4 * 2, 4 * 2 + 4 * 4), (0, 4 * 4)
    for plan in ({}, {"context": "all-gather"}):
        assert of(window, **plan) == [first, middle, middle, last]
    assert of(Sight(first_of(64, (16, 32, 40, 48))).reach) == [(0, 0)] * 4
    assert of(Sight(first_of(64, (10, 20))).reach)[0] == (6 * 2, 6 * 2)


def test_the_mesh_goes_round_with_what_its_seats_see() -> None:
    """Two seats of two ranks: a window of 5 sends 4 tokens of half the heads over the border between seats."""
    shares = cut_sequence(64, 4, "contiguous")
    heads = Heads(rows=1, heads=8, kv_heads=2, head_size=16, element_bytes=2)
    who = Arrangement.of(PlanSpec(cp=4, context="mesh", ulysses=2, context_layout="contiguous"))
    window, nothing = partial(Reach.window, size=5), partial(Reach.window, size=1)
    for rank, sent in enumerate([4, 4, 0, 0]):
        both = [sequence_volume(who, shares, rank, heads, sees=see) for see in (window, nothing)]
        assert both[0].forward - both[1].forward == 2 * 16 * sent * 2


@pytest.mark.parametrize("ulysses", [1, 2, 4, 8])
@pytest.mark.parametrize("inner", ["ulysses", "ring"])
def test_every_rank_has_one_place(ulysses: int, inner: str) -> None:
    who = Arrangement.of(PlanSpec(cp=8, context="mesh", ulysses=ulysses, context_inner=inner))
    assert len({who.place(rank) for rank in range(8)}) == 8
    for rank in range(8):
        assert who.sharers(rank)[who.place(rank)[1]] == rank and who.ring(rank)[who.place(rank)[0]] == rank
    if inner == "ulysses":
        assert who.sharers(0) == tuple(range(ulysses))
    else:
        assert who.ring(0) == tuple(range(8 // ulysses))
