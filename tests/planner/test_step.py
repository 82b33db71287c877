"""Step time: collectives by hand, the pipeline against the simulator, a published run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from stretto.planner.calibration import Calibration
from stretto.planner.communication import Group, context_seconds, data_seconds, group, tensor_seconds
from stretto.planner.compute import head_seconds, kernels, layer_seconds
from stretto.planner.flops import flops_per_token
from stretto.planner.profile import profile
from stretto.planner.sequence_volume import Heads, sequence_volume
from stretto.planner.stack import KernelStack
from stretto.planner.step import stage_turns, step_time
from stretto.planner.workload import Workload
from stretto.schedule.families import build
from stretto.schedule.op import Kind
from stretto.schedule.simulate import Costs, simulate
from stretto.spec.errors import UnsupportedError
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_cluster import cluster_preset
from stretto.spec.presets_model import model_preset
from stretto.spec.sequence import Arrangement, cut_sequence

SILENT = Calibration(network_latency=0.0, link_latency=0.0, message=1e12)
"""Messages take no time."""


def work_of(stack: KernelStack | None = None, gpus: int = 64, **degrees: Any) -> Workload:
    """Llama 2 7B on A100s, 512 sequences of 2,048."""
    plan = PlanSpec(**degrees)
    plan = replace(plan, dp_shard=gpus // (plan.pp * plan.tp))
    return Workload(
        model=model_preset("llama-2-7b"),
        plan=plan,
        cluster=cluster_preset(f"a100:{gpus}"),
        sequence_length=2048,
        global_batch_size=512,
        stack=stack or KernelStack(),
    )


@pytest.mark.parametrize(
    ("stages", "tolerance"), [((8, 8, 8, 8), 1e-9), ((5, 9, 9, 9), 1e-9), ((9, 8, 8, 7), 0.015), ((8, 9, 9, 6), 0.015)]
)
def test_pipeline_is_the_simulators(stages: tuple[int, ...], tolerance: float) -> None:
    """Work and bubble of 1F1B with uneven stages and the head on the last, all messages free."""
    work = work_of(pp=4, stages=stages)
    layer, head = layer_seconds(work, SILENT), head_seconds(work, SILENT)
    forward = [layer.forward * layers for layers in stages]
    backward = [layer.backward * layers for layers in stages]
    forward[-1] += head.forward
    backward[-1] += head.backward
    half = tuple(seconds / 2 for seconds in backward)
    schedule = build("1f1b", ranks=4, microbatches=work.num_microbatches)
    true = simulate(schedule, Costs(F=tuple(forward), I=half, W=half)).makespan
    estimate = step_time(work, SILENT)
    assert estimate.work + estimate.bubble == pytest.approx(true, rel=tolerance)


@pytest.mark.parametrize("stages", [(8, 8, 8, 8), (9, 8, 8, 7), (7, 9, 9, 7)])
def test_messages_are_the_simulators(stages: tuple[int, ...]) -> None:
    """1F1B whose messages take a twentieth of a stage's turn."""
    work = work_of(pp=4, stages=stages)
    layer, head = layer_seconds(work, SILENT), head_seconds(work, SILENT)
    turns = [(layer.forward + layer.backward) * layers for layers in stages]
    turns[-1] += head.forward + head.backward
    third = tuple(turn / 3 for turn in turns)
    calibration = replace(SILENT, network_latency=turns[0] / 20)
    schedule = build("1f1b", ranks=4, microbatches=work.num_microbatches)
    true = simulate(schedule, Costs(F=third, I=third, W=third, comm=turns[0] / 20)).makespan
    estimate = step_time(work, calibration)
    assert estimate.work + estimate.bubble == pytest.approx(true, rel=0.04)


def test_blocking_messages_add_to_each_turn() -> None:
    """Four messages a micro-batch for a stage between two others."""
    free, blocked = (work_of(KernelStack(blocking_messages=flag), pp=4) for flag in (False, True))
    calibration = replace(SILENT, network_latency=0.01)
    more = step_time(blocked, calibration).work - step_time(free, calibration).work
    assert more <= 4 * 0.01 * free.num_microbatches * (1 + 1e-9) and more > 2 * 0.01 * free.num_microbatches


@pytest.mark.parametrize("context", ["ring", "ulysses", "mesh", "token-ring", "all-gather"])
def test_every_way_to_cut_attention_has_a_time(context: str) -> None:
    plan = PlanSpec(cp=8, context=context, ulysses=2 if context == "mesh" else 1)
    work = replace(work_of(gpus=8), plan=plan, global_batch_size=8)
    assert step_time(work).context_communication > 0


