"""Fused kernels and FlexAttention against blockwise attention, which is held to the plain formula elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, BlockMask

from stretto.parallel.sequence import rectangles
from stretto.parallel.sequence.backends import kernel_for
from stretto.parallel.sequence.blockwise import Block, Blockwise, Rows
from stretto.parallel.sequence.flash import CudaEfficient, CudaFlash, Flash, Fused, operators_for, whole_out
from stretto.parallel.sequence.flex import SIDE, Flex, relations
from stretto.parallel.sequence.pieces import Kernel
from stretto.parallel.sequence.rectangles import Kind
from stretto.parallel.sequence.sight import Sight
from stretto.spec.errors import UnsupportedError
from stretto.spec.sequence import Range

CPU = torch.device("cpu")
LENGTH = 300
PLACES = torch.arange(LENGTH)
DOCUMENTS = (PLACES // 7 * 7).where(PLACES < 60, 60).where(PLACES < 210, 210)
"""Documents of 7 tokens, one of 150, one of 90."""
WINDOW = (PLACES - 40).clamp(min=0)
SIGHTS = {
    "causal": None,
    "documents": DOCUMENTS.unsqueeze(0),
    "window": WINDOW.unsqueeze(0),
    "rows that differ": torch.stack((DOCUMENTS, torch.zeros_like(PLACES), DOCUMENTS.maximum(WINDOW))),
}
BLOCKS = [
    ((0, 300), (0, 300)),
    ((150, 300), (0, 150)),
    ((40, 260), (100, 230)),
    ((100, 230), (40, 260)),
    ((5, 9), (0, 7)),
]


def problem(
    block: Block, *, kv_heads: int = 2, size: int = 8, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Rows, Tensor]:
    """Queries of three sequences, whose rows of attention see other keys too, and keys and values."""
    generator = torch.Generator().manual_seed(block.queries[0] * LENGTH + block.keys[1])

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    (a, b), (c, d) = block.queries, block.keys
    q, dout, kv = drawn(3, 4, b - a, size), drawn(3, 4, b - a, size), drawn(2, 3, kv_heads, d - c, size)
    if device == "meta":
        sums = torch.empty(3, 4, b - a, device=device)
        return Rows(q=q, dout=dout, lse=sums, delta=sums), kv
    lse = torch.logaddexp(Blockwise().forward(q, kv, block)[1], drawn(3, 4, b - a).float().to(dtype))
    return Rows(q=q, dout=dout, lse=lse, delta=drawn(3, 4, b - a)), kv


def hold(kernel: Kernel, block: Block, *, error: float, **of: Any) -> None:
    """Everything that the kernel gives for a block is what Blockwise gives."""
    rows, kv = problem(block, **of)
    exact = Blockwise()
    (out, lse), (out_2, lse_2) = (one.forward(rows.q, kv, block) for one in (exact, kernel))
    unseen = lse == float("-inf")
    assert torch.equal(unseen, lse_2 == float("-inf"))
    pairs = [(out, out_2), (lse.masked_fill(unseen, 0.0), lse_2.masked_fill(unseen, 0.0))]
    pairs += zip(exact.backward(rows, kv, block), kernel.backward(rows, kv, block), strict=True)
    for expected, found in pairs:
        assert (found - expected).abs().max() <= error * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("first", SIGHTS.values(), ids=SIGHTS)
def test_the_fused_kernel_of_the_cpu_is_exact(first: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = kernel_for(CPU)
    assert isinstance(kernel, Flash)
    for queries, keys in BLOCKS:
        block = Block(queries=queries, keys=keys, sight=Sight(first))
        hold(kernel, block, error=1e-12)
        hold(kernel, block, error=3e-6, kv_heads=1, dtype=torch.float32)
    monkeypatch.setattr(rectangles, "SHORTEST", 5)
    monkeypatch.setattr(rectangles, "STRIP", 16)
    for queries, keys in BLOCKS:
        hold(kernel, Block(queries=queries, keys=keys, sight=Sight(first)), error=1e-12, kv_heads=4)


def test_rectangles_hold_each_pair_once_and_need_no_mask_for_long_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    long = rectangles.rectangles((60, 300), (60, 300), Sight(SIGHTS["documents"]))
    assert [(asked, kind) for asked, _, kind in long] == [((60, 210), Kind.CAUSAL), ((210, 300), Kind.CAUSAL)]
    monkeypatch.setattr(rectangles, "STRIP", 16)
    for name, first in SIGHTS.items():
        for row in range(1 if first is None else first.shape[0]):
            sight = Sight(first).row(row)
            for queries, keys in BLOCKS:
                covered = torch.zeros(LENGTH, LENGTH, dtype=torch.int64)
                for asked, answer, kind in rectangles.rectangles(queries, keys, sight):
                    seen = sight.mask(asked, answer, CPU)[0, 0]
                    if kind is Kind.FULL:
                        assert bool(seen.all())
                    if kind is Kind.CAUSAL:
                        assert asked == answer and torch.equal(seen, torch.ones_like(seen).tril())
                    if kind is Kind.MASKED:
                        assert name != "causal" and bool(seen.any())
                    covered[slice(*asked), slice(*answer)] += seen
                part = torch.zeros_like(covered)
                part[slice(*queries), slice(*keys)] = sight.mask(queries, keys, CPU)[0, 0].long()
                assert torch.equal(covered, part)


def test_bfloat16_is_at_least_as_near_as_blockwise() -> None:
    block = Block(queries=(0, 300), keys=(0, 300), sight=Sight(WINDOW.unsqueeze(0)))
    rows, kv = problem(block, dtype=torch.bfloat16)
    exact = Blockwise().forward(rows.q.double(), kv.double(), block)[0]
    far, near = (
        (kernel.forward(rows.q, kv, block)[0] - exact).abs().max() for kernel in (Blockwise(), kernel_for(CPU))
    )
    assert near <= max(far, 0.01)
    hold(kernel_for(CPU), block, error=0.03, dtype=torch.bfloat16)


def test_dropout_is_blockwise_work() -> None:
    def drop(heads: Range, queries: Range, keys: Range) -> Tensor:
        shape = (1, heads[1] - heads[0], queries[1] - queries[0], keys[1] - keys[0])
        return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).remainder(3).view(shape)

    hold(kernel_for(CPU), Block(queries=(0, 40), keys=(0, 40), sight=Sight(None), drop=drop), error=0.0)


def test_an_output_with_the_same_sum_stands_for_the_real_one() -> None:
    block = Block(queries=(0, 50), keys=(0, 50), sight=Sight(None))
    for factor in (1.0, 1e-30, 1e30, 0.0):
        rows, _ = problem(block, dtype=torch.float32)
        rows = Rows(q=rows.q, dout=rows.dout * factor, lse=rows.lse, delta=rows.delta * factor)
        sums = (rows.dout.double() * whole_out(rows).double()).sum(-1)
        assert bool(((sums - rows.delta).abs() <= 1e-6 * rows.delta.abs()).all())


SCHEMAS = {
    "_scaled_dot_product_flash_attention": "query key value dropout_p is_causal return_debug_mask scale",
    "_scaled_dot_product_flash_attention_backward": "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q "
    "max_k dropout_p is_causal philox_seed philox_offset scale",
    "_scaled_dot_product_efficient_attention": "query key value attn_bias compute_log_sumexp dropout_p is_causal scale",
    "_scaled_dot_product_efficient_attention_backward": "grad_out_ query key value attn_bias out logsumexp philox_seed "
    "philox_offset dropout_p grad_input_mask is_causal scale",
    "_scaled_dot_product_flash_attention_for_cpu": "query key value dropout_p is_causal attn_mask scale",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "grad_out query key value out logsumexp dropout_p "
    "is_causal attn_mask scale",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_operators_are_the_ones_that_the_code_was_written_for(name: str) -> None:
    schema = getattr(torch.ops.aten, name).default._schema
    assert [argument.name for argument in schema.arguments] == SCHEMAS[name].split()


@pytest.mark.parametrize(("fused", "dtype"), [(CudaFlash(), torch.bfloat16), (CudaEfficient(), torch.float32)])
def test_kernels_of_cuda_take_what_they_are_given(fused: Fused, dtype: torch.dtype) -> None:
    """On torch's meta device: the calls fit the operators, and what comes back has the shapes of what is asked."""
    kernel = Flash([fused], strict=True)
    for queries, keys in BLOCKS:
        block = Block(queries=queries, keys=keys, sight=Sight(None))
        rows, kv = problem(block, dtype=dtype, device="meta")
        out, lse = kernel.forward(rows.q, kv, block)
        dq, dkv = kernel.backward(rows, kv, block)
        assert (out.shape, lse.shape, dq.shape, dkv.shape) == (rows.q.shape, rows.lse.shape, rows.q.shape, kv.shape)
        assert lse.dtype == torch.float32 and {out.dtype, dq.dtype, dkv.dtype} <= {dtype, torch.float32}
    rows, kv = problem(block, dtype=dtype, device="meta", size=12)
    with pytest.raises(UnsupportedError, match=r'takes heads of 12 in .*set it to "auto" or "blockwise"'):
        kernel.forward(rows.q, kv, block)


