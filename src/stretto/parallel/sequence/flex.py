"""Attention of a block through FlexAttention: any mask, and empty tiles cost nothing (CUDA; it has no CPU backward).

torch generates a kernel for a rule of who sees whom, and takes a list of the tiles in which somebody sees somebody.
Both come from the one number per token that is the whole mask (``sight``): the list is written from the corners of
tiles, never from a table of all pairs, once per micro-batch and block, and is shared by all layers.

    list     for each 128 queries the tiles of 128 keys that are partial, and those that are full and need no rule
    rule     first[q] <= k <= q, at the places of the block in the row

Backward: its kernel takes no log-sum-exp from outside, but gives one that has a gradient.  So the block is attended
again and (out, lse) of it differentiated with what the merge of all blocks makes of dout:

    share = exp(lse of the block - lse of the row)      dout_block = share dout
                                                        dlse_block = share (sum(dout out_block) - delta)
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from stretto.parallel.sequence.blockwise import Block, Blockwise, Rows
from stretto.parallel.sequence.pieces import Kernel
from stretto.parallel.sequence.sight import Relation, Sight
from stretto.spec.sequence import Range

SIDE = 128
"""Queries, and keys, of a tile of the list."""
REMEMBERED = 64
"""Micro-batches whose lists are kept: as many as a pipeline rank has in flight."""

Attend = Callable[..., Any]
_Lists = tuple[weakref.ref[Tensor] | None, dict[tuple[Any, ...], BlockMask]]
"""Lists of tiles by block, and the first tokens that they are of; None: of plain causal rows."""


class Flex:
    """The backend; lists of tiles are kept for the layers that follow."""

    def __init__(self, attend: Attend | None = None) -> None:
        """``attend``: flex_attention, or what stands for it; None: compiled, when first needed."""
        self._attend = attend
        self._dropping: Kernel = Blockwise()
        self._lists: OrderedDict[int, _Lists] = OrderedDict()

    def forward(self, q: Tensor, kv: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """As ``Blockwise.forward``; dropout of weights is its business too."""
        if block.drop is not None:
            return self._dropping.forward(q, kv, block)
        with torch.no_grad():
            return self._found(q, kv[0], kv[1], block)

    def backward(self, rows: Rows, kv: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """As ``Blockwise.backward``."""
        if block.drop is not None:
            return self._dropping.backward(rows, kv, block)
        q, k, v = (x.detach().requires_grad_() for x in (rows.q, kv[0], kv[1]))
        with torch.enable_grad():
            out, lse = self._found(q, k, v, block)
        share = (lse.detach() - rows.lse).exp()
        dout = rows.dout.to(share.dtype)
        of_lse = share * ((dout * out.detach().to(share.dtype)).sum(-1) - rows.delta)
        of_out = (share.unsqueeze(-1) * dout).to(out.dtype)
        dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (of_out, of_lse.to(lse.dtype)))
        return dq, torch.stack((dk, dv))

    def _found(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        if self._attend is None:
            self._attend = torch.compile(flex_attention)
        tiles = None
        if block.sight.relation(block.queries, block.keys) is not Relation.FULL:
            tiles = self.tiles(block.queries, block.keys, block.sight, q.device)
        out, aux = self._attend(
            q, k, v, block_mask=tiles, enable_gqa=q.shape[1] != k.shape[1], return_aux=AuxRequest(lse=True)
        )
        return out, aux.lse

    def tiles(self, queries: Range, keys: Range, sight: Sight, device: torch.device) -> BlockMask:
        """The list for a block, made once for the masks of a micro-batch."""
        known, key = self._known(sight), (queries, keys, device)
        if key not in known:
            known[key] = list_of_tiles(queries, keys, sight, device)
        return known[key]

    def _known(self, sight: Sight) -> dict[tuple[Any, ...], BlockMask]:
        """Lists of one micro-batch, which is told by its tensor of first tokens; all plain causal ones share theirs."""
        first = sight.first
        of = self._lists.get(id(first))
        if of is None or (of[0] is not None and of[0]() is not first):
            of = (None if first is None else weakref.ref(first), {})
            self._lists[id(first)] = of
        self._lists.move_to_end(id(first))
        while len(self._lists) > REMEMBERED:
            self._lists.popitem(last=False)
        return of[1]


def list_of_tiles(queries: Range, keys: Range, sight: Sight, device: torch.device) -> BlockMask:
    """FlexAttention's BlockMask of a block, from the corners of its tiles."""
    kind = relations(queries, keys, sight)
    partial, full = (_listed(kind == one, device) for one in (1, 2))
    first = sight.first
    # Tensors, not numbers: other blocks of the same shape then need no other kernel.  Filled there, and all copies
    # without waiting: the host would stop until the device has done what it was given so far.
    q0, k0 = (torch.full((), at, dtype=torch.int64, device=device) for at in (queries[0], keys[0]))
    oldest = None if first is None else first[:, queries[0] : queries[1]].to(device, non_blocking=True)
    alike = sight.alike

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at = key + k0
        seen = at <= query + q0
        return seen if oldest is None else seen & (at >= oldest[0 if alike else row, query])

    return BlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=SIDE, mask_mod=rule, seq_lengths=(queries[1] - queries[0], keys[1] - keys[0])
    )


def relations(queries: Range, keys: Range, sight: Sight) -> np.ndarray:
    """Of all tiles, int [B or 1, tiles of queries, tiles of keys]: 0 nobody sees anybody, 1 some, 2 all see all.

    A last tile that isn't whole is never 2, since the kernel reads beyond its end.
    """
    starts_q, starts_k = (np.arange(a, b, SIDE) for a, b in (queries, keys))
    last_q, last_k = np.minimum(starts_q + SIDE, queries[1]) - 1, np.minimum(starts_k + SIDE, keys[1]) - 1
    first = np.zeros((1, queries[1]), np.int64) if sight.first is None else sight.first.numpy()
    least, most = first[:, starts_q, None], first[:, last_q, None]
    some = (starts_k <= last_q[:, None]) & (last_k >= least)
    every = (last_k <= starts_q[:, None]) & (starts_k >= most)
    whole = (last_q - starts_q == SIDE - 1)[:, None] & (last_k - starts_k == SIDE - 1)
    found: np.ndarray = some.astype(np.int8) + (every & whole)
    return found


def _listed(chosen: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many tiles each tile of queries has, [B, 1, Q], and which, those first, [B, 1, Q, K], int32."""
    order = np.argsort(~chosen, axis=-1, kind="stable").astype(np.int32)
    number = chosen.sum(-1).astype(np.int32)
    numbers, tiles = (torch.from_numpy(x).unsqueeze(1).to(device, non_blocking=True) for x in (number, order))
    return numbers, tiles
