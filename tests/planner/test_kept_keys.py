"""Keys that came kept for backward: fewer bytes, more memory, and proposed where that is faster and fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ranks import Ranks
from stretto.parallel.sequence.blockwise import Blockwise
from stretto.parallel.sequence.opening import ContextAttend
from stretto.parallel.wire import Wire
from stretto.planner.blockwise import brought_bytes
from stretto.planner.estimate import estimate
from stretto.planner.plan import answer
from stretto.planner.request import Request
from stretto.spec.contract import SequencePart
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_cluster import cluster_preset
from stretto.spec.presets_model import model_preset
from stretto.spec.run import RunSpec
from stretto.spec.sequence import Arrangement, cut_sequence
from stretto.spec.training import TrainingSpec

PINS = {"pp": 1, "tp": 1, "cp": 16, "recompute": "none", "micro_batch_size": 1}


def request_of(**pins: object) -> Request:
    """Two nodes of eight with a slow network, on which a ring of 16 waits for its messages."""
    cluster = replace(cluster_preset("h100:16"), network_bytes_per_second=2e9)
    training = TrainingSpec(sequence_length=16384, global_batch_size=8)
    model = replace(model_preset("llama-2-7b"), max_positions=16384)
    return Request(run=RunSpec(model=model, cluster=cluster, training=training), pins={**PINS, **pins})


def test_less_is_waited_for_and_more_is_held() -> None:
    request = request_of()
    sent, kept = (estimate(request, request.plan(dp_shard=1, context_keep=keep)) for keep in (False, True))
    assert kept.time.context_communication < sent.time.context_communication
    more = kept.memory[0].activations - sent.memory[0].activations
    # Of 32 layers: keys and values of 15 seats of 1,024 tokens, 2 x 32 heads of 128 in 16 bit.
    assert more == pytest.approx(32 * 15 * 1024 * 2 * 32 * 128 * 2)


def test_it_is_proposed_where_links_are_slow_and_memory_is_left() -> None:
    assert answer(request_of(context="ring"), top=1).best.plan.context_keep
    assert not answer(request_of(context="ring", context_keep=False), top=1).best.plan.context_keep
    narrow = request_of(context="ring")
    peak = answer(request_of(context="ring", context_keep=False), top=1).best.peak_bytes
    cluster = replace(narrow.run.cluster, memory_bytes=peak * 1.01)
    assert not answer(replace(narrow, run=replace(narrow.run, cluster=cluster)), top=1).best.plan.context_keep


class _NoDropout:
    def weight_dropout(self, context: object) -> None:
        return None


class _Cut:
    def __init__(self, part: SequencePart) -> None:
        self.part, self.first = part, None


def saved_bytes(rank: int, world: int, plan: PlanSpec, heads: tuple[int, int]) -> int:
    """What autograd keeps of one attention, in bytes."""
    shares = cut_sequence(64, world, plan.context_layout)
    index = torch.cat([torch.arange(*part) for part in shares[rank]])
    qkv = [torch.zeros(1, n, len(index), 4, requires_grad=True) for n in (heads[0], heads[1], heads[1])]
    attend = ContextAttend(
        wire=Wire(dist.group.WORLD), arrangement=Arrangement.of(plan), local=_NoDropout(), kernel=Blockwise()
    )
    found: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        found.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attend(*qkv, _Cut(SequencePart(shares=shares, tokens=index, documents=None)))
    return sum(found)


@pytest.mark.parametrize(
    ("ways", "kv_heads"), [({}, 2), ({"context": "mesh", "ulysses": 2}, 4), ({"context": "mesh", "ulysses": 2}, 1)]
)
def test_the_bytes_are_those_that_autograd_keeps(ranks: Ranks, ways: dict[str, object], kv_heads: int) -> None:
    plan = PlanSpec(cp=4, **ways)  # type: ignore[arg-type]
    kept = replace(plan, context_keep=True)
    model = replace(model_preset("llama-2-7b"), num_heads=4, num_kv_heads=kv_heads, hidden_size=16)
    training = TrainingSpec(sequence_length=64, global_batch_size=1)
    request = Request(run=RunSpec(model=model, training=training, cluster=cluster_preset("h100:4")))
    own = 16 * (2 * 4 * 4 + 2 * kv_heads * 4 + 4)  # q, out; k, v; lse of 16 tokens
    for one in (plan, kept):
        found = ranks.run(saved_bytes, 4, one, (4, kv_heads))
        assert found == [4 * own + 2 * brought_bytes(request.work(one))] * 4  # float32, twice 16 bit