def plain(
    q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask | None, enable_gqa: bool, return_aux: Any
) -> tuple[Tensor, AuxOutput]:
    """What FlexAttention does with a list of tiles: a rule for those that are partial, none for full ones."""
    assert return_aux.lse and enable_gqa == (q.shape[1] != k.shape[1])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
    if block_mask is not None:
        scores = scores.masked_fill(~dense(block_mask, q.shape[0], q.shape[2], k.shape[2]), float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)).exp()
    return weights @ v, AuxOutput(lse=lse)


def dense(tiles: BlockMask, rows: int, queries: int, keys: int) -> Tensor:
    """[rows, 1, queries, keys]: who sees whom."""
    seen = torch.zeros(rows, 1, queries, keys, dtype=torch.bool)
    lists = ((tiles.kv_num_blocks, tiles.kv_indices, False), (tiles.full_kv_num_blocks, tiles.full_kv_indices, True))
    for row in range(rows):
        for number, index, full in lists:
            assert number is not None and index is not None
            at = row if number.shape[0] > 1 else 0
            for i in range(number.shape[2]):
                for j in index[at, 0, i, : number[at, 0, i]].tolist():
                    q = torch.arange(i * SIDE, min((i + 1) * SIDE, queries)).unsqueeze(1)
                    k = torch.arange(j * SIDE, min((j + 1) * SIDE, keys))
                    rule = tiles.mask_mod(torch.tensor(row), torch.tensor(0), q, k)
                    seen[row, 0, q, k] = torch.ones_like(rule) if full else rule
    return seen


