"""This machine measured, in small, and the first steps of a run laid beside what the planner said of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ranks import Ranks
from stretto.cli.calibrate import shown
from stretto.cli.main import main
from stretto.planner.calibration_file import read_calibration, write_calibration
from stretto.planner.machine import COLLECTIVES, Curve, Machine
from stretto.trainer import measure, measure_group
from stretto.trainer.launch import run_training
from trainer.small import small_run, train, write_corpus

SMALL = {
    "SIDES": (16, 32),
    "ATTENTION": ((1, 16, 16), (2, 32, 16)),
    "BLOCKS": ((32, 16), (32, 32)),
    "LOGITS": ((8, 260), (16, 260)),
    "PARAMETERS": (1000, 2000),
    "COPIES": (4096, 8192),
    "ENOUGH_SECONDS": 0.001,
}
SIZES = {"SIZES": (64, 4096), "REPEATS": {64: 2, 4096: 2}, "WORK_SECONDS": 0.01}


def together(rank: int, world: int) -> dict[str, Any]:
    for name, value in SIZES.items():
        setattr(measure_group, name, value)
    return measure_group.measure_together(rank, world)


@pytest.fixture(scope="module")
def machine(ranks: Ranks) -> Machine:
    found = ranks.run(together, 4)[0]
    groups = tuple((name, size, Curve(points=points)) for name, size, points in found["collectives"])
    group = {"messages": Curve(points=found["messages"]), "collectives": groups, "contention": found["contention"]}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(measure, name, value)
        return Machine(**measure.measure_process(), **group)


def test_a_measured_machine_is_kept_and_first_steps_are_compared(machine: Machine, tmp_path: Path) -> None:
    assert {(name, size) for name, size, _ in machine.collectives} == {(n, s) for n in COLLECTIVES for s in (2, 4)}
    assert [count for count, _ in machine.contention] == [1, 2, 3, 4] and machine.slowdown(4) >= 1.0
    curves = [value for value in machine.as_data().values() if isinstance(value, list) and len(value) == 2]
    assert curves and machine.operation_seconds > 0 and machine.step_seconds > 0 and machine.sleep_seconds > 0
    assert all(word in shown(machine) for word in ("GFLOP/s", "GB/s", "all-reduce", "cores"))
    write_calibration(machine, tmp_path / "here.toml")
    assert read_calibration(tmp_path / "here.toml").machine == machine

    write_corpus(tmp_path / "corpus")
    plain = small_run(tmp_path / "run", dtype="float32", steps=3)
    _, said = train(0, 1, plain)
    assert not (tmp_path / "run" / "prediction.json").exists() and not any("predicted" in line for line in said)
    run = replace(plain, cluster=replace(plain.cluster, calibration=str(tmp_path / "here.toml")))
    run = replace(run, run=replace(run.run, dir=str(tmp_path / "known")))
    _, said = train(0, 1, run)
    assert sum("a step" in line and "predicted" in line and "memory" in line for line in said) == 1
    found = json.loads((tmp_path / "known" / "prediction.json").read_text())
    assert found["steps"] == {"last": 3, "counted": 2}
    for name in ("seconds", "bytes"):
        assert found[name]["ratio"] == pytest.approx(found[name]["predicted"] / found[name]["measured"])
    assert sum(found["bytes"]["kinds"].values()) == pytest.approx(found["bytes"]["predicted"])
    assert found["bytes"]["ratio"] == pytest.approx(1.0, abs=0.1)


def test_calibrating_from_the_command_line(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("stretto.trainer.calibrate.calibrate", lambda **_: machine)
    assert main(["diagnose", "--calibrate", "--out", str(tmp_path / "c.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cores"] == machine.cores
    bad = (["--out", "x.txt"], ["--out", str(tmp_path / "no" / "c.toml")])
    for words in bad:
        assert main(["diagnose", "--calibrate", *words]) != 0
    assert main(["diagnose"]) != 0
    assert "--calibrate" in capsys.readouterr().err


def test_a_plan_that_cannot_fit_is_refused_before_anything_starts(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    run = small_run(tmp_path / "run", {"pp": 2}, global_batch_size=8)
    tight = replace(run, cluster=replace(run.cluster, memory_bytes=1e4))
    with pytest.raises(ValueError, match="The plan can't fit"):
        run_training(tight)
    assert not (tmp_path / "run" / "run.toml").exists()
