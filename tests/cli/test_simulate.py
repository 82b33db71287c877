"""``stretto simulate``: what it builds, prints and writes."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import stretto
from stretto.cli.main import main
from stretto.schedule.document import load
from stretto.schedule.families import FAMILIES, build
from stretto.schedule.passes import PASSES

KEYS = [
    "name", "ranks", "stages", "microbatches", "makespan", "span", "lower_bound", "bubble_rate", "bubble_rate_span",
    "busy", "peak_activation",
]  # fmt: skip
SHAPE = ("--pp", "4", "--microbatches", "8")


@pytest.fixture
def simulate(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the verb in this process and return what it printed."""

    def run(*arguments: str) -> str:
        assert main(["simulate", *arguments]) == 0
        return capsys.readouterr().out

    return run


def test_figures_are_those_of_the_contract(simulate: Any) -> None:
    """1F1B with F = 1, B = 2: (M + R - 1) x 3, of which a rank works 3 M."""
    figures = json.loads(simulate("--schedule", "1f1b", *SHAPE, "--json"))
    assert list(figures) == KEYS
    assert figures["makespan"] == 33 and figures["busy"] == [24] * 4
    assert figures["peak_activation"] == [4, 3, 2, 1]


def test_costs_come_from_the_line_or_from_a_file(simulate: Any, tmp_path: Path) -> None:
    """A file is absolute per stage: with every stage at F=1, I=1, W=1 it says what the default does."""
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"F": [1] * 4, "I": [1] * 4, "W": [1] * 4, "comm": [0] * 3, "OPT": [0] * 4}))
    line = simulate("--schedule", "zb-h1", *SHAPE, "--cost", "F=1,I=1,W=1", "--json")
    assert simulate("--schedule", "zb-h1", *SHAPE, "--costs", str(path), "--json") == line
    slower = simulate("--schedule", "zb-h1", *SHAPE, "--cost", "comm=0.5", "--json")
    assert json.loads(slower)["makespan"] > json.loads(line)["makespan"]


def test_options_may_be_given_together_or_one_by_one(simulate: Any) -> None:
    told = simulate("--schedule", "hanayo", *SHAPE, "--option", "waves=2", "--json")
    assert json.loads(told)["stages"] == 16
    assert simulate("--schedule", "hanayo", *SHAPE, "--json", "--option", "waves=2") == told


def test_list_names_every_family_and_pass_in_a_line(simulate: Any) -> None:
    lines = simulate("--list").splitlines()
    assert max(map(len, lines)) <= 140
    for name, entry in (*FAMILIES.items(), *PASSES.items()):
        line = next(line for line in lines if line.split()[:1] == [name])
        assert entry.summary in line
    document = json.loads(simulate("--list", "--json"))
    assert [family["name"] for family in document["families"]] == list(FAMILIES)
    assert {"name", "summary", "chunks", "options"} == set(document["families"][0])


