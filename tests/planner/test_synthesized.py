"""Schedules that are searched for at the memory that a layout leaves, and the run file that plays them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stretto.cli.main import main
from stretto.planner import effort, synthesized
from stretto.planner.estimate import estimate
from stretto.planner.request import Request
from stretto.planner.synthesized import with_synthesized
from stretto.schedule.simulate import simulate
from stretto.spec.check import check
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_cluster import cluster_preset
from stretto.spec.presets_model import model_preset
from stretto.spec.resolve import load_run
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.planned import planned

ASKED = ["plan", "--model", "llama-2-7b", "--cluster", "a100:4", "--seq-len", "4096", "--global-batch", "8"]


def test_what_is_found_is_faster_and_fits_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthesized, "BUDGET_SECONDS", 0.8)
    run = RunSpec(
        model=model_preset("llama-2-7b"),
        cluster=replace(cluster_preset("a100:8"), memory_bytes=40e9),
        training=TrainingSpec(global_batch_size=16, sequence_length=4096, dtype="bfloat16"),
    )
    request = Request(run=run)
    drawn = estimate(request, PlanSpec(pp=8, recompute="full"))
    one_rank = estimate(request, PlanSpec(tp=8))
    found = with_synthesized(request, (drawn, one_rank), tmp_path)
    assert found[1] is one_rank and all(plan.fits for plan in found)
    assert found[0].seconds < 0.97 * drawn.seconds
    searched = found[0].plan
    assert searched == replace(
        drawn.plan, schedule="auto", chunks=searched.chunks, schedule_file=searched.schedule_file
    )
    assert with_synthesized(request.pinned(schedule="1f1b"), (drawn,), tmp_path) == (drawn,)


def test_the_run_file_plays_the_file_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(synthesized, "BUDGET_SECONDS", 0.6)
    monkeypatch.setattr(effort, "SEARCHED_CORES", 0)
    monkeypatch.setattr(effort, "UNITS", 8)
    out = tmp_path / "run.toml"
    pins = ["--pin", "pp=4", "micro_batch_size=1", "recompute=none", "tp=1", "cp=1", "offload=false", "zero=1"]
    assert main([*ASKED, *pins, "--thorough", "--top", "1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "searched schedule" in said and f"wrote {tmp_path / 'run-schedule.json'}: the schedule" in said
    run = load_run(out)
    assert run.plan.schedule == "auto" and run.plan.schedule_file == str(tmp_path / "run-schedule.json")
    check(run, data=False)
    played = planned(run)
    assert (played.num_ranks, played.num_stages) == (4, run.plan.num_stages) and simulate(played).makespan > 0
