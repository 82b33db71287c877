"""Calibrations corrected by runs: known rates come back, steps are predicted better, alien traces are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from planner.test_measured_step import MACHINE as MEASURED
from planner.test_measured_step import RUN as DEMO
from schedule.recorded import write_run
from stretto.cli.main import main
from stretto.planner.calibration_file import read_calibration, write_calibration
from stretto.planner.machine import Machine
from stretto.planner.measured_step import measured_step, played
from stretto.planner.observed import observe
from stretto.planner.refine import refine
from stretto.planner.refinement import Refinement, error, merged
from stretto.planner.request import Request
from stretto.schedule.families import build
from stretto.schedule.measured.format import FOLDER, path_of
from stretto.schedule.measured.trace import load
from stretto.schedule.op import Kind
from stretto.schedule.passes.communication import lower
from stretto.spec import toml
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec

MACHINE = replace(MEASURED, cores=4, contention=((1, 1.0), (4, 1.0)))
"""A core for each rank: operations take what the trace says."""


def recorded(folder: Path, run: RunSpec, *, machine: Machine = MACHINE, about: Mapping[str, object] = {}) -> Path:
    """A run on ``machine`` whose operations take 10 ms (F), 20 ms (B), 10 ms (I, W)."""
    plan = run.plan
    schedule = lower(build(plan.schedule, ranks=plan.pp, microbatches=run.num_microbatches))
    write_run(folder, schedule)
    toml.save(run, folder / "run.toml")
    for rank in range(plan.pp):
        path = path_of(folder / FOLDER, rank)
        line, _, body = path.read_bytes().partition(b"\n")
        said = {**json.loads(line), "processor": machine.processor, "cores": machine.cores, **about}
        path.write_bytes(json.dumps(said).encode() + b"\n" + body)
    return folder


def run_of(**plan: object) -> RunSpec:
    return replace(DEMO, plan=PlanSpec(**plan))  # type: ignore[arg-type]


@pytest.mark.parametrize("plan", [{"pp": 4}, {"pp": 2, "schedule": "zb-h1"}, {}])
def test_known_rates_come_back(plan: dict[str, object], tmp_path: Path) -> None:
    run = run_of(**plan)
    found = refine(MACHINE, recorded(tmp_path / "run", run))
    work = Request(run=run).work(run.plan)
    trace = load(tmp_path / "run")
    taken: dict[tuple[Kind, int], list[float]] = {}
    played(work, found.machine, schedule=trace.schedule, taken=taken)
    for (kind, stage), seconds in taken.items():
        if stage < work.plan.num_stages - 1:  # the head is corrected as a whole, not each way
            assert seconds[0] == pytest.approx(0.02 if kind is Kind.B else 0.01, rel=1e-3)
    whole = observe(trace).step
    assert found.measured == whole and abs(found.after.total / whole - 1) < 0.01 < abs(found.before.total / whole - 1)
    assert found.after.expected_error < 0.02 < found.before.expected_error
    assert measured_step(work, found.machine) == found.after


def test_shared_cores_are_not_taken_for_slow_ones(tmp_path: Path) -> None:
    crowded = replace(MACHINE, cores=2, contention=((1, 1.0), (2, 1.0), (4, 2.0)))
    folder = recorded(tmp_path / "run", run_of(pp=4), machine=crowded)
    factors = {
        name: {one.kind: one.factor for one in refine(machine, folder).found}
        for name, machine in {"crowded": crowded, "alone": replace(crowded, contention=((1, 1.0), (4, 1.0)))}.items()
    }
    assert 0.5 <= factors["crowded"]["forward"] / factors["alone"]["forward"] < 0.95


def test_factors_fade_with_distance_and_newer_ones_win() -> None:
    old, new, other = (
        Refinement(kind="forward", size=size, factor=factor, error=0.01, source="")
        for size, factor in ((100.0, 2.0), (100.4, 3.0), (400.0, 1.0))
    )
    known = merged([old, other], [new])
    assert known == (other, new)
    machine = replace(MACHINE, refinements=known)
    assert machine.factor("forward", 100.4) == 3.0 and machine.factor("forward", 400.0) == 1.0
    assert machine.factor("forward", 200.4) == pytest.approx(2.0, rel=1e-2) and machine.factor("gaps", 2) == 0.0
    before = [machine.factor("forward", 100.4 / far) for far in (1.0, 2.0, 4.0, 100.0)]
    assert before == pytest.approx([3.0, 2.0, 1.0, 1.0])
    near, far, none = (error(known, "forward", size, unrefined=0.12) for size in (400.0, 800.0, 1e6))
    assert near == 0.01 < far < none == 0.12


def test_the_command_writes_a_file_that_plans_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_calibration(MACHINE, tmp_path / "here.toml", shares={"matmul": 0.7})
    run = recorded(tmp_path / "run", run_of(pp=4))
    assert main(["diagnose", str(run), "--refine", str(tmp_path / "here.toml")]) == 0
    said = capsys.readouterr().out
    assert "here-refined.toml: stretto plan" in said and "older file" not in said and "predicted before" in said
    known = read_calibration(tmp_path / "here-refined.toml")
    assert known.matmul == 0.7 and known.machine is not None
    assert known.machine == refine(MACHINE, run).machine and str(run) in known.machine.refinements[0].source
    out = ["--out", str(tmp_path / "here-refined.toml"), "--json"]
    assert main(["diagnose", str(run), "--refine", str(tmp_path / "here-refined.toml"), *out]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["predicted_after"] == pytest.approx(again["predicted_before"], rel=1e-3)
    assert main(["diagnose", str(run), "--refine", str(tmp_path / "here.toml")]) == 0
    assert "(instead of an older file)" in capsys.readouterr().out


def test_traces_of_something_else_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibration = tmp_path / "here.toml"
    write_calibration(MACHINE, calibration)
    good = run_of(pp=2)
    training = replace(good.training, dtype="float64")
    cases: tuple[tuple[RunSpec, Mapping[str, object], str], ...] = (
        (good, {"processor": "another"}, "on 4 cores of 'another', but the calibration is of 4 cores of 'test'"),
        (good, {"cores": 8}, "on 8 cores of 'test'"),
        (good, {"processor": ""}, "doesn't say which processor"),
        (good, {"device": "cuda"}, "was on GPUs"),
        (replace(good, training=training), {}, "computes in float64"),
        (replace(good, training=replace(good.training, freeze=("inputs.*",))), {}, "training.freeze"),
    )
    for number, (run, about, message) in enumerate(cases):
        folder = recorded(tmp_path / str(number), run, about=about)
        assert main(["diagnose", str(folder), "--refine", str(calibration)]) == 2
        assert message in capsys.readouterr().err
    folder = recorded(tmp_path / "other", good)
    for other, message in ((run_of(pp=4), "2 ranks in all, but the run.toml"), (None, "has no run.toml")):
        (folder / "run.toml").write_text("")
        if other is not None:
            toml.save(other, folder / "run.toml")
        assert main(["diagnose", str(folder), "--refine", str(calibration)]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "shares.toml").write_text('format = "stretto.calibration/1"\n[shares]\nmatmul = 0.5\n')
    assert main(["diagnose", str(folder), "--refine", str(tmp_path / "shares.toml")]) == 2
    assert "has no [machine]" in capsys.readouterr().err
