"""States of linear layers: they travel under the products inside chunks, and as many bytes as the papers say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from stretto.models.chunked import Tokens, summarise
from stretto.parallel.sequence.states import WAYS, CutStates, Passage
from stretto.parallel.wire import Wire
from stretto.planner.sequence_volume import Heads
from stretto.planner.state_volume import state_volume
from stretto.spec.contract import SequencePart
from stretto.spec.sequence import cut_sequence

HEADS = Heads(rows=2, heads=8, kv_heads=4, head_size=16, element_bytes=2)
STATE = 2 * 4 * 16 * 16 * 4  # sums of bfloat16 are float32


@dataclass(frozen=True)
class Cut:
    part: SequencePart


@pytest.mark.parametrize("way", WAYS)
def test_products_lie_between_begin_and_end(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def noted(name: str) -> None:
        original: Any = getattr(Passage, name)

        def call(self: Passage, *args: Any) -> Any:
            events.append(name)
            return original(self, *args)

        monkeypatch.setattr(Passage, name, call)

    for name in ("begin", "finish", "begin_back", "finish_back"):
        noted(name)
    q, k, v = (torch.randn(1, 2, 12, 4, dtype=torch.float64).requires_grad_() for _ in range(3))
    stretch = summarise(Tokens(q=q, k=k, v=v, log_decay=torch.zeros(1, 2, 12, dtype=torch.float64)), 4)
    part = SequencePart(shares=(((0, 12),),), tokens=torch.arange(12), documents=None)
    before = CutStates(wire=Wire(None), way=WAYS[way]).begin([stretch], Cut(part))
    reading = stretch.read()
    for product in (reading.own, reading.reads):  # a hook is called right before its product is differentiated
        product.register_hook(lambda gradient: events.append("product"))
    (state,) = before()
    reading.output(state).square().sum().backward()
    assert events == ["begin", "finish", "begin_back", "product", "product", "finish_back"]


def test_volumes_do_not_grow_with_the_sequence() -> None:
    for length in (64, 4096):
        plain, zigzag = (cut_sequence(length, 4, layout) for layout in ("contiguous", "zigzag"))
        ring = [state_volume("ring", "delta", plain, rank, HEADS) for rank in range(4)]
        assert [v.forward for v in ring] == [STATE, STATE, STATE, 0]
        assert [v.backward for v in ring] == [0, STATE, STATE, STATE]
        there_and_back = [state_volume("ring", "linear", zigzag, rank, HEADS).forward for rank in range(4)]
        assert there_and_back == [STATE, 2 * STATE, 2 * STATE, STATE]
        gathered = state_volume("all-gather", "linear", plain, 1, HEADS)
        assert (gathered.forward, gathered.backward) == (3 * (STATE + 2 * 4 * 4), 3 * STATE)
        assert state_volume("all-gather", "delta", plain, 1, HEADS).forward == 2 * gathered.backward
