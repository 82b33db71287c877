"""Attention of a block through the fused kernels that are behind ``scaled_dot_product_attention``.

A ring needs of a block what torch's public function keeps to itself: the log-sum-exp, and a gradient that takes that
of the whole row.  The operators under it give both, in the dispatcher's own namespace, ``torch.ops.aten``, with a
schema that a test pins.  Their names begin with an underscore, so this file is the one exception to the rule against
private names; nothing else of torch is used here that isn't documented.

    operator       device, type                     forward                             backward
    CpuFlash       CPU                              out, lse                            dq, dk, dv of (dout, out, lse)
    CudaFlash      CUDA, bfloat16, head size 8k     the same, grouped heads as they are
    CudaEfficient  CUDA, float32                    the same, grouped heads repeated; lse in rows of 32

The rectangles of a block (``rectangles``) are full or causal, which all kernels know; a mask, where one has to be, only
the CPU's takes.  On CUDA blockwise stands in for such a rectangle, or FlexAttention for the whole block.  Dropout of
weights is keyed by position, which no fused kernel knows: blockwise does it.

The gradient needs sum(dout * out) of the whole row, which the operators compute from an ``out`` that they are given.
Where only the sum is at hand (TokenRing sends it instead of the output), they get the one vector along dout with
that sum, which is no longer than the output was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from stretto.parallel.sequence.blockwise import Block, Blockwise, Rows, sum_dtype
from stretto.parallel.sequence.merge import merge
from stretto.parallel.sequence.pieces import Kernel
from stretto.parallel.sequence.rectangles import Kind, Rectangle, rectangles
from stretto.parallel.sequence.sight import Relation
from stretto.spec.errors import UnsupportedError

LSE_ROWS = 32
"""The memory-efficient kernel wants log-sum-exp in multiples of so many queries."""
LEAST_MASKED = 16
"""The smallest head size that FlexAttention takes."""
CHANNELS, MOST_CHANNELS = 8, 256
"""What the head size has to be a multiple of on CUDA, and the largest."""


class Fused(ABC):
    """One fused kernel: shapes as in ``blockwise``, k and v [B, G, S, K], lse [B, H, T]."""

    masks: bool
    """Whether it takes a mask."""

    @abstractmethod
    def takes(self, q: Tensor) -> bool:
        """Whether it is for this type and head size."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """``out`` and ``lse``; ``bias`` [B or 1, 1, T, S] is added to the scores."""

    @abstractmethod
    def backward(self, rows: Rows, k: Tensor, v: Tensor, *, causal: bool, bias: Tensor | None) -> tuple[Tensor, ...]:
        """dq, dk, dv."""


class CpuFlash(Fused):
    """The kernel of the CPU."""

    masks = True

    def takes(self, q: Tensor) -> bool:
        """All types of a run; in bfloat16 it rounds once a row, where plain products round in every tile."""
        return q.dtype in (torch.bfloat16, torch.float32, torch.float64)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """As Fused says; where a query sees nothing, ``lse`` is 0."""
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
            q, k, v, 0.0, causal, attn_mask=bias, scale=q.shape[-1] ** -0.5
        )
        return found[0], found[1]

    def backward(self, rows: Rows, k: Tensor, v: Tensor, *, causal: bool, bias: Tensor | None) -> tuple[Tensor, ...]:
        """As Fused says."""
        found: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
            rows.dout, rows.q, k, v, whole_out(rows), rows.lse, 0.0, causal, attn_mask=bias, scale=_scale(rows.q)
        )
        return found


class CudaFlash(Fused):
    """FlashAttention, in 16 bit."""

    masks = False

    def takes(self, q: Tensor) -> bool:
        """Types and head sizes of the kernel."""
        return q.dtype in (torch.bfloat16, torch.float16) and _fits(q)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """As Fused says, without a bias."""
        assert bias is None
        found = torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, causal, False, scale=_scale(q))
        return found[0], found[1][:, :, : q.shape[2]]

    def backward(self, rows: Rows, k: Tensor, v: Tensor, *, causal: bool, bias: Tensor | None) -> tuple[Tensor, ...]:
        """As Fused says; without dropout the two tensors of random state are read by nobody."""
        assert bias is None
        state = [torch.zeros(size, dtype=torch.uint64, device=k.device) for size in ((2,), ())]
        found: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention_backward.default(
            rows.dout,
            rows.q,
            k,
            v,
            whole_out(rows),
            rows.lse.contiguous(),
            None,
            None,
            rows.q.shape[2],
            k.shape[2],
            0.0,
            causal,
            *state,
            scale=_scale(rows.q),
        )
        return found


class CudaEfficient(Fused):
    """The memory-efficient kernel, for float32."""

    masks = False

    def takes(self, q: Tensor) -> bool:
        """Types and head sizes of the kernel."""
        return q.dtype == torch.float32 and _fits(q)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """As Fused says, without a bias."""
        assert bias is None
        k, v = (_repeated(x, q.shape[1]) for x in (k, v))
        found = torch.ops.aten._scaled_dot_product_efficient_attention.default(
            q, k, v, None, True, 0.0, causal, scale=_scale(q)
        )
        return found[0], found[1][:, :, : q.shape[2]]

    def backward(self, rows: Rows, k: Tensor, v: Tensor, *, causal: bool, bias: Tensor | None) -> tuple[Tensor, ...]:
        """As Fused says; the gradients of repeated heads are added up."""
        assert bias is None
        heads, groups, length = rows.q.shape[1], k.shape[1], rows.q.shape[2]
        state = [torch.zeros((), dtype=torch.int64, device=k.device) for _ in range(2)]
        padded = torch.nn.functional.pad(rows.lse, (0, -length % LSE_ROWS), value=float("inf"))
        k, v = (_repeated(x, heads) for x in (k, v))
        dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default(
            rows.dout,
            rows.q,
            k,
            v,
            None,
            whole_out(rows),
            padded,
            *state,
            0.0,
            [True, True, True, False],
            causal,
            scale=_scale(rows.q),
        )
        dk, dv = (x.unflatten(1, (groups, heads // groups)).sum(2) for x in (dk, dv))
        return dq, dk, dv


def operators_for(device: torch.device) -> list[Fused]:
    """The fused kernels of a kind of device; a list of none where there are none."""
    if device.type == "cuda":
        return [CudaFlash(), CudaEfficient()]
    return [CpuFlash()] if device.type == "cpu" else []


class Flash:
    """Fused kernels wherever they are exact, and what stands in for them elsewhere."""

    def __init__(self, operators: list[Fused], masked: Kernel | None = None, *, strict: bool = False) -> None:
        """Take the first of ``operators`` that fits.

        ``masked``: for blocks that documents or windows cut, as wholes; None: they are cut into rectangles.
        ``strict``: a type or head size that none takes is an UnsupportedError; else it is blockwise's.
        """
        self._operators, self._masked, self._strict = operators, masked, strict
        self._plain: Kernel = Blockwise()

    def forward(self, q: Tensor, kv: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """As ``Blockwise.forward``, in the type of q where one call gives it all."""
        fused = self._choose(q, block)
        if not isinstance(fused, Fused):
            return fused.forward(q, kv, block)
        if not block.sight.alike:
            rows = [self.forward(q[b : b + 1], kv[:, b : b + 1], _row(block, b)) for b in range(q.shape[0])]
            out, lse = (torch.cat(same) for same in zip(*rows, strict=True))
            return out, lse
        exact, into, placed = sum_dtype(q.dtype), None, list(_placed(block))
        if len(placed) == 1 and placed[0][0][:2] == (block.queries, block.keys):
            return self._forward(fused, q, kv, (block, placed[0][0]))
        for rectangle, rows_at, columns in placed:
            found = self._forward(fused, q[:, :, rows_at], kv[:, :, :, columns], (block, rectangle))
            if rectangle[0] == block.queries and into is None:
                into = found[0].to(exact), found[1]
                continue
            if into is None:
                into = torch.zeros(q.shape, dtype=exact, device=q.device), _unseen(q, exact)
            merge(into[0][:, :, rows_at], into[1][:, :, rows_at], *found)
        return into if into is not None else (torch.zeros(q.shape, dtype=exact, device=q.device), _unseen(q, exact))

    def backward(self, rows: Rows, kv: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """As ``Blockwise.backward``, in the type of q where one call gives it all."""
        fused = self._choose(rows.q, block)
        if not isinstance(fused, Fused):
            return fused.backward(rows, kv, block)
        if not block.sight.alike:
            parts = [self.backward(rows.row(b), kv[:, b : b + 1], _row(block, b)) for b in range(kv.shape[1])]
            return torch.cat([dq for dq, _ in parts]), torch.cat([dkv for _, dkv in parts], dim=1)
        exact, found = sum_dtype(rows.q.dtype), list(_placed(block))
        if len(found) == 1 and found[0][0][:2] == (block.queries, block.keys):
            of_q, of_k, of_v = self._backward(fused, rows, kv, (block, found[0][0]))
            return of_q, torch.stack((of_k, of_v))
        dq = torch.zeros(rows.q.shape, dtype=exact, device=kv.device)
        dkv = torch.zeros(kv.shape, dtype=exact, device=kv.device)
        for rectangle, at, columns in found:
            part = rows.narrow(at.start, at.stop - at.start)
            of_q, of_k, of_v = self._backward(fused, part, kv[:, :, :, columns], (block, rectangle))
            dq[:, :, at] += of_q
            dkv[0, :, :, columns] += of_k
            dkv[1, :, :, columns] += of_v
        return dq, dkv

    def _choose(self, q: Tensor, block: Block) -> Fused | Kernel:
        """What takes these tensors."""
        if block.drop is not None:
            return self._plain
        found = next((one for one in self._operators if one.takes(q)), None)
        if found is None and self._strict:
            raise UnsupportedError(
                f'plan.attention_backend = "flash": no fused kernel of {q.device.type} takes heads of {q.shape[-1]} in '
                f'{str(q.dtype).removeprefix("torch.")}; set it to "auto" or "blockwise".'
            )
        if found is None:
            return self._plain
        whole = block.sight.first is None or block.sight.relation(block.queries, block.keys) is Relation.FULL
        return found if whole or self._masked is None or q.shape[-1] < LEAST_MASKED else self._masked

    def _forward(self, fused: Fused, q: Tensor, kv: Tensor, of: tuple[Block, Rectangle]) -> tuple[Tensor, Tensor]:
        block, (queries, keys, kind) = of
        if kind is not Kind.MASKED:
            return fused.forward(q, kv[0], kv[1], causal=kind is Kind.CAUSAL, bias=None)
        if not fused.masks:
            return self._plain.forward(q, kv, block.within(queries, keys))
        seen = block.sight.mask(queries, keys, q.device)
        out, lse = fused.forward(q, kv[0], kv[1], causal=False, bias=_bias(seen, q.dtype))
        return out, lse.masked_fill(~seen.any(-1), float("-inf"))

    def _backward(self, fused: Fused, rows: Rows, kv: Tensor, of: tuple[Block, Rectangle]) -> tuple[Tensor, ...]:
        block, (queries, keys, kind) = of
        if kind is not Kind.MASKED:
            return fused.backward(rows, kv[0], kv[1], causal=kind is Kind.CAUSAL, bias=None)
        if not fused.masks:
            dq, dkv = self._plain.backward(rows, kv, block.within(queries, keys))
            return dq, dkv[0], dkv[1]
        bias = _bias(block.sight.mask(queries, keys, kv.device), kv.dtype)
        return fused.backward(rows, kv[0], kv[1], causal=False, bias=bias)


def whole_out(rows: Rows) -> Tensor:
    """The output of the rows, or a stand-in with the same sum(dout * out), in the type of q."""
    if rows.out is not None:
        return rows.out.to(rows.q.dtype)
    dout = rows.dout.to(rows.delta.dtype)
    largest = dout.abs().amax(-1, keepdim=True)
    along = dout / largest.masked_fill(largest == 0, 1.0)  # so that squares neither overflow nor vanish
    length = (along * along).sum(-1, keepdim=True) * largest
    return (along * (rows.delta.unsqueeze(-1) / length.masked_fill(length == 0, 1.0))).to(rows.q.dtype)


def _placed(block: Block) -> Iterator[tuple[Rectangle, slice, slice]]:
    """The rectangles of a block, and where they lie in it."""
    for found in rectangles(block.queries, block.keys, block.sight):
        (a, b), (c, d), _ = found
        q, k = block.queries[0], block.keys[0]
        yield found, slice(a - q, b - q), slice(c - k, d - k)


def _row(block: Block, index: int) -> Block:
    return Block(queries=block.queries, keys=block.keys, sight=block.sight.row(index), first_head=block.first_head)


def _unseen(q: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.full(q.shape[:3], float("-inf"), dtype=dtype, device=q.device)


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def _scale(q: Tensor) -> float:
    return float(q.shape[-1] ** -0.5)


def _fits(q: Tensor) -> bool:
    return q.shape[-1] % CHANNELS == 0 and q.shape[-1] <= MOST_CHANNELS


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
