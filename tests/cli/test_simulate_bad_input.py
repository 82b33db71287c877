"""``stretto simulate`` with what can't be: one clear message, exit code 2, and no file written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stretto.cli.main import main
from stretto.schedule import Schedule
from stretto.schedule.document import save
from stretto.schedule.families import build

ONE = ("--schedule", "1f1b", "--pp", "4", "--microbatches", "8")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Run the verb, which must fail without writing; return what it says."""

    def run(*arguments: str) -> str:
        out = {name: tmp_path / f"out.{name}" for name in ("html", "svg", "trace", "export")}
        wanted = [part for name, path in out.items() for part in (f"--{name}", str(path))]
        assert main(["simulate", *arguments, *wanted]) == 2
        assert not any(path.exists() for path in out.values())
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith("stretto: error: ")
        return printed.err

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "1f2b", *ONE[2:]], "There is no schedule '1f2b'; did you mean '1f1b'? Known: gpipe, 1f1b"),
        (["--schedule", "1f1b", "--pp", "4"], "--schedule 1f1b also needs --microbatches."),
        (["--schedule", "1f1b", "--pp", "0", "--microbatches", "4"], "can't have 0 ranks"),
        (["--schedule", "1f1b", "--pp", "4", "--microbatches", "0"], "can't have 0 micro-batches"),
        (["--schedule", "dualpipe", "--pp", "3", "--microbatches", "4"], "3 ranks"),
        ([*ONE, "--chunks", "2"], "1f1b holds one stage per rank"),
        ([*ONE, "--option", "waves=2"], "no option 'waves'"),
        ([*ONE, "--option", "waves"], "write KEY=VALUE"),
        ([*ONE, "--cost", "F=0"], "Cost F is 0"),
        ([*ONE, "--cost", "I=-1"], "Cost I is -1"),
        ([*ONE, "--cost", "F=nan"], "Cost F is nan"),
        ([*ONE, "--cost", "W=1e308"], "Cost W is 1e+308; the most is 1e+100."),
        ([*ONE, "--cost", "G=1"], "There is no cost 'G'"),
        ([*ONE, "--memory-limit", "0"], "--memory-limit 0 leaves no room"),
        ([*ONE, "--memory-limit", "nan"], "--memory-limit nan leaves no room"),
        (
            [*ONE, "--memory-limit", "3.9999985"],
            "keeps 4 micro-batches of activations on rank 0, above the memory limit of 3.9999985",
        ),
        (
            [*ONE, "--pass", "split-backward", "--memory-limit", "3.9999985"],
            "above the memory limit of 3.9999985; allow 4",
        ),
        ([*ONE, "--memory-limit", "3"], "above the memory limit of 3"),
        ([*ONE, "--pass", "vocabular"], "There is no pass 'vocabular'; did you mean 'vocabulary'?"),
        ([*ONE, "--pass", "vocabulary:algo=1"], "Pass vocabulary has no option 'algo'"),
        ([*ONE, "--against", "1f2b"], "There is no schedule '1f2b'"),
        ([*ONE, "--against", "none.json"], "none.json can't be read"),
        (["--schedule", "auto", *ONE[2:], "--memory-limit", "0.1"], "the limit must be "),
        (["--schedule", "auto", *ONE[2:], "--option", "placement=loop"], "did you mean 'placements'?"),
        (["--schedule", "auto", *ONE[2:], "--option", "placements=spiral"], "There is no placement 'spiral'"),
        (["--schedule", "auto", *ONE[2:], "--option", "placements=[]"], "is []; write loop, zigzag or loop+zigzag"),
        (["--schedule", "auto", *ONE[2:], "--option", "placements=3"], "is 3; write loop, zigzag or loop+zigzag"),
        (["--schedule", "auto", *ONE[2:], "--time-budget", "-1"], "time_budget"),
        (["--schedule", "auto", *ONE[2:], "--time-budget", "nan"], "time_budget"),
        ([*ONE[:4], "--microbatches", "99999999"], "up to 10,000,000"),
        ([*ONE, "--seed", "1"], "no option 'seed'"),
        (["--schedule-file", "none.json"], "none.json can't be read"),
        ([*ONE, "--costs", "none.json"], "none.json can't be read"),
        (["--schedule", "interleaved", *ONE[2:], "--option", "chunks=x"], "can't have chunks=x; it is a whole number"),
        (["--schedule", "interleaved", *ONE[2:], "--option", "chunks=2.5"], "can't have chunks=2.5"),
        ([*ONE, "--against", "interleaved:chunks=[2]"], "can't have chunks=[2]"),
        (["--schedule", "hanayo", *ONE[2:], "--option", "waves=2", "waves=3"], "--option waves is given twice"),
        (["--schedule", "hanayo", *ONE[2:], "--option", "waves=99999999"], "up to 10,000,000"),
        ([*ONE, "--network", "in_flight=1,in_flight=2"], "in_flight of a network is given twice"),
        ([*ONE, "--pass", "offload:stages=1.5"], "stages=1.5 is no choice of stages"),
        ([*ONE, "--pass", "offload:stages=2-1"], "stages='2-1' is no choice of stages"),
        ([*ONE, "--pass", "offload:stages=0-99999999999999"], "There is no stage 4 to choose; stages are 0 to 3"),
        ([*ONE, "--pass", "2bp:limit=[1]"], "2bp can't keep a limit of [1]"),
        ([*ONE, "--pass", "2bp:behind=2"], "behind=2 says how late W comes where when=late"),
        ([*ONE, "--pass", "sharding:blocks=1.5"], "Sharding can't have blocks=1.5"),
        ([*ONE, "--pass", "sharding:blocks=999999999"], "(up to 4096)"),
        ([*ONE, "--pass", "sharding:optimizer=maybe"], "Sharding can't have optimizer='maybe'"),
        ([*ONE, "--pass", "fill-bubbles:units=999999999"], "give a number from 1 to 100000"),
    ],
)
def test_one_line(refused: Any, arguments: list[str], message: str) -> None:
    said = refused(*arguments)
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({"F": [1] * 4, "I": [1] * 3, "W": [1] * 4}, "has 4 entries, but I has 3"),
        ({"F": [1] * 3, "I": [1] * 3, "W": [1] * 3}, "Cost F has 3 entries, but the schedule has 4 stages"),
        ({"F": [1, 1, 0, 1], "I": [1] * 4, "W": [1] * 4}, "Cost F[2] is 0"),
        ({"F": [1] * 4, "I": [1] * 4}, "has no 'W'"),
        ({"F": [1] * 4, "I": [1] * 4, "W": [1] * 4, "comm": [0] * 4}, "comm has 4 entries, but 4 stages have 3"),
        ({"F": [1] * 4, "I": [1] * 4, "W": [1] * 4, "G": [1] * 4}, "unknown key 'G'"),
        ({"F": "1", "I": [1] * 4, "W": [1] * 4}, "it is a list of numbers"),
        ([], "holds no JSON object"),
    ],
)
def test_costs_files(refused: Any, tmp_path: Path, costs: object, message: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(costs))
    said = refused(*ONE, "--costs", str(path))
    assert message in said and said.count("\n") == 1


