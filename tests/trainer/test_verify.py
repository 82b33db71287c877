"""Classic faults, injected into the ranks: each must be found and laid at the right parameter's door.

Healthy plans must be found equal, or the first half would prove nothing.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from ranks import Ranks
from stretto.spec.data import DataSpec
from stretto.spec.model import ModelSpec, RopeScaling, VideoSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_model import model_preset
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.verify import VerifyReport, verify
from trainer import faults

LLAMA = model_preset("tiny")
TIED = model_preset("tiny-tied")
GPT2 = model_preset("tiny-gpt2")
DROPOUT = replace(LLAMA, dropout=0.1)
FOREIGN = ModelSpec(
    family="foreign",
    module="examples/foreign_gpt_neox.py:build",
    vocab_size=67,
    intermediate_size=256,
    num_layers=4,
    max_positions=128,
)
VIDEO = replace(model_preset("tiny-video"), video=VideoSpec(frames=4, patches=16, channels=4))
SWITCHED = {"cp": 2, "context": "switch"}
DYNAMIC = {"context_groups": "dynamic"}
INTERLEAVED = {"pp": 2, "schedule": "interleaved", "chunks": 2}

Case = tuple[Callable[[], Any], ModelSpec, dict[str, Any], str, str | None]

CASES: list[Case] = [
    # fault, model, plan, the parameter that must be named, the module where the forward pass goes wrong
    (faults.tied_gradient_counted_twice, TIED, {"pp": 2}, "inputs.tokens.weight", None),
    (faults.tied_gradients_not_summed, TIED, {"pp": 2}, "inputs.tokens.weight", None),
    (faults.tied_weight_counted_twice_in_norm, TIED, {"pp": 2}, "inputs.tokens.weight", None),
    (faults.norm_gradient_not_summed_over_tp, LLAMA, {"tp": 2}, "blocks.0.attention_norm.weight", None),
    (faults.mean_of_means, LLAMA, {"dp_replicate": 2}, "inputs.tokens.weight", None),
    (faults.mean_of_means, LLAMA, {"dp_shard": 2, "zero": 3}, "inputs.tokens.weight", None),
    (faults.dropped_layer, LLAMA, {"pp": 2}, "blocks.2.attention_norm.weight", "blocks.2.attention_norm"),
    (faults.swapped_stages, LLAMA, INTERLEAVED, "blocks.1.", "blocks.1.attention_norm"),
    (faults.rotary_offset_of_last_stage, LLAMA, {"pp": 2}, "blocks.2.attention.", "blocks.2.attention.o"),
    (faults.rotary_offset_of_last_stage, LLAMA, {"tp": 2}, "blocks.0.attention.", "blocks.0.attention.o"),
    (faults.no_reduction_over_dp, LLAMA, {"dp_replicate": 2}, "inputs.tokens.weight", None),
    (faults.clip_by_local_norm, LLAMA, {"pp": 2}, "inputs.tokens.weight", None),
    (faults.documents_not_masked, LLAMA, {"pp": 2}, "blocks.0.attention.", "blocks.0.attention.o"),
    (faults.kv_heads_on_wrong_tp_rank, LLAMA, {"tp": 2}, "blocks.0.attention.k.weight", "blocks.0.attention.k"),
    (faults.dropout_keyed_by_rank, DROPOUT, {"tp": 2}, "inputs.tokens.weight", "inputs"),
    (faults.recompute_draws_again, DROPOUT, {"pp": 2, "recompute": "full"}, "inputs.tokens.weight", None),
    (faults.vocabulary_shard_off_by_one, LLAMA, {"tp": 2}, "inputs.tokens.weight", "inputs.tokens"),
    (faults.softmax_over_own_shard, LLAMA, {"tp": 2}, "outputs.head.weight", "outputs"),
    (faults.row_bias_added_on_each_rank, GPT2, {"tp": 2}, "blocks.0.attention.o.bias", "blocks.0.attention.o"),
    (faults.region_gradient_averaged, LLAMA, {"tp": 2}, "inputs.tokens.weight", None),
    (faults.sequence_slices_in_wrong_order, LLAMA, {"tp": 2}, "blocks.0.attention.", "blocks.0.attention.q"),
    (faults.reduce_scatter_to_wrong_rank, LLAMA, {"dp_shard": 2, "zero": 2}, "inputs.tokens.weight", None),
    (faults.last_micro_batch_wins, LLAMA, {"pp": 2}, "inputs.tokens.weight", None),
    (faults.micro_batches_mixed_up, LLAMA, {"pp": 2}, "blocks.2.", "blocks.2.attention_norm"),
    (faults.boundary_gradient_halved, LLAMA, {"pp": 2}, "inputs.tokens.weight", None),
    (faults.boundary_gradient_not_finite, LLAMA, {"pp": 2}, "inputs.tokens.weight", None),
    (faults.parameters_not_published, LLAMA, {"dp_shard": 2}, "inputs.tokens.weight", "inputs.tokens"),
    (faults.key_gradients_lost_on_the_ring, LLAMA, {"cp": 2}, "inputs.tokens.weight", None),
    (faults.positions_as_if_contiguous, LLAMA, {"cp": 2, "tp": 2}, "blocks.0.attention.", "blocks.0.attention.o"),
    (faults.key_gradients_lost_on_the_ring, LLAMA, {"cp": 2, **DYNAMIC}, "inputs.tokens.weight", None),
    (faults.dropped_layer, LLAMA, {"pp": 2, "cp": 2, **DYNAMIC}, "blocks.2.", "blocks.2"),
    (faults.frames_as_if_the_first, VIDEO, SWITCHED, "inputs.", "inputs"),
    (faults.decay_on_norms, LLAMA, {"pp": 2}, "blocks.0.attention_norm.weight", None),
]

HEALTHY: dict[str, tuple[ModelSpec, dict[str, Any]]] = {
    "one": (LLAMA, {}),
    "tied-pp2": (TIED, {"pp": 2}),
    "pp2-tp2-zero3": (LLAMA, {"pp": 2, "tp": 2, "dp_shard": 2, "zero": 3}),
    "interleaved": (LLAMA, {**INTERLEAVED, "micro_batch_size": 2}),
    "gpt2-pp2-tp2": (GPT2, {"pp": 2, "tp": 2}),
    "uneven": (replace(LLAMA, num_layers=7), {"pp": 3, "stages": (1, 4, 2), "dp_replicate": 2}),
    "dropout-recompute": (DROPOUT, {"pp": 2, "tp": 2, "recompute": "full"}),
    "qwen-window-scaled": (
        replace(LLAMA, qkv_bias=True, qk_norm=True, sliding_window=20, rope_scaling=RopeScaling(original_positions=64)),
        {"tp": 2, "dp_shard": 2, "recompute": "selective"},
    ),
    "cp2-tp2-dropout": (DROPOUT, {"cp": 2, "tp": 2, "context": "ulysses"}),
    "hybrid-cp2-pp2": (replace(LLAMA, num_layers=6, attention=("delta", "linear", "softmax")), {"cp": 2, "pp": 2}),
    "documents": (LLAMA, {"cp": 2, "dp_shard": 2, "tp": 2, "offload": True, "zero": 3, **DYNAMIC}),
    "foreign": (FOREIGN, {"pp": 2, "tp": 2}),
    "clips": (VIDEO, {**SWITCHED, "dp_shard": 2, "zero": 3, "recompute": "full"}),
}


def run_of(model: ModelSpec, plan: dict[str, Any], **training: Any) -> RunSpec:
    return RunSpec(
        model=model,
        plan=PlanSpec(**plan),
        training=TrainingSpec(global_batch_size=24, sequence_length=64, **training),
    )


def quietly(ranks: Ranks, run: RunSpec, fault: Callable[[], Any] | None = None) -> VerifyReport:
    return verify(run, steps=2, run_ranks=ranks.run, around=fault, say=lambda line: None)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0].__name__}-{'-'.join(c[2])}")
def test_fault_is_found_and_named(ranks: Ranks, case: Case) -> None:
    fault, model, plan, parameter, module = case
    report = quietly(ranks, run_of(model, plan), fault)
    assert not report.equal
    assert report.worst_parameter is not None and report.worst_parameter.startswith(parameter), report
    assert report.first_output == module, report
    assert report.worst_parameter in report.finding


def test_every_fault_is_tried() -> None:
    defined = {f for _, f in inspect.getmembers(faults, inspect.isfunction) if f.__module__ == faults.__name__}
    assert defined == {case[0] for case in CASES}


@pytest.mark.parametrize("name", list(HEALTHY))
def test_healthy_plan_is_equal(ranks: Ranks, name: str) -> None:
    model, plan = HEALTHY[name]
    report = quietly(ranks, run_of(model, plan))
    assert report.equal, report.finding
    assert max(report.loss_error, report.grad_error, report.norm_error, report.weight_error) < 1e-11
    assert report.first_output is None and report.steps == 2 and report.ranks == PlanSpec(**plan).num_ranks


def test_wrong_clip_shows_in_the_weights_alone(ranks: Ranks) -> None:
    report = quietly(ranks, run_of(LLAMA, {"pp": 2}), faults.clip_by_local_norm)
    assert max(report.loss_error, report.grad_error, report.norm_error) < 1e-11 < report.weight_error
    assert "all gradients are equal" in report.finding


def test_wrong_norm_is_found_even_where_nothing_is_clipped(ranks: Ranks) -> None:
    run = run_of(TIED, {"pp": 2}, clip_norm=0.0)
    report = quietly(ranks, run, faults.tied_weight_counted_twice_in_norm)
    assert not report.equal and report.worst_parameter is None and report.norm_error > 1e-2
    assert "norm is wrong" in report.finding


def test_packing_without_isolation_is_not_a_fault(ranks: Ranks) -> None:
    run = replace(run_of(LLAMA, {"pp": 2}), data=DataSpec(isolate_documents=False))
    assert quietly(ranks, run).equal
    assert quietly(ranks, run, faults.documents_not_masked).equal


def test_report_is_json_even_where_nothing_is_finite(ranks: Ranks) -> None:
    report = quietly(ranks, run_of(LLAMA, {"pp": 2}), faults.boundary_gradient_not_finite)
    numbers = [report.loss_error, report.grad_error, report.norm_error, report.weight_error]
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers and report.grad_error > 1e200