@pytest.mark.parametrize("kv_heads", [32, 8, 2, 1])
@pytest.mark.parametrize(
    "way",
    [
        {"context": "ring"},
        {"context": "ring", "context_keep": True},
        {"context": "all-gather"},
        {"context": "ulysses"},
        {"context": "mesh", "ulysses": 2},
        {"context": "mesh", "ulysses": 4, "context_keep": True},
    ],
)
def test_cut_attention_sends_what_its_closed_form_says(way: dict[str, Any], kv_heads: int) -> None:
    """Of messages that hide nothing and cost nothing but their bytes; with fewer key/value heads than ranks a seat."""
    work = work_of(gpus=8)
    plan, model = PlanSpec(cp=8, **way), replace(work.model, num_kv_heads=kv_heads)
    work = replace(work, plan=plan, model=model, global_batch_size=8)
    plain = Calibration(link_latency=0.0, overlap=1.0)
    shape = Heads(rows=1, heads=32, kv_heads=kv_heads, head_size=128, element_bytes=2)
    sent = sequence_volume(Arrangement.of(plan), cut_sequence(2048, 8, "zigzag"), 0, shape)
    rate = group(work, 8, 1, plain).bytes_per_second
    assert context_seconds(work, plain) == pytest.approx((sent.forward / rate, sent.backward / rate))


def test_work_is_at_least_the_models() -> None:
    """One rank at the full peak can't be beaten."""
    work = work_of(gpus=8)
    least = flops_per_token(work.model, 2048) * 2048 * 512 / 8 / work.cluster.peak_flops_bfloat16
    assert least < step_time(work).work < 2 * least


def test_collectives_by_hand() -> None:
    ring = Group(size=4, bytes_per_second=100.0, latency=0.0)
    assert ring.all_reduce(400.0) == pytest.approx(6.0)
    assert ring.all_gather(400.0) == pytest.approx(3.0)
    assert Group(size=1, bytes_per_second=1.0, latency=1.0).all_reduce(9.0) == 0


def test_tree_wins_where_latency_rules() -> None:
    many = Group(size=1024, bytes_per_second=1e9, latency=1e-5)
    assert many.all_reduce(8.0) == pytest.approx(20 * 1e-5, rel=0.01)


def test_groups_share_the_network_of_a_node() -> None:
    """The further apart its members, the fewer adapters of a node a group can use."""
    work, calibration = work_of(), Calibration()
    inside, near, far = (group(work, size, stride, calibration) for size, stride in ((8, 1), (64, 1), (8, 8)))
    assert inside.bytes_per_second > near.bytes_per_second == pytest.approx(8 * far.bytes_per_second)


def test_sequence_parallelism_gathers_twice_more() -> None:
    """Korthikanti et al. 2022, section 4.2.2: as much volume, and the inputs gathered again for their weights."""
    plain = tensor_seconds(work_of(KernelStack(sequence_parallel=False), tp=4), SILENT)
    split = tensor_seconds(work_of(tp=4), SILENT)
    assert split[0] == pytest.approx(plain[0]) and split[1] == pytest.approx(1.5 * plain[1])


def test_unfused_kernels_take_longer() -> None:
    stacks = [KernelStack(attention=name) for name in ("flash-2", "flash-1", "fused", "unfused")]
    seconds = [step_time(work_of(stack)).total for stack in stacks]
    assert seconds == sorted(seconds) and len(set(seconds)) == 4
    assert step_time(work_of(KernelStack(fused_norm=False))).total > seconds[0]


def test_recompute_costs_a_forward() -> None:
    work = work_of()
    more = step_time(work_of(recompute="full")).work - step_time(work).work
    assert more == pytest.approx(work.num_microbatches * 32 * layer_seconds(work, Calibration()).forward)


def test_selective_recompute_costs_attention_alone() -> None:
    stack = KernelStack(attention="fused")
    none, some, full = (step_time(work_of(stack, recompute=how)).work for how in ("none", "selective", "full"))
    assert none < some < (none + full) / 2


def test_unestimated_choices_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"The time of plan\.ep isn't estimated yet"):
        step_time(replace(work_of(gpus=8), plan=PlanSpec(ep=2)))


def test_context_parallel_ring_hides_under_attention() -> None:
    """Longer sequences make attention grow faster than what the ring hands over."""
    plan = PlanSpec(cp=8)
    short, long = (
        step_time(replace(work_of(gpus=8), plan=plan, sequence_length=length, global_batch_size=8))
        for length in (2048, 65536)
    )
    assert short.context_communication > 0 == long.context_communication


def test_small_micro_batches_cost_latency() -> None:
    """The same tokens in fewer, larger micro-batches save the latency of every kernel that isn't run."""
    cluster = replace(cluster_preset("a100:64"), name="plain")  # of unknown multiprocessors, so that waves don't count
    small, large = (replace(work_of(micro_batch_size=size), cluster=cluster) for size in (1, 2))
    saved = small.num_microbatches - large.num_microbatches
    times = [step_time(work, SILENT).work for work in (small, large)]
    assert kernels(small) == 24
    assert times[0] - times[1] == pytest.approx(saved * 32 * 3 * 24 * SILENT.kernel_latency)


def test_chunks_divide_the_bubble() -> None:
    plain = step_time(work_of(pp=4, micro_batch_size=2), SILENT)
    chunked = step_time(work_of(pp=4, micro_batch_size=2, schedule="interleaved", chunks=4), SILENT)
    assert chunked.bubble == pytest.approx(plain.bubble / 4, rel=0.02)


