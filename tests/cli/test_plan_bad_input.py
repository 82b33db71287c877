"""What ``stretto plan`` says to input that can't be, and that nothing which is asked for is passed over in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import stretto
from stretto.cli.main import main
from stretto.spec.check import check
from stretto.spec.resolve import load_run
from stretto.trainer.planned import planned

ASKED = ["plan", "--model", "gpt2", "--cluster", "a100:2", "--seq-len", "128", "--global-batch", "4", "--top", "1"]
ASKED += ["--pin", "pp=1", "tp=1", "cp=1"]
DEMO = str(Path(__file__).parents[2] / "examples" / "demo.toml")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--why-not", ""], "--why-not names no value; write KEY=VALUE"),
        (["--why-not", "pp=auto"], "--why-not names no value"),
        (["--why-not", "foo=1"], "--why-not: unknown key plan.foo; keys: pp, tp"),
        (["--lengths", "no.txt"], "--lengths no.txt can't be read (No such file or directory)"),
        (["--why-not", "pp=2", "--lengths", "lognormal:"], "leave out --lengths"),
        (["--cluster", "no.toml"], "The cluster file no.toml doesn't exist"),
        (["--cluster", "a100:0"], "must end in a number of devices, at least 1"),
        (["--cluster", "rtx4090:4"], "did you mean 'rtx-4090'?"),
        (["--model", "./nowhere"], "The model directory nowhere doesn't exist"),
        (["--critical-batch", "0"], "--critical-batch 0 must be at least 1 token"),
        (["--dtype", "float16"], "did you mean 'bfloat16'?"),
        (["--seq-len", "0"], "training.sequence_length = 0 must be above 0"),
        (["--seq-len", "5000"], "longer than the model's 1024 positions"),
        (["--pin", "dp_shard=4"], "plan.dp_shard = 4 can't divide 2 devices"),
        (["--set", "cluster.memry=1"], "unknown key cluster.memry; did you mean 'cluster.memory_bytes'?"),
    ],
)
def test_refused_in_one_line(more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, *more]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_set_writes_over_presets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = ["--seq-len", "2048", "--set", "model.max_positions=4096", "cluster.memory_bytes=6e9"]
    assert main([*ASKED, *wide]) == 0
    assert "of 6.00 GB: " in capsys.readouterr().out
    path = tmp_path / "machines.toml"
    path.write_text('name = "a100:2"\n')
    assert main([*ASKED, "--cluster", str(path), "--set", "cluster.memory_bytes=3e9"]) == 2
    assert f"says what the cluster file {path} should" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; write at least name"),
        ('name = "a100:8"\nmemory_bytes = -5', "cluster.memory_bytes = -5 must be positive: there is no memory"),
        ('name = "a100:8', "is not valid TOML"),
        ("groups = []", "groups is empty; write [[groups]]"),
        ('[[groups]]\nname = "a100:2"\n[[groups]]\nname = "h100:2"', "on two groups of 'mixed'"),
        ('name = "a100:8"\nnum_nodes = "two"', "cluster.num_nodes must be a whole number, not 'two'"),
        ('cluster = "a100:8"', "cluster must be a section; write [cluster]"),
        ('name = "a100:8"\n[cluster]\nname = "h100:8"', "name beside [cluster] would not be read"),
        ('name = "a100:8"\nlink_bytes_per_second = -5', "cluster.link_bytes_per_second = -5.0 must not be negative"),
        (
            'name = "a100:8"\nprice_per_device_hour = inf',
            "A price of inf for a device and hour must be a finite number",
        ),
    ],
)
def test_cluster_files_that_say_nothing(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "machines.toml"
    path.write_text(text)
    assert main([*ASKED, "--cluster", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_dtype_of_a_run_file_is_written_over(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for dtype in ("float32", "float64"):
        assert main(["plan", DEMO, "--dtype", dtype, "--json", "--top", "1"]) == 0
        found.append(json.loads(capsys.readouterr().out)["plans"][0]["memory"][0])
    assert found[1]["parameters"] == 2 * found[0]["parameters"]


def test_critical_batch_is_in_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, "--critical-batch", "1024", "--json"]) == 0
    assert "0.50 of the critical 1,024" in json.loads(capsys.readouterr().out)["critical_batch"]


def test_a_file_that_was_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.toml"
    assert main([*ASKED, "--out", str(out)]) == 0
    assert "older" not in capsys.readouterr().out
    assert main([*ASKED, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert f"wrote {out} (instead of an older file)" in text and "(2 devices)" in text


@pytest.mark.parametrize(
    "pins", [["context_groups=dynamic"], ["context_groups=dynamic", "pp=2"], ["asynchronous=plain"]]
)
def test_what_goes_with_few_schedules_is_planned_with_those(
    pins: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["plan", "--model", "gpt2", "--cluster", "a100:2", "--seq-len", "128", "--global-batch", "4", "--top", "1"]
    plain = [
        "--set",
        "model.dropout=0",
        "training.optimizer=sgd",
        "training.clip_norm=0",
        "model.tied_embeddings=false",
    ]
    assert main([*asked, "--dtype", "float32", *plain, "--pin", *pins, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"][0]["plan"]["schedule"] in ("1f1b", "gpipe")


def test_a_pinned_cp_may_cut_rows_unevenly(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "--model", "gpt2", "--cluster", "a100:2", "--seq-len", "129", "--global-batch", "4", "--top", "1"]
    assert main([*asked, "--pin", "cp=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"][0]["plan"]["cp"] == 2


TINY = ["plan", "--model", "tiny", "--cluster", "a100:8", "--seq-len", "64", "--global-batch", "8", "--top", "1"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pin", "pp=0"], "plan.pp = 0 must be at least 1"),
        (["--pin", "tp=0"], "plan.tp = 0 must be at least 1"),
        (["--why-not", "pp=2", "--objective", "nope"], "--objective = 'nope' is none of 'time', 'cost', 'memory'"),
        (["--why-not", "pp=2", "--thorough"], "leave out --thorough"),
        (["--why-not", "pp=2", "--critical-batch", "9"], "leave out --critical-batch"),
        (["--objective", "cost", "--price", "inf"], "A price of inf for a device and hour must be a finite number"),
        (["--dtype", ""], "training.dtype = '' is none of"),
        (["--model", ""], "There is no model preset ''"),
        (["--cluster", "machines/a.json"], "a cluster file ends in .toml"),
        (["--pin", "context=mesh", "ulysses=3", "cp=8"], "plan.ulysses = 3 can't divide plan.cp = 8 ranks evenly"),
        (
            ["--pin", "inner_ring=3"],
            "cp must be a multiple of 3, which can't divide 8 devices",
        ),
        (["--pin", "options={waves=2}"], "say which by plan.schedule"),
        (["--pin", "schedule=1f1b", "options={waves=2}"], "Schedule 1f1b has no option 'waves'"),
        (
            ["--pin", "schedule=hanayo", "options={waves=3}"],
            "plan.chunks=6 makes 6 pipeline stages",
        ),
        (["--pin", "stages=[1,1,2]", "pp=2"], "names 3 stages, but plan.pp=2 has 2"),
        (
            ["--pin", "stages=[1,1,2]", "schedule=1f1b"],
            "can have stages=[1, 1, 2], schedule=1f1b; leave one of them out",
        ),
        (["--pin", "memory_limit=0.01"], "above the memory limit of 0.01"),
        (["--pin", 'passes=["nope"]'], "There is no pass 'nope'"),
        (["--pin", "pp=2", "schedule_file=no.json"], "The schedule file 'no.json' doesn't exist"),
        (["--pin", "pp=2", "--set", "plan.pp=4"], "--pin pp and --set plan.pp say the same thing"),
        (["--set", "training.global_batch_size=4"], "--global-batch and --set training.global_batch_size say the same"),
        (["--set", "cluster.name=h100:8"], "--cluster and --set cluster.name say the same"),
        (
            ["--pin", "pp=2", "tp=1", "cp=1", "dp_replicate=1", "dp_shard=2"],
            "pp 2 x dp_shard 2 = 4 ranks leave 4 of 8 devices without work",
        ),
    ],
)
def test_pins_that_cannot_be(more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, *more]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


@pytest.mark.parametrize(
    ("pins", "told"),
    [
        (["cp=8", "context=mesh", "ulysses=4"], {"cp": 8, "context": "mesh", "ulysses": 4}),
        (["context=mesh", "ulysses=4"], {"context": "mesh", "ulysses": 4}),
        (["cp=8", "inner_ring=4"], {"cp": 8, "inner_ring": 4}),
        (["inner_ring=2"], {"inner_ring": 2}),
        (["cp=8", "context=mesh", "ulysses=2", "inner_ring=2", "context_inner=ring"], {"context_inner": "ring"}),
        (["schedule=hanayo", "options={waves=2}"], {"schedule": "hanayo", "chunks": 4}),
        (["chunks=3"], {"chunks": 3}),
        (["stages=[1,3]"], {"stages": (1, 3)}),
        (["stages=[3,1]", "pp=2"], {"stages": (3, 1), "pp": 2}),
        (["stages=[1,1,2]"], {"stages": (1, 1, 2), "pp": 1, "chunks": 3}),
        (["stages=[3,1]", "schedule=v-half"], {"stages": (3, 1), "chunks": 2}),
        (["stages=[1,3]", "context_groups=dynamic"], {"stages": (1, 3), "pp": 2}),
        (["pp=4", "memory_limit=2", "dp_shard=1", "tp=2", "micro_batch_size=1"], {"memory_limit": 2.0}),
    ],
)
def test_pins_are_kept_in_plans_that_run(pins: list[str], told: dict[str, object], tmp_path: Path) -> None:
    out = tmp_path / "run.toml"
    assert main([*TINY, "--pin", *pins, "--out", str(out)]) == 0
    run = load_run(out)
    check(run)
    assert {key: getattr(run.plan, key) for key in told} == told
    planned(run)  # the schedule, with its options and within its memory limit


def test_a_schedule_file_is_for_its_own_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "schedule.json"
    assert main(["simulate", "--schedule", "1f1b", "--pp", "2", "--microbatches", "2", "--export", str(path)]) == 0
    capsys.readouterr()
    for pins, devices, batch, message in (
        (["pp=4"], "8", "8", "is for 2 ranks, but plan.pp = 4; take pp = 2"),
        ([], "7", "8", "is for 2 ranks, which can't divide 7 devices"),
        (["stages=[1,1,2]"], "8", "8", "is for 2 stages, but the plan has 3"),
        ([], "8", "9", "is for 2 micro-batches, which can't divide training.global_batch_size = 9"),
    ):
        shape = ["--cluster", f"a100:{devices}", "--global-batch", batch]
        assert main([*TINY, *shape, "--pin", f"schedule_file={path}", *pins]) == 2
        assert message in capsys.readouterr().err
    assert main([*TINY, "--pin", f"schedule_file={path}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"][0]["plan"]["pp"] == 2


def test_a_price_beside_the_section_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "machines.toml"
    path.write_text('price_per_device_hour = 2\n[cluster]\nname = "a100:2"\n')
    assert main([*ASKED, "--cluster", str(path), "--objective", "cost", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["plans"][0]
    assert best["cost"] == pytest.approx(2 * best["device_hours"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[shares]\nmatmul = nan", "shares.matmul must be a finite number above 0, not nan"),
        ("[shares]\nmatmul = inf", "shares.matmul must be a finite number above 0, not inf"),
        ("[shares]\nflow_splits = 2.5", "shares.flow_splits must be a whole number above 0, not 2.5"),
        ("share = 3", "unknown key share; did you mean 'shares'?"),
    ],
)
def test_calibration_files_that_cannot_be(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "calibration.toml"
    path.write_text(f'format = "stretto.calibration/1"\n{text}\n')
    assert main([*ASKED, "--calibration", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_a_large_batch_is_planned_in_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a batch with many divisors only sizes of micro-batches that some device could hold are tried."""
    assert main([*TINY, "--global-batch", str(2**40), "--pin", "pp=1", "tp=1", "cp=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"][0]["plan"]["micro_batch_size"] <= 4096


def test_set_says_the_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--set", "training.dtype=float32"]) == 0
    assert "sequences a step, float32, on a100:8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"pins": {"pp": "2"}}, "plan.pp must be a whole number, not '2'"),
        ({"pins": {"pq": 2}}, "unknown key plan.pq"),
        ({"pins": {"stages": 2}}, "plan.stages must be a list of whole numbers"),
        ({"objective": "cost", "price": -3.0}, "A price of -3 for a device and hour"),
    ],
)
def test_the_function_checks_what_it_is_given(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(stretto.ConfigError, match=message):
        stretto.plan(DEMO, **asked)
