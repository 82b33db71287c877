"""``stretto diagnose``: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import stretto
from schedule.recorded import write_run
from stretto.cli.main import main
from stretto.schedule.families import build
from stretto.schedule.passes.communication import lower


@pytest.fixture
def run(tmp_path: Path) -> Path:
    schedule = lower(build("1f1b", ranks=2, microbatches=4))
    return write_run(tmp_path / "run", schedule, times=[{1: 1.5}], more={"1RECV_F3": 0.02, "0B1": 0.03}, late_steps=[3])


def test_figures_ranks_and_sentences(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(run)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1f1b: 2 ranks, 2 stages, 4 micro-batches; step ") and "over 3 steps" in out
    assert "ratio 1.000" in out and "Stage 1 (rank 1) is slow" in out
    rows = [line.split() for line in out.splitlines() if line[:4].strip().isdigit()]
    assert [row[0] for row in rows] == ["0", "1"] and rows[0][1:5] == ["120", "ms", "120", "ms"]


def test_json_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(run), "--step", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 3 and found["ratio"] > 1.05
    parts = found["difference"]
    total = parts["operations"] + parts["messages"] + parts["gaps"] + parts["start"] - parts["slack"]
    assert total == pytest.approx(found["measured"] - found["simulated"], abs=1e-8)
    assert parts["operations"] == pytest.approx(0.03, abs=1e-6)
    for rank in range(2):
        spent = sum(found["measured_ranks"][part][rank] for part in ("busy", "communication", "bubble"))
        assert spent == pytest.approx(found["measured"], abs=1e-8)


def test_costs_feed_the_simulator(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs = tmp_path / "costs.json"
    assert main(["diagnose", str(run), "--json", "--costs-out", str(costs)]) == 0
    diagnosed = json.loads(capsys.readouterr().out)
    schedule = str(run / "trace" / "schedule.json")
    assert main(["simulate", "--schedule-file", schedule, "--costs", str(costs), "--json"]) == 0
    simulated = json.loads(capsys.readouterr().out)
    assert simulated["makespan"] == pytest.approx(diagnosed["simulated"] + max(diagnosed["optimizer"]))


def test_both_timelines_are_written(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, html = tmp_path / "trace.json", tmp_path / "page.html"
    assert main(["diagnose", str(run), "--step", "3", "--trace", str(trace), "--html", str(html)]) == 0
    events = json.loads(trace.read_text())["traceEvents"]
    named = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert named == {1: "1f1b, measured", 2: "1f1b, simulated"}
    received = next(event for event in events if event["name"] == "1RECV_F0")
    assert received["args"] == {"peer": 0, "bytes": 100} and received["dur"] == pytest.approx(11_000)
    slow = {event["pid"]: event["dur"] for event in events if event["name"] == "0B1" and event["ph"] == "X"}
    assert slow == {1: pytest.approx(50_000), 2: pytest.approx(20_000)}
    page = html.read_text()
    assert "1f1b, measured and 1f1b, simulated" in page


def test_what_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        ([str(tmp_path / "none")], "There is no run in"),
        ([str(run), "--step", "7"], "Step 7 of the run"),
        ([str(run), "--html", str(tmp_path)], "is a folder"),
        ([str(run), "--costs-out", str(tmp_path / "no" / "costs.json")], "there is no folder"),
        ([str(run), "--out", str(tmp_path / "out.toml")], "--out is for --calibrate or --refine"),
        ([str(run), "--refine", "c.toml", "--step", "3"], "--refine makes none"),
        ([str(run), "--calibrate"], "reads no run"),
        ([str(run), "--processes", "2"], "--processes is for --calibrate"),
        ([str(run), "--trace", str(tmp_path / "a"), "--html", str(tmp_path / "a")], "--trace writes that file already"),
    ):
        assert main(["diagnose", *arguments]) == 2
        assert said in capsys.readouterr().err


def test_as_a_function(run: Path) -> None:
    found = stretto.diagnose(run, step=3)
    assert found.played.step == 3 and found.ratio > 1
    with pytest.raises(stretto.ConfigError, match="There is no run"):
        stretto.diagnose(run / "deeper")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 0}, "rank-0 is no trace of a rank"),
        ({"world_size": "2"}, "rank-0 is no trace of a rank"),
        ({"world_size": 10**9}, "lacks rank 2 of 1000000000"),
        ({"epoch": None}, "rank-0 is no trace of a rank"),
        ({"pipeline": [0]}, "rank-0 is no trace of a rank"),
    ],
)
def test_a_first_line_that_cannot_be(
    run: Path, changes: dict[str, object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "trace" / "rank-0"
    line, _, rest = path.read_bytes().partition(b"\n")
    path.write_bytes(json.dumps(json.loads(line) | changes).encode() + b"\n" + rest)
    assert main(["diagnose", str(run)]) == 2
    assert message in capsys.readouterr().err


def test_operations_that_cannot_be(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "trace" / "rank-1"
    line, _, rest = path.read_bytes().partition(b"\n")
    path.write_bytes(line + b"\n" + rest[:32] + bytes([120]) + rest[33:])  # the kind of the first operation
    assert main(["diagnose", str(run)]) == 2
    assert "operation 0 is nothing that is known where 1f1b has 1RECV_F0" in capsys.readouterr().err


@pytest.mark.parametrize("line", ['{"seconds": "x", "ranks": [1], "sentence": "s"}', '{"seconds": 2.0}', "[]", '{"se'])
def test_stalls_half_written_are_passed_over(run: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "stalls.jsonl").write_text('{"seconds": 1.5, "ranks": [1], "sentence": "rank 0 waited"}\n' + line)
    assert main(["diagnose", str(run), "--json"]) == 0
    stalls = json.loads(capsys.readouterr().out)["stalls"]
    assert stalls == [{"seconds": 1.5, "ranks": [1], "sentence": "rank 0 waited"}]