def test_overlap_hides_the_reduction() -> None:
    assert data_seconds(work_of(), Calibration()) > 0
    plain, hidden = (step_time(work_of(KernelStack(overlapped_reduction=flag))) for flag in (False, True))
    one = plain.work / work_of().num_microbatches
    assert hidden.data_communication == pytest.approx(plain.data_communication - one)


@pytest.mark.parametrize("family", ["zb-h1", "hanayo", "chimera", "dualpipe-v", "zeropp", "group-interleaved"])
def test_profiles_are_the_simulators(family: str) -> None:
    """Chains of remembered simulations, in steps longer than those and of uneven stages, with messages."""
    chunks = {"hanayo": 2, "dualpipe-v": 2}.get(family, 1)
    for microbatches, message, tolerance in ((8, 0.0, 1e-9), (64, 0.0, 1e-9), (8, 0.07, 0.03), (64, 0.07, 0.03)):
        plan = PlanSpec(pp=4, schedule=family, chunks=chunks)
        counts = profile(plan, microbatches)
        schedule = build(family, ranks=4, microbatches=microbatches, **({} if chunks > 1 else {"chunks": 1}))
        even = [1.0] * schedule.num_stages
        if message:
            even[-1] = 1.2
        true = simulate(schedule, Costs(F=even, I=even, W=even, comm=message)).makespan
        assert counts.makespan({Kind.F: even, Kind.I: even, Kind.W: even}, message) == pytest.approx(
            true, rel=tolerance
        )


@pytest.mark.parametrize("family", ["bitpipe", "dualpipe", "modular", "skip-pipe"])
def test_every_family_has_a_time(family: str) -> None:
    chunks = 2 if family == "bitpipe" else 1
    work = work_of(pp=2, schedule=family, chunks=chunks, micro_batch_size=4)
    plain = step_time(work_of(pp=2, micro_batch_size=4))
    assert step_time(work).total == pytest.approx(plain.total, rel=0.15)


def test_zero_moves_what_it_says() -> None:
    """Rajbhandari et al. 2020, section 7: ZeRO-2 moves less than ZeRO-1, ZeRO-3 for every micro-batch."""
    one, two, three = (data_seconds(work_of(zero=zero), SILENT) for zero in (1, 2, 3))
    assert one == pytest.approx(two * (2 + 4 + 4) / (2 + 4))
    assert three == pytest.approx(two * work_of().num_microbatches * (2 + 2 + 4) / (2 + 4))


def test_replicas_share_shards() -> None:
    """Sharding inside the node leaves one sum of a shard's gradients a step for the network."""
    work = replace(work_of(), plan=PlanSpec(dp_replicate=8, dp_shard=8, zero=3))
    inside = data_seconds(replace(work, plan=PlanSpec(dp_shard=8, zero=3), global_batch_size=64), SILENT)
    across = group(work, 8, 8, SILENT).all_reduce(work.parameters_of_rank(0) * 4 / 8)
    assert data_seconds(work, SILENT) == pytest.approx(inside + across)
    assert data_seconds(work, SILENT) < data_seconds(work_of(zero=3), SILENT)


def test_unknown_rates_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="peak_flops_bfloat16 and memory_bytes_per_second"):
        step_time(replace(work_of(gpus=1), cluster=cluster_preset("local-cpu")))


def test_published_step() -> None:
    """Hagemann et al. 2023: Llama 13B on 64 A100 with tp=2, pp=2, micro-batch 1 took 34.8 s a step."""
    plan = PlanSpec(tp=2, pp=2, dp_shard=16)
    work = Workload(
        model=model_preset("llama-2-13b", vocab_size=128000),
        plan=plan,
        cluster=cluster_preset("a100:64"),
        sequence_length=2048,
        global_batch_size=2048,
        stack=KernelStack(sequence_parallel=False, sharded_logits=False, sharded_messages=False),
    )
    assert step_time(work).total == pytest.approx(34.8, rel=0.15)


def test_layers_compiled_as_a_whole_have_no_w() -> None:
    """I costs I + W and W nothing, so a split backward fills nothing: zb-h1 takes what 1f1b does."""
    plain, blocks, regions = (
        step_time(work_of(pp=4, schedule="zb-h1", compile=how), SILENT) for how in ("none", "blocks", "regions")
    )
    unsplit = step_time(work_of(pp=4, schedule="1f1b"), SILENT)
    assert blocks.total > 1.02 * plain.total and regions == plain
    assert blocks.total == pytest.approx(unsplit.total, rel=0.005)
    turns = stage_turns(work_of(pp=4, schedule="zb-h1", compile="blocks"), SILENT)
    head = head_seconds(work_of(pp=4), SILENT)
    assert turns.weights == pytest.approx([0.0, 0.0, 0.0, head.weights], abs=1e-6 * head.weights)
    whole, split = (profile(PlanSpec(pp=4, schedule="zb-h1", compile=how), 8) for how in ("blocks", "none"))
    assert [max(sum(n for _, n in moment) for moment in rank) for rank in whole.alive] == [4, 3, 2, 1]
    assert [max(sum(n for _, n in moment) for moment in rank) for rank in split.alive] == [4, 4, 4, 4]