@pytest.mark.parametrize("first", SIGHTS.values(), ids=SIGHTS)
def test_flex_is_exact_with_any_kernel_that_keeps_to_its_lists(first: Tensor | None) -> None:
    kernel = Flex(plain)
    for queries, keys in BLOCKS:
        block = Block(queries=queries, keys=keys, sight=Sight(first))
        hold(kernel, block, error=1e-12)


def test_empty_tiles_are_in_no_list_and_lists_are_made_once() -> None:
    length = 4096
    first = (torch.arange(length) // 1024 * 1024).unsqueeze(0)
    kind = relations((0, length), (0, length), Sight(first))[0]
    side = length // SIDE
    assert int((kind > 0).sum()) == 4 * (side // 4) * (side // 4 + 1) // 2
    assert int((kind == 2).sum()) == 4 * (side // 4) * (side // 4 - 1) // 2
    kernel, whole = Flex(plain), (0, length)
    made = kernel.tiles(whole, whole, Sight(first), CPU)
    assert kernel.tiles(whole, whole, Sight(first), CPU) is made
    assert kernel.tiles(whole, whole, Sight(first.clone()), CPU) is not made
    assert kernel.tiles(whole, (0, 1024), Sight(first), CPU) is not made


def test_a_backend_that_a_device_lacks_is_refused() -> None:
    with pytest.raises(UnsupportedError, match='no forward and backward on a device of type cpu; set it to "auto"'):
        kernel_for(CPU, "flex")
    with pytest.raises(UnsupportedError, match="device of type meta"):
        kernel_for(torch.device("meta"), "flash")
    assert isinstance(kernel_for(CPU, "blockwise"), Blockwise) and isinstance(kernel_for(CPU, "flash"), Flash)
    assert isinstance(kernel_for(torch.device("meta")), Blockwise)
    assert [type(one) for one in operators_for(torch.device("cuda"))] == [CudaFlash, CudaEfficient]
