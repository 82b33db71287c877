"""Linear and delta layers in the planner: what they keep, compute and send, held to the layers themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stretto.models.build import build_model
from stretto.planner.calibration import published
from stretto.planner.communication import context_seconds, group
from stretto.planner.compute import attention_seconds, layer_seconds, recompute_seconds
from stretto.planner.linear_layers import kept, kernel_operations, most, of_kind, of_stages
from stretto.planner.memory import layer_activation_bytes, memory
from stretto.planner.own_stack import own_stack
from stretto.planner.plan import answer
from stretto.planner.request import Request
from stretto.planner.roofline import roofline
from stretto.planner.sequence_volume import Heads
from stretto.planner.state_volume import state_volume
from stretto.planner.tracked import layer_elements, tracked
from stretto.planner.workload import Workload
from stretto.spec.cluster import ClusterSpec
from stretto.spec.contract import Batch, Place
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_cluster import cluster_preset
from stretto.spec.presets_model import model_preset
from stretto.spec.run import RunSpec
from stretto.spec.sequence import cut_sequence
from stretto.spec.training import TrainingSpec
from stretto.trainer.memory import ActivationMeter
from stretto.trainer.session import Session

SMALL = ModelSpec(
    vocab_size=61, hidden_size=48, intermediate_size=80, num_layers=4, num_heads=4, num_kv_heads=2, max_positions=256
)
HYBRID = replace(model_preset("llama-3-8b"), attention=("linear", "delta", "linear", "softmax"))


def work_of(model: ModelSpec, *, length: int = 192, rows: int = 2, cluster: str = "", **plan: object) -> Workload:
    return Workload(
        model=model,
        plan=PlanSpec(micro_batch_size=rows, **plan),  # type: ignore[arg-type]
        cluster=cluster_preset(cluster) if cluster else ClusterSpec(),
        sequence_length=length,
        global_batch_size=rows * 16,
        stack=own_stack(TrainingSpec(dtype="bfloat16" if cluster else "float32")),
    )


def batch_of(rows: int, length: int) -> Batch:
    tokens = torch.randint(0, 61, (rows, length))
    positions = torch.arange(length).expand(rows, length)
    return Batch(tokens=tokens, labels=tokens, positions=positions, documents=None, samples=torch.arange(rows))


@pytest.mark.parametrize("kind", ["linear", "delta"])
@pytest.mark.parametrize(("kv_heads", "length"), [(2, 192), (4, 192), (1, 150)])
def test_a_layer_keeps_what_is_said(kind: str, kv_heads: int, length: int) -> None:
    model = replace(SMALL, attention=(kind,), num_kv_heads=kv_heads)
    stack = build_model(model)
    batch = batch_of(2, length)
    own = {parameter.untyped_storage().data_ptr() for parameter in stack.parameters()}  # type: ignore[attr-defined]
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(2, length, model.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stack.blocks[0](x, stack.context(batch, Place(training=True)))
    real = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)
    # Where the last chunk is filled up not all tensors are.
    near = 0.02 if length % 64 == 0 else 0.07
    assert 4 * layer_elements(work_of(model, length=length), packed=False) == pytest.approx(real, rel=near)


@pytest.mark.parametrize("pattern", [("linear",), ("delta",), ("delta", "linear", "softmax")])
def test_memory_of_a_run_is_within_a_tenth(pattern: tuple[str, ...]) -> None:
    model = replace(SMALL, attention=pattern)
    training = TrainingSpec(global_batch_size=2, sequence_length=128, dtype="float32")
    run = RunSpec(model=model, plan=PlanSpec(micro_batch_size=2), training=training)
    session = Session.start(run, 0)
    meter = ActivationMeter(session)
    with meter.watch():
        session.train_step(1, [batch_of(2, 128)])
    (found,) = tracked(replace(work_of(model, length=128), global_batch_size=2), packed=False)
    assert found.activations + found.logits == pytest.approx(meter.peak_bytes, rel=0.1)


def test_operations_are_those_of_the_chunks() -> None:
    """C tokens a chunk, T tokens, two rows; H query and G key/value heads of size K."""
    chunk, tokens, heads, keys, size = 64, 2 * 192, 4, 2, 12
    linear = 2 * tokens * (2 * heads * chunk * size + heads * size**2 + keys * size**2)
    assert kernel_operations(of_kind(work_of(SMALL), "linear")) == pytest.approx(linear)
    more = 2 * tokens * (2 * keys * chunk * size + heads * chunk * size + keys * size**2 + keys * size**3 / chunk)
    assert kernel_operations(of_kind(work_of(SMALL), "delta")) == pytest.approx(linear + more)
    twice = work_of(replace(SMALL, attention=("linear",)), length=384)
    assert kernel_operations(twice) == pytest.approx(2 * linear), "it grows with the tokens, not with their square"


def test_layers_that_differ_are_counted_stage_by_stage() -> None:
    work = work_of(HYBRID, length=8192, rows=1, cluster="h100:8", pp=2, tp=4, stages=(3, 29))
    calibration = published("h100")
    each = {kind: layer_seconds(of_kind(work, kind), calibration).forward for kind in ("linear", "delta", "softmax")}
    first, second = of_stages(work, lambda one: layer_seconds(one, calibration).forward)
    assert first == pytest.approx(2 * each["linear"] + each["delta"])
    assert first + second == pytest.approx(16 * each["linear"] + 8 * each["delta"] + 8 * each["softmax"])
    assert layer_seconds(work, calibration).forward == pytest.approx((first + second) / 32)
    kept_bytes = of_stages(work, layer_activation_bytes)
    assert memory(work)[0].activations == pytest.approx(2 * kept_bytes[0])
    assert most(work, layer_activation_bytes) == layer_activation_bytes(of_kind(work, "delta"))


def test_states_take_their_bytes_over_the_links() -> None:
    model = replace(model_preset("llama-3-8b"), attention=("delta",))
    quiet = replace(published("h100"), link_latency=0.0, network_latency=0.0)
    heads = Heads(rows=2, heads=32, kv_heads=8, head_size=128, element_bytes=2)
    for layout in ("zigzag", "contiguous"):
        shares = cut_sequence(8192, 4, layout)
        for way in ("all-gather", "ring"):
            work = work_of(model, length=8192, cluster="h100:8", cp=4, context_layout=layout, linear_context=way)
            rate = group(work, 4, 1, quiet).bytes_per_second
            sent = [state_volume(way, "delta", shares, rank, heads) for rank in range(4)]
            seconds = context_seconds(work, quiet)
            if way == "all-gather":  # all at once: each rank receives what it sends
                assert seconds == pytest.approx((sent[0].forward / rate, sent[0].backward / rate))
            else:  # one hop after the other
                assert seconds[0] == pytest.approx(sum(one.forward for one in sent) / rate)


def test_recompute_and_shares_of_tp() -> None:
    model = replace(model_preset("llama-3-8b"), attention=("linear",))
    work, calibration = work_of(model, length=8192, cluster="h100:8"), published("h100")
    halves = replace(work, plan=replace(work.plan, tp=2))
    assert kept(halves).sums == pytest.approx(kept(work).sums / 2)
    selective = replace(work, plan=replace(work.plan, recompute="selective"))
    full = replace(work, plan=replace(work.plan, recompute="full"))
    assert recompute_seconds(selective, calibration) == attention_seconds(work, calibration).forward
    assert recompute_seconds(full, calibration) == pytest.approx(layer_seconds(work, calibration).forward)
    sizes = [layer_activation_bytes(one) for one in (work, selective, full)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


def test_a_plan_of_a_hybrid_model() -> None:
    training = TrainingSpec(global_batch_size=16, sequence_length=8192, dtype="bfloat16")
    run = RunSpec(model=HYBRID, cluster=cluster_preset("h100:8"), training=training)
    softmax = replace(run, model=replace(HYBRID, attention=("softmax",)))
    few = {"pp": 1, "tp": 2, "micro_batch_size": 1, "recompute": "full", "offload": False}
    found, other = (answer(Request(run=one, pins=few), top=1).best for one in (run, softmax))
    best = found
    assert best.fits and best.seconds > 0 and best.plan.num_ranks == 8
    assert sum(part.seconds for part in roofline(best.work)[:4]) > 0
    assert found.time.work != other.time.work
    cut = answer(Request(run=run, pins={**few, "cp": 4, "linear_context": "ring"}), top=1).best
    assert cut.plan.linear_context == "ring" and cut.time.context_communication > 0