def test_passes_apply_in_their_order(simulate: Any, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    passes = ("--pass", "split-backward", "--pass", "vocabulary:algorithm=2")
    simulate("--schedule", "1f1b", *SHAPE, *passes, "--json", "--export", str(path))
    kinds = {op.kind.name for op in load(path).ops(0)}
    assert kinds == {"F", "I", "W", "S", "T"}


def test_export_has_messages_only_where_asked(simulate: Any, tmp_path: Path) -> None:
    flat, lowered = tmp_path / "flat.json", tmp_path / "lowered.json"
    simulate("--schedule", "1f1b", *SHAPE, "--json", "--export", str(flat))
    simulate("--schedule", "1f1b", *SHAPE, "--json", "--export", str(lowered), "--lowered")
    assert load(flat) == build("1f1b", ranks=4, microbatches=8)
    assert load(lowered).lowered
    again = simulate("--schedule-file", str(lowered), "--json", "--export", str(flat))
    assert json.loads(again)["makespan"] == 33 and not load(flat).lowered


def test_export_without_messages_has_compute_operations_only(simulate: Any, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    simulate("--schedule", "breadth-first", *SHAPE, "--chunks", "2", "--option", "sharded=true", "--json",
             "--export", str(path))  # fmt: skip
    tokens = {token for order in json.loads(path.read_text())["actions"] for token in order}
    assert not any(kind in token for token in tokens for kind in ("SHARD", "REDUCE", "OPT"))


def test_lowered_prints_the_messages(simulate: Any) -> None:
    printed = simulate("--schedule", "dualpipe", *SHAPE, "--lowered")
    assert "0SEND_F0" in printed and "3F2+0B4" in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_comparison(simulate: Any, tmp_path: Path) -> None:
    """The same shape; --chunks only where the family takes it; a file by its name."""
    path = tmp_path / "s.json"
    simulate("--schedule", "gpipe", *SHAPE, "--json", "--export", str(path))
    arguments = ("--schedule", "interleaved", *SHAPE, "--chunks", "2", "--against", "zb-h1", "--against", str(path))
    document = json.loads(simulate(*arguments, "--json"))
    assert [other["name"] for other in document["against"]] == ["zb-h1", "gpipe"]
    assert document["against"][0]["stages"] == 4
    table = simulate(*arguments).splitlines()
    assert next(line for line in table if line.startswith("makespan")).split() == ["makespan", "28.5", "27", "33"]
    three = simulate("--schedule", "1f1b", *SHAPE, "--against", "interleaved:chunks=3", "--json")
    assert json.loads(three)["against"][0]["stages"] == 12


def test_what_is_compared_with_stays_as_it_is(simulate: Any) -> None:
    """Neither passes nor the limit touch it: it shows what they change."""
    arguments = ("--schedule", "1f1b", *SHAPE, "--pass", "recompute", "--memory-limit", "2", "--against", "1f1b")
    document = json.loads(simulate(*arguments, "--json"))
    assert max(document["peak_activation"]) <= 2 < max(document["against"][0]["peak_activation"])
    assert document["makespan"] > document["against"][0]["makespan"]


def test_pictures_are_written_together(simulate: Any, tmp_path: Path) -> None:
    names = ("html", "svg", "trace", "export")
    paths = {name: tmp_path / f"out.{name}" for name in names}
    arguments = [part for name in names for part in (f"--{name}", str(paths[name]))]
    simulate("--schedule", "1f1b", *SHAPE, "--against", "gpipe", "--json", *arguments)
    assert paths["html"].read_text().startswith("<!doctype html>")
    assert paths["svg"].read_text().startswith("<svg")
    trace = json.loads(paths["trace"].read_text())
    assert {event["pid"] for event in trace["traceEvents"]} == {1, 2}


def test_memory_limit_holds_after_the_passes(simulate: Any, capsys: pytest.CaptureFixture[str]) -> None:
    simulate("--schedule", "1f1b", *SHAPE, "--memory-limit", "4")
    assert main(["simulate", "--schedule", "1f1b", *SHAPE, "--memory-limit", "3.9"]) == 2
    assert "keeps 4 micro-batches" in capsys.readouterr().err
    arguments = ("--schedule", "1f1b", *SHAPE, "--memory-limit", "4", "--pass", "vocabulary:algorithm=2")
    assert main(["simulate", *arguments]) == 2
    assert "keeps 5 micro-batches on rank 0, above the memory limit of 4; allow 5" in capsys.readouterr().err


def test_a_long_row_of_peaks_is_shortened(simulate: Any) -> None:
    wide = simulate("--schedule", "1f1b", "--pp", "80", "--microbatches", "90")
    assert max(map(len, wide.splitlines())) <= 120
    assert "peak activation  80 on rank 0 to 1 on rank 79" in wide
    even = simulate("--schedule", "gpipe", "--pp", "64", "--microbatches", "90")
    assert "peak activation  64 ranks 90" in even


def test_small_shapes_are_quick_and_load_neither_torch_nor_numba() -> None:
    script = (
        "import sys; from stretto.cli.main import main;"
        "main(['simulate', '--schedule', 'zb-h1', '--pp', '4', '--microbatches', '8', '--json']);"
        "print([m for m in ('torch', 'numba', 'ortools', 'transformers') if m in sys.modules])"
    )
    took = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert result.stdout.splitlines()[-1] == "[]"
    assert min(took) < 0.5  # of one core, whatever else the machine does; 0.25 s where this was written


def test_the_function_says_what_the_command_line_does(tmp_path: Path, simulate: Any) -> None:
    path = tmp_path / "s.json"
    printed = simulate("--schedule", "hanayo", *SHAPE, "--option", "waves=2", "--json", "--export", str(path))
    figures = stretto.simulate("hanayo", pp=4, microbatches=8, waves=2, costs="F=1,comm=0")
    assert figures.makespan == json.loads(printed)["makespan"]
    assert stretto.simulate(path).makespan == stretto.simulate(str(path)).makespan == figures.makespan
    assert stretto.simulate(build("1f1b", ranks=2, microbatches=2)).makespan == 9
    with pytest.raises(stretto.ScheduleError, match="memory limit of 2"):
        stretto.simulate("1f1b", pp=4, microbatches=8, memory_limit=2)
    with pytest.raises(stretto.ConfigError, match="also needs pp and microbatches"):
        stretto.simulate("1f1b", pp=4)
    with pytest.raises(stretto.ConfigError, match="has its own shape"):
        stretto.simulate(path, pp=4)


def test_the_search_says_how_good_it_can_be(simulate: Any) -> None:
    """Two ranks and two micro-batches: proven at once; equal seeds, equal schedules."""
    arguments = ("--schedule", "auto", "--pp", "2", "--microbatches", "2", "--chunks", "1", "--seed", "3")
    printed = simulate(*arguments, "--json")
    found = json.loads(printed)
    assert list(found)[: len(KEYS)] == KEYS
    assert found["gap"] == 0 and found["proven"] is True and found["lower_bound"] == found["makespan"]
    assert simulate(*arguments, "--json") == printed
    table = simulate(*arguments, "--memory-limit", "1", "--time-budget", "1")
    assert "gap " in table and "placement " in table and "for all placements" in table
    passed = json.loads(simulate(*arguments, "--json", "--pass", "recompute"))
    assert "gap" not in passed  # the bound is for what was searched, not for what a pass makes of it


def test_explain(simulate: Any) -> None:
    arguments = ("--schedule", "1f1b", *SHAPE, "--cost", "comm=0.2", "--explain")
    document = json.loads(simulate(*arguments, "--json"))
    assert list(document) == [*KEYS, "communication", "bubble", "critical_path", "memory_curve"]
    printed = simulate(*arguments)
    assert f"critical path: {len(document['critical_path'])} operations" in printed
    assert " ".join(document["critical_path"][:10]) in printed


def test_network(simulate: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Messages that occupy ranks take time from them."""
    arguments = ("--schedule", "1f1b", *SHAPE, "--cost", "comm=0.2", "--json")
    free = json.loads(simulate(*arguments))["makespan"]
    assert json.loads(simulate(*arguments, "--network", "manner=overlapped"))["makespan"] == free
    slow = json.loads(simulate(*arguments, "--network", "manner=rendezvous,bandwidth=2,message_bytes=1"))
    assert slow["makespan"] > free
    assert main(["simulate", *arguments, "--network", "manner=slow"]) == 2
    assert "they are overlapped, blocking, rendezvous" in capsys.readouterr().err