def test_a_costs_file_says_each_cost_once(refused: Any, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text('{"F": [1, 1, 1, 1], "I": [1, 1, 1, 1], "W": [1, 1, 1, 1], "F": [2, 2, 2, 2]}')
    assert "the key 'F' occurs twice" in refused(*ONE, "--costs", str(path))


def _file(path: Path, **changes: Any) -> Path:
    """A schedule file with some keys replaced."""
    save(build("1f1b", ranks=2, microbatches=2), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other/2"}, "has the format 'other/2'"),
        ({"ranks": 3}, "has ranks=3, but actions of 2 ranks"),
        ({"actions": [["0F0"], ["1X0"]]}, "unknown kind 'X'"),
        ({"stages": 3}, "places 2 stages, but there are 3"),
        ({"microbatches": 999_999_999}, "voice has 2 entries, but there are 999999999 micro-batches"),
        ({"actions": [["0F0", "0F1", "0B0", "0B1"], ["1F0", "1F1", "1B0"]]}, "stage 1, micro-batch 1"),
    ],
)
def test_schedule_files(refused: Any, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert message in refused("--schedule-file", str(_file(tmp_path / "s.json", **changes)))


def test_a_deadlock_shows_the_grid(refused: Any, tmp_path: Path) -> None:
    actions = [["0F0", "0B0", "0F1", "0B1"], ["1F1", "1B1", "1F0", "1B0"]]
    said = refused("--schedule-file", str(_file(tmp_path / "s.json", actions=actions)))
    assert "deadlock" in said and "│" in said and "^^^" in said


def test_a_file_of_another_shape_than_the_costs(refused: Any, tmp_path: Path) -> None:
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps({key: [1] * 4 for key in ("F", "I", "W")}))
    said = refused("--schedule-file", str(_file(tmp_path / "s.json")), "--costs", str(costs))
    assert "Cost F has 4 entries, but the schedule has 2 stages" in said


def test_a_schedule_file_has_its_own_shape(refused: Any, tmp_path: Path) -> None:
    path = str(_file(tmp_path / "s.json"))
    said = refused("--schedule-file", path, "--pp", "2", "--chunks", "1", "--option", "a=1", "--seed", "1")
    assert "leave out --pp, --chunks, --option, --seed." in said
    assert "--against zb-h1 takes its shape from --schedule" in refused("--schedule-file", path, "--against", "zb-h1")


def test_files_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["simulate", *ONE, "--svg", str(tmp_path / "none" / "a.svg")]) == 2
    assert "name a file in a folder that exists" in capsys.readouterr().err
    both = str(tmp_path / "a")
    assert main(["simulate", *ONE, "--svg", both, "--html", both]) == 2
    assert "--html writes that file already" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["--schedule", "1f1b", "--list"], [*ONE, "--cost", "F=1", "--costs", "c"]])
def test_arguments_that_exclude_each_other(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["simulate", *arguments])
    assert ended.value.code == 2


def test_an_empty_rank_is_no_reason_to_fail(tmp_path: Path) -> None:
    """Two ranks of which one holds nothing: drawn, timed and traced all the same."""
    orders = [build("1f1b", ranks=1, microbatches=2).ops(0), []]
    lone = Schedule.from_orders(orders, name="lone", num_stages=1, num_microbatches=2, placement=[[0]])
    save(lone, tmp_path / "s.json")
    names = [part for name in ("html", "svg", "trace") for part in (f"--{name}", str(tmp_path / name))]
    assert main(["simulate", "--schedule-file", str(tmp_path / "s.json"), *names]) == 0
