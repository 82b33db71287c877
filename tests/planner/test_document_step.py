"""A step of documents: as long as a row's where documents are rows, and as the fullest rank where they are not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner.test_measured_step import MACHINE
from stretto.planner.calibration import Calibration
from stretto.planner.document_memory import document_memory
from stretto.planner.document_portions import placed, portions
from stretto.planner.document_step import document_step
from stretto.planner.estimate import estimate
from stretto.planner.prediction import predict
from stretto.planner.remedy import refuse_unfit
from stretto.planner.request import Request
from stretto.spec.errors import ConfigError, UnsupportedError
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_cluster import cluster_preset
from stretto.spec.presets_model import model_preset
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec

ROW = 32768
HYBRID = ("linear", "softmax", "delta", "softmax")


def run_of(cluster: str = "h100:8", **plan: Any) -> RunSpec:
    model = replace(model_preset("llama-2-7b"), max_positions=ROW)
    training = TrainingSpec(global_batch_size=8, sequence_length=ROW, dtype="bfloat16")
    chosen = PlanSpec(context_groups="dynamic", recompute="full", **plan)
    return RunSpec(model=model, cluster=cluster_preset(cluster), plan=chosen, training=training)


@pytest.mark.parametrize(
    "plan",
    [
        {"cp": 8, "zero": 3},
        {"cp": 4, "tp": 2, "zero": 2},
        {"cp": 2, "pp": 4, "zero": 1, "context_tokens": ROW // 2},
        {"cp": 2, "pp": 2, "dp_shard": 2, "schedule": "gpipe", "context_tokens": ROW // 4},
    ],
    ids=str,
)
def test_documents_as_long_as_rows_are_rows(plan: dict[str, Any]) -> None:
    """With one group of all ranks the step is the static plan's, part by part; pipelines' closed form is as near."""
    run = run_of(**plan)
    static = replace(run.plan, context_groups="static", context_tokens=None)
    if run.plan.dp > 1:
        static = replace(static, cp=4, dp_shard=1)  # a document gets all data ranks
    request = Request(run=run)
    step, known = document_step(request, [ROW] * 8), estimate(request, static)
    assert step.total == pytest.approx(known.seconds, rel=1e-9 if run.plan.pp == 1 else 0.01)
    if run.plan.pp == 1:
        assert step.data_communication == pytest.approx(known.time.data_communication)
        peak = max(rank.total for rank in document_memory(request, [ROW] * 8))
        assert peak == pytest.approx(known.peak_bytes, rel=0.01)


@pytest.mark.parametrize("recompute", ["full", "none"])
def test_layers_that_keep_states_are_counted_by_themselves(recompute: Any) -> None:
    run = run_of(cp=8)
    run = replace(run, plan=replace(run.plan, recompute=recompute), model=replace(run.model, attention=HYBRID))
    request = Request(run=run)
    step, known = document_step(request, [ROW] * 8), estimate(request, replace(run.plan, context_groups="static"))
    assert step.total == pytest.approx(known.seconds, rel=1e-9)
    short = document_step(request, [4096] * 64)
    assert short.context_communication == 0.0 and short.total < step.total
    calibrated = replace(request, calibration=Calibration(machine=MACHINE))
    with pytest.raises(UnsupportedError, match=r"delta layers .* in groups isn't calibrated"):
        document_step(calibrated, [ROW] * 8)


def test_short_documents_pay_for_no_messages_and_the_fullest_rank_is_the_step() -> None:
    request = Request(run=run_of(cp=8))
    short = document_step(request, [4096] * 64)
    assert short.context_communication == 0.0 and short.bubble == pytest.approx(0.0, abs=1e-9)
    longest = document_step(request, [ROW, *[4096] * 56])
    assert longest.context_communication > 0
    zero = document_step(Request(run=run_of(cp=8, zero=3)), [ROW // 2, *[2048] * 4])
    assert zero.work + zero.bubble >= document_step(request, [ROW // 2, *[2048] * 4]).work


def test_portions_are_the_placement() -> None:
    run, lengths = run_of(cp=4, tp=2, context_tokens=9000), [30001, 9001, 4000, 4000, 77, 5]
    found, placement = portions(run, lengths), placed(run, lengths)
    assert len(found) == 4 and {len(row) for row in found} == {placement.micro_batches}
    for piece in placement.pieces:
        for rank in range(piece.first, piece.first + piece.ranks):
            portion = found[rank][piece.micro_batch]
            assert lengths[piece.document] in portion.documents and portion.ranks == piece.ranks
    assert all(p.tokens % 2 == 0 and 0 < p.tokens <= 9000 for row in found for p in row)


def test_ranks_that_share_cores_slow_each_other() -> None:
    """Of 4 ranks on 2 cores three have little: they share the cores at first, then the fourth has one to itself."""
    model = replace(model_preset("tiny"), max_positions=4096)
    training = TrainingSpec(global_batch_size=4, sequence_length=1024, dtype="float32")
    plan = PlanSpec(context_groups="dynamic", dp_shard=4, context_tokens=1024)
    run = RunSpec(model=model, cluster=cluster_preset("local-cpu:4"), plan=plan, training=training)
    lonely = replace(MACHINE, cores=64, contention=())
    crowded = replace(MACHINE, cores=2, contention=())
    alone, shared = (
        document_step(Request(run=run, calibration=Calibration(machine=machine)), [512] * 4)
        for machine in (lonely, crowded)
    )
    assert shared.work + shared.bubble == pytest.approx(2 * (alone.work + alone.bubble))
    with pytest.raises(UnsupportedError, match="isn't known"):
        document_step(Request(run=run), [512] * 4)
    assert predict(run, documents=[[512] * 4]) is None


def test_a_run_whose_micro_batches_cannot_fit_is_refused() -> None:
    run = run_of("h100:8", cp=8, zero=3, context_tokens=4 * ROW)
    with pytest.raises(ConfigError, match=r"can't fit: .*plan.context_tokens = (\d+) \([\d.]+ GB\)") as found:
        refuse_unfit(run)
    tokens = int(str(found.value).partition("plan.context_tokens = ")[2].split()[0])
    refuse_unfit(replace(run, plan=replace(run.plan, context_tokens=tokens)))
    with pytest.raises(ConfigError):
        refuse_unfit(replace(run, plan=replace(run.plan, context_tokens=tokens + tokens // 50)))
    assert "a step" not in str(found.value)
