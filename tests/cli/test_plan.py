"""``stretto plan``: what it prints, writes and refuses; ``auto`` in a run file."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import stretto
from stretto.cli.main import main
from stretto.planner.critical_batch import verdict
from stretto.planner.own_stack import own_stack
from stretto.planner.pins import read_pins
from stretto.planner.placement import placed
from stretto.spec.check import check
from stretto.spec.errors import ConfigError, UnsupportedError
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_cluster import cluster_preset
from stretto.spec.resolve import load_run, resolve_text
from stretto.spec.training import TrainingSpec

ASKED = ["plan", "--model", "llama-3-8b", "--cluster", "a100:8", "--seq-len", "2048", "--global-batch", "32"]
ASKED += ["--pin", "cp=1", "--pin", "tp=1"]
AUTO = "plan = 'auto'\n[model]\nname = 'tiny'\n[data]\npath = 'stdlib'\n[cluster]\nname = 'local-cpu:4'\n"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command ends with."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


def test_list_and_run_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.toml"
    assert main([*ASKED, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "1 before 2: " in text and "the fullest: " in text and "expected error" in text
    run = load_run(out)
    check(run, world_size=8)
    assert run.training.dtype == "bfloat16" and run.training.global_batch_size == 32
    assert f"wrote {out}: stretto train {out}" in text


def test_clips_need_no_length_and_train_as_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.toml"
    asked = ["plan", "--model", "stdit-xl", "--cluster", "h100:16", "--global-batch", "4"]
    assert main([*asked, "--out", str(out), "--html", str(tmp_path / "plans.html")]) == 0
    assert "switch" in capsys.readouterr().out
    run = load_run(out)
    check(run, world_size=16)
    assert run.plan.cp >= 4 and run.training.sequence_length == 16 * 1024
    assert "clips are all of one length" in refused(
        capsys, *asked, "--lengths", "lognormal:median=64,sigma=1,min=8,max=99"
    )


def test_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, "--json", "--top", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    best, second = found["plans"]
    assert best["step_s"] <= second["step_s"] and best["beats_next"] and "beats_next" not in second
    assert sum(best["parts"].values()) == pytest.approx(best["step_s"])
    rank = max(best["memory"], key=lambda kinds: kinds["total"])
    assert best["peak_bytes"] == rank["total"] == pytest.approx(sum(v for k, v in rank.items() if k != "total"))
    assert best["tokens_per_s"] == pytest.approx(32 * 2048 / best["step_s"])
    assert 0 < best["mfu"] < 1 and 0 < best["expected_error"] < 1


@pytest.mark.parametrize(
    ("why_not", "message"),
    [
        ("pp=3", "pp=3 can't be: plan.pp = 3 can't divide 8 devices"),
        (
            "pp=1,zero=1,shard_optimizer=1",
            "pp=1, zero=1, shard_optimizer=1 doesn't fit. The least that any plan needs is",
        ),
        ("recompute=full,pp=1", "faster: arithmetic"),
        ("tp=2", "tp=2 contradicts what is pinned: tp=1."),
    ],
)
def test_why_not(why_not: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, "--why-not", why_not]) == 0
    assert message in capsys.readouterr().out


def test_run_file_keeps_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    demo = Path(__file__).parents[2] / "examples" / "demo.toml"
    assert main(["plan", str(demo), "--json", "--top", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    plan = found["plans"][0]["plan"]
    assert (plan["pp"], plan["dp_replicate"], plan["schedule"], plan["micro_batch_size"]) == (2, 2, "1f1b", 2)
    assert found["devices"] == 4 and "mfu" not in found["plans"][0] and "peak_flops_bfloat16" in found["assumed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--model", "llama-3-8b"], "plan also needs --cluster, --seq-len, --global-batch"),
        ([*ASKED, "--model", "llama-3-8c"], "did you mean 'llama-3-8b'?"),
        ([*ASKED, "--cluster", "a101:8"], "did you mean 'a100'?"),
        ([*ASKED, "--cluster", "a100:0"], "must end in a number of devices"),
        ([*ASKED, "--pin", "zerro=1"], "unknown key plan.zerro; did you mean 'zero'?"),
        ([*ASKED, "--pin", "schedule=1f1c"], "plan.schedule = '1f1c' is none of"),
        ([*ASKED, "--objective", "cost"], "needs the price of a device"),
        ([*ASKED, "--out", "no/such/run.toml"], "name a file in a folder that exists"),
        ([*ASKED, "--top", "0"], "--top 0 must be at least 1"),
        ([*ASKED, "--global-batch", "7", "--pin", "pp=1"], "No plan divides a global batch of 7 sequences"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "a100:8"\nnum_nodes = 0', "there are no devices"),
        ('name = "a100:8"\nmemry_bytes = 8e9', "did you mean 'cluster.memory_bytes'?"),
        ('[[groups]]\nname = "local-cpu:8"', "doesn't tell"),
        ("price_per_device_hour = '2'", "price_per_device_hour must be a number"),
    ],
)
def test_cluster_file_that_cannot_be(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    assert message in refused(capsys, *ASKED, "--cluster", str(path))


def test_cluster_file_says_the_price(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text('name = "a100:8"\nprice_per_device_hour = 3.0\nprice_source = "a list"\n')
    assert main([*ASKED, "--cluster", str(path), "--objective", "cost", "--top", "1", "--json"]) == 0
    (best,) = json.loads(capsys.readouterr().out)["plans"]
    assert best["cost"] == pytest.approx(3.0 * best["device_hours"])
    assert main([*ASKED, "--cluster", str(path), "--objective", "cost", "--top", "1"]) == 0
    assert "(3 per device and hour, a list)" in capsys.readouterr().out


def test_auto_is_filled_in_before_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    stub = ModuleType("stretto.trainer.launch")
    stub.__dict__["run_training"] = lambda run, run_file: seen.append(run) or 0
    monkeypatch.setitem(sys.modules, "stretto.trainer.launch", stub)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    path = tmp_path / "run.toml"
    path.write_text(AUTO)
    assert main(["train", str(path), "--set", "plan.pp=2"]) == 0
    assert seen[0].plan.pp == 2 and seen[0].plan.num_ranks == 4
    assert stretto.load_run(path, ["plan.pp=2"]).plan == seen[0].plan
    found = stretto.plan(path, pins={"pp": 2}, top=1)
    assert found.best.plan == seen[0].plan == found.run().plan
    assert found.run().cluster.peak_flops_bfloat16 == 0  # what was assumed isn't written down as known


def test_auto_without_a_planner() -> None:
    with pytest.raises(UnsupportedError, match="needs the planner"):
        resolve_text(AUTO)
    assert resolve_text(AUTO, planner=lambda run, pins: PlanSpec(pp=4, **pins), overrides=["plan.tp=2"]).plan == (
        PlanSpec(pp=4, tp=2)
    )


def test_pins_as_written() -> None:
    pins = read_pins(["pp=2,stages=[3,5]", "plan.tp=auto", "offload=true"])
    assert pins == {"pp": 2, "stages": (3, 5), "offload": True}
    with pytest.raises(ConfigError, match="pp is pinned twice"):
        read_pins(["pp=2", "pp=4"])


def test_placement_follows_the_ranks() -> None:
    plan = PlanSpec(tp=4, dp_shard=4, pp=2)
    assert placed(plan, cluster_preset("a100:32")) == {"tp": "node", "dp_shard": "network", "pp": "network"}


def test_critical_batch() -> None:
    assert "take a smaller global batch" in verdict(8_000_000, 4_000_000)
    assert own_stack(TrainingSpec(dtype="bfloat16")).optimizer_bytes == 12


def test_written_run_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "run.toml"
    main([*ASKED, "--out", str(out), "--top", "1"])
    assert set(tomllib.loads(out.read_text())) >= {"run", "model", "cluster", "plan", "training", "data"}
