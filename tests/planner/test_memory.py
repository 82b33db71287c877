"""Peak memory by kind, against counts by hand and published runs that did and didn't fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from stretto.planner.flops import parameters
from stretto.planner.memory import Margin, fits, layer_activation_bytes, logits_bytes, memory
from stretto.planner.stack import KernelStack
from stretto.planner.workload import LOOPED, Workload
from stretto.schedule.families import build
from stretto.spec.errors import ConfigError
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_cluster import cluster_preset
from stretto.spec.presets_model import model_preset

A100 = cluster_preset("a100:64", memory_bytes=79.15 * 2**30)
MARGIN = Margin(fragmentation=0.2)
HAGEMANN = KernelStack(gradient_bytes=2, sequence_parallel=False, sharded_logits=False)
"""Hagemann et al. 2023: Llama 13B with a vocabulary of 128,000 on 64 A100-80GB, 2,048 sequences of 2,048."""


def llama_13b(stack: KernelStack = HAGEMANN, **degrees: Any) -> Workload:
    """One row of the published table."""
    plan = PlanSpec(**degrees)
    plan = replace(plan, dp_shard=64 // (plan.pp * plan.tp))
    model = model_preset("llama-2-13b", vocab_size=128000)
    return Workload(model=model, plan=plan, cluster=A100, sequence_length=2048, global_batch_size=2048, stack=stack)


@pytest.mark.parametrize(
    ("degrees", "fit"),
    [
        ({"micro_batch_size": 1}, True),
        ({"micro_batch_size": 2}, False),
        ({"micro_batch_size": 2, "pp": 2}, True),
        ({"micro_batch_size": 4, "pp": 2}, False),
        ({"micro_batch_size": 2, "tp": 2}, True),
        ({"micro_batch_size": 4, "tp": 2}, False),
    ],
)
def test_published_runs(degrees: dict[str, int], fit: bool) -> None:
    """Table of Hagemann et al. 2023, FlashAttention 2 and fused RMSNorm, no recompute."""
    assert fits(llama_13b(**degrees), MARGIN) is fit


def test_unfused_norm_breaks_what_fits() -> None:
    """Same source: tp=1, pp=1, micro-batch 1 fits with the fused norm alone."""
    assert not fits(llama_13b(replace(HAGEMANN, fused_norm=False)), MARGIN)


def test_states_are_megatrons() -> None:
    """Bytes per parameter with float32 gradients and a distributed optimizer: 6 + 12/d (Megatron-LM's README)."""
    work = llama_13b(KernelStack())
    rank = memory(work)[0]
    states = rank.parameters + rank.gradients + rank.optimizer
    assert states == pytest.approx(parameters(work.model).total * (6 + 12 / 64))


def test_gpt_layer_is_the_papers() -> None:
    """34sbh + 5as^2b bytes a layer (Korthikanti et al. 2022, equation 1)."""
    model = model_preset("gpt2", dropout=0.1)
    work = Workload(
        model=model, plan=PlanSpec(), cluster=A100, sequence_length=1024, global_batch_size=1,
        stack=KernelStack(attention="fused"),
    )  # fmt: skip
    h, s, a = model.hidden_size, 1024, model.num_heads
    assert layer_activation_bytes(work) == pytest.approx(34 * s * h + 5 * a * s * s)


def test_sequence_parallelism_divides_everything() -> None:
    """Korthikanti et al. 2022, table 2: with it all of a layer is divided by tp."""
    whole = layer_activation_bytes(llama_13b(KernelStack()))
    assert layer_activation_bytes(llama_13b(KernelStack(), tp=4)) == pytest.approx(whole / 4)
    assert layer_activation_bytes(llama_13b(tp=4)) > whole / 4


def test_logits_are_on_the_last_rank_and_divided_if_sharded() -> None:
    ranks = memory(llama_13b(pp=2))
    assert ranks[0].logits == 0 < ranks[1].logits
    assert logits_bytes(llama_13b(KernelStack(), tp=2)) * 2 == logits_bytes(llama_13b(KernelStack()))
    assert logits_bytes(llama_13b(tp=2)) > logits_bytes(llama_13b())


def test_first_rank_keeps_most_activations() -> None:
    first, *_, last = memory(llama_13b(pp=4))
    assert first.activations == pytest.approx(4 * last.activations)


def test_recompute_keeps_inputs_and_one_layer() -> None:
    work = llama_13b(recompute="full")
    inputs = 40 * work.tokens * 2 * 5120
    assert memory(work)[0].activations == pytest.approx(inputs + layer_activation_bytes(work, recompute="none"))


def test_zero_divides_what_it_says() -> None:
    one, two, three = (memory(llama_13b(zero=zero))[0] for zero in (1, 2, 3))
    assert one.gradients == 64 * two.gradients and one.parameters == two.parameters
    assert three.parameters == pytest.approx(two.parameters * (1 / 64 + 2 / 40))  # its shard and two layers of 40


def test_batch_that_cannot_be_divided() -> None:
    with pytest.raises(ConfigError, match="multiple of 192"):
        llama_13b(micro_batch_size=3)


def test_offload_keeps_less() -> None:
    """Ranks that keep more than two micro-batches hand the others over."""
    plain, moved = (memory(llama_13b(pp=4, offload=offload)) for offload in (False, True))
    assert [rank.activations / plain[3].activations for rank in plain] == pytest.approx([4, 3, 2, 1])
    assert [rank.activations / plain[3].activations for rank in moved] == pytest.approx([2, 2, 2, 1])


def test_folded_stages_lie_where_the_schedule_puts_them() -> None:
    """A V has the embedding and the head on rank 0, and every rank the same number of layers."""
    work = llama_13b(KernelStack(), pp=4, chunks=2, schedule="hanayo")
    first, *others = memory(work)
    assert first.logits > 0 and all(rank.logits == 0 for rank in others)
    assert work.stages_of_rank(0) == (0, 7) and work.layers_of_rank(0) == 10


def test_two_replicas_are_held_twice() -> None:
    one, two = memory(llama_13b(pp=4)), memory(llama_13b(pp=4, schedule="chimera"))
    layers = two[1].parameters
    assert layers == pytest.approx(2 * one[1].parameters, rel=0.01)
    assert two[0].logits == two[3].logits > 0


def test_vocabulary_parallelism_levels_the_ends() -> None:
    plain, level = memory(llama_13b(pp=4)), memory(llama_13b(pp=4, passes=("vocabulary:algorithm=2",)))
    work = llama_13b(pp=4, passes=("vocabulary:algorithm=2",))
    assert work.profile.waiting == ((2, 8, 7), (3, 11, 1.5), (2, 8, 1.5), (3, 7, 1.5))
    shard, width = 2048 * 128000 / 4, 2 * 2048 * work.model.hidden_size
    assert level[1].logits == pytest.approx((3 * 2 + 6) * shard + (11 + 1.5) * width)
    assert max(rank.logits for rank in level) < 0.4 * plain[3].logits
    assert level[0].parameters < plain[0].parameters


@pytest.mark.parametrize("family", LOOPED)
def test_looped_families_are_looped(family: str) -> None:
    chunks = 2 if "interleaved" in family or family == "zeropp" else 1
    schedule = build(family, ranks=4, microbatches=8, chunks=chunks)
    assert schedule.placement == (tuple(stage % 4 for stage in range(4 * chunks)),)
